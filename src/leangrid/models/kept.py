"""Linears of a block that stay in 16 bits by the field's custom, and why: they decide or scale more than they weigh.

A pattern is searched in a linear's path from its block; the first that is found counts. ``Recipe.ignore`` and ``only``
change what is quantized."""

import re

# A linear with fewer rows or columns than this, and 16 times as many of the other, makes control numbers: a gate
# a head, a weight a stream.
_FEW, _RATIO = 48, 16
_LEAST = 8  # rows or columns below which a matrix has next to no weights to save

_KEPT: tuple[tuple[str, str], ...] = (
    (
        r"(^|\.)(\w*_)?(shared_expert_gate|shared_experts_gate|expert_gate|experts_gate|shared_gate)(\.|$)",
        "weighs an expert",
    ),
    (r"(^|\.)\w*router\w*(\.|$)", "routes tokens to experts"),
    (r"(^|\.)(gate|wg|gate_weight|\w*_switch)$", "routes tokens to experts"),
    (r"(^|\.)e_score\w*$", "routes tokens to experts"),
    (r"(^|\.)(indexer|index_\w+|\w*_indexer)\.", "chooses the tokens that attention sees"),
    (r"(^|\.)(in_proj_a|in_proj_b|in_proj_ba|\w*_ba_proj|dt_proj|x_proj|bcdt_proj)$", "parameters of a state space"),
    (r"(^|\.)(b_proj|a_proj|beta_proj|alpha_proj|f_[ab]_proj|decay_proj)$", "decays of a recurrence"),
    (r"(^|\.)\w*sconv\.", "a short convolution"),
    (r"(^|\.)(weights?_proj|block_inject_weight)$", "weighs heads or streams"),
    (r"norm\.mlp\.", "scales a norm"),
)
# Of attention; ``q_a_proj`` and ``q_b_proj`` are queries by way of fewer numbers, the rank, which alone may be small.
_ATTENTION = re.compile(r"(^|\.)(q|k|v|kv|qkv|o|query|key|value)(_[ab])?(_(proj|lin|head)(_with_mqa)?)?$")
_COMPILED = tuple((re.compile(pattern), why) for pattern, why in _KEPT)


def why_kept(path: str, rows: int, cols: int) -> str | None:
    """Why the linear at ``path`` in its block, of [rows, cols], stays in 16 bits; None where it is quantized."""
    for pattern, why in _COMPILED:
        if pattern.search(path):
            return why
    few, many = min(rows, cols), max(rows, cols)
    attends = _ATTENTION.search(path) is not None  # engines fuse keys and values with the queries, however few they are
    if few < _LEAST or (few < _FEW and many >= _RATIO * few and not attends):
        return f"is of {rows} x {cols} numbers only"
    return None
