"""Linear layers whose weight stays packed; the products are those of kernels/packed.py.

Buffers are named as the containers name their tensors, so a stored layer is the module's state dict. On a CPU with
native kernels ``prepare`` replaces the stored codes by the same codes in the kernels' layout (tiles), so that nothing
is held twice; the state dict is still in the stored layout."""

from abc import ABC, abstractmethod
from typing import Any

import torch
from jaxtyping import Float, Int32, UInt8, UInt32
from torch import Tensor, nn
from torch.nn import functional

from leangrid.errors import ShapeError
from leangrid.formats.bit_stream import packed_width, unpack
from leangrid.kernels import packed


class PackedLinear(nn.Module, ABC):
    """y = x W^T + bias, with W [out_features, in_features] held as ``bits``-bit codes.

    Args:
        in_features: the number of columns of W.
        out_features: the number of rows of W.
        bits: 1..8.
        bias: whether there is a bias [out_features].
        dtype: of the grid's parameters, the bias, the input and the dequantized weight.
        device: where the (uninitialised) buffers are made; "meta" allocates nothing.
    """

    bias: nn.Parameter | None
    tiles: Tensor  # uint8, the codes after ``prepare``
    CODES: str  # name of the buffer that holds the stored codes

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__()
        if not 1 <= bits <= 8 or in_features < 1 or out_features < 1:
            raise ShapeError(
                f"no packed layer of {out_features} x {in_features} at {bits} bits",
                None,
                "Give 1..8 bits and positive sizes",
            )
        self.in_features, self.out_features, self.bits = in_features, out_features, bits
        value = (
            nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False) if bias else None
        )
        self.register_parameter("bias", value)

    def __getattr__(self, name: str) -> Any:
        # Code of a model may ask a linear for its weight's dtype or shape: it is told them. There is no such tensor, so
        # what would multiply by it fails. (While it is loaded, the codes of some containers have this name.)
        if name == "weight" and (self.__dict__.get("_is_loaded") or self.CODES != "weight"):
            return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        return super().__getattr__(name)

    def prepare(self) -> None:
        """Bring the codes into the layout that this device's kernels read. Loading does it; a layer that was filled by
        hand works without."""
        codes, self._is_loaded = self._buffers.get(self.CODES), True
        if codes is not None and packed.can_tile(codes):
            self.register_buffer("tiles", packed.tile(codes, self.bits, self.in_features), persistent=False)
            del self._buffers[self.CODES]

    def restore(self) -> None:
        """Bring the codes back into the stored layout."""
        self._is_loaded = False
        if "tiles" in self._buffers:
            self.register_buffer(self.CODES, self.words)
            del self._buffers["tiles"]

    @property
    def words(self) -> Int32[Tensor, "rows words"] | UInt32[Tensor, "rows words"]:
        """The codes in the stored layout."""
        codes = self.codes
        return (
            packed.untile(codes, self.bits, self.out_features, self.in_features) if "tiles" in self._buffers else codes
        )

    @property
    def codes(self) -> Tensor:
        """The codes in the layout that they are in now."""
        return self._buffers["tiles" if "tiles" in self._buffers else self.CODES]  # pyright: ignore[reportReturnType]

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # Kernels of another device read another layout, so the stored one is what moves.
        self.restore()
        super()._apply(fn, recurse)
        self.prepare()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self.CODES] = self.words

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.restore()
        super()._load_from_state_dict(*args, **kwargs)
        self.prepare()

    @abstractmethod
    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        """Rows ``start`` to ``stop`` (exclusive) of W, dequantized."""

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """x W^T + bias, computed by the kernels."""

    def matrix(self) -> Any:
        """The C++ extension's view of W and the bias; only for a layer with tiles."""
        raise ShapeError(f"{type(self).__name__} has no tiles")

    @property
    def weight_hat(self) -> Float[Tensor, "rows cols"]:
        """W, dequantized, [out_features, in_features]."""
        return self.rows(0, self.out_features)

    def forward(self, x: Float[Tensor, "*batch cols"]) -> Float[Tensor, "*batch rows"]:
        """y [..., out_features] of x [..., in_features].

        Raises:
            ShapeError: the input's features, dtype or device are not the layer's.
        """
        if x.shape[-1] != self.in_features:
            raise ShapeError(f"the input has {x.shape[-1]} features, the layer {self.in_features}")
        if x.dtype != self.dtype and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        if torch.is_grad_enabled() and x.requires_grad:  # the kernels have no derivative
            return functional.linear(x, self.weight_hat, self.bias)
        return self.product(x)

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the grid, the input and the output."""

    def extra_repr(self) -> str:
        sizes = f"in_features={self.in_features}, out_features={self.out_features}"
        return f"{sizes}, bits={self.bits}, bias={self.bias is not None}"


class LutLinear(PackedLinear):
    """W[i, j] = lut[i, code[i, j]].

    Its buffers are named as format lut names them: ``weight`` int32 [rows, words] (the codes), ``lut`` [rows, 2^bits].
    """

    lut: Tensor
    CODES = "weight"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(in_features, out_features, bits, bias, dtype, device)
        self.register_buffer(
            "weight", torch.empty(out_features, packed_width(in_features, bits), dtype=torch.int32, device=device)
        )
        self.register_buffer("lut", torch.empty(out_features, 2**bits, dtype=dtype, device=device))

    @property
    def dtype(self) -> torch.dtype:
        return self.lut.dtype

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        return packed.lut_rows(self.codes, self.lut, self.bits, self.in_features)(start, stop)

    def product(self, x: Tensor) -> Tensor:
        return packed.lut_linear(x, self.codes, self.lut, self.bias, self.bits)

    def matrix(self) -> Any:
        return packed.lut_matrix(self.tiles, self.lut, self.bias, self.bits, self.in_features)


class AffineLinear(PackedLinear):
    """W[i, j] = S[i, g] (code[i, j] - Z[i, g]), g = j // group_size.

    Its buffers are named as compressed-tensors names them.

    Args:
        group_size: columns that share one (S, Z); None: a whole row does.
        symmetric: whether every Z is 2^(bits-1) and none is stored.
        stored_dtype: the dtype of S in the file; None: ``dtype``. W is rounded to it, as every dequantizing reader of
            the file does, in whatever dtype the layer computes.
    """

    weight_scale: Tensor
    weight_zero_point: Tensor | None
    zero_point: Tensor | None
    CODES = "weight_packed"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        group_size: int | None = None,
        symmetric: bool = False,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bits, bias, dtype, device)
        self.stored_dtype = stored_dtype or dtype
        self.group_size, self.symmetric = group_size or in_features, symmetric
        if in_features % self.group_size:
            raise ShapeError(f"groups of {self.group_size} do not divide {in_features} columns")
        groups = in_features // self.group_size
        self.register_buffer(
            "weight_packed",
            torch.empty(out_features, packed_width(in_features, bits), dtype=torch.int32, device=device),
        )
        self.register_buffer("weight_scale", torch.empty(out_features, groups, dtype=dtype, device=device))
        self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64, device=device))
        packed = (
            None
            if symmetric
            else torch.empty(packed_width(out_features, bits), groups, dtype=torch.int32, device=device)
        )
        self.register_buffer("weight_zero_point", packed)

        self.register_buffer("zero_point", None, persistent=False)

    def prepare(self) -> None:
        super().prepare()
        if self.zero_point is None and self.weight_scale.device.type != "meta":
            self.zero_point = self.zero_points()

    def restore(self) -> None:
        super().restore()
        self.zero_point = None

    def zero_points(self) -> UInt8[Tensor, "rows groups"]:
        """Z, uint8: as ``prepare`` unpacked it, else unpacked now."""
        if self.zero_point is not None:
            return self.zero_point
        if self.weight_zero_point is None:
            return torch.full_like(self.weight_scale, 2 ** (self.bits - 1), dtype=torch.uint8)
        return unpack(self.weight_zero_point.T.contiguous(), self.bits, self.out_features).T.contiguous()

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_scale.dtype

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        grid = (self.weight_scale, self.zero_points(), self.bits, self.group_size, self.stored_dtype)
        return packed.affine_rows(self.codes, *grid)(start, stop)

    def product(self, x: Tensor) -> Tensor:
        grid = (self.weight_scale, self.zero_points(), self.bias, self.bits, self.group_size, self.stored_dtype)
        return packed.affine_linear(x, self.codes, *grid)

    def matrix(self) -> Any:
        grid = (self.weight_scale, self.zero_points(), self.bias, self.bits, self.group_size, self.stored_dtype)
        return packed.affine_matrix(self.tiles, *grid)


class OffsetLinear(PackedLinear):
    """W[i, j] = S[i, g] code[i, j] + B[i, g], g = j // group_size.

    Its buffers are named as MLX names them: ``weight`` uint32 [rows, words] (the codes), ``scales`` (S) and ``biases``
    (B) [rows, groups]. No kernel reads these codes: every pass dequantizes a tile of rows at a time, which
    ``leangrid.load(dense=True)`` does once."""

    weight: Tensor
    scales: Tensor
    biases: Tensor
    CODES = "weight"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        bias: bool,
        dtype: torch.dtype,
        device: str | torch.device = "cpu",
        group_size: int = 64,
    ) -> None:
        super().__init__(in_features, out_features, bits, bias, dtype, device)
        if in_features % group_size or in_features * bits % 32:
            raise ShapeError(
                f"groups of {group_size} do not divide {in_features} columns, or those do not fill their words"
            )
        self.group_size = group_size
        self.register_buffer(
            "weight", torch.empty(out_features, packed_width(in_features, bits), dtype=torch.uint32, device=device)
        )
        for name in ("scales", "biases"):
            self.register_buffer(name, torch.empty(out_features, in_features // group_size, dtype=dtype, device=device))

    @property
    def dtype(self) -> torch.dtype:
        return self.scales.dtype

    def rows(self, start: int, stop: int) -> Float[Tensor, "tile cols"]:
        grid = (self.scales, self.biases, self.bits, self.group_size)
        return packed.offset_rows(self._stored_codes(), *grid)(start, stop)

    def product(self, x: Tensor) -> Tensor:
        grid = (self.scales, self.biases, self.bias, self.bits, self.group_size)
        return packed.offset_linear(x, self._stored_codes(), *grid)

    def _stored_codes(self) -> Int32[Tensor, "rows words"]:
        return self.codes.view(torch.int32)
