"""The GPTQ container, versions 2 and 1: w = S (q - Z), codes packed along the columns, read by GPTQModel, transformers,
vLLM.

Version 1 stores Z - 1, so it cannot say Z = 0: readers disagree on what the borrowed bits mean. Version 2 stores Z.
Source: GPTQModel 7.6, nn_modules/qlinear (docs/formats.md has the layout and the readers' limits).
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid._version import __version__
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import check_layout, check_scales, exactly_in_half, half_precision, stored_groups
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.recipe import Scheme

QUANT_METHOD: str = "gptq"
BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # what GPTQModel's torch kernel takes
_WORD = 32
_WHERE = "config.json: quantization_config"
_DAMAGED = "The file is damaged: quantize or copy it again"


@dataclass(eq=False)
class Gptq:
    """One version of the container: 2, or 1."""

    version: int
    QUANT_METHOD: str = QUANT_METHOD

    @property
    def name(self) -> str:
        """As ``checkpoint_format`` spells it."""
        return "gptq_v2" if self.version == 2 else "gptq"

    @property
    def _shift(self) -> int:
        """Z less what is stored for it."""
        return 1 if self.version == 1 else 0

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Non-uniform grids, 5 and 6 bits, Conv1D, groups that its kernels do not take or that do not divide, unfilled
        words."""
        bits, size = scheme.bits, scheme.group_size
        if scheme.grid != "affine":
            return f"{name}: gptq holds affine grids only. Use format lut for NU{bits}, or scheme W{bits}A16"
        if bits not in BITS:
            return f"{name}: gptq holds {', '.join(map(str, BITS))} bits, not {bits}. Use format compressed-tensors or mlx, or scheme W4A16"
        if kind == "conv1d":
            return (
                f"{name} is a Conv1D, and readers of gptq know nn.Linear only. Use scheme NU{min(bits, 4)} (format lut)"
            )
        if size and (size not in GROUPS or cols % size):
            why = f"do not divide its {cols} columns" if cols % size else f"are none of {', '.join(map(str, GROUPS))}"
            return f"{name}: groups of {size} {why}. Use format compressed-tensors, or whole rows (no _G)"
        for what, count in (("columns", cols), ("rows", rows)):
            if count * bits % _WORD:
                return f"{name}: its {count} {what} of {bits} bits do not fill 32-bit words, as gptq asks. Use format compressed-tensors"
        return None

    def stored(self, scheme: Scheme, columns: set[int]) -> Scheme:
        """The same."""
        return scheme

    def precision(self, dtype: torch.dtype) -> Precision:
        """Scales exact in float16, as they are stored, and in ``dtype``, as readers convert them."""
        return half_precision(dtype)

    def layout(
        self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype
    ) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """qweight int32 [cols b / 32, rows], qzeros int32 [groups, rows b / 32], scales float16 [groups, rows], g_idx
        int32 [cols]."""
        rows, cols = shape
        groups = cols // scheme.group_size if scheme.group_size else 1
        return {
            "qweight": (torch.int32, (cols * scheme.bits // _WORD, rows)),
            "qzeros": (torch.int32, (groups, rows * scheme.bits // _WORD)),
            "scales": (torch.float16, (groups, rows)),
            "g_idx": (torch.int32, (cols,)),
        }

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """codes and a grid with scale, zero_point [rows, groups] -> the layer's tensors.

        Raises:
            FormatError: a grid of another kind, a scale that float16 or ``dtype`` would round, zero points that a
                symmetric scheme or version 1 cannot say.
        """
        grid = stored_groups(grid, scheme, codes.shape[1], "gptq")
        zero_point = grid.zero_point
        if scheme.symmetric and not bool((zero_point == scheme.levels // 2).all()):
            raise FormatError(
                "a symmetric scheme needs every zero point in the middle", None, "Use the scheme without _SYM"
            )
        if self.version == 1 and bool((zero_point == 0).any()):
            count = int((zero_point == 0).sum())
            raise FormatError(
                f"{count} zero points are 0, and gptq version 1 stores Z - 1", None, "Use format gptq (version 2)"
            )
        cols = codes.shape[1]
        tensors = {
            "qweight": pack_bits(codes, scheme.bits).T.contiguous(),
            "qzeros": pack_bits((zero_point - self._shift).T.contiguous(), scheme.bits),
            "scales": exactly_in_half(grid.scale, dtype).T.contiguous(),
            "g_idx": grid.group_of(cols),
        }
        self.check(tensors, scheme, (codes.shape[0], cols), "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """CheckpointError unless shapes and dtypes are right, scales finite and not 0, groups in order, and zero points
        sayable."""
        check_layout(tensors, self.layout(scheme, shape, torch.float16), name)
        scale, size = tensors["scales"], scheme.group_size or shape[1]
        check_scales(scale, f"{name}.scales")
        if not torch.equal(tensors["g_idx"], torch.arange(shape[1], dtype=torch.int32, device=scale.device) // size):
            raise CheckpointError(
                "the groups are not in the order of the columns", f"{name}.g_idx", "Load it with GPTQModel"
            )
        zero_point = unpack_bits(tensors["qzeros"], scheme.bits, shape[0])
        if scheme.symmetric and not bool((zero_point == scheme.levels // 2 - self._shift).all()):
            raise CheckpointError(
                "a zero point is not in the middle, and the config says sym", f"{name}.qzeros", _DAMAGED
            )
        if self.version == 1 and bool((zero_point == scheme.levels - 1).any()):
            raise CheckpointError(
                "a zero point is 0 or 2^bits, which version 1 cannot say", f"{name}.qzeros", "Load it with GPTQModel"
            )

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, AffineGrid]:
        """The layer's tensors -> (codes uint8 [rows, cols], grid); checked first."""
        self.check(tensors, scheme, shape, name)
        zero_point = unpack_bits(tensors["qzeros"], scheme.bits, shape[0]) + self._shift
        scale = tensors["scales"].float().T.contiguous()
        codes = unpack_bits(tensors["qweight"].T.contiguous(), scheme.bits, shape[1])
        return codes, AffineGrid(scale, zero_point.T.contiguous(), scheme.bits, scheme.group_size)

    def dense(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer") -> Tensor:
        """S (q - Z), [rows, cols], rounded once to float16."""
        codes, grid = self.unpack(tensors, scheme, shape, name)
        return grid.dequantize(codes).half()

    def config(self, scheme: Scheme, layers: list[str], ignore: list[str], dtype: torch.dtype) -> dict[str, Any]:
        """``quantization_config`` with the keys that GPTQModel 7.6 reads."""
        return {
            "quant_method": QUANT_METHOD,
            "checkpoint_format": self.name,
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"leangrid:{__version__}"]},
        }

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """The scheme of a ``quantization_config``, ours or another tool's, whose groups lie in the order of the
        columns."""
        bits, size, sym = config.get("bits"), config.get("group_size"), config.get("sym", True)
        if config.get("desc_act") or config.get("dynamic") or config.get("pack_dtype", "int32") != "int32":
            raise FormatError(
                "leangrid reads gptq without desc_act and dynamic, packed in int32", _WHERE, "Load it with GPTQModel"
            )
        if (
            bits not in BITS
            or isinstance(bits, bool)
            or not (size == -1 or size in GROUPS)
            or not isinstance(sym, bool)
        ):
            raise FormatError(
                f"leangrid does not read gptq of {bits!r} bits in groups of {size!r}", _WHERE, "Load it with GPTQModel"
            )
        return Scheme(
            grid="affine", method="leanquant", bits=bits, group_size=None if size == -1 else size, symmetric=sym
        )

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Every linear but the head; which of them are stored quantized, the file itself says."""
        return bool(config.get("lm_head")) or name.rpartition(".")[2] != "lm_head"


V2, V1 = Gptq(2), Gptq(1)


def version_of(config: dict[str, Any]) -> Gptq:
    """The version that a ``quantization_config`` names; FormatError for one that leangrid does not read."""
    name = config.get("checkpoint_format") or config.get("format") or V1.name
    known = {version.name: version for version in (V2, V1)}
    if name not in known:
        raise FormatError(
            f"leangrid does not read checkpoint_format {name!r} of gptq", _WHERE, f"Known: {', '.join(known)}"
        )
    return known[name]
