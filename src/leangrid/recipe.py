"""What to do, as one frozen value: validated once at the door, hashed into the manifest, never changed after.

A scheme string names the whole idea: ``W4A16_G64`` affine, 4 bits, groups of 64; ``W4A16`` whole rows; ``NU3``
non-uniform, 3 bits, whole rows; ``GPTQ4_G64`` and ``RTN4`` the min-max baselines through the same code path;
suffix ``_SYM`` fixes the zero point in the middle, ``_EXACT`` asks for LeanQuant-Exact. ``Q4_K`` and its like are
llama.cpp's block types as the grid itself, ``GPTQ_Q4_K`` and ``RTN_Q4_K`` their baselines.
"""

import hashlib
import json
import re
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from leangrid.block_types import BLOCK_TYPES, BlockType
from leangrid.errors import RecipeError

GridKind = Literal["affine", "offset", "superblock", "nonuniform"]
Method = Literal["leanquant", "gptq", "rtn"]

AFFINE_BITS, NONUNIFORM_BITS = (2, 3, 4, 5, 6, 8), (2, 3, 4)
OFFSET_FORMATS = frozenset(
    {"mlx"}
)  # containers whose readers compute S q + B: B is a stored number, Z need not be an integer

_SCHEME = re.compile(r"^(?:W(?P<w>\d+)A16|NU(?P<nu>\d+)|GPTQ(?P<gptq>\d+)|RTN(?P<rtn>\d+))"
                     r"(?:_G(?P<group>\d+))?(?P<sym>_SYM)?(?P<exact>_EXACT)?$")  # fmt: skip

_BLOCK = re.compile(r"^(?:(?P<method>GPTQ|RTN)_)?(?P<kind>Q\d_[01K])$")

_METHODS: dict[str, Method] = {"w": "leanquant", "nu": "leanquant", "gptq": "gptq", "rtn": "rtn"}


class _Checked(BaseModel):
    """A model whose one refusal, by whatever door its fields come in, is a RecipeError of one sentence."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse(cls, fields: Any, inner: Any) -> Any:
        try:
            return inner(fields)
        except ValidationError as error:
            raise _refusal(error, cls) from None

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **options: Any) -> Any:
        try:
            return super().model_validate_json(json_data, **options)
        except ValidationError as error:  # no JSON at all
            raise _refusal(error, cls) from None


def _refusal(error: ValidationError, model: type[BaseModel]) -> RecipeError:
    """The first field that is wrong, in one sentence."""
    first = error.errors(include_url=False)[0]
    name, where = ".".join(str(part) for part in first["loc"]), model.__name__.lower()
    if first["type"] == "extra_forbidden":
        nearest = get_close_matches(name, model.model_fields, 1)
        hint = f"Did you mean {nearest[0]}? " if nearest else ""
        return RecipeError(
            f"'{name[:80]}' is no field of a {where}", where, f"{hint}Fields: {', '.join(model.model_fields)}"
        )
    given, field = (
        " ".join(repr(first.get("input")).split()),
        model.model_fields.get(str(first["loc"][0]) if first["loc"] else ""),
    )
    told = first["msg"].replace("Input should be", "must be").replace("Value error, ", "")
    told = f"{name or f'a {where}'}{'' if told.startswith('must be') else ':'} {told}"
    way_out = f"Fields: {', '.join(model.model_fields)}"
    if field is not None and not field.is_required():
        way_out = f"The default is {field.default!r}{f': {field.description}' if field.description else ''}"
    return RecipeError(f"{told}, not {given[:77] + '...' if len(given) > 80 else given}", where, way_out)


class Scheme(_Checked):
    """A parsed scheme string: which grid, how many bits, over how many columns, found how."""

    model_config = ConfigDict(frozen=True)

    grid: GridKind
    method: Method
    bits: int
    group_size: int | None  # None: one grid for the whole row
    symmetric: bool = False
    exact: bool = False
    block: str | None = None  # llama.cpp's type

    @classmethod
    def parse(cls, text: str) -> "Scheme":
        """Read ``text``; raise RecipeError naming what a scheme looks like."""
        block = _BLOCK.match(text.upper())
        if block and block["kind"] in BLOCK_TYPES:
            return cls.of_block(BLOCK_TYPES[block["kind"]], _METHODS[(block["method"] or "w").lower()])
        match = _SCHEME.match(text.upper())
        if match is None:
            raise RecipeError(
                f"'{text}' is not a scheme", "--scheme", "Examples: W4A16_G64, W3A16, NU4, NU3, GPTQ4_G64, RTN4, Q4_K"
            )
        kind = next(k for k in ("w", "nu", "gptq", "rtn") if match[k])
        scheme = cls(
            grid="nonuniform" if kind == "nu" else "affine",
            method=_METHODS[kind],
            bits=int(match[kind]),
            group_size=int(match["group"]) if match["group"] else None,
            symmetric=match["sym"] is not None,
            exact=match["exact"] is not None,
        )
        scheme._check(text)
        return scheme

    @classmethod
    def of_block(cls, kind: BlockType, method: Method = "leanquant") -> "Scheme":
        """The grid of one of llama.cpp's block types."""
        grid = "superblock" if kind.sc else "offset" if kind.minimum else "affine"
        return cls(
            grid=grid, method=method, bits=kind.bits, group_size=kind.group, symmetric=not kind.minimum, block=kind.name
        )

    def fitting(self, cols: int) -> "Scheme":
        """What a layer of ``cols`` columns gets: this scheme, or the narrow type where superblocks do not divide the
        row."""
        if self.block is None:
            return self
        return Scheme.of_block(BLOCK_TYPES[self.block].fitting(cols), self.method)

    def _check(self, text: str) -> None:
        allowed = NONUNIFORM_BITS if self.grid == "nonuniform" else AFFINE_BITS
        if self.bits not in allowed:
            raise RecipeError(f"{self.bits} bits are not available in '{text}'", "--scheme", f"Choose one of {allowed}")
        if self.grid == "nonuniform" and (self.group_size or self.symmetric):
            raise RecipeError(
                f"non-uniform grids hold whole rows and have no zero point, but '{text}' asks for more",
                "--scheme",
                f"Use NU{self.bits}, or an affine scheme such as W{self.bits}A16_G64",
            )
        if self.group_size == 0:
            raise RecipeError(
                f"a group of 0 columns in '{text}'", "--scheme", "Use a group such as 64, or no _G for whole rows"
            )
        if self.exact and self.method != "leanquant":
            raise RecipeError(f"'{text}' mixes a baseline with _EXACT", "--scheme", "Use W4A16_EXACT or NU4_EXACT")

    @property
    def levels(self) -> int:
        """K = 2^bits."""
        return 2**self.bits


def _container(scheme: Scheme) -> str:
    """Where a scheme lies unless told otherwise."""
    return "gguf" if scheme.block else "lut" if scheme.grid == "nonuniform" else "compressed-tensors"


class Recipe(_Checked):
    """Everything that decides the bytes of the result. ``None`` means: the default for this scheme (see
    ``resolved``)."""

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
    products: Literal["auto", "float32", "bfloat16", "tfloat32"] = Field(
        default="auto",
        description="operands of forward and Hessian products; auto: bfloat16 where model and processor have it",
    )

    @field_validator("samples", "length", "seed", "p", "steps", "correct", "refine", "damping", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("must be a number")
        return value

    @field_validator("scheme")
    @classmethod
    def _scheme(cls, value: str) -> str:
        if value != "auto":
            Scheme.parse(value)
            return value.upper()
        return value

    @field_validator("layers")
    @classmethod
    def _layers(cls, value: dict[str, str]) -> dict[str, str]:
        for key, scheme in value.items():
            Scheme.parse(scheme)
            try:
                re.compile(key.removeprefix("re:") if key.startswith("re:") else "")
            except re.error as error:
                way_out = 'Write such as "mlp.down_proj" or "re:.*down_proj"'
                raise RecipeError(f"'{key}' is no pattern: {error}", "layers", way_out) from None
        return {key: scheme.upper() for key, scheme in value.items()}

    @model_serializer(mode="wrap")
    def _without_unused(self, inner: Any) -> dict[str, Any]:
        """As JSON; ``text_field`` only where it is given, so that recipes written before there was one keep their
        fingerprint."""
        return {name: value for name, value in inner(self).items() if name != "text_field" or value is not None}

    @property
    def parsed(self) -> Scheme:
        """The parsed scheme on the grid that the format stores; RecipeError while it is still ``auto``."""
        scheme = Scheme.parse(self.scheme)
        stored = scheme.grid == "affine" and not scheme.symmetric and self.format in OFFSET_FORMATS
        return scheme.model_copy(update={"grid": "offset"}) if stored else scheme

    @property
    def schemes(self) -> list[Scheme]:
        """The parsed scheme, then those of ``layers``."""
        return [self.parsed, *(Scheme.parse(scheme) for scheme in self.layers.values())]

    def key_of(self, layer: str) -> str | None:
        """The first entry of ``layers`` that names this layer: the end of its name, at a dot, or a pattern that matches
        all of it."""
        for key in self.layers:
            found = (
                re.fullmatch(key[3:], layer) is not None if key.startswith("re:") else f".{layer}".endswith(f".{key}")
            )
            if found:
                return key
        return None

    def for_layer(self, layer: str) -> "Recipe":
        """This recipe for one layer alone: with the scheme that ``layers`` has for it, else its own."""
        key = self.key_of(layer)
        return (
            self
            if not self.layers
            else self.model_copy(update={"scheme": self.layers[key] if key else self.scheme, "layers": {}})
        )

    def scheme_for(self, cols: int) -> Scheme:
        """The scheme of a layer with ``cols`` columns."""
        return self.parsed.fitting(cols)

    def scheme_name(self, cols: int) -> str:
        """Its name, as records show it."""
        taken = self.scheme_for(cols).block
        return self.scheme.replace(self.parsed.block or "", taken) if taken else self.scheme

    def resolved(self, scheme: str | None = None) -> "Recipe":
        """This recipe with every default of its scheme written out. ``scheme`` replaces ``auto``."""
        name = scheme if scheme and self.scheme == "auto" else self.scheme
        parsed = Scheme.parse(name)
        learned = parsed.method == "leanquant"
        for key, other in ((key, Scheme.parse(value)) for key, value in self.layers.items()):
            if parsed.grid != "affine" or (other.grid, other.method, other.exact) != (
                parsed.grid,
                parsed.method,
                parsed.exact,
            ):
                what = f"layers mix schemes of one kind only, but '{key}' asks for {self.layers[key]} beside {name}"
                raise RecipeError(what, "layers", "Use affine schemes of one method, such as W4A16_G64 with W8A16")
        return self.model_copy(update={
            "scheme": name,
            "format": _container(parsed) if self.format == "auto" else self.format,
            "p": self.p if self.p is not None else (4.0 if parsed.grid == "nonuniform" else 2.0),
            "correct": self.correct if self.correct is not None else (0.5 if learned else 0.0),
            "refine": self.refine if self.refine is not None else (1 if learned and not parsed.exact else 0),
        })  # fmt: skip

    def fingerprint(self) -> str:
        """sha256 of the recipe's canonical JSON: equal recipes, equal text."""
        text = json.dumps(self.model_dump(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @classmethod
    def build(cls, **fields: Any) -> "Recipe":
        """The recipe of these fields, as ``Recipe(**fields)``: RecipeError with the first field that is wrong, in one
        sentence."""
        return cls(**fields)

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> "Recipe":
        """Read a TOML file; ``overrides`` (from flags) win over the file."""
        try:
            fields = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RecipeError("no such recipe file", path, "Give the path of a .toml file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise RecipeError(
                f"the recipe cannot be read: {error}", path, 'A recipe is TOML such as: scheme = "NU4"'
            ) from None
        return cls.build(**{**fields, **overrides})
