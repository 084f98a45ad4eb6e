"""The GPTQ container, versions 2 and 1: w = S (q - Z), codes packed along the columns; read by GPTQModel, transformers,
vLLM.

Version 2 stores Z. Version 1 stores Z - 1 and so cannot store Z = 0: readers disagree on what the borrowed bits mean.
Source: GPTQModel 7.6, nn_modules/qlinear. docs/formats.md has the layout and what readers accept.
"""

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid._version import __version__
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats.base import CONFIG, DAMAGED_CONFIG, Format, Layout
from leangrid.formats.bit_stream import pack as pack_bits
from leangrid.formats.bit_stream import unpack as unpack_bits
from leangrid.formats.checks import (
    DAMAGED,
    affine_grid,
    affine_only,
    cast_exactly_to_half,
    check_layout,
    check_scales,
    half_precision,
    no_conv1d,
)
from leangrid.grids import AffineGrid, Grid, Precision
from leangrid.schemes import Scheme

BITS = (2, 3, 4, 8)
GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # columns; what GPTQModel's torch kernel accepts
VERSIONS = {"gptq_v2": 2, "gptq": 1}  # by ``checkpoint_format``
_WORD = 32
_STAYS = "-:"  # begins a pattern of ``dynamic`` that names modules which are not quantized


class Gptq(Format):
    """One version of the container: 2, or 1, which only ``export`` writes (a search may find Z = 0)."""

    QUANT_METHOD = "gptq"

    def __init__(self, version: int) -> None:
        self.version = version
        self.NAME = "gptq" if version == 2 else "gptq_v1"
        self.EXPORT_ONLY = version == 1
        self._shift = 1 if version == 1 else 0  # Z less what is stored for it

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Non-uniform grids; 5 and 6 bits; Conv1D; groups that its kernels do not accept or that do not divide a row;
        rows or columns that do not fill words."""
        bits, size = scheme.bits, scheme.group_size
        if scheme.grid != "affine":
            return affine_only("gptq", name, bits, f"W{bits}A16")
        if bits not in BITS:
            return (
                f"{name}: gptq holds {', '.join(map(str, BITS))} bits, not {bits}. "
                "Use format compressed-tensors or mlx, or scheme W4A16"
            )
        if kind == "conv1d":
            return no_conv1d(name, "and readers of gptq know nn.Linear only", bits)
        if size and (size not in GROUPS or cols % size):
            why = f"do not divide its {cols} columns" if cols % size else f"are none of {', '.join(map(str, GROUPS))}"
            return f"{name}: groups of {size} {why}. Use format compressed-tensors, or whole rows (no _G)"
        for what, count in (("columns", cols), ("rows", rows)):
            if count * bits % _WORD:
                return (
                    f"{name}: its {count} {what} of {bits} bits do not fill 32-bit words, as gptq asks. "
                    "Use format compressed-tensors"
                )
        return None

    def precision(self, dtype: torch.dtype) -> Precision:
        """Scales exact in float16, as they are stored, and in ``dtype``, to which readers convert them."""
        return half_precision(dtype)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """qweight int32 [cols b / 32, rows], qzeros int32 [groups, rows b / 32], scales float16 [groups, rows], g_idx
        int32 [cols]."""
        rows, cols = shape
        groups = cols // (scheme.group_size or cols)
        return {
            "qweight": (torch.int32, (cols * scheme.bits // _WORD, rows)),
            "qzeros": (torch.int32, (groups, rows * scheme.bits // _WORD)),
            "scales": (torch.float16, (groups, rows)),
            "g_idx": (torch.int32, (cols,)),
        }

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of an affine grid, scale and zero_point [rows, groups]. FormatError for another grid, where float16 or
        ``dtype`` rounds a scale, and for zero points that a symmetric scheme or version 1 cannot say."""
        cols = codes.shape[1]
        grid = affine_grid(grid, scheme, "gptq").regrouped(cols, scheme.group_size)
        zero_point = grid.zero_point
        if self.version == 1 and bool((zero_point == 0).any()):
            what = f"{int((zero_point == 0).sum())} zero points are 0, and gptq version 1 stores Z - 1"
            raise FormatError(what, None, "Use format gptq (version 2)")
        tensors = {
            "qweight": pack_bits(codes, scheme.bits).T.contiguous(),
            "qzeros": pack_bits((zero_point - self._shift).T.contiguous(), scheme.bits),
            "scales": cast_exactly_to_half(grid.scale, dtype).T.contiguous(),
            "g_idx": grid.group_of(cols),
        }
        self.check(tensors, scheme, (codes.shape[0], cols), "the packed layer")
        return tensors

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shapes and dtypes, scales finite and not 0, groups in the order of the columns, and zero points that the
        scheme and the version allow."""
        check_layout(tensors, self.layout(scheme, shape, torch.float16), name)
        scale, size = tensors["scales"], scheme.group_size or shape[1]
        check_scales(scale, f"{name}.scales")
        if not torch.equal(tensors["g_idx"], torch.arange(shape[1], dtype=torch.int32, device=scale.device) // size):
            what = "the groups are not in the order of the columns"
            raise CheckpointError(what, f"{name}.g_idx", "Load it with GPTQModel")
        stored = unpack_bits(tensors["qzeros"], scheme.bits, shape[0])
        if scheme.symmetric and not bool((stored == scheme.levels // 2 - self._shift).all()):
            what = "a zero point is not in the middle, and the config says sym"
            raise CheckpointError(what, f"{name}.qzeros", DAMAGED)
        if self.version == 1 and bool((stored == scheme.levels - 1).any()):
            what = "a zero point is 0 or 2^bits, which version 1 cannot say"
            raise CheckpointError(what, f"{name}.qzeros", "Load it with GPTQModel")

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, AffineGrid]:
        """(codes uint8 [rows, cols], grid)."""
        self.check(tensors, scheme, shape, name)
        zero_point = unpack_bits(tensors["qzeros"], scheme.bits, shape[0]) + self._shift
        scale = tensors["scales"].float().T.contiguous()
        codes = unpack_bits(tensors["qweight"].T.contiguous(), scheme.bits, shape[1])
        return codes, AffineGrid(scale, zero_point.T.contiguous(), scheme.bits, scheme.group_size)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """float16."""
        return torch.float16

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """The keys that GPTQModel 7.6, optimum 2.3 and vLLM read.

        GPTQModel takes every linear of a block for quantized that its own table of the architecture names, optimum
        every one. So where linears beside the output head stay, they are named in ``dynamic`` for the first, and those
        that do not in ``modules_in_block_to_quantize`` for the second."""
        scheme = self.only_scheme(schemes)
        stays = [name for name in ignore if not _is_head(name)]
        named: dict[str, Any] = {}
        if stays:
            named["dynamic"] = {f"{_STAYS}^{re.escape(name)}$": {} for name in stays}
            named["modules_in_block_to_quantize"] = [_ends_of(schemes, stays)]
        return {
            "quant_method": self.QUANT_METHOD,
            "checkpoint_format": next(name for name, version in VERSIONS.items() if version == self.version),
            "bits": scheme.bits,
            "group_size": scheme.group_size or -1,
            "sym": scheme.symmetric,
            "desc_act": False,
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": [f"leangrid:{__version__}"]},
            **named,
        }

    def is_config(self, config: dict[str, Any]) -> bool:
        """``checkpoint_format`` tells the versions apart; where it is absent, the version is 1."""
        if not super().is_config(config):
            return False
        name = config.get("checkpoint_format") or config.get("format") or "gptq"
        if not isinstance(name, str) or name not in VERSIONS:
            what = f"leangrid does not read checkpoint_format {name!r} of gptq"
            raise FormatError(what, CONFIG, f"Known: {', '.join(VERSIONS)}")
        return VERSIONS[name] == self.version

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """Of an entry, ours or another tool's, whose groups lie in the order of the columns, and whose ``dynamic`` only
        names modules that stay."""
        bits, size, sym = config.get("bits"), config.get("group_size"), config.get("sym", True)
        if config.get("desc_act") or config.get("pack_dtype", "int32") != "int32":
            what = "leangrid reads gptq without desc_act, packed in int32"
            raise FormatError(what, CONFIG, "Load it with GPTQModel")
        _staying(config)  # refuses another scheme for some modules
        if (
            bits not in BITS
            or isinstance(bits, bool)
            or not (size == -1 or size in GROUPS)
            or not isinstance(sym, bool)
        ):
            what = f"leangrid does not read gptq of {bits!r} bits in groups of {size!r}"
            raise FormatError(what, CONFIG, "Load it with GPTQModel")
        group_size = None if size == -1 else size
        return Scheme(grid="affine", method="leanquant", bits=bits, group_size=group_size, symmetric=sym)

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Every linear but the output head and those that ``dynamic`` says stay; the file decides then."""
        head, staying = _is_head(name) and not config.get("lm_head"), _staying(config)
        return not head and (staying is None or staying.match(name) is None)


def _is_head(name: str) -> bool:
    return name.rpartition(".")[2] == "lm_head"


def _ends_of(quantized: Iterable[str], stays: list[str]) -> list[str]:
    """Ends of the names of the ``quantized`` linears, from behind their block's number, that no name in ``stays`` ends
    in; the whole name where one does."""
    ends: dict[str, list[str]] = {}
    for name in quantized:
        ends.setdefault(re.split(r"\.\d+\.", name, maxsplit=1)[-1], []).append(name)
    shared = {end for end in ends if any(name.endswith(end) for name in stays)}
    return [one for end, names in ends.items() for one in (names if end in shared else [end])]


def _staying(config: dict[str, Any]) -> re.Pattern[str] | None:
    """The pattern of modules that stay; None where ``dynamic`` names none. FormatError where it says something else or
    is damaged."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise FormatError(f"dynamic is {dynamic!r}", CONFIG, DAMAGED_CONFIG)
    return _joined(tuple(dynamic))


@lru_cache(maxsize=8)  # asked for every layer
def _joined(keys: tuple[str, ...]) -> re.Pattern[str] | None:
    """One pattern for all ``keys`` of ``dynamic``."""
    for key in keys:
        if not key.startswith(_STAYS):
            what = f"leangrid reads no gptq whose dynamic gives {key!r} a scheme of its own"
            raise FormatError(what, CONFIG, "Load it with GPTQModel")
        try:
            re.compile(key.removeprefix(_STAYS))
        except re.error as error:
            raise FormatError(f"dynamic: {key!r} is no pattern ({error})", CONFIG, DAMAGED_CONFIG) from error
    return re.compile("|".join(f"(?:{key.removeprefix(_STAYS)})" for key in keys)) if keys else None
