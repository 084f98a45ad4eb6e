"""ignore and only: which linears are quantized, in which groups, and what is refused."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from leangrid.errors import RecipeError
from leangrid.models.skeleton import Skeleton
from leangrid.storage.source import open_source

Tiny = Callable[..., Path]
ATTENTION = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",))
MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))


def selected(source: Path, ignore: Sequence[str] = (), only: Sequence[str] = ()) -> Skeleton:
    skeleton = Skeleton(open_source(source))
    skeleton.select(ignore, only)
    return skeleton


@pytest.mark.parametrize(
    ("ignore", "only", "groups"),
    [
        ((), (), ATTENTION + MLP),
        (("down_proj",), (), ATTENTION + MLP[:1]),
        (("re:.*mlp.*",), (), ATTENTION),
        ((), ("*.mlp.*",), MLP),
        (("*.down_proj",), ("*.mlp.*",), MLP[:1]),
        (("lm_head", "*norm*", "embed_tokens"), (), ATTENTION + MLP),
    ],
)
def test_the_groups_of_every_block(tiny: Tiny, ignore: tuple, only: tuple, groups: tuple) -> None:
    skeleton = selected(tiny("llama3"), ignore, only)
    assert [skeleton.groups(index) for index in range(2)] == [groups, groups]
    named = {name for group in groups for name in group}
    assert {name.split(".", 3)[3] for name in skeleton.all_linear_names()} == named
    assert len(skeleton.kept) == 2 * (7 - len(named))


def test_one_block_is_left_out_whole(tiny: Tiny) -> None:
    skeleton = selected(tiny("llama3"), ["model.layers.0.*"])
    assert (skeleton.groups(0), skeleton.groups(1)) == ((), ATTENTION + MLP)
    assert set(skeleton.kept.values()) == {"--ignore model.layers.0.*"}


def test_a_linear_between_two_that_read_the_same_ends_no_group_where_it_stays(tiny: Tiny) -> None:
    """deepseek_v3 calls q_b between q_a and kv_a, which read the same input."""
    assert ("self_attn.q_a_proj",) in selected(tiny("deepseek_v3")).groups(0)
    groups = selected(tiny("deepseek_v3"), ["*.q_b_proj"]).groups(0)
    assert groups[0] == ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa")


def test_all_experts_of_a_block_stay(tiny: Tiny) -> None:
    skeleton = selected(tiny("qwen3_moe"), ["model.layers.1.mlp.experts.*"])
    assert any("experts" in name for group in skeleton.groups(0) for name in group)
    assert skeleton.groups(1) == ATTENTION
    assert sum("experts" in name for name in skeleton.kept) == 4 * 3


def test_experts_alone(tiny: Tiny) -> None:
    skeleton = selected(tiny("qwen3_moe"), only=["*.experts.*"])
    assert len(skeleton.groups(0)) == 2 and all("experts" in name for name in skeleton.all_linear_names())


REFUSED = [
    ("llama3", ["*.dwon_proj"], [], r"'\*\.dwon_proj' names no linear of the model \(--ignore\). Near are down_proj"),
    ("llama3", ["re:down_proj"], [], r"'re:down_proj' names no linear of the model; a regular expression has to match"),
    ("llama3", [], ["zzz"], r"'zzz' names no linear of the model \(--only\). Names are such as model.layers.0"),
    ("llama3", [], ["lm_head"], r"'lm_head' names no linear that is quantized: lm_head stays .* \(--only\)"),
    ("llama3", [], ["down_proj", "lm_head"], r"'lm_head' names no linear that is quantized"),
    ("llama3", ["*"], [], r"no linear is left to be quantized \(--ignore\)"),
    ("llama3", ["down_proj"], ["down_proj"], r"no linear is left to be quantized \(--only\)"),
    ("llama3", ["*.q_proj"], [], r"q_proj, k_proj, v_proj share an input .*q_proj alone.* \(--ignore \*\.q_proj: .*\)"),
    ("llama3", [], ["up_proj"], r"gate_proj, up_proj share an input .* gate_proj alone .* \(--only names others: .*\)"),
    ("qwen3_moe", ["experts.3.*"], [], r"the experts of a block are quantized together .* \(--ignore experts.3.\*: "),
    ("qwen3_moe", ["*.experts.*.down_proj"], [], r"the experts of a block are quantized together or stay together"),
]


@pytest.mark.parametrize(("name", "ignore", "only", "said"), REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(tiny: Tiny, name: str, ignore: list, only: list, said: str) -> None:
    with pytest.raises(RecipeError, match=said) as told:
        selected(tiny(name), ignore, only)
    assert "\n" not in str(told.value) and told.value.exit_code == 2
