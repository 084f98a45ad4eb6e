"""Which linears stay in 16 bits by custom, by their names and shapes."""

import pytest

from leangrid.models.kept import why_kept


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("mlp.gate", "routes tokens to experts"),
        ("mlp.router", "routes tokens to experts"),
        ("block_sparse_moe.router.layer", "routes tokens to experts"),
        ("mlp.shared_expert_gate", "weighs an expert"),
        ("self_attn.indexer.wq_b", "chooses the tokens that attention sees"),
        ("linear_attn.in_proj_a", "parameters of a state space"),
        ("linear_attn.in_proj_ba", "parameters of a state space"),
        ("mixer.dt_proj", "parameters of a state space"),
        ("mixer.x_proj", "parameters of a state space"),
    ],
)
def test_controls_stay(path: str, why: str) -> None:
    assert why_kept(path, 256, 256) == why


@pytest.mark.parametrize(
    "path",
    [
        *(
            "self_attn.q_proj",
            "self_attn.kv_a_proj_with_mqa",
            "mlp.gate_proj",
            "mlp.gate_up_proj",
            "mlp.experts.3.up_proj",
        ),
        *("attn.c_attn", "linear_attn.in_proj_qkvz", "mixer.in_proj", "mixer.out_proj", "mlp.shared_expert.gate_proj"),
        *("mlp.shared_experts.down_proj", "feed_forward.w1", "attention.wqkv", "mlp.experts.3.up_proj"),
    ],
)
def test_matrices_of_weights_do_not(path: str) -> None:
    assert why_kept(path, 256, 256) is None


@pytest.mark.parametrize(
    ("rows", "cols", "stays"),
    [(32, 2048, True), (2048, 32, True), (7, 64, True), (64, 64, False), (48, 2048, False), (32, 500, False)],
)
def test_few_rows_or_columns_beside_many_of_the_other_stay(rows: int, cols: int, stays: bool) -> None:
    why = why_kept("mixer.some_proj", rows, cols)
    assert why == (f"is of {rows} x {cols} numbers only" if stays else None)


@pytest.mark.parametrize(
    ("path", "rows", "cols"),
    [
        *(("self_attn.k_proj", 32, 2048), ("attn.kv_a_proj_with_mqa", 24, 512), ("attn.kv_b_proj", 512, 32)),
        *(("self_attn.q_a_proj", 16, 256), ("self_attn.q_b_proj", 256, 16), ("self_attn.o_b_proj", 512, 32)),
        ("self_attn.o_proj", 512, 32),
    ],
)
def test_attention_by_way_of_few_numbers_does_not(path: str, rows: int, cols: int) -> None:
    assert why_kept(path, rows, cols) is None
