"""What to do, as one immutable value that is checked when it is made and hashed into the manifest."""

import hashlib
import json
import math
import re
import tomllib
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from leangrid.errors import RecipeError
from leangrid.mixture import Part, sources_of, split_mixture
from leangrid.patterns import REGEX, Pattern, compile_regex
from leangrid.schemes import GRID_SCHEMES, OFFSET_FORMATS, Scheme
from leangrid.validation import ValidatedModel, read_size

_UNSET: dict[str, tuple[Any, ...]] = {
    "bits": (None,),
    "size": (None,),
    "effort": ("good",),
    "tune": (None,),
    "finish": (None,),
    "guide": (None,),
    "text_field": (None,),
    "ignore": ((), []),
    "only": ((), []),
}
# What each effort sets, of a learned grid, where the recipe leaves it open; "good" are the defaults.
EFFORTS: dict[str, dict[str, Any]] = {
    "fast": {"correct": 0.0, "refine": 0},
    "good": {},
    "best": {"tune": 4, "finish": 4},
}
_NUMBERS = ("bits", "size", "samples", "length", "seed", "p", "steps", "refine", "tune", "guide", "finish", "damping")


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
    bits: float | None = Field(
        default=None, gt=0, le=16, description="a budget: mean bits a weight of the linears; each layer's are chosen"
    )
    size: int | None = Field(
        default=None, gt=0, description="a budget: bytes of the whole directory, or such as 5GB or 700MiB"
    )
    format: str = Field(default="auto", description="container: auto, compressed-tensors, lut, gptq, awq, mlx, gguf")
    calibration: str = Field(
        default="c4",
        description="c4, wikitext2, self, embedded, a .txt/.jsonl/.csv/.parquet file, hf:org/name:split:column, or so "
        "many windows of several: c4:64,self:64",
    )
    text_field: str | None = Field(
        default=None, description="the column of the calibration's rows; None: text, or conversations"
    )
    samples: int = Field(
        default=128, ge=1, le=1_000_000, description="calibration windows; of several sources the sum of theirs"
    )
    length: int = Field(default=2048, ge=8, le=1_000_000, description="tokens a window")
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    effort: Literal["fast", "good", "best"] = Field(
        default="good",
        description="fast: the paper's procedure; good: with correction and refit; best: with tuning, and with text of "
        "the model's own where there is little",
    )
    p: float | None = Field(
        default=None, ge=0, le=16, description="exponent of the loss-error weights U_jj^-p; 4 non-uniform, 2 affine"
    )
    steps: int = Field(default=2048, ge=1, le=65536, description="T of the affine enumeration")
    search: Literal["optimal", "lloyd"] = Field(
        default="optimal", description="non-uniform grid: global optimum, or Lloyd"
    )
    correct: float | Literal["auto"] | None = Field(
        default=None,
        description="share of the inputs' own error that is corrected, 0 to 1; auto: by its noise; 0 is the paper",
    )
    refine: int | None = Field(
        default=None, ge=0, le=20, description="rounds of refit and descent after the sweep; 0 is the paper"
    )
    tune: int | None = Field(
        default=None, ge=0, le=100, description="passes of block tuning over the windows; 0: none, as by default"
    )
    guide: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="drawn gradients a token by which tuning weighs a block's error; 0: none, its own output alone",
    )
    finish: int | None = Field(
        default=None, ge=0, le=100, description="passes of tuning all grids by the whole model's output; 0: none"
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

    @field_validator(*_NUMBERS, mode="before")
    @classmethod
    def _refuse_bool(cls, value: Any) -> Any:
        if isinstance(value, bool):  # which pydantic takes for 0 or 1
            raise ValueError("must be a number")
        return value

    @field_validator("tune", "guide", "finish")
    @classmethod
    def _none_for_zero(cls, value: int | None, info: Any) -> int | None:
        """None and 0 are the same, but where an effort would tune, or finish."""
        is_set = info.field_name in EFFORTS[info.data.get("effort", "good")]
        return None if value == 0 and not is_set else value

    @field_validator("correct", mode="before")
    @classmethod
    def _check_correct(cls, value: Any) -> Any:
        if value is None or value == "auto":
            return value
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ValueError('must be a number from 0 to 1, or "auto"')
        return number

    @field_validator("size", mode="before")
    @classmethod
    def _read_size(cls, value: Any) -> Any:
        return read_size(value) if isinstance(value, str) else value

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

    @model_validator(mode="before")
    @classmethod
    def _count_windows(cls, fields: Any) -> Any:
        """A mixture's windows are counted by its parts."""
        if not isinstance(fields, dict) or not isinstance(fields.get("calibration"), str) or "samples" in fields:
            return fields
        parts = split_mixture(fields["calibration"])
        return {**fields, "samples": sum(part.windows for part in parts)} if parts else fields

    @model_validator(mode="after")
    def _check_mixture(self) -> "Recipe":
        parts = self.parts
        if parts and self.samples != (total := sum(part.windows for part in parts)):
            what = f"samples is {self.samples}, and the sources of the calibration give {total} windows"
            raise RecipeError(what, "recipe", "Leave out samples")
        if not all(part.windows for part in parts):
            raise RecipeError(f"a source of '{self.calibration}' gives no windows", "recipe", "Leave it out")
        if len({part.source for part in parts}) < len(parts):
            raise RecipeError(f"'{self.calibration}' names a source twice", "recipe", "Name it once, with all windows")
        if self.text_field is not None and sum(part.source != "self" for part in parts) > 1:
            what = "text_field is the column of one source, and the calibration has several"
            raise RecipeError(what, "recipe", "Name the column behind the data set (hf:org/name:split:column)")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> "Recipe":
        if self.bits is not None and self.size is not None:
            raise RecipeError("bits and size are two budgets", "recipe", "Give one of them")
        if self.has_budget and self.layers:
            what = "a budget chooses the scheme of every layer, and layers chooses some of them"
            raise RecipeError(what, "recipe", "Give bits or size, or layers")
        return self

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
        """The parsed scheme, then those of ``layers``, each once."""
        return list(dict.fromkeys((self.parsed, *map(Scheme.parse, dict.fromkeys(self.layers.values())))))

    @property
    def parts(self) -> tuple[Part, ...]:
        """The sources of the calibration and the windows of each; none where there is one source."""
        return split_mixture(self.calibration)

    def of_part(self, part: Part) -> "Recipe":
        """This recipe with one source of its mixture alone."""
        column = self.column_of(part.source)
        return self.model_copy(update={"calibration": part.source, "samples": part.windows, "text_field": column})

    def column_of(self, source: str) -> str | None:
        """The column of the rows of a source; text that the model writes beside another source has none."""
        return None if self.parts and source == "self" else self.text_field

    @property
    def samples_itself(self) -> bool:
        """Whether the model writes calibration text, or some of it."""
        return "self" in sources_of(self.calibration)

    @property
    def written_windows(self) -> int:
        """How many windows of calibration text the model writes."""
        if self.parts:
            return sum(part.windows for part in self.parts if part.source == "self")
        return self.samples if self.samples_itself else 0

    @property
    def has_budget(self) -> bool:
        """Whether the bits of each layer are to be chosen."""
        return self.bits is not None or self.size is not None

    def find_key(self, layer: str) -> str | None:
        """The first key of ``layers`` that names the layer: the end of its name, cut at a dot, or all of it by re:."""
        return _find_key(tuple(self.layers), layer) if self.layers else None

    @property
    def streams(self) -> int:
        """Streams of activations that a run carries: the original's beside the quantized where inputs are corrected or
        blocks tuned."""
        return 2 if self.correct or self.tune else 1

    @property
    def draws(self) -> int:
        """Gradients a token that guide block tuning; 0: none."""
        return (self.guide or 0) if self.tune else 0

    @property
    def holds_out(self) -> bool:
        """Whether some windows are kept from the Hessians, to judge tuning by."""
        return bool(self.tune or self.finish)

    @property
    def measures_correction(self) -> bool:
        """Whether the share of the inputs' own error that is corrected is measured for each linear."""
        return self.correct == "auto"

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
            RecipeError: the scheme is still ``auto``, ``layers`` has a scheme of another kind or method, or a baseline
                is asked for an effort.
        """
        name = scheme if scheme and self.scheme == "auto" else self.scheme
        parsed = Scheme.parse(name)
        self._refuse_mixed_kinds(name, parsed)
        if self.effort != "good" and parsed.method != "leanquant":
            what = f"{name} is a baseline, which knows no effort '{self.effort}'"
            raise RecipeError(what, "effort", "Leave it out, or choose a scheme such as W4A16_G64 or NU4")
        default = "gguf" if parsed.block else GRID_SCHEMES[parsed.grid].format
        container = default if self.format == "auto" else self.format
        return self.with_defaults(parsed).model_copy(update={"scheme": name, "format": container})

    def with_defaults(self, scheme: Scheme) -> "Recipe":
        """This recipe with ``p``, ``correct``, ``refine``, ``tune`` and ``finish``, where they are None, as its
        effort or else ``scheme`` has them by default."""
        learned = scheme.method == "leanquant"
        defaults = {
            "p": GRID_SCHEMES[scheme.grid].p,
            "correct": 0.5 if learned else 0.0,
            "refine": 1 if learned and not scheme.exact else 0,
        } | (EFFORTS[self.effort] if learned else {})
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
            if not scheme.mixes_with(other):
                what = f"layers mix schemes of one kind only, but '{key}' asks for {value} beside {name}"
                way_out = "Use affine schemes of one method, such as W4A16_G64 with W8A16, or Q4_K with Q6_K"
                raise RecipeError(what, "layers", way_out)

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


@lru_cache(maxsize=1 << 17)  # a budget names hundreds of layers, and a mixture has tens of thousands
def _find_key(keys: tuple[str, ...], layer: str) -> str | None:
    for key in keys:
        if re.fullmatch(key[3:], layer) if key.startswith(REGEX) else f".{layer}".endswith(f".{key}"):
            return key
    return None
