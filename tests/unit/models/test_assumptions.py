"""Models that break what the walk assumes are refused with the module's name; those that only look so are not."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from module_models import WIDTH, Block, Model, found, linear, with_block
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

from leangrid.errors import ArchitectureError
from leangrid.models.discovery import FoundBlock, discover

GROUPS = (("q", "k", "v"), ("o",), ("up",), ("down",))


def refused(kind: Callable[[], nn.Module]) -> str:
    """The sentence with which a model is refused."""
    with pytest.raises(ArchitectureError) as caught:
        found(kind)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    return str(caught.value)


def refused_block(kind: Callable[[], nn.Module]) -> str:
    return refused(lambda: Model(kind))


# ---------------------------------------------------------------- settings of torch


class _Mixed(Block):
    """Attention under autocast, as mixed-precision code has it."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            attended = self.o(self.q(x) + self.k(x) * self.v(x))
        x = x + attended.float()
        return x + self.down(torch.relu(self.up(self.norm(x))))


def test_linears_under_autocast_stay_and_the_others_are_taken() -> None:
    block = with_block(_Mixed).blocks[0]
    assert block.fixed == dict.fromkeys("qkvo", "is called under autocast") and block.groups == (("up",), ("down",))


def test_autocast_that_is_turned_off_is_none() -> None:
    class Island(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return super().forward(x.float())

    assert with_block(Island).blocks[0].groups == GROUPS


def test_blocks_that_are_called_under_autocast_are_refused() -> None:
    class Around(Model):
        def forward(self, ids: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(ids)

    assert "layers.0 is called under autocast" in refused(Around)


def test_linears_under_a_transform_of_torch_func_stay() -> None:
    class Mapped(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return super().forward(x) + torch.vmap(self.v)(x[0])[None]

    class Twice(Mapped):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x + self.o(self.q(x) + self.k(x)) + torch.vmap(self.v)(x[0])[None]

    assert dict(with_block(Mapped).blocks[0].fixed) == {"v": "is called under a transform of torch.func"}
    assert dict(with_block(Twice).blocks[0].fixed)["v"] == "is called under a transform of torch.func"


# ---------------------------------------------------------------- weights


class _Scales(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.o.weight.data.mul_(0.5)
        return super().forward(x)


class _Normalizes(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.up.weight.data = nn.functional.normalize(self.up.weight.data)
        return super().forward(x)


class _Replaces(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.up.weight = nn.Parameter(2 * self.up.weight)
        return super().forward(x)


class _ScalesItsNorm(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.norm.weight.data.copy_(self.norm.weight.abs())
        return super().forward(x)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (_Scales, "changes the weight layers.0.o.weight in place (mul_)"),
        (_Normalizes, "changes the weight layers.0.up.weight"),
        (_Replaces, "changes the weight layers.0.up.weight"),
        (_ScalesItsNorm, "changes the weight layers.0.norm.weight in place (copy_)"),
    ],
)
def test_weights_that_the_forward_pass_changes(kind: Callable[[], nn.Module], words: str) -> None:
    assert words in refused_block(kind)


def test_a_change_of_a_weight_that_is_none_is_none() -> None:
    class Divides(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            self.o.weight.data.div_(1)
            return super().forward(x)

    assert with_block(Divides).blocks[0].groups == GROUPS


def test_a_weight_of_a_block_that_is_used_outside_of_it() -> None:
    class Peeks(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.layers[0].norm(self.embed(ids))  # pyright: ignore
            for layer in self.layers:
                x = layer(x)
            return x

    class Reaches(Model):
        def __init__(self) -> None:
            super().__init__()
            for layer, following in zip(self.layers, self.layers[1:], strict=False):
                object.__setattr__(layer, "following", following)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x)
                x = x + layer.following.v(x) if hasattr(layer, "following") else x  # pyright: ignore
            return x

    class Inside(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            following: Any = getattr(self, "following", None)
            return super().forward(x if following is None else following.q(x))

    class ReachesInside(Reaches):
        def __init__(self) -> None:
            Model.__init__(self, Inside)
            for layer, following in zip(self.layers, self.layers[1:], strict=False):
                object.__setattr__(layer, "following", following)

        forward = Model.forward

    assert "the weights of layers.0.norm are used in the model itself, outside of their block" in refused(Peeks)
    assert "the weights of layers.1.v are used in the model itself, outside of their block" in refused(Reaches)
    assert "the weights of layers.1.q are used in layers.0, outside of their block" in refused(ReachesInside)


@pytest.mark.parametrize("how", ["elementwise", "cast", "norm", "absorbed"])
def test_a_weight_that_is_read_beside_its_linear_stays(how: str) -> None:
    class Reads(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            weight = self.v.weight
            extra = {
                "elementwise": lambda: x * weight[0],
                "cast": lambda: nn.functional.linear(x, weight.float()),
                "norm": lambda: x / weight.norm(),
                "absorbed": lambda: x @ (weight @ self.q.weight),
            }[how]()
            return super().forward(x) + extra

    fixed = with_block(Reads).blocks[0].fixed
    assert fixed["v"] == "its weight is used in layers.0 too" and set(fixed) == (
        {"v", "q"} if how == "absorbed" else {"v"}
    )


def test_shapes_and_dtypes_of_a_weight_may_be_read_anywhere() -> None:
    class Looks(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            like = torch.zeros_like(self.v.weight.t()), self.v.weight.new_ones(1)
            return super().forward(x.to(self.v.weight.dtype)) * like[1]

    assert with_block(Looks).blocks[0].groups == GROUPS


# ---------------------------------------------------------------- linears that are more than a product


class _WeightNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.weight_norm(self.v)


class _OldWeightNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        weight_norm(self.v)


class _SpectralNorm(Block):
    def __init__(self) -> None:
        super().__init__()
        parametrizations.spectral_norm(self.v)


class _Hooked(Block):
    def __init__(self) -> None:
        super().__init__()
        self.v.register_forward_hook(lambda _module, _args, out: torch.tanh(out))


class _OwnForward(Block):
    def __init__(self) -> None:
        super().__init__()
        self.v.forward = lambda x: nn.functional.linear(x, self.v.weight).tanh()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (_WeightNorm, "its weight is computed whenever it is called"),
        (_OldWeightNorm, "its weight is computed whenever it is called"),
        (_SpectralNorm, "its weight is computed whenever it is called"),
        (_Hooked, "has hooks of its own"),
    ],
)
def test_linears_that_do_more_than_multiply_stay(kind: Callable[[], nn.Module], why: str) -> None:
    block = with_block(kind).blocks[0]
    assert dict(block.kept) == dict(block.fixed) == {"v": why} and block.groups == (("q", "k"), *GROUPS[1:])


def test_a_linear_with_a_forward_of_its_own_instance_is_none() -> None:
    with torch.device("meta"):
        model = Model(_OwnForward)
    block = discover(model, model, lambda entry, number: entry(torch.arange(5)[None] + number)).blocks[0]
    assert block.left == {"v.weight": (WIDTH, WIDTH)} and block.groups == (("q", "k"), *GROUPS[1:])


def test_linears_of_one_subclass_are_told_apart_by_what_they_do() -> None:
    class Scaled(nn.Linear):
        scale = 1.0

        def forward(self, input: Tensor) -> Tensor:
            return self.scale * nn.functional.linear(input, self.weight)

    class Scales(Block):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.v = Scaled(WIDTH, WIDTH, bias=False), Scaled(WIDTH, WIDTH, bias=False)
            self.v.scale = 2.0

    block = with_block(Scales).blocks[0]
    assert block.groups == (("q", "k"), *GROUPS[1:]) and block.left == {"v.weight": (WIDTH, WIDTH)}


def test_one_linear_under_two_names_or_in_two_blocks_stays() -> None:
    class TwoNames(Block):
        def __init__(self) -> None:
            super().__init__()
            self.v = self.q

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return x + self.o(self.q(x) + self.k(x) * self.v(x + 1)) + self.down(torch.relu(self.up(x)))

    class OneForAll(Model):
        def __init__(self) -> None:
            super().__init__()
            for layer in self.layers:
                layer.v = self.layers[0].v

    assert set(with_block(TwoNames).blocks[0].fixed) == {"q", "v"}
    assert [set(block.fixed) for block in found(OneForAll).blocks] == [{"v"}] * 3


# ---------------------------------------------------------------- chance, memory, order


class _Drops(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        return super().forward(nn.functional.dropout(x, 0.5))  # training=True is the default


class _TrainsItself(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.train()
        return self.down(self.drop(torch.relu(self.up(x))))


@pytest.mark.parametrize("kind", [_Drops, _TrainsItself])
def test_what_depends_on_random_numbers_is_refused(kind: Callable[[], nn.Module]) -> None:
    words = refused_block(kind)
    assert "reads depends on random numbers, drawn in layers.0" in words


def test_random_numbers_that_change_nothing_are_no_matter_and_the_callers_stay() -> None:
    class LayerDrop(Model):
        def forward(self, ids: Tensor) -> Tensor:
            self.eval()
            x = self.embed(ids)
            for layer in self.layers:
                if not (torch.rand(()) < 0.5 and self.training):
                    x = layer(x)
            return x

    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    assert not found(LayerDrop).flows
    assert torch.equal(torch.rand(2), expected)


class _Remembers(Model):
    """The second block reads what the first one left in an attribute."""

    def __init__(self, everybody: bool = False) -> None:
        super().__init__(_Keeps, 2)
        object.__setattr__(self.layers[1], "before", self.layers[0])


class _Keeps(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.last = x.sum(1, keepdim=True)
        before: Any = getattr(self, "before", None)
        return super().forward(x if before is None else x + before.last)


class _Accumulates(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(WIDTH, device="cpu"))

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.total: Tensor = self.total + x.mean((0, 1))
        return super().forward(x + self.total)


class _Counts(Block):
    calls = 0

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        self.calls += 1
        return super().forward(x / self.calls)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (_Remembers, "layers.0.last"),
        (lambda: Model(_Accumulates), "layers.0.total"),
        (lambda: Model(_Counts), "layers.0.calls"),
    ],
)
def test_what_modules_keep_between_calls_is_refused_where_it_matters(kind: Callable[[], nn.Module], name: str) -> None:
    assert f"{name} is kept from one call to the next, and what is computed depends on it" in refused(kind)


def test_what_modules_keep_for_others_to_look_at_does_not_matter() -> None:
    class Shows(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            self.seen = self.seen + 1 if hasattr(self, "seen") else 1
            self.scores = 2 * x
            self.table = getattr(self, "table", torch.ones(1))
            return super().forward(x * self.table)

    assert with_block(Shows).blocks[0].groups[0] == ("q", "k", "v")


def test_blocks_that_are_called_as_often_as_there_are_tokens_are_refused() -> None:
    class ATokenAtATime(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x, state = self.embed(ids), torch.zeros(1, 1, WIDTH)
            for place in range(x.shape[1]):
                state = state + x[:, place : place + 1]
                for layer in self.layers:
                    state = layer(state)
            return state

    def run(entry: nn.Module, number: int) -> Any:
        return entry(torch.arange(8 if number == 2 else 4)[None] + number)

    with torch.device("meta"):
        model = ATokenAtATime()
    with pytest.raises(ArchitectureError, match=r"layers.0 is called 4 times, with a longer text 8 times"):
        discover(model, model, run)


# ---------------------------------------------------------------- arguments that are changed


class _AddsInPlace(Block):
    def forward(self, x: Tensor, **_: Any) -> Tensor:
        x += self.o(self.q(x) + self.k(x) * self.v(x))
        x.add_(self.down(torch.relu(self.up(x))))
        return x


def test_a_block_that_changes_its_input_is_known() -> None:
    block: FoundBlock = with_block(_AddsInPlace).blocks[0]
    assert block.changes and block.groups == GROUPS and not with_block(Block).blocks[0].changes


def test_a_block_that_changes_an_argument_of_its_own_is_no_link_of_a_chain() -> None:
    class Biased(Block):
        def forward(self, x: Tensor, **given: Any) -> Tensor:
            given["bias"] += 1
            return super().forward(x + given["bias"])

    class Biases(Model):
        def __init__(self) -> None:
            super().__init__(Biased)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x, bias=torch.zeros(1))
            return x

    structure = found(Biases)
    assert structure.flows[0] == "bias of layers.0 is changed by it" and structure.blocks[0].changes


def test_a_failing_pass_names_the_module_at_work() -> None:
    class Fails(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return self.down(x)

    words = refused_block(Fails)
    assert "cannot be followed on text alone: " in words and "in module layers.0.down" in words


def test_values_of_activations_may_be_looked_at() -> None:
    class Decides(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            largest = x.abs().max().item()
            rows = torch.nonzero(x.sum((0, 2)) < 2 * largest * x.shape[-1])
            assert rows.tolist()
            return super().forward(x)

    assert with_block(Decides).blocks[0].groups == GROUPS


def test_a_linear_that_is_called_with_keywords() -> None:
    class Named(Block):
        def forward(self, x: Tensor, **_: Any) -> Tensor:
            x = x + self.o(input=self.q(input=x) + self.k(x) * self.v(input=x))
            return x + self.down(torch.relu(self.up(self.norm(x))))

    assert with_block(Named).blocks[0].groups == GROUPS
    assert linear().weight.shape == (WIDTH, WIDTH)
