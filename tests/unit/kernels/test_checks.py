"""What the kernels refuse, before any pointer reaches C++; and how a path is chosen."""

import sys
from collections.abc import Callable

import pytest
import torch

from leangrid import kernels
from leangrid.errors import RecipeError, ShapeError
from leangrid.kernels import choice, native, plain

W = torch.linspace(-1, 1, 12).reshape(2, 6)
ONES = torch.ones(6, dtype=torch.float64)
GRID = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
CODES = torch.zeros(2, 6, dtype=torch.uint8)
ZERO = torch.zeros(2, 1, dtype=torch.uint8)
GROUP = torch.zeros(6, dtype=torch.int64)


def replaced(tensor: torch.Tensor, value: float) -> torch.Tensor:
    out = tensor.clone()
    out.view(-1)[3] = value
    return out


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "weight_nan": (lambda: kernels.kmeans_dp(replaced(W, float("nan")), ONES, 2), "NaN or infinite"),
    "weight_infinite": (
        lambda: kernels.affine_search(replaced(W, float("inf")), ONES, 4, 64, 0.2, 6),
        "NaN or infinite",
    ),
    "weight_dtype": (lambda: kernels.kmeans_lloyd(W.double(), ONES, 2), "expected a matrix of torch.float32"),
    "weight_vector": (lambda: kernels.kmeans_dp(W[0], ONES, 2), "expected a matrix"),
    "weight_no_columns": (lambda: kernels.kmeans_dp(torch.empty(2, 0), ONES[:0], 2), "no columns"),
    "importance_infinite": (lambda: kernels.kmeans_dp(W, replaced(ONES, float("inf")), 2), "negative, NaN or infinite"),
    "importance_nan": (
        lambda: kernels.affine_search(W, replaced(ONES, float("nan")), 4, 64, 0.2, 6),
        "negative, NaN or infinite",
    ),
    "importance_negative": (lambda: kernels.kmeans_lloyd(W, replaced(ONES, -1e-9), 2), "negative, NaN or infinite"),
    "importance_dtype": (lambda: kernels.kmeans_dp(W, ONES.float(), 2), "importance torch.float32"),
    "importance_length": (lambda: kernels.kmeans_dp(W, ONES[:5], 2), r"importance torch.float64 \(5,\)"),
    "no_levels": (lambda: kernels.kmeans_dp(W, ONES, 0), "0 levels"),
    "many_levels": (lambda: kernels.kmeans_lloyd(W, ONES, 257), "257 levels"),
    "no_iterations": (lambda: kernels.kmeans_lloyd(W, ONES, 2, 0), "0 iterations"),
    "group_divides": (lambda: kernels.affine_search(W, ONES, 4, 64, 0.2, 4), "groups of 4 do not divide 6"),
    "group_zero": (lambda: kernels.affine_search(W, ONES, 4, 64, 0.2, 0), "groups of 0"),
    "bits": (lambda: kernels.affine_search(W, ONES, 9, 64, 0.2, 6), "bits 9"),
    "shrink": (lambda: kernels.affine_search(W, ONES, 4, 64, 0.5, 6), "shrink 0.5"),
    "scale_dtype": (
        lambda: kernels.affine_search(W, ONES, 4, 64, 0.2, 6, False, torch.float64),
        "scale dtype torch.float64",
    ),
    "upper_shape": (lambda: kernels.sweep_levels(W, torch.eye(5), GRID), r"upper \(5, 5\)"),
    "levels_rows": (lambda: kernels.sweep_levels(W, torch.eye(6), GRID[:1]), r"levels \(1, 2\)"),
    "levels_none": (lambda: kernels.sweep_levels(W, torch.eye(6), GRID[:, :0]), r"levels \(2, 0\)"),
    "zero_point_shape": (lambda: kernels.sweep_affine(W, torch.eye(6), GRID, ZERO, GROUP, 4), "differ"),
    "zero_point_dtype": (
        lambda: kernels.sweep_affine(W, torch.eye(6), GRID[:, :1], ZERO.int(), GROUP, 4),
        "torch.uint8",
    ),
    "group_range": (lambda: kernels.sweep_affine(W, torch.eye(6), GRID[:, :1], ZERO, GROUP + 1, 4), "with 1 groups"),
    "group_negative": (lambda: kernels.sweep_affine(W, torch.eye(6), GRID[:, :1], ZERO, GROUP - 1, 4), "-1..-1"),
    "group_length": (
        lambda: kernels.sweep_affine(W, torch.eye(6), GRID[:, :1], ZERO, GROUP[:5], 4),
        r"expected int \[6\]",
    ),
    "sweep_bits": (lambda: kernels.sweep_affine(W, torch.eye(6), GRID[:, :1], ZERO, GROUP, 0), "0 bits"),
    "codes_large": (lambda: kernels.descend_levels(W, torch.eye(6), CODES + 2, GRID), "code 2 with 2 levels"),
    "codes_affine": (
        lambda: kernels.descend_affine(W, torch.eye(6), CODES + 9, GRID[:, :1], ZERO, GROUP, 3),
        "code 9 with 8 levels",
    ),
    "codes_shape": (lambda: kernels.descend_levels(W, torch.eye(6), CODES[:, :5], GRID), r"codes \(2, 5\)"),
    "gram_codes": (lambda: kernels.level_gram(torch.eye(6), CODES + 4, 4), "code 4 with 4 levels"),
    "gram_shape": (lambda: kernels.level_gram(torch.eye(7), CODES, 4), r"hessian \(7, 7\)"),
    "gram_levels": (lambda: kernels.level_gram(torch.eye(6), CODES, 0), "0 levels"),
}


@pytest.mark.fault("O6")
@pytest.mark.parametrize("case", sorted(REFUSED))
def test_bad_input_is_one_shape_error(case: str) -> None:
    call, message = REFUSED[case]
    with pytest.raises(ShapeError, match=message):
        call()


def test_an_unknown_path_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANGRID_KERNELS", "sse9")
    with pytest.raises(RecipeError, match="LEANGRID_KERNELS=sse9"):
        kernels.backend()


def test_the_torch_path_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    assert kernels.backend() == "torch"
    assert kernels.kmeans_dp(W, ONES, 2)[0].shape == (2, 2)


@pytest.mark.fault("O7")
def test_without_the_extension_there_is_one_notice_and_the_torch_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANGRID_KERNELS", raising=False)
    monkeypatch.delattr(kernels, "_cpu", raising=False)
    monkeypatch.setitem(sys.modules, "leangrid.kernels._cpu", None)  # makes the import fail
    native._extension.cache_clear()
    native._isa.cache_clear()
    try:
        with pytest.warns(UserWarning, match=r"without its C\+\+ kernels") as notices:
            assert kernels.kmeans_dp(W, ONES, 2)[0].shape == (2, 2)
            assert kernels.backend() == "torch"
        assert len(notices) == 1
    finally:
        native._extension.cache_clear()
        native._isa.cache_clear()


CUDA = torch.device("cuda")


def test_cuda_tensors_go_to_triton_unless_torch_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice, "_triton", lambda interpreted=False: (choice, "")
    )  # stands for the module with the kernels
    for wanted in ("", "triton", "portable"):  # the last is about CPU tensors
        monkeypatch.setenv("LEANGRID_KERNELS", wanted)
        assert choice._module(CUDA) is choice
        assert kernels.backend(CUDA) == "triton"
    monkeypatch.setenv("LEANGRID_KERNELS", "torch")
    assert choice._module(CUDA) is plain
    assert kernels.backend("cuda") == "torch"


def test_where_triton_cannot_run_there_is_one_notice_or_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_triton", lambda interpreted=False: (None, "RuntimeError: Failed to find C compiler"))
    monkeypatch.delenv("LEANGRID_KERNELS", raising=False)
    choice._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="without its Triton kernels .* Failed to find C compiler") as notices:
        assert [choice._module(CUDA), choice._module(CUDA)] == [plain, plain]
    assert len(notices) == 1
    monkeypatch.setenv("LEANGRID_KERNELS", "triton")
    with pytest.raises(RecipeError, match="Triton does not run here: RuntimeError: Failed to find C compiler"):
        choice._module(CUDA)


def test_triton_for_cpu_tensors_asks_for_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEANGRID_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RecipeError, match="TRITON_INTERPRET=1"):
        kernels.kmeans_dp(W, ONES, 2)


@pytest.mark.fault("O7")
def test_a_missing_triton_is_the_reason_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("leangrid.kernels.triton")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)  # makes the import fail
    choice._triton.cache_clear()
    try:
        module, why = choice._triton()
    finally:
        choice._triton.cache_clear()
    assert module is None
    assert "triton" in why
