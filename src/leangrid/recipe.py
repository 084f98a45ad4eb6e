"""What to do, as one immutable value that is checked when it is made and hashed into the manifest.

A scheme string names grid, bits and method: ``W4A16_G64`` affine, 4 bits, groups of 64; ``W4A16`` affine, one grid for
each whole row; ``NU3`` non-uniform, 3 bits, whole rows; ``GPTQ4_G64`` and ``RTN4`` the min-max baselines through the
same code path. The suffix ``_SYM`` fixes the zero point in the middle, ``_EXACT`` asks for LeanQuant-Exact (Algorithm 2
of the paper). ``Q4_K`` and its like take one of llama.cpp's block types as the grid; ``GPTQ_Q4_K`` and ``RTN_Q4_K`` are
their baselines."""

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import RecipeError
from leangrid.patterns import REGEX, Pattern, compile_regex
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

_UNSET: dict[str, tuple[Any, ...]] = {"text_field": (None,), "ignore": ((), []), "only": ((), [])}
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


class Recipe(ValidatedModel):
    """Everything that decides the bytes of a result; equal recipes on equal input give equal bytes.

    Every field has a default, and None means the default of the scheme (``resolved`` writes it out). The fields are
    those of a recipe file and, with dashes, options of ``leangrid quantize``; each is described beside its default in
    the source. A recipe cannot be changed: ``model_copy(update={...})`` makes another.

    Raises:
        RecipeError: a wrong field, in whichever way the recipe is made.

    Example:
        >>> recipe = leangrid.Recipe(scheme="NU4", samples=64)
        >>> recipe.model_copy(update={"seed": 1}).seed
        1
        >>> leangrid.Recipe(samples=0)
        Traceback (most recent call last):
        leangrid.errors.RecipeError: samples must be greater than or equal to 1, not 0 (recipe). The default is 128: ...
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    scheme: str = Field(
        default="auto", description="scheme string, or auto: W4A16_G128 where the shapes allow, else W4A16"
    )
    format: str = Field(default="auto", description="container: auto, compressed-tensors, lut, gptq, awq, mlx, gguf")
    calibration: str = Field(
        default="c4",
        description="c4, wikitext2, self, embedded, a .txt/.jsonl/.csv/.parquet file, or hf:org/name:split:column",
    )
    text_field: str | None = Field(
        default=None, description="the column of the calibration's rows; None: text, or conversations"
    )
    samples: int = Field(default=128, ge=1, le=1_000_000, description="calibration windows")
    length: int = Field(default=2048, ge=8, le=1_000_000, description="tokens a window")
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    p: float | None = Field(
        default=None, ge=0, le=16, description="exponent of the loss-error weights U_jj^-p; 4 non-uniform, 2 affine"
    )
    steps: int = Field(default=2048, ge=1, le=65536, description="T of the affine enumeration")
    search: Literal["optimal", "lloyd"] = Field(
        default="optimal", description="non-uniform grid: global optimum, or Lloyd"
    )
    correct: float | None = Field(
        default=None, ge=0, le=1, description="share of the inputs' own error that is corrected; 0 is the paper"
    )
    refine: int | None = Field(
        default=None, ge=0, le=20, description="rounds of refit and descent after the sweep; 0 is the paper"
    )
    guard: bool = Field(default=True, description="rows worse than min-max GPTQ try lower p")
    damping: float = Field(default=0.01, gt=0, le=10, description="lambda, in units of mean(diag H)")
    act_order: bool = Field(default=True, description="eliminate columns by descending diag H")
    layers: dict[str, str] = Field(
        default={}, description="other schemes for some layers: the end of a name, or re:pattern -> scheme"
    )
    ignore: tuple[str, ...] = Field(default=(), description="linears that stay in 16 bits: globs, or re:pattern")
    only: tuple[str, ...] = Field(default=(), description="linears beside which all stay, in the same words")
    products: Literal["auto", "float32", "bfloat16", "tfloat32"] = Field(
        default="auto",
        description="operands of forward and Hessian products; auto: bfloat16 where model and processor have it",
    )

    @field_validator("samples", "length", "seed", "p", "steps", "correct", "refine", "damping", mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("must be a number")
        return value

    @field_validator("scheme")
    @classmethod
    def _check_scheme(cls, value: str) -> str:
        if value == "auto":
            return value
        Scheme.parse(value)
        return value.upper()

    @field_validator("layers")
    @classmethod
    def _check_layers(cls, value: dict[str, str]) -> dict[str, str]:
        for key, scheme in value.items():
            Scheme.parse(scheme)
            if key.startswith(REGEX):
                compile_regex(key, "layers", 'Write such as "mlp.down_proj" or "re:.*down_proj"')
        return {key: scheme.upper() for key, scheme in value.items()}

    @field_validator("ignore", "only")
    @classmethod
    def _check_patterns(cls, value: tuple[str, ...], info: Any) -> tuple[str, ...]:
        for text in value:
            Pattern(text, info.field_name).check()
        return tuple(dict.fromkeys(value))

    @model_serializer(mode="wrap")
    def _without_unused(self, inner: Any) -> dict[str, Any]:
        """JSON values, without younger fields that are not set: older recipes keep their fingerprints."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in inner(self).items() if v not in _UNSET.get(k, ())}

    @property
    def parsed(self) -> Scheme:
        """The parsed scheme, on the grid that the format stores; RecipeError while the scheme is still ``auto``."""
        scheme = Scheme.parse(self.scheme)
        offset_kind = GRID_SCHEMES[scheme.grid].offset_kind
        stores_offsets = offset_kind and not scheme.symmetric and self.format in OFFSET_FORMATS
        return scheme.model_copy(update={"grid": offset_kind}) if stores_offsets else scheme

    @property
    def schemes(self) -> list[Scheme]:
        """The parsed scheme, then those of ``layers``."""
        return [self.parsed, *(Scheme.parse(scheme) for scheme in self.layers.values())]

    def find_key(self, layer: str) -> str | None:
        """The first key of ``layers`` that names the layer: the end of its name, cut at a dot, or all of it by re:."""
        for key in self.layers:
            if re.fullmatch(key[3:], layer) if key.startswith(REGEX) else f".{layer}".endswith(f".{key}"):
                return key
        return None

    @property
    def streams(self) -> int:
        """Streams of activations that a run carries: the original's beside the quantized where inputs are corrected."""
        return 2 if self.correct else 1

    def for_layer(self, layer: str) -> "Recipe":
        """This recipe with the scheme of one layer, by its full name, and with no ``layers``."""
        if not self.layers:
            return self
        key = self.find_key(layer)
        return self.model_copy(update={"scheme": self.layers[key] if key else self.scheme, "layers": {}})

    def scheme_for(self, cols: int) -> Scheme:
        """The scheme of a layer with ``cols`` columns (see ``Scheme.fitting``)."""
        return self.parsed.fitting(cols)

    def scheme_name(self, cols: int) -> str:
        """The name of the scheme of a layer with ``cols`` columns, as records show it."""
        return self.scheme_for(cols).name

    def resolved(self, scheme: str | None = None) -> "Recipe":
        """This recipe with every default of its scheme written out.

        Args:
            scheme: what replaces ``auto``; None: nothing.

        Raises:
            RecipeError: the scheme is still ``auto``, or ``layers`` has a scheme of another kind or method.
        """
        name = scheme if scheme and self.scheme == "auto" else self.scheme
        parsed = Scheme.parse(name)
        self._refuse_mixed_kinds(name, parsed)
        default = "gguf" if parsed.block else GRID_SCHEMES[parsed.grid].format
        container = default if self.format == "auto" else self.format
        return self.with_defaults(parsed).model_copy(update={"scheme": name, "format": container})

    def with_defaults(self, scheme: Scheme) -> "Recipe":
        """This recipe with ``p``, ``correct`` and ``refine`` as ``scheme`` has them by default, where they are None."""
        learned = scheme.method == "leanquant"
        defaults = {
            "p": GRID_SCHEMES[scheme.grid].p,
            "correct": 0.5 if learned else 0.0,
            "refine": 1 if learned and not scheme.exact else 0,
        }
        return self.model_copy(update={name: value for name, value in defaults.items() if getattr(self, name) is None})

    @property
    def exponent(self) -> float:
        """``p`` of a resolved recipe; RecipeError where defaults are not written out."""
        if self.p is None or self.correct is None or self.refine is None:
            what = "p, correct or refine is None: the defaults of the scheme are not written out"
            raise RecipeError(what, "recipe", "Call recipe.resolved()")
        return self.p

    def _refuse_mixed_kinds(self, name: str, scheme: Scheme) -> None:
        for key, value in self.layers.items():
            other = Scheme.parse(value)
            same = (other.grid, other.method, other.exact) == (scheme.grid, scheme.method, scheme.exact)
            if not GRID_SCHEMES[scheme.grid].mixes or not same:
                what = f"layers mix schemes of one kind only, but '{key}' asks for {value} beside {name}"
                raise RecipeError(what, "layers", "Use affine schemes of one method, such as W4A16_G64 with W8A16")

    def fingerprint(self) -> str:
        """The sha256, in hexadecimal, of the recipe's canonical JSON; equal recipes have equal fingerprints."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a recipe from a TOML file; ``overrides`` (such as command-line options) replace fields of the file.

        Raises:
            RecipeError: the file is missing or not TOML, or a field is wrong.
        """
        try:
            fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError("no such recipe file", path, "Give the path of a .toml file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            way_out = 'A recipe is TOML such as: scheme = "NU4"'
            raise RecipeError(f"the recipe cannot be read: {error}", path, way_out) from None
        return cls(**{**fields, **overrides})
