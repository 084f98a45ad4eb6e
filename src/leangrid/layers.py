"""Linear layers that keep their weight packed: the torch path, a tile of rows at a time, nothing cached between calls.

Buffers are named as the containers name their tensors, so a stored layer is the module's state dict.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from leangrid.errors import ShapeError
from leangrid.packing import packed_width, unpack

# Weights dequantized at once: 2^24 (64 MB in float32). Smaller layers are one tile, and then the product is the dense layer's, bit for bit.
TILE = 1 << 24


class PackedLinear(nn.Module):
    """y = x W^T + bias, W [out_features, in_features] kept as ``bits``-bit codes.

    Args:
        in_features: columns of W.
        out_features: rows of W.
        bits: 1..8.
        bias: whether there is a bias [out_features].
        dtype: of the grid's parameters and the bias, and of the dequantized weight.
        device: where the (uninitialised) buffers are made; "meta" makes none.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, bits: int, bias: bool, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8 or in_features < 1 or out_features < 1:
            raise ShapeError(f"no packed layer of {out_features} x {in_features} at {bits} bits", None, "Give 1..8 bits and positive sizes")
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        value = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        self.register_parameter("bias", value)

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        """Rows ``start`` to ``stop`` of W, dequantized."""
        raise NotImplementedError

    @property
    def weight_hat(self) -> Float[Tensor, "rows cols"]:
        """W, dequantized: [out_features, in_features]."""
        return self.rows(0, self.out_features)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """x [..., in_features] -> [..., out_features]."""
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"the input has {x.shape[-1]} features, the layer {self.in_features}")
        tile = max(1, TILE // self.in_features)
        if tile >= self.out_features:
            return functional.linear(x, self.weight_hat, self.bias)
        out = x.new_empty(*x.shape[:-1], self.out_features)
        for start in range(0, self.out_features, tile):
            stop = min(start + tile, self.out_features)
            bias = None if self.bias is None else self.bias[start:stop]
            out[..., start:stop] = functional.linear(x, self.rows(start, stop), bias)
        return out

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, bias={self.bias is not None}"


class LutLinear(PackedLinear):
    """W[i, j] = lut[i, code[i, j]]. Buffers: ``weight`` int32 [rows, words] (the codes), ``lut`` [rows, 2^bits]."""

    weight: Tensor
    lut: Tensor

    def __init__(
        self, in_features: int, out_features: int, bits: int, bias: bool, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> None:
        super().__init__(in_features, out_features, bits, bias, dtype, device)
        self.register_buffer("weight", torch.empty(out_features, packed_width(in_features, bits), dtype=torch.int32, device=device))
        self.register_buffer("lut", torch.empty(out_features, 2**bits, dtype=dtype, device=device))

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        codes = unpack(self.weight[start:stop], self.bits, self.in_features)
        return self.lut[start:stop].gather(1, codes.long())


class AffineLinear(PackedLinear):
    """W[i, j] = S[i, g] (code[i, j] - Z[i, g]), g = j // group_size; buffers as compressed-tensors names them.

    ``group_size`` None: one (S, Z) a row. ``symmetric``: Z = 2^(bits-1) everywhere and not stored. ``stored_dtype``: the dtype
    of S in the file. W is rounded to it, as every dequantizing reader of the file does, whatever dtype it is computed in.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None

    def __init__(self, in_features: int, out_features: int, bits: int, bias: bool, dtype: torch.dtype, device: str | torch.device = "cpu",
                 group_size: int | None = None, symmetric: bool = False, stored_dtype: torch.dtype | None = None) -> None:  # fmt: skip
        super().__init__(in_features, out_features, bits, bias, dtype, device)
        self.stored_dtype = stored_dtype or dtype
        self.group_size, self.symmetric = group_size or in_features, symmetric
        if in_features % self.group_size:
            raise ShapeError(f"groups of {self.group_size} do not divide {in_features} columns")
        groups = in_features // self.group_size
        self.register_buffer("weight_packed", torch.empty(out_features, packed_width(in_features, bits), dtype=torch.int32, device=device))
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device=device))
        packed = None if symmetric else torch.empty(packed_width(out_features, bits), groups, dtype=torch.int32, device=device)
        self.register_buffer("weight_zero_point", packed)

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        scale = self.weight_scale[start:stop, :, None]
        codes = unpack(self.weight_packed[start:stop], self.bits, self.in_features)
        steps = codes.to(scale.dtype).view(stop - start, -1, self.group_size)  # integers up to 255 are exact in every float dtype used
        if self.weight_zero_point is None:
            zero_point: Tensor | float = float(2 ** (self.bits - 1))
        else:
            packed = unpack(self.weight_zero_point.T.contiguous(), self.bits, self.out_features)
            zero_point = packed[:, start:stop].T.to(scale.dtype)[:, :, None]
        weight = ((steps - zero_point) * scale).view(stop - start, self.in_features)
        return weight if weight.dtype == self.stored_dtype else weight.to(self.stored_dtype).to(weight.dtype)
