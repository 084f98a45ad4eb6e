"""Models of transformers that do what models rarely do, registered with its automatic classes as a user's own are."""

from typing import Any

import tiny_models
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaModel

WIDTH = 64


class Layer(LlamaDecoderLayer):
    """A layer of Llama in parts."""

    def attend(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        return self.self_attn(hidden_states=self.input_layernorm(x), **given)[0]

    def think(self, x: Tensor) -> Tensor:
        return self.mlp(self.post_attention_layernorm(x))

    def forward(self, hidden_states: Tensor, **given: Any) -> Tensor:  # pyright: ignore
        x = hidden_states + self.attend(hidden_states, given)
        return x + self.think(x)


def build(name: str, layer: type[Layer] = Layer, base: type[LlamaModel] = LlamaModel) -> Any:
    """A tiny model of the new type ``name``, with random weights, registered with AutoConfig and
    AutoModelForCausalLM."""

    def init(self: Any, config: Any) -> None:
        LlamaForCausalLM.__init__(self, config)
        if base is not LlamaModel:
            self.model = base(config)
        blocks = getattr(base, "blocks", nn.ModuleList)
        self.model.layers = blocks([layer(config, number) for number in range(config.num_hidden_layers)])
        self.post_init()

    config_class = type(f"{name.title()}Config", (LlamaConfig,), {"model_type": name})
    model_class = type(
        f"{name.title()}ForCausalLM", (LlamaForCausalLM,), {"config_class": config_class, "__init__": init}
    )
    AutoConfig.register(name, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    torch.manual_seed(0)
    config = config_class(
        vocab_size=tiny_models.VOCAB,
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return model_class(config).eval()
