"""Models that do what models rarely do: through the whole run, each with the right result, or refused before anything
is written. What is right is said by hooks on transformers' own model."""

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import odd_models
import pytest
import tiny_models
import torch
import zoo_uses
from odd_models import WIDTH, Layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers import AutoModelForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.llama.modeling_llama import LlamaModel
from zoo_adapter import Walked, ends_watched, hessians_watched

import leangrid
from leangrid.errors import ArchitectureError

IDS = tiny_models.tokens(4, 24)
RECIPE = leangrid.Recipe(scheme="W8A16_G32", samples=4, length=24)
ALL = {
    f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")
} | {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}  # fmt: skip


class _InPlace(Layer):
    """The residual is added into the block's own input."""

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        hidden_states += self.attend(hidden_states, given)
        return hidden_states.add_(self.think(hidden_states))


class _InputOfTheGroup(Layer):
    """What the linears of a group read is changed once they have read it, and a linear is called again."""

    def think(self, x: Tensor) -> Tensor:
        x = self.post_attention_layernorm(x)
        first = self.mlp.act_fn(self.mlp.gate_proj(x)) * self.mlp.up_proj(x)
        x.mul_(0.5).sub_(0.1)
        again = self.mlp.act_fn(self.mlp.gate_proj(x))
        x.zero_()
        return self.mlp.down_proj(first + again)


class _Autocast(Layer):
    def attend(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().attend(x, given).float()


class _Parametrized(Layer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        parametrizations.weight_norm(self.self_attn.v_proj)
        parametrizations.spectral_norm(self.mlp.up_proj)


class _WeightNorm(Layer):
    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        parametrizations.weight_norm(self.self_attn.v_proj)


class _Reads(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        x = super().forward(hidden_states, **given)
        return x + nn.functional.linear(x, self.self_attn.o_proj.weight) + x * self.mlp.up_proj.weight[0]


class _TwiceThrough(nn.ModuleList):
    def __getitem__(self, idx: Any) -> Any:
        found = super().__getitem__(idx)
        return [*found, *found] if isinstance(idx, slice) else found


class _Looped(LlamaModel):
    """The blocks run twice: what the first reads depends on the last."""

    blocks = _TwiceThrough


class _Given(LlamaModel):
    """The blocks put what they made into a list that all of them read."""

    def forward(self, *args: Any, **given: Any) -> Any:
        return super().forward(*args, **given, seen=[])


class _Appends(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        seen = given.pop("seen")
        x = super().forward(hidden_states, **given)
        seen.append(x)
        return x + sum(seen) / len(seen)


class _Keyword(Layer):
    def think(self, x: Tensor) -> Tensor:
        x = self.post_attention_layernorm(x)
        return self.mlp.down_proj(input=self.mlp.act_fn(self.mlp.gate_proj(input=x)) * self.mlp.up_proj(input=x))


class _Looks(Layer):
    """Decides by values, though always in the same way; draws numbers that change nothing; keeps what it saw."""

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        if hidden_states.abs().max().item() < 0 or torch.rand(()) < 0:
            return hidden_states
        self.seen = hidden_states
        return super().forward(hidden_states, **given)


def _kept(**names: str) -> dict[str, str]:
    return {name.replace("__", "."): why for name, why in names.items()}


_COMPUTED = "its weight is computed whenever it is called"
SOUND: list[Any] = [
    pytest.param(Layer, LlamaModel, {}, id="plain"),
    pytest.param(_InPlace, LlamaModel, {}, id="in-place"),
    pytest.param(_InputOfTheGroup, LlamaModel, {}, id="input-of-the-group"),
    pytest.param(
        _Autocast,
        LlamaModel,
        dict.fromkeys((n for n in sorted(ALL) if "attn" in n), "is called under autocast"),
        id="autocast",
    ),
    pytest.param(
        _Parametrized, LlamaModel, _kept(self_attn__v_proj=_COMPUTED, mlp__up_proj=_COMPUTED), id="parametrized"
    ),
    pytest.param(
        _Reads,
        LlamaModel,
        dict.fromkeys(("self_attn.o_proj", "mlp.up_proj"), "its weight is used in model.layers.{} too"),
        id="reads",
    ),
    pytest.param(Layer, _Looped, {}, id="looped"),
    pytest.param(_Appends, _Given, {}, id="appends"),
    pytest.param(_Keyword, LlamaModel, {}, id="keyword"),
    pytest.param(_Looks, LlamaModel, {}, id="looks"),
]


def _source(name: str, layer: type[Layer], base: type[LlamaModel], directory: Path) -> Any:
    model = odd_models.build(name.replace("-", "_"), layer, base)
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("layer", "base", "kept"), SOUND)
def test_what_linears_read_and_what_stays(
    layer: type[Layer], base: type[LlamaModel], kept: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = _source(f"odd_{request.node.callspec.id}", layer, base, tmp_path / "source")
    uses = zoo_uses.products(model, lambda: model(IDS, use_cache=False))
    wanted = {f"model.layers.{n}.{path}" for n in range(3) for path in ALL - kept.keys()}
    for placement in (leangrid.Placement(2), leangrid.Placement(2, replay=True, disk_streams=True)):
        with hessians_watched() as seen, suppress(Walked):
            leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=IDS, placement=placement)
        shutil.rmtree(tmp_path / "out.partial")
        assert seen.hessians.keys() == wanted
        for path in wanted:
            use = uses[f"{path}.weight", -1]
            assert use.alone and use.hessian is not None
            largest = float(use.hessian.abs().max())
            torch.testing.assert_close(seen.hessians[path], use.hessian, rtol=1e-4, atol=1e-4 * largest)
    stay = {entry["name"]: entry["why"] for entry in leangrid.plan(tmp_path / "source", RECIPE).kept}
    assert {f"model.layers.*.{path}" for path in kept} == {name for name in stay if "layers" in name}


@torch.no_grad()
@pytest.mark.parametrize(("layer", "base"), [(_InPlace, LlamaModel), (_WeightNorm, LlamaModel), (_Appends, _Given)])
def test_the_result_opens_and_is_the_models(layer: type[Layer], base: type[LlamaModel], tmp_path: Path) -> None:
    model = _source(f"odd_opened{layer.__name__}".lower(), layer, base, tmp_path / "source")
    with ends_watched() as seen:
        leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=IDS)
    expected = model(IDS, use_cache=False).logits
    opened, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for found in (opened, plain):
        torch.testing.assert_close(found(IDS, use_cache=False).logits, expected, rtol=0, atol=0.02)
    end = model.model(IDS, use_cache=False).last_hidden_state
    torch.testing.assert_close(model.model.norm(seen.ends["original"]), end, rtol=0, atol=1e-4)


# ---------------------------------------------------------------- refused


class _Scales(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        self.mlp.up_proj.weight.data.mul_(0.9)
        return super().forward(hidden_states, **given)


class _Drops(Layer):
    def think(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().think(x), 0.5)


class _Remembers(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        before = getattr(self, "before", None)
        self.before = hidden_states[:1].mean(1, keepdim=True)
        x = super().forward(hidden_states, **given)
        return x if before is None else x + before


class _Around(LlamaModel):
    def forward(self, *args: Any, **given: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*args, **given)


class _Peeks(LlamaModel):
    def forward(self, *args: Any, **given: Any) -> Any:
        out = super().forward(*args, **given)
        out.last_hidden_state = self.layers[1].mlp.down_proj(self.layers[1].mlp.up_proj(out.last_hidden_state))
        return out


class _Turns(LlamaModel):
    """Takes its blocks away while it runs, and puts them back."""

    def forward(self, *args: Any, **given: Any) -> Any:
        blocks = self.layers
        self.layers = nn.ModuleList([*blocks, *blocks][: 2 * len(blocks) - 1])
        self.config.num_hidden_layers = len(self.layers)
        try:
            return super().forward(*args, **given)
        finally:
            self.layers, self.config.num_hidden_layers = blocks, len(blocks)


class _LaterFirst(LlamaModel):
    """The first block is given what the last one made of the earlier call."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("memory", torch.zeros(1, 1, WIDTH), persistent=False)

    def forward(self, input_ids: Tensor | None = None, **given: Any) -> Any:
        embedded = self.embed_tokens(input_ids) + self.memory
        out = super().forward(inputs_embeds=embedded, **given)
        self.memory = out.last_hidden_state[:1].mean(1, keepdim=True)
        return out


@pytest.mark.parametrize(
    ("layer", "base", "words"),
    [
        pytest.param(_Scales, LlamaModel, "changes the weight model.layers.0.mlp.up_proj.weight in place", id="scales"),
        pytest.param(_Drops, LlamaModel, "depends on random numbers, drawn in model.layers.0", id="drops"),
        pytest.param(_Remembers, LlamaModel, "model.layers.0.before is kept from one call to the next", id="remembers"),
        pytest.param(Layer, _Around, "model.layers.0 is called under autocast", id="around"),
        pytest.param(Layer, _Peeks, "the weights of model.layers.1.mlp.down_proj are used in", id="peeks"),
        pytest.param(Layer, _Turns, "model.layers is kept from one call to the next", id="turns"),
        pytest.param(Layer, _LaterFirst, "model.memory is kept from one call to the next", id="later"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(
    layer: type[Layer], base: type[LlamaModel], words: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = _source("odd_" + request.node.callspec.id, layer, base, tmp_path / "source")
    assert type(model).__name__.startswith("Odd_")
    with pytest.raises(ArchitectureError) as caught:
        leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=IDS)
    assert words in str(caught.value) and caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---------------------------------------------------------------- another way for some texts

LOUD = 400  # a token with large numbers; the model is looked at with others
QUIET = IDS.where(IDS != LOUD, 7)
WITH_LOUD = torch.cat([QUIET[:-1], QUIET[-1:].index_fill(1, torch.tensor([5]), LOUD)])


class _Grows(Layer):
    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:
        return 3 * super().forward(hidden_states, **given)


class _Chooses(LlamaModel):
    """Which block it calls next depends on how large the numbers are that the block before it made."""

    loud = (0, 11, 22)  # the second digit: which block is called in place of that of the first

    def forward(self, input_ids: Tensor, **given: Any) -> Any:
        x = self.embed_tokens(input_ids)
        rope, others = self.rotary_emb(x, torch.arange(x.shape[1])[None]), self.others(x)
        for number in range(len(self.layers)):
            for chosen in [n for n in self.loud if n // 10 == number] if x.abs().max() > 100 else [number]:
                x = self.layers[chosen % 10](self.between(x), position_embeddings=rope, **others)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x))

    def others(self, embedded: Tensor) -> dict[str, Any]:
        return {}

    def between(self, x: Tensor) -> Tensor:
        return x


def _that_goes(*loud: int) -> type[_Chooses]:
    return type("_Goes" + "_".join(map(str, loud)), (_Chooses,), {"loud": loud})


_Skips, _SkipsTheLast, _Swaps = _that_goes(0, 22), _that_goes(0, 11), _that_goes(0, 12, 21)
_Again, _AgainAtTheEnd = _that_goes(0, 11, 11, 22), _that_goes(0, 11, 22, 20)


class _LiveAgain(_Chooses):
    """More than hidden states flows, and a block is called again."""

    loud = (0, 11, 11, 22)

    def others(self, embedded: Tensor) -> dict[str, Any]:
        return {"seen": []}


class _LiveAgainAtTheEnd(_LiveAgain):
    loud = (0, 11, 22, 20)


class _Doubles(_Chooses):
    """Does something else with the states between two blocks."""

    def between(self, x: Tensor) -> Tensor:
        return 2 * x if x.abs().max() > 100 else x


class _Masks(_Chooses):
    """What it gives its blocks beside the states depends on a token."""

    def others(self, embedded: Tensor) -> dict[str, Any]:
        windows, length, _ = embedded.shape
        return {"attention_mask": torch.zeros(windows, 1, length, length) - 1.0 * (embedded.abs().max() > 50)}


class _GrowsAndAppends(_Appends, _Grows):
    pass


ORDERS: list[Any] = [
    pytest.param(_Grows, _Skips, "another order than when it was looked at: model.layers.2 is next", 1, id="skips"),
    pytest.param(_Grows, _SkipsTheLast, "the end of its blocks is next", 2, id="skips-last"),
    pytest.param(_Grows, _Again, "model.layers.1 is next", 2, id="again"),
    pytest.param(_Grows, _AgainAtTheEnd, "model.layers.0 is next", 3, id="again-at-the-end"),
    pytest.param(_Grows, _Swaps, "model.layers.2 is next", 1, id="swaps"),
    pytest.param(_GrowsAndAppends, _LiveAgain, "model.layers.1 is next", 2, id="live-again"),
    pytest.param(_GrowsAndAppends, _LiveAgainAtTheEnd, "model.layers.0 is next", 3, id="live-again-at-the-end"),
    pytest.param(_Grows, _Doubles, "what enters it is not what the block before it returned", 1, id="doubles"),
    pytest.param(_Grows, _Masks, "its arguments beside the hidden states depend on the text", 0, id="masks"),
]


def _loud_source(name: str, layer: type[Layer], base: type[LlamaModel], directory: Path) -> Any:
    model = odd_models.build(name.replace("-", "_"), layer, base)
    with torch.no_grad():
        model.model.embed_tokens.weight[LOUD] = 60.0
    model.save_pretrained(directory)
    return model


@pytest.mark.parametrize(("layer", "base", "words", "done"), ORDERS)
def test_texts_that_go_another_way_through_the_blocks_are_refused(
    layer: type[Layer],
    base: type[LlamaModel],
    words: str,
    done: int,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    _loud_source(f"odd_{request.node.callspec.id}", layer, base, tmp_path / "source")
    mapped = request.node.callspec.id in ("skips", "swaps")
    placement = leangrid.Placement(1, replay=True, disk_streams=True) if mapped else leangrid.Placement(2)

    def run(**given: Any) -> Any:
        out = tmp_path / "out"
        return leangrid.quantize(tmp_path / "source", out, RECIPE, windows=WITH_LOUD, placement=placement, **given)

    for _ in range(2):  # the second goes on where the first was stopped
        with pytest.raises(ArchitectureError) as caught:
            run()
        assert words in str(caught.value) and caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert len(list(tmp_path.glob("out.partial/blocks/*.safetensors"))) == done


@torch.no_grad()
@pytest.mark.parametrize(("layer", "base"), [(_Grows, _Skips), (_GrowsAndAppends, _LiveAgain), (_Grows, _Masks)])
def test_texts_that_go_the_same_way_are_walked(layer: type[Layer], base: type[LlamaModel], tmp_path: Path) -> None:
    model = _loud_source(f"odd_quiet{base.__name__}".lower(), layer, base, tmp_path / "source")
    with ends_watched() as seen:
        leangrid.quantize(tmp_path / "source", tmp_path / "out", RECIPE, windows=QUIET)
    end = model.model(QUIET).last_hidden_state
    torch.testing.assert_close(model.model.norm(seen.ends["original"]), end, rtol=0, atol=1e-4)
