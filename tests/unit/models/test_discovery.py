"""What is found in a model by looking at it: blocks, groups by shared input, what stays, what flows."""

from collections.abc import Callable
from typing import Any

import pytest
import tiny_models
import torch
from module_models import WIDTH, Block, Model, found, linear, with_block
from torch import Tensor, nn

from leangrid.errors import ArchitectureError
from leangrid.models.discovery import discover
from leangrid.models.model_class import build_empty, with_experts_apart


def test_blocks_groups_and_the_rest_of_a_plain_decoder() -> None:
    structure = found()
    assert structure.lists == ("layers",) and structure.order == (0, 1, 2) and not structure.flows
    assert [block.path for block in structure.blocks] == ["layers.0", "layers.1", "layers.2"]
    for block in structure.blocks:
        assert block.groups == (("q", "k", "v"), ("o",), ("up",), ("down",))
        assert not (block.kept or block.fixed or block.repeated or block.left)
    assert structure.unused == {"tower.weight"} and not structure.idle


def test_a_linear_that_is_called_after_a_later_group_has_begun_is_a_group_of_its_own() -> None:
    """MLA's kv_a, the parallel MLP of phi: both streams must not run past it with weights that are not its own yet."""

    class Parallel(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            attended = self.o(self.q(x) + self.k(x))
            return x + attended + self.down(torch.relu(self.up(x))) + self.v(x)

    assert with_block(Parallel).blocks[0].groups == (("q", "k"), ("o",), ("up",), ("down",), ("v",))


def test_a_view_of_the_same_numbers_is_the_same_input_and_a_change_in_place_is_another() -> None:
    class Views(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            both = self.q(x).flatten() + self.k(x.view(-1, WIDTH)).flatten()
            changed = self.o(x.mul_(1.5)) + self.v(x)
            return x + both.view(x.shape) + changed + self.down(self.up(x))

    assert with_block(Views).blocks[0].groups == (("q", "k"), ("o", "v", "up"), ("down",))


def test_a_group_that_is_called_twice_is_known_by_its_number() -> None:
    class Twice(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            x = x + self.o(self.q(x) + self.k(x))
            x = x + self.down(torch.relu(self.up(x)))
            return x + self.down(torch.relu(self.up(self.norm(x)))) + self.v(x)

    block = with_block(Twice).blocks[0]
    assert block.groups[2:] == (("up",), ("down",), ("v",)) and block.repeated == {2, 3}


class _ReadsAWeight(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x = x + self.o(self.q(x) + self.k(x)) + x @ self.v.weight
        return x + self.down(torch.relu(self.up(x)))


class _Skips(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return x + self.o(self.q(x) + self.k(x)) + self.down(torch.relu(self.up(x)))


class _Shares(Block):
    def __init__(self) -> None:
        super().__init__()
        self.v.weight = self.k.weight


class _SharesWithIdle(_Skips):
    def __init__(self) -> None:
        super().__init__()
        self.v.weight = self.k.weight


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        (_ReadsAWeight, {"v": "is not called on text"}),
        (_Skips, {"v": "is not called on text"}),
        (
            _Shares,
            {"k": "its weight is used in layers.0.v too", "v": "its weight is used in layers.0.k too"},
        ),
        (_SharesWithIdle, {"k": "shares its weight with another module", "v": "is not called on text"}),
    ],
)
def test_linears_that_cannot_be_quantized_stay_and_say_why(kind: Callable[[], nn.Module], kept: dict[str, str]) -> None:
    block = with_block(kind).blocks[0]
    assert dict(block.kept) == dict(block.fixed) == kept
    assert not set(kept) & {name for group in block.groups for name in group}


def test_a_weight_that_is_multiplied_outside_of_its_linear_stays() -> None:
    class Reads(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x) + x @ self.v.weight

    assert dict(with_block(Reads).blocks[0].kept) == {"v": "its weight is used in layers.0 too"}


def test_matrices_of_no_linear_are_counted_as_left() -> None:
    class Bare(Block):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.empty(WIDTH, WIDTH))

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x) + x @ self.matrix

    assert dict(with_block(Bare).blocks[0].left) == {"matrix": (WIDTH, WIDTH)}


def test_control_linears_stay_by_custom() -> None:
    class Routed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.router = linear(8)

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x) * self.router(x).softmax(-1)[..., :1]

    block = with_block(Routed).blocks[0]
    assert dict(block.kept) == {"router": "routes tokens to experts"} and not block.fixed


class _SharesThroughADict(Model):
    """The second block reads what the first one left, as later layers of Gemma 3n read earlier keys."""

    def __init__(self) -> None:
        super().__init__(_Leaves, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x, shared = self.embed(ids), {"keys": torch.zeros(1)}
        for layer in self.layers:
            x = layer(x, shared=shared)
        return x


class _Leaves(Block):
    def forward(self, x: Tensor, **given: Any) -> Tensor:
        out = super().forward(x) + given["shared"]["keys"]
        given["shared"]["keys"] = self.k(x)
        return out


class _PassesAnEmbeddingALayer(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = start = self.embed(ids)
        for layer in self.layers:
            x = layer(x, start=start)
        return x


class _AddsBetween(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x) + 0.5
        return x


class _CallsAgain(Model):
    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for number in (0, 1, 0, 1, 2):
            x = self.layers[number](x)
        return x


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_SharesThroughADict, "shared.keys of layers.1"),
        (_PassesAnEmbeddingALayer, "start of layers.0"),
        (_AddsBetween, "the input of layers.1 is not the output of layers.0"),
        (_CallsAgain, "layers.0 is called more than once"),
    ],
)
def test_what_flows_beside_the_hidden_states_is_named(kind: Callable[[], nn.Module], words: str) -> None:
    assert words in found(kind).flows


def test_blocks_that_are_called_again_are_one_block_in_the_order_of_calls() -> None:
    structure = found(_CallsAgain)
    assert structure.order == (0, 1, 0, 1, 2) and len(structure.blocks) == 3
    assert structure.blocks[0].groups == (("q", "k", "v"), ("o",), ("up",), ("down",))


def test_tables_that_every_block_is_given_do_not_flow() -> None:
    class Given(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x, table = self.embed(ids), torch.arange(ids.shape[1])[:, None] / 7
            for layer in self.layers:
                x = layer(x, table=table, mask=None)
            return x

    assert not found(Given).flows


def test_blocks_that_text_does_not_reach_are_idle() -> None:
    class Half(Model):
        def forward(self, ids: Tensor) -> Tensor:
            return self.layers[1](self.layers[0](self.embed(ids)))

    structure = found(Half)
    assert structure.idle == ("layers.2",) and len(structure.blocks) == 2


def test_a_list_of_small_modules_is_no_list_of_blocks() -> None:
    class WithAdapters(Model):
        def __init__(self) -> None:
            super().__init__()
            self.adapters = nn.ModuleList([linear(2), linear(2)])
            self.small = nn.ModuleList([nn.Sequential(linear(2), linear(cols=2)) for _ in range(2)])

        def forward(self, ids: Tensor) -> Tensor:
            x = super().forward(ids)
            for small in self.small:
                x = small(x)
            return x

    assert found(WithAdapters).lists == ("layers",)


def test_a_model_without_blocks_is_refused() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.one = nn.Embedding(100, WIDTH), linear()

        def forward(self, ids: Tensor) -> Tensor:
            return self.one(self.embed(ids))

    with pytest.raises(ArchitectureError, match=r"no list of modules runs hidden states.*Flat|Flat.*no list") as caught:
        found(Flat)
    assert caught.value.exit_code == 2


def test_a_forward_that_fails_is_refused_with_its_own_words() -> None:
    class Needs(Model):
        def forward(self, ids: Tensor) -> Tensor:
            raise ValueError("You have to give pixel_values\nor something else")

    with pytest.raises(ArchitectureError, match=r"cannot be followed on text alone: .*pixel_values") as caught:
        found(Needs)
    assert "something else" not in str(caught.value)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_experts_of_a_stage_are_one_group(name: str) -> None:
    model = with_experts_apart(build_empty(tiny_models.CONFIGS[name]()))
    structure = discover(model, model.model, lambda entry, number: entry(torch.arange(4)[None] + number))  # pyright: ignore
    groups = structure.blocks[-1].groups
    experts = [group for group in groups if ".experts." in group[0]]
    assert [len(group) for group in experts] == [8, 4] and experts[0][:2] == (
        "mlp.experts.0.gate_proj",
        "mlp.experts.0.up_proj",
    )
    assert not any("mlp.gate" in (name, name.removesuffix(".weight")) for group in groups for name in group)


@pytest.mark.parametrize(("name", "blocks"), [("gemma3n", 4), ("albert", 1)])
def test_models_in_which_more_flows(name: str, blocks: int) -> None:
    config = tiny_models.CONFIGS[name]()
    config.use_cache = False
    model = build_empty(config)
    entry = model.base_model
    structure = discover(model, entry, lambda entry, number: entry(torch.arange(4)[None] + number))
    assert structure.flows and len(structure.blocks) == blocks
