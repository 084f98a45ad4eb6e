"""only lifts the custom by which a linear stays where it spells its name; what cannot be quantized stays refused."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as hf

from leangrid.errors import RecipeError
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source


@pytest.fixture(scope="module")
def mamba(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("mamba")
    hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8)
    ).save_pretrained(directory)
    return directory


def quantized(source: Path, only: Sequence[str]) -> set[str]:
    skeleton = Skeleton(open_source(source))
    skeleton.select((), only)
    return {name.rpartition(".")[2] for name in skeleton.all_linear_names()}


@pytest.mark.parametrize(
    ("only", "names"),
    [
        ([], {"in_proj", "out_proj"}),
        (["*"], {"in_proj", "out_proj"}),
        (["re:.*_proj"], {"in_proj", "out_proj"}),
        (["*.x_proj"], {"x_proj"}),
        (["re:.*x_proj", "out_proj"], {"x_proj", "out_proj"}),
    ],
)
def test_a_custom_is_lifted_for_what_is_spelled_out(mamba: Path, only: list[str], names: set[str]) -> None:
    assert quantized(mamba, only) == names


def test_a_pattern_that_names_customs_without_spelling_them_says_how(mamba: Path) -> None:
    with pytest.raises(RecipeError, match=r"x_proj stays \(parameters of a state space\).*Write its name, as in"):
        quantized(mamba, ["*.x_p*"])


def test_what_text_does_not_call_cannot_be_quantized(mamba: Path) -> None:
    with pytest.raises(RecipeError, match=r"dt_proj stays \(is not called on text\)"):
        quantized(mamba, ["*.dt_proj"])
