"""Tiny random models of every type of transformers, one at a time: built, saved as its own checkpoint, run on text.

python tests/support/zoo_models.py TYPE ...      builds, runs and prints a line for each
"""

import importlib.util
import inspect
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto
from zoo_configs import FIRST_ID, TEXT_IDS, real_config, tiny_config
from zoo_variants import Change, changed, changes

FAMILIES: dict[str, dict[str, Any]] = {
    "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "image-text": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "encoder": auto.MODEL_MAPPING_NAMES,
}
ENCODERS = (
    "albert", "bert", "camembert", "convbert", "deberta", "deberta-v2", "distilbert", "electra", "ernie", "esm",
    "eurobert", "fnet", "funnel", "longformer", "mobilebert", "modernbert", "mpnet", "nomic_bert", "roberta", "t5",
    "xlm-roberta",
)  # fmt: skip
# What checkpoints of a type have beside transformers' model: layers that predict further tokens.
FURTHER: dict[str, str] = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next"), "mtp.layers.0"),
    **dict.fromkeys(("deepseek_v3", "glm4_moe"), "model.layers.{layers}"),
}


def model_types(family: str) -> list[str]:
    """Every type of a family, sorted."""
    return sorted(ENCODERS) if family == "encoder" else sorted(FAMILIES[family])


def family_of(model_type: str) -> str:
    """The family in which a type is tried where none is given."""
    return "encoder" if model_type in ENCODERS else next(f for f in FAMILIES if model_type in FAMILIES[f])


def model_class(model_type: str, family: str) -> type[PreTrainedModel]:
    """The class that transformers' automatic class of the family opens."""
    names = FAMILIES[family][model_type]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def config_of(model_type: str, family: str, real: bool = False) -> PreTrainedConfig:
    """The tiny config (``real``: the one of real widths) with which the class of the family is made."""
    decoder, kind = model_type in FAMILIES["causal"] and family != "encoder", model_class(model_type, family)
    config = real_config(model_type, decoder) if real else tiny_config(model_type, decoder)
    text = config.get_text_config(decoder=True)
    return text if type(text) is kind.config_class is not type(config) else config  # the text model of a composite


def build(model_type: str, family: str, seed: int = 0, vary: int | None = None) -> PreTrainedModel:
    """The model in evaluation mode and float32, every parameter random (norms and biases too), the same for the same
    seed.

    ``vary`` is a seed of choices in the config (zoo_variants.changes); what came of it is in ``model.varied``.
    """
    stand_in_for_timm()
    config, kind = config_of(model_type, family), model_class(model_type, family)
    notes: list[str] = []
    if vary is not None:
        config, notes = variant(config, kind, vary)
    torch.manual_seed(seed)
    model: Any = kind(config).eval().requires_grad_(False)
    model.varied = notes
    for parameter in model.parameters():
        _randomize(parameter)
    return model


def variant(config: PreTrainedConfig, kind: type[PreTrainedModel], seed: int) -> tuple[PreTrainedConfig, list[str]]:
    """Another config by ``seed`` with which the class runs, and what differs: all that was drawn, or, where the class
    does not allow that, one change after the other, those left out with which it does not run."""
    drawn = changes(config, seed)
    whole = _sound(config, kind, drawn)
    if whole is not None:
        return whole, [change.words for change in drawn]
    found, kept = config, list[Change]()
    for change in drawn:
        other = _sound(config, kind, [*kept, change])
        if other is not None:
            found, kept = other, [*kept, change]
    return found, [change.words for change in kept]


def _sound(config: PreTrainedConfig, kind: type[PreTrainedModel], chosen: list[Change]) -> PreTrainedConfig | None:
    """The config with the ``chosen`` changes; None where the class does not run with it, or to no finite number."""
    try:
        other = changed(config, chosen)
        other.use_cache = False
        out = run(kind(other).eval(), tokens(config=other))
        return other if bool(out.isfinite().any()) else None
    except Exception:  # whatever the class raises: only it knows what it allows
        return None


def _randomize(parameter: Tensor) -> None:
    """Numbers that no zero, one or tiny spread hides."""
    if not parameter.dtype.is_floating_point or parameter.numel() == 0:
        return
    whole = bool(torch.isfinite(parameter).all())
    if parameter.ndim == 1 or not whole or float(parameter.abs().max()) == 0.0:
        parameter.nan_to_num_(0.0, 0.0, 0.0).add_(torch.randn_like(parameter), alpha=0.1)
    elif parameter.shape[-1] > 1:
        usual = parameter.shape[-1] ** -0.5
        if float(parameter.std()) < 0.5 * usual:
            parameter.normal_(0, usual)


def save(model: PreTrainedModel, directory: Path, seed: int = 0, published: bool = True) -> Path:
    """Write ``model`` as transformers does, with what such checkpoints have beside it, and a tokenizer; under the names
    of published checkpoints, or with ``published`` False those of the modules."""
    from tiny_models import tokenizer

    transformers.utils.logging.disable_progress_bar()
    model.save_pretrained(directory, save_original_format=published)
    tokenizer().save_pretrained(directory)
    further = FURTHER.get(model.config.model_type)
    if further is not None:
        file, text = directory / "model.safetensors", model.config.get_text_config(decoder=True)
        owner = further.format(layers=text.num_hidden_layers)
        stored, draw = load_file(file), torch.Generator().manual_seed(seed)
        for leaf in ("input_layernorm", "mlp.down_proj"):
            shape = (text.hidden_size,) if leaf.endswith("norm") else (text.hidden_size, 2 * text.hidden_size)
            stored[f"{owner}.{leaf}.weight"] = torch.randn(shape, generator=draw)
        save_file(stored, file, {"format": "pt"})
        _count_further(directory / "config.json", further)
    return directory


def _count_further(path: Path, further: str) -> None:
    """Say in the config how many layers predict further tokens, where published ones do."""
    if "{layers}" in further:
        config = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({**config, "num_nextn_predict_layers": 1}), encoding="utf-8")


def tokens(windows: int = 2, length: int = 32, seed: int = 0, config: PreTrainedConfig | None = None) -> Tensor:
    """Random token ids, int64 [windows, length], of text only; below the vocabulary of ``config``."""
    text = config and config.get_text_config(decoder=True)
    most = min(TEXT_IDS, getattr(text, "vocab_size", None) or TEXT_IDS)
    return torch.randint(FIRST_ID, most, (windows, length), generator=torch.Generator().manual_seed(seed))


def run_out(model: Any, ids: Tensor) -> Any:
    """The model's own output for token ids; a decoder beside an encoder reads the same. Of a model that does not run
    without pictures, its language model's."""
    try:
        return _run_out(model, ids)
    except (TypeError, ValueError):
        decoder = model.get_decoder()
        if decoder is model:
            raise
        return _run_out(decoder, ids)


def _run_out(model: Any, ids: Tensor) -> Any:
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind == p.VAR_KEYWORD for p in parameters.values())
    more: dict[str, Any] = {"use_cache": False} if open_ended or "use_cache" in parameters else {}
    if "decoder_input_ids" in parameters:
        more["decoder_input_ids"] = ids
    if "bbox" in parameters:
        more["bbox"] = torch.zeros(*ids.shape, 4)
    return model(input_ids=ids, **more)


@torch.no_grad()
def run(model: Any, ids: Tensor) -> Tensor:
    """The logits of token ids; an encoder's states."""
    return logits_of(run_out(model, ids))


def logits_of(out: Any) -> Tensor:
    """The logits of a model's output, an encoder's states."""
    found = getattr(out, "logits", None)
    if found is None:
        found = getattr(out, "last_hidden_state", None)
    return out[0] if found is None else found


def real_shapes(model_type: str, family: str) -> dict[str, tuple[int, ...]] | None:
    """Shapes of the parameters at the default config's widths, layers as in the tiny one; None where the defaults are
    no sound config."""
    try:
        with torch.device("meta"):
            model = model_class(model_type, family)(config_of(model_type, family, real=True))
    except Exception as error:  # the defaults of some types cannot be built
        print(f"{model_type}: no real shapes: {type(error).__name__}: {error}")
        return None
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def open_plain(directory: Path) -> PreTrainedModel:
    """A directory as a user of transformers opens it, in float32 and by the class that its config names."""
    stand_in_for_timm()
    (name,) = json.loads((directory / "config.json").read_text(encoding="utf-8"))["architectures"]
    kind = getattr(transformers, name)
    model, info = kind.from_pretrained(directory, dtype=torch.float32, output_loading_info=True, local_files_only=True)
    lost = sorted(info["missing_keys"])[:3] + sorted(str(key) for key in info["mismatched_keys"])[:3]
    if lost:
        raise ValueError(f"transformers does not find {lost} in {directory.name}")
    for parameter in model.parameters():
        if parameter.ndim == 3 and parameter.dtype is torch.bfloat16:  # packed experts come out in their scales' type
            parameter.data = parameter.data.float()
    return model.eval().requires_grad_(False)


def stand_in_for_timm() -> None:
    """Let models that see through timm be built where it is not installed: their text does not need that tower."""
    if importlib.util.find_spec("timm") is not None:
        return
    from transformers import MODEL_MAPPING, Gemma3nVisionConfig, TimmWrapperConfig

    class Tower(PreTrainedModel):
        config_class = TimmWrapperConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.proj = torch.nn.Linear(8, 8)
            self.post_init()

    tower: Any = Tower
    for kind in (TimmWrapperConfig, Gemma3nVisionConfig):
        MODEL_MAPPING.register(kind, tower, exist_ok=True)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    for given in sys.argv[1:]:
        made = build(given, family_of(given))
        shown = run(made, tokens(config=made.config))
        print(given, type(made).__name__, sum(p.numel() for p in made.parameters()), tuple(shown.shape),
              bool(shown.isfinite().all()))  # fmt: skip
