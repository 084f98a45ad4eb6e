"""Scheme strings: which grid, how many bits, by which method.

A scheme string names grid, bits and method: ``W4A16_G64`` affine, 4 bits, groups of 64; ``W4A16`` affine, one grid for
each whole row; ``NU3`` non-uniform, 3 bits, whole rows; ``GPTQ4_G64`` and ``RTN4`` the min-max baselines through the
same code path. The suffix ``_SYM`` fixes the zero point in the middle, ``_EXACT`` asks for LeanQuant-Exact (Algorithm 2
of the paper). ``Q4_K`` and its like take one of llama.cpp's block types as the grid; ``GPTQ_Q4_K`` and ``RTN_Q4_K`` are
their baselines."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from pydantic import ConfigDict, field_validator, model_validator

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import RecipeError
from leangrid.validation import ValidatedModel

Method = Literal["leanquant", "gptq", "rtn"]

# Containers whose readers compute S q + B with a stored number B, so that the zero point need not be an integer.
OFFSET_FORMATS = frozenset({"mlx"})


@dataclass(frozen=True)
class GridScheme:
    """What a kind of grid means to a recipe: its row in ``GRID_SCHEMES``.

    Attributes:
        head: how a scheme string with the learned grid begins, with {bits} for the bits of a code; None for grids that
            only llama.cpp's block types have.
        bits: the bits that the kind has.
        p: the default exponent of the loss-error weights.
        format: the container of ``format="auto"``.
        title: the kind's name in messages.
        has_groups: whether groups of columns may share a grid, and the zero point may be fixed.
        mixes: whether the layers of a model may have different bits and groups.
        offset_kind: the kind that takes its place in a container that stores offsets (OFFSET_FORMATS); None: none.
    """

    head: str | None
    bits: tuple[int, ...]
    p: float
    format: str
    title: str
    has_groups: bool = True
    mixes: bool = False
    offset_kind: str | None = None


AFFINE_BITS = (2, 3, 4, 5, 6, 8)
# Scheme.grid -> its row. Where two kinds have one head, a scheme string means the first.
GRID_SCHEMES: dict[str, GridScheme] = {
    "affine": GridScheme(
        "W{bits}A16", AFFINE_BITS, 2.0, "compressed-tensors", "affine", mixes=True, offset_kind="offset"
    ),
    "nonuniform": GridScheme("NU{bits}", (2, 3, 4), 4.0, "lut", "non-uniform", has_groups=False),
    "offset": GridScheme("W{bits}A16", AFFINE_BITS, 2.0, "mlx", "affine"),
    "superblock": GridScheme(None, AFFINE_BITS, 2.0, "gguf", "K-type"),
}

_SUFFIXES = r"(?:_G(?P<group>\d+))?(?P<sym>_SYM)?(?P<exact>_EXACT)?"
_BLOCK = re.compile(r"(?:(?P<method>GPTQ|RTN)_)?(?P<block>Q\d_[01K])")
_BASELINES: dict[str, Method] = {"GPTQ{bits}": "gptq", "RTN{bits}": "rtn"}  # on affine grids


def _heads() -> Iterator[tuple[str, str, Method]]:
    """How scheme strings begin, with the kind of grid and the method that each means."""
    for grid, row in GRID_SCHEMES.items():
        if row.head:
            yield row.head, grid, "leanquant"
    for head, method in _BASELINES.items():
        yield head, "affine", method


class Scheme(ValidatedModel):
    """A scheme string, parsed: the kind of grid, the bits, the columns that share a grid, and the method.

    Attributes:
        grid: ``affine`` (scale and integer zero point), ``nonuniform`` (2^bits free levels), ``offset`` (scale and
            stored offset: MLX, llama.cpp's Q4_1) or ``superblock`` (llama.cpp's K types).
        method: ``leanquant`` (the grid is learned on the inverse Hessian), ``gptq`` (min-max grid, GPTQ's sweep) or
            ``rtn`` (min-max grid, rounding to nearest).
        bits: bits of one code.
        group_size: how many columns of a row share one grid; None: the whole row.
        symmetric: whether the zero point is fixed in the middle of the codes.
        exact: whether LeanQuant-Exact (Algorithm 2 of the paper) replaces the sweep.
        block: llama.cpp's block type that the grid is; None: none.

    Raises:
        RecipeError: an unknown field or kind of grid, bits that the kind does not have, or parts that exclude each
            other.

    Example:
        >>> scheme = leangrid.Scheme.parse("W4A16_G64")
        >>> scheme.grid, scheme.bits, scheme.group_size, scheme.name
        ('affine', 4, 64, 'W4A16_G64')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid: str
    method: Method
    bits: int
    group_size: int | None
    symmetric: bool = False
    exact: bool = False
    block: str | None = None

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read a scheme string in any letter case; RecipeError with examples for anything else."""
        block = _BLOCK.fullmatch(text.upper())
        if block and block["block"] in BLOCK_TYPES:
            method: Method = "gptq" if block["method"] == "GPTQ" else "rtn" if block["method"] else "leanquant"
            return cls.of_block(BLOCK_TYPES[block["block"]], method)
        for head, grid, method in _heads():
            found = re.fullmatch(head.replace("{bits}", r"(?P<bits>\d+)") + _SUFFIXES, text.upper())
            if found is not None:
                return cls(
                    grid=grid,
                    method=method,
                    bits=int(found["bits"]),
                    group_size=int(found["group"]) if found["group"] else None,
                    symmetric=found["sym"] is not None,
                    exact=found["exact"] is not None,
                )
        examples = "Examples: W4A16_G64, W3A16, NU4, NU3, GPTQ4_G64, RTN4, Q4_K"
        raise RecipeError(f"'{text}' is not a scheme", "--scheme", examples)

    @classmethod
    def of_block(cls, block: BlockType, method: Method = "leanquant") -> "Scheme":
        """The scheme whose grid is one of llama.cpp's block types."""
        return cls(
            grid=block.grid,
            method=method,
            bits=block.bits,
            group_size=block.group,
            symmetric=not block.minimum,
            block=block.name,
        )

    @field_validator("grid")
    @classmethod
    def _check_grid(cls, value: str) -> str:
        if value not in GRID_SCHEMES:
            raise RecipeError(f"'{value}' is no kind of grid", "scheme", f"Kinds: {', '.join(GRID_SCHEMES)}")
        return value

    @model_validator(mode="after")
    def _check_parts(self) -> "Scheme":
        row = GRID_SCHEMES[self.grid]
        if row.head is None and self.block is None:
            raise RecipeError(f"a {row.title} grid without its block type", "scheme", "Use such as Q4_K")
        if self.bits not in row.bits:
            what = f"{self.bits} bits are not available in '{self.name}'"
            raise RecipeError(what, "--scheme", f"Choose one of {row.bits}")
        if not row.has_groups and (self.group_size or self.symmetric):
            what = f"{row.title} grids hold whole rows and have no zero point, but '{self.name}' asks for more"
            own = self._head("leanquant")
            raise RecipeError(what, "--scheme", f"Use {own}, or an affine scheme such as W{self.bits}A16_G64")
        if self.group_size is not None and self.group_size < 1:
            what = f"a group of {self.group_size} columns in '{self.name}'"
            raise RecipeError(what, "--scheme", "Use a group such as 64, or no _G for whole rows")
        if self.exact and self.method != "leanquant":
            raise RecipeError(f"'{self.name}' mixes a baseline with _EXACT", "--scheme", "Use W4A16_EXACT or NU4_EXACT")
        return self

    @property
    def name(self) -> str:
        """The scheme string that ``parse`` reads as this scheme."""
        if self.block is not None:
            return self.block if self.method == "leanquant" else f"{self.method.upper()}_{self.block}"
        group = "" if self.group_size is None else f"_G{self.group_size}"
        return self._head(self.method) + group + ("_SYM" if self.symmetric else "") + ("_EXACT" if self.exact else "")

    def _head(self, method: Method) -> str:
        """How the scheme string of this grid with ``method`` begins."""
        head = GRID_SCHEMES[self.grid].head or "" if method == "leanquant" else method.upper() + "{bits}"
        return head.format(bits=self.bits)

    def mixes_with(self, other: "Scheme") -> bool:
        """Whether one model may have layers of this scheme and of the other: both of one method, and either of one kind
        that mixes, or both llama.cpp's block types."""
        if (self.method, self.exact) != (other.method, other.exact):
            return False
        if self.block is not None and other.block is not None:
            return True
        return GRID_SCHEMES[self.grid].mixes and self.grid == other.grid

    def with_bits(self, bits: int) -> "Scheme":
        """The same scheme with other ``bits``; RecipeError where its kind does not have them."""
        return Scheme(**{**self.model_dump(), "bits": bits})

    @property
    def levels(self) -> int:
        """How many values a weight can take: 2^bits."""
        return 2**self.bits

    def fitting(self, cols: int) -> "Scheme":
        """The scheme of a layer with ``cols`` columns: this one, or that of the narrow block type where blocks of 256
        do not divide the row."""
        if self.block is None:
            return self
        return Scheme.of_block(BLOCK_TYPES[self.block].fitting(cols), self.method)
