"""llama.cpp's blocks in a Hugging Face directory: each layer's rows as the bytes that a GGUF file of the model will
hold.

``leangrid export --to gguf`` copies them into one file, unchanged. config.json says the commonest type and, by name,
those of layers that have another (version 2). Layers whose columns 256 does not divide hold the narrow type of their
width (block_types.py), which the type that is said stands for. ``weight`` is uint8 [rows, bytes of a row]:
a reader that expects weights finds another dtype and shape, and stops."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import CheckpointError, FormatError
from leangrid.formats import gguf_blocks
from leangrid.formats.base import CONFIG, DAMAGED_CONFIG, Format, Layout
from leangrid.formats.checks import DAMAGED, check_layout, no_conv1d
from leangrid.formats.gguf_blocks import Parts
from leangrid.grids import AffineGrid, Grid, GroupedGrid, KTypeGrid, OffsetGrid, Precision
from leangrid.schemes import Scheme

VERSION = 1  # one type for all layers
VERSION_OF_SEVERAL = 2  # with "types"


class Gguf(Format):
    """The bytes of the scheme's block type."""

    NAME = "gguf"
    QUANT_METHOD = "leangrid"
    BLOCKS = True

    def refuse(self, scheme: Scheme, name: str, rows: int, cols: int, kind: str = "linear") -> str | None:
        """Schemes that are no block type, GPT-2's Conv1D, and rows that 32 does not divide."""
        if scheme.block is None:
            return (
                f"{name}: format gguf holds llama.cpp's block types. "
                "Use scheme Q4_K or Q4_0, or export a finished affine result to gguf"
            )
        if kind == "conv1d":
            return no_conv1d(name, "which llama.cpp's files hold transposed", 4)
        if cols % 32:
            return (
                f"{name}: llama.cpp's blocks of 32 do not divide its {cols} columns. "
                f"Use scheme W{min(scheme.bits, 4)}A16"
            )
        return None

    def precision(self, dtype: torch.dtype) -> Precision:
        """Readers compute in float32; what the blocks round, their grids have rounded already."""
        return Precision(torch.float32)

    def layout(self, scheme: Scheme, shape: tuple[int, int], dtype: torch.dtype) -> Layout:
        """weight uint8 [rows, bytes of a row]."""
        return {"weight": (torch.uint8, (shape[0], _block_type(scheme, shape[1]).row_bytes(shape[1])))}

    def pack(
        self, codes: UInt8[Tensor, "rows cols"], grid: Grid, dtype: torch.dtype, scheme: Scheme
    ) -> dict[str, Tensor]:
        """Of the grid of the layer's block type. FormatError for another grid, or one that its fields cannot hold."""
        block_type = _block_type(scheme, codes.shape[1])
        return {"weight": gguf_blocks.pack(block_type, _parts(block_type, codes, grid))}

    def check(self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str) -> None:
        """Shape and dtype, scales finite and not 0, minima finite."""
        self.unpack(tensors, scheme, shape, name)

    def unpack(
        self, tensors: dict[str, Tensor], scheme: Scheme, shape: tuple[int, int], name: str = "layer"
    ) -> tuple[Tensor, GroupedGrid]:
        """(codes uint8 [rows, cols], grid)."""
        check_layout(tensors, self.layout(scheme, shape, torch.float32), name)
        block_type = _block_type(scheme, shape[1])
        parts = gguf_blocks.unpack(block_type, tensors["weight"])
        scales = [parts.d] if parts.sc is None else [parts.d, parts.sc]
        if not bool(parts.d.isfinite().all()) or any(bool((scale == 0).any()) for scale in scales):
            raise CheckpointError("a block's scale is NaN, infinite or 0", f"{name}.weight", DAMAGED)
        if parts.dmin is not None and not bool(parts.dmin.isfinite().all()):
            raise CheckpointError("a block's minimum is NaN or infinite", f"{name}.weight", DAMAGED)
        return parts.codes, _grid(block_type, parts)

    def weight_dtype(self, tensors: dict[str, Tensor]) -> torch.dtype:
        """float32, in which llama.cpp dequantizes."""
        return torch.float32

    def config(self, schemes: Mapping[str, Scheme], ignore: list[str]) -> dict[str, Any]:
        """The type that was asked for, of several the commonest, and the layers of each other one as ``types``; and the
        layers by name, so that a lost one is noticed."""
        common = Counter(schemes.values()).most_common(1)[0][0]
        others: dict[str, list[str]] = {}
        for name, scheme in schemes.items():
            if scheme != common:
                others.setdefault(str(scheme.block), []).append(name)
        return {
            "quant_method": self.QUANT_METHOD,
            "format": self.NAME,
            "version": VERSION_OF_SEVERAL if others else VERSION,
            "type": common.block,
            **({"types": others} if others else {}),
            "layers": list(schemes),
        }

    def is_config(self, config: dict[str, Any]) -> bool:
        """``format`` tells leangrid's own containers apart."""
        return super().is_config(config) and config.get("format") == self.NAME

    def scheme_of(self, config: dict[str, Any]) -> Scheme:
        """The block type as a scheme; of several types the commonest."""
        name, layers = config.get("type"), config.get("layers")
        version = VERSION_OF_SEVERAL if "types" in config else VERSION
        if config.get("version") != version or not isinstance(name, str) or name not in BLOCK_TYPES:
            what = f"type {name!r} of version {config.get('version')!r} is not known"
            raise FormatError(what, CONFIG, "Upgrade leangrid")
        if not isinstance(layers, list) or not layers or not all(isinstance(layer, str) for layer in layers):
            raise FormatError("layers must list the quantized layers", CONFIG, DAMAGED_CONFIG)
        return Scheme.of_block(BLOCK_TYPES[name])

    def schemes(self, config: dict[str, Any], names: Iterable[str]) -> dict[str, Scheme]:
        """Each layer's own type, or the commonest."""
        common, types, others = self.scheme_of(config), config.get("types", {}), dict[str, Scheme]()
        if not isinstance(types, dict):
            raise FormatError("types must give the layers of each type", CONFIG, DAMAGED_CONFIG)
        for block, layers in types.items():
            if block not in BLOCK_TYPES:
                raise FormatError(f"type {block!r} is not known", CONFIG, "Upgrade leangrid")
            if not isinstance(layers, list) or not all(isinstance(layer, str) for layer in layers):
                raise FormatError(f"types must list the layers of {block}", CONFIG, DAMAGED_CONFIG)
            others |= dict.fromkeys(layers, Scheme.of_block(BLOCK_TYPES[block]))
        return {name: others.get(name, common) for name in names}

    def covers(self, config: dict[str, Any], name: str) -> bool:
        """Whether ``name`` is listed."""
        return name in (config.get("layers") or ())


def _block_type(scheme: Scheme, cols: int) -> BlockType:
    if scheme.block is None:
        raise FormatError("format gguf holds llama.cpp's block types", None, "Use a scheme such as Q4_K")
    return BLOCK_TYPES[scheme.block].fitting(cols)


def _parts(block_type: BlockType, codes: UInt8[Tensor, "rows cols"], grid: Grid) -> Parts:
    """The fields of the blocks that hold ``codes`` on ``grid``; FormatError where the type has no such grid."""
    if not isinstance(grid, GroupedGrid) or (grid.bits, grid.group_size) != (block_type.bits, block_type.group):
        what = (
            f"{block_type.name} holds groups of {block_type.group} at {block_type.bits} bits, not {type(grid).__name__}"
        )
        raise FormatError(what, None, "Use its scheme")
    if isinstance(grid, KTypeGrid) and grid.block_type is block_type:
        return Parts(
            codes,
            grid.d,
            *((grid.dmin, grid.sub_scale, grid.sub_min) if block_type.minimum else (None, grid.sub_scale)),
        )
    if not block_type.sc:
        if (
            isinstance(grid, AffineGrid)
            and not block_type.minimum
            and bool((grid.zero_point == block_type.middle).all())
        ):
            return Parts(codes, grid.scale)
        if isinstance(grid, OffsetGrid) and block_type.minimum:
            return Parts(codes, grid.scale, grid.offset)
    raise FormatError(f"{block_type.name} does not hold a {type(grid).__name__}", None, f"Use scheme {block_type.name}")


def _grid(block_type: BlockType, parts: Parts) -> GroupedGrid:
    """The grid that the fields of a layer's blocks say."""
    if parts.sc is not None:
        dmin = torch.zeros_like(parts.d) if parts.dmin is None else parts.dmin
        sub_min = torch.zeros_like(parts.sc) if parts.m is None else parts.m
        return KTypeGrid(block_type=block_type, d=parts.d, dmin=dmin, sub_scale=parts.sc, sub_min=sub_min)
    if parts.dmin is not None:
        return OffsetGrid(parts.d, parts.dmin, block_type.bits, block_type.group)
    return AffineGrid(
        parts.d, torch.full_like(parts.d, block_type.middle).to(torch.uint8), block_type.bits, block_type.group
    )
