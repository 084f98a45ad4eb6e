"""Rotary positions: llama.cpp's header fields and factor tensors as transformers' ``rope_parameters``, or a refusal.

llama.cpp's angle of frequency i at position p is p / (base^(2i/d) x scale x factors[i]); cosine and sine are multiplied
by one attention factor (llama-context.cpp, ggml's rope). In transformers' terms that is default, linear, llama3 or, for
any other factors, longrope with two equal lists."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from leangrid.models.gguf_fields import Fields

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_DEFAULT_BASE = 10000.0  # llama-model.cpp
_EXACT = 1e-6  # relative; float32 has six to seven digits
# factor, low_freq_factor, high_freq_factor, original_max_position_embeddings of Meta's releases of Llama 3.
_META = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))


@dataclass(frozen=True)
class _Scaling:
    """The fields of a header that scale rotary positions.

    Attributes:
        base: of the frequencies.
        kind: llama.cpp's name of the scaling.
        scale: what positions are divided by.
        attention: what cosine and sine are multiplied by.
        context, original: the longest text in tokens, and that of the model before it was scaled.
        yarn: the fields of YaRN alone.
    """

    base: float
    kind: str
    scale: float
    attention: float
    context: int
    original: int
    yarn: dict[str, float]


def _read_scaling(fields: Fields) -> _Scaling:
    base = fields.number("rope.freq_base", _DEFAULT_BASE)
    kind = fields.text("rope.scaling.type", "linear")  # llama.cpp's default where only the factor is given
    legacy = fields.number("rope.scale_linear", 0.0)
    scale = fields.number("rope.scaling.factor", legacy) or 1.0
    attention = fields.number("rope.scaling.attn_factor", 1.0) or 1.0
    fields.value("rope.scaling.finetuned")  # llama.cpp does not compute with it
    context = fields.integer("context_length")
    original = fields.integer("rope.scaling.original_context_length", context) or context
    return _Scaling(base, kind, scale, attention, context, original, _yarn_fields(fields))


def rope_parameters(fields: Fields, dims: int, supported: str = "any") -> dict[str, Any]:
    """``rope_parameters`` of config.json for a model that rotates ``dims`` dimensions of each head.

    Args:
        supported: the scalings that transformers' class computes: "any", "longrope" (Phi-3: default and longrope), or
            "linear" (Gemma: default and linear, in blocks that attend to the whole context).

    Raises:
        CheckpointError: the class cannot compute the scaling, or the number of factors is not ``dims`` / 2.
    """
    rope = _read_scaling(fields)
    scale, attention = rope.scale, rope.attention
    if rope.kind == "yarn" and scale != 1.0:
        if supported != "any" or fields.has_tensor(FREQS, LONG, SHORT):
            raise fields.refusal("rope.scaling.type", "'yarn'")
        return _yarn(fields, rope)
    if rope.kind not in ("none", "linear", "longrope", "yarn"):
        raise fields.refusal("rope.scaling.type", repr(rope.kind))
    if rope.kind == "none":
        scale = 1.0
    if rope.base <= 0 or scale <= 0 or attention <= 0:
        raise fields.refusal("rope.scaling.factor", str(scale))
    short, long = _factors(fields, dims)
    if short is not None and scale != 1.0:  # no converter writes both at once
        raise fields.refusal("rope.scaling.factor", f"{scale} beside a tensor of factors")
    if short is None and rope.kind == "longrope":
        raise fields.refusal("rope.scaling.type", f"'longrope' without {LONG} and {SHORT}")
    # One factor for all frequencies: default or linear.
    theta = {"rope_theta": rope.base}
    if attention == 1.0 and short is None and (scale == 1.0 or supported != "longrope"):
        return theta | _one_factor(scale)
    if supported == "linear":
        raise fields.refusal("rope.scaling", "factors of single frequencies or of attention")
    short = [scale] * (dims // 2) if short is None else short
    if attention == 1.0 and long is None:
        if all(factor == short[0] for factor in short) and (short[0] == 1.0 or supported != "longrope"):
            return theta | _one_factor(short[0])
        # The factors of Llama 3's scaling.
        found = _llama3(short, rope.base, dims, rope.original) if supported == "any" else None
        if found is not None:
            return theta | found
    # Any other factors.
    return theta | {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": short if long is None else long,
        "original_max_position_embeddings": rope.original,
        "factor": max(rope.context / rope.original, 1.0),
        "attention_factor": attention,
    }


def _one_factor(factor: float) -> dict[str, Any]:
    return {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}


def _factors(fields: Fields, dims: int) -> tuple[list[float] | None, list[float] | None]:
    """What each frequency is divided by in short and in long texts: None twice where no tensor says so, None for long
    texts where one tensor is for both."""
    freqs, long, short = (fields.vector(name, dims // 2) for name in (FREQS, LONG, SHORT))
    for name, found in ((FREQS, freqs), (LONG, long), (SHORT, short)):
        if found is not None and not all(math.isfinite(factor) and factor > 0 for factor in found):
            raise fields.refusal(name, "factors that are not positive numbers")
    if freqs is not None:
        if long is not None or short is not None:
            raise fields.refusal(FREQS, f"factors beside those of {LONG}")
        return freqs, None
    if (long is None) != (short is None):
        raise fields.refusal(LONG if short is None else SHORT, "one list of factors without the other")
    return short, long


def _yarn_fields(fields: Fields) -> dict[str, float]:
    """The fields of YaRN, with llama.cpp's defaults."""
    return {
        name: fields.number(f"rope.scaling.yarn_{name}", default)
        for name, default in (
            ("log_multiplier", 0.0),
            ("ext_factor", 1.0),
            ("attn_factor", 1.0),
            ("beta_fast", 32.0),
            ("beta_slow", 1.0),
        )
    }


def _yarn(fields: Fields, rope: _Scaling) -> dict[str, Any]:
    """The parameters of YaRN (Peng et al. 2023), whose attention factor transformers and llama.cpp compute alike."""
    scale, yarn = rope.scale, rope.yarn
    if scale < 1.0:
        raise fields.refusal("rope.scaling.factor", str(scale))
    if yarn["ext_factor"] not in (1.0, -1.0):
        raise fields.refusal("rope.scaling.yarn_ext_factor", str(yarn["ext_factor"]))
    whole = 0.1 * math.log(scale) + 1.0  # the same in llama-context.cpp and transformers
    if not (yarn["attn_factor"] in (1.0, -1.0) or math.isclose(yarn["attn_factor"], whole, rel_tol=1e-4)):
        raise fields.refusal("rope.scaling.yarn_attn_factor", str(yarn["attn_factor"]))
    if yarn["log_multiplier"]:
        whole /= 0.1 * yarn["log_multiplier"] * math.log(scale) + 1.0
    return {
        "rope_type": "yarn",
        "rope_theta": rope.base,
        "factor": scale,
        "original_max_position_embeddings": rope.original,
        "attention_factor": rope.attention * whole,
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
    }


def _llama3(factors: Sequence[float], base: float, dims: int, original: int) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling whose factors equal these within float32; None where no parameters do."""
    wanted = np.asarray(factors, dtype=np.float64)
    turns = base ** (-np.arange(0, dims, 2) / dims) / (2 * math.pi)  # turns per position
    usual = (
        (float(wanted.max()), 1.0, 4.0, length) for length in (float(original), *(2.0**power for power in range(5, 21)))
    )
    candidates = [*_META, *usual, *_solved(wanted, turns)]
    for factor, low, high, length in candidates:
        found = {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
                 "original_max_position_embeddings": int(length)}  # fmt: skip
        if 0 < low < high and factor > 1 and np.allclose(_computed(found, base, dims), wanted, rtol=_EXACT, atol=0):
            return found
    return None


def _solved(wanted: np.ndarray, turns: np.ndarray) -> list[tuple[float, float, float, float]]:
    """Candidate parameters, computed from the factors between 1 and the largest, where 1 / factor is a linear function
    of the turns; low_freq_factor is set to 1, since only its product with the length matters."""
    factor = float(wanted.max())
    between = np.flatnonzero((wanted > 1 + 1e-5) & (wanted < factor * (1 - 1e-5)))
    if len(between) < 2:
        return []
    smooth = (1 / wanted[between] - 1 / factor) / (1 - 1 / factor)
    slope, offset = (float(value) for value in np.polyfit(turns[between], smooth, 1))
    if offset >= 0 or slope <= 0:
        return []
    high = 1 - 1 / offset
    length = slope * (high - 1)
    return [(factor, 1.0, round(high, digits), float(round(length))) for digits in (0, 1, 2, 3, 6)]


def _computed(parameters: dict[str, Any], base: float, dims: int) -> np.ndarray:
    """The factors that transformers computes from these parameters, f64 [dims / 2]."""
    given = {**parameters, "rope_theta": base}
    sizes: dict[str, Any] = {
        "hidden_size": dims,
        "num_attention_heads": 1,
        "head_dim": dims,
        "max_position_embeddings": 1 << 30,
    }
    config = transformers.LlamaConfig(**sizes, rope_parameters=given)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 1.0 / base ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    return (plain / scaled).double().numpy()
