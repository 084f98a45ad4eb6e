"""Rotary positions: llama.cpp's header fields and factor tensors as transformers' ``rope_parameters``, the same
function or a refusal.

llama.cpp's angle of frequency i at position p is p / (base^(2i/d) x scale x factors[i]), cosine and sine times one
attention factor (llama-context.cpp, ggml's rope). transformers says so as default, linear, llama3 or, for any other
factors, longrope with two equal lists."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from leangrid.models.gguf_fields import Fields

FREQS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
_DEFAULT_BASE = 10000.0  # llama-model.cpp
_EXACT = 1e-6  # relative; float32 holds six to seven digits
_META = ((8.0, 1.0, 4.0, 8192.0), (32.0, 1.0, 4.0, 8192.0))  # factor, low, high, original length of Meta's releases


def rope_parameters(fields: Fields, dims: int, families: str = "any") -> dict[str, Any]:
    """``rope_parameters`` for a model that rotates ``dims`` dimensions of each head.

    Args:
        families: what transformers' class can be told: "any", "longrope" (Phi-3: default and longrope), or "linear"
            (Gemma: default and linear, in blocks that attend to everything).

    Raises:
        CheckpointError: scaling that the class cannot compute, or factors of another number than ``dims`` / 2.
    """
    base = fields.number("rope.freq_base", _DEFAULT_BASE)
    kind = fields.text("rope.scaling.type", "linear")  # so llama.cpp, where only the factor is given
    legacy = fields.number("rope.scale_linear", 0.0)
    scale = fields.number("rope.scaling.factor", legacy) or 1.0
    attention = fields.number("rope.scaling.attn_factor", 1.0) or 1.0
    fields.take("rope.scaling.finetuned")  # only said, never computed with
    context = fields.integer("context_length")
    original = fields.integer("rope.scaling.original_context_length", context) or context
    yarn = _yarn_fields(fields)
    if kind == "yarn" and scale != 1.0:
        if families != "any" or fields.has_tensor(FREQS, LONG, SHORT):
            raise fields.refuse("rope.scaling.type", "'yarn'")
        return _yarn(fields, yarn, base, scale, attention, original)
    if kind not in ("none", "linear", "longrope", "yarn"):
        raise fields.refuse("rope.scaling.type", repr(kind))
    if kind == "none":
        scale = 1.0
    if base <= 0 or scale <= 0 or attention <= 0:
        raise fields.refuse("rope.scaling.factor", str(scale))
    short, long = _factors(fields, dims)
    if short is not None and scale != 1.0:
        raise fields.refuse(
            "rope.scaling.factor", f"{scale} beside a tensor of factors"
        )  # both at once: nothing writes it so
    if short is None and kind == "longrope":
        raise fields.refuse("rope.scaling.type", f"'longrope' without {LONG} and {SHORT}")
    plain = {"rope_theta": base}
    if attention == 1.0 and short is None and (scale == 1.0 or families != "longrope"):
        return plain | ({"rope_type": "default"} if scale == 1.0 else {"rope_type": "linear", "factor": scale})
    if families == "linear":
        raise fields.refuse("rope.scaling", "factors of single frequencies or of attention")
    short = [scale] * (dims // 2) if short is None else short
    if attention == 1.0 and long is None:
        if all(factor == short[0] for factor in short) and (short[0] == 1.0 or families != "longrope"):
            return plain | (
                {"rope_type": "default"} if short[0] == 1.0 else {"rope_type": "linear", "factor": short[0]}
            )
        found = _llama3(short, base, dims, original) if families == "any" else None
        if found is not None:
            return plain | found
    extent = {
        "original_max_position_embeddings": original,
        "factor": max(context / original, 1.0),
        "attention_factor": attention,
    }
    return plain | {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": short if long is None else long,
        **extent,
    }


def _factors(fields: Fields, dims: int) -> tuple[list[float] | None, list[float] | None]:
    """What each frequency is divided by, in short and in long texts; None for both without a tensor, None for ``long``
    where it is one."""
    freqs, long, short = (fields.vector(name, dims // 2) for name in (FREQS, LONG, SHORT))
    for name, found in ((FREQS, freqs), (LONG, long), (SHORT, short)):
        if found is not None and not all(math.isfinite(factor) and factor > 0 for factor in found):
            raise fields.refuse(name, "factors that are not positive numbers")
    if freqs is not None:
        if long is not None or short is not None:
            raise fields.refuse(FREQS, f"factors beside those of {LONG}")
        return freqs, None
    if (long is None) != (short is None):
        raise fields.refuse(LONG if short is None else SHORT, "one list of factors without the other")
    return short, long


def _yarn_fields(fields: Fields) -> dict[str, float]:
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


def _yarn(
    fields: Fields, yarn: dict[str, float], base: float, scale: float, attention: float, original: int
) -> dict[str, Any]:
    if scale < 1.0:
        raise fields.refuse("rope.scaling.factor", str(scale))
    if yarn["ext_factor"] not in (1.0, -1.0):
        raise fields.refuse("rope.scaling.yarn_ext_factor", str(yarn["ext_factor"]))
    whole = 0.1 * math.log(scale) + 1.0  # llama-context.cpp and transformers agree on this one
    if not (yarn["attn_factor"] in (1.0, -1.0) or math.isclose(yarn["attn_factor"], whole, rel_tol=1e-4)):
        raise fields.refuse("rope.scaling.yarn_attn_factor", str(yarn["attn_factor"]))
    if yarn["log_multiplier"]:
        whole /= 0.1 * yarn["log_multiplier"] * math.log(scale) + 1.0
    return {
        "rope_type": "yarn",
        "rope_theta": base,
        "factor": scale,
        "original_max_position_embeddings": original,
        "attention_factor": attention * whole,
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
    }


def _llama3(factors: Sequence[float], base: float, dims: int, original: int) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these factors, checked against each of them; None where there are
    none."""
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
    """Parameters from the factors between 1 and the largest: 1 / factor is a line in the turns there, low is 1 by
    choice of the length."""
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
    """The factors that transformers computes with."""
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
