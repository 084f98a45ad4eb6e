"""Tiny random vision-language models with their processors, written as real checkpoints, and pictures for them.

The tokenizer is the byte-level BPE of tiny_models.py with the tokens that stand for pictures behind it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_models
import torch
import transformers as hf
from PIL import Image
from tokenizers import AddedToken, Tokenizer

VOCAB = tiny_models.VOCAB + 16
_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.1,
}
_QWEN = {"image": "<|image_pad|>", "video": "<|video_pad|>", "start": "<|vision_start|>", "end": "<|vision_end|>"}
_GEMMA = {"image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
_TEMPLATE = """{{%- for message in messages %}}<turn>{{{{ message.role }}}}
{{%- if message.content is string %}} {{{{ message.content }}}}{{%- else %}}
{{%- for part in message.content %}}
{{%- if part.type == 'image' %}}{picture}{{%- else %}} {{{{ part.text }}}}{{%- endif %}}
{{%- endfor %}}{{%- endif %}}</turn>
{{%- endfor %}}"""


def _rope(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": sections, "mrope_interleaved": True}


def _tower(**fields: Any) -> dict[str, Any]:
    sizes = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4}
    return {**sizes, "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 64,
            "num_position_embeddings": 64, "initializer_range": 0.1, **fields}  # fmt: skip


def _qwen_ids() -> dict[str, int]:
    numbers = {name: tiny_models.VOCAB + place for place, name in enumerate(_QWEN)}
    return {f"{name}_token_id": number for name, number in numbers.items() if name in ("image", "video")} | {
        f"vision_{name}_token_id": number for name, number in numbers.items() if name in ("start", "end")
    }


def _qwen3_vl() -> hf.PreTrainedConfig:
    text = {**_SIZES, "rope_parameters": _rope([4, 2, 2])}
    return hf.Qwen3VLConfig(text_config=text, vision_config=_tower(deepstack_visual_indexes=[0, 1]), **_qwen_ids())


def _qwen3_5() -> hf.PreTrainedConfig:
    text = {**_SIZES, "num_hidden_layers": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}
    text |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
    text |= {"linear_value_head_dim": 16, "rope_parameters": {**_rope([2, 1, 1]), "partial_rotary_factor": 0.5}}
    return hf.Qwen3_5Config(text_config=text, vision_config=_tower(), **_qwen_ids())


def _gemma3() -> hf.PreTrainedConfig:
    text = {**_SIZES, "query_pre_attn_scalar": 16, "sliding_window": 16}
    text["layer_types"] = ["sliding_attention", "full_attention"]
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    numbers = [tiny_models.VOCAB + place for place in range(len(_GEMMA))]
    names = dict(zip(("image_token_index", "boi_token_index", "eoi_token_index"), numbers, strict=True))
    return hf.Gemma3Config(
        text_config=text,
        vision_config={**tower, "image_size": 32, "patch_size": 8, "vision_use_head": False},
        mm_tokens_per_image=4,
        **names,
    )


CONFIGS: dict[str, Callable[[], hf.PreTrainedConfig]] = {"qwen3_vl": _qwen3_vl, "qwen3_5": _qwen3_5, "gemma3": _gemma3}
NAMES = tuple(CONFIGS)


def build(name: str, seed: int = 0) -> hf.PreTrainedModel:
    """The model ``name`` (one of NAMES) in evaluation mode, every parameter random, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = hf.AutoModelForImageTextToText.from_config(CONFIGS[name](), dtype=torch.float32).eval()
        model.requires_grad_(False)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1 if parameter.ndim == 1 else 0.02)
    return model


def save(name: str, directory: Path | str, seed: int = 0) -> Path:
    """Write ``name`` with tokenizer, chat template and the settings of its processor, as published models have them."""
    directory = Path(directory)
    hf.utils.logging.disable_progress_bar()
    build(name, seed).save_pretrained(directory)
    _tokenizer(name).save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(_settings(name)), encoding="utf-8")
    if name == "gemma3":
        fields = {"processor_class": "Gemma3Processor", "image_seq_length": 4}
        (directory / "processor_config.json").write_text(json.dumps(fields), encoding="utf-8")
    else:
        video = {**_settings(name), "video_processor_type": "Qwen3VLVideoProcessor"}
        del video["image_processor_type"]
        (directory / "video_preprocessor_config.json").write_text(json.dumps(video), encoding="utf-8")
    return directory


def _tokenizer(name: str) -> hf.PreTrainedTokenizerFast:
    names, plain = (_GEMMA if name == "gemma3" else _QWEN), tiny_models.tokenizer()
    backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
    backend.add_special_tokens([AddedToken(text, special=True) for text in names.values()])
    special = {role: getattr(plain, role) for role in ("pad_token", "bos_token", "eos_token", "unk_token")}
    extra = names if name == "gemma3" else {}
    shown = names["boi_token"] if name == "gemma3" else f"{names['start']}{names['image']}{names['end']}"
    found = hf.PreTrainedTokenizerFast(tokenizer_object=backend, **special, extra_special_tokens=extra)
    found.chat_template = _TEMPLATE.format(picture=shown)
    return found


def _settings(name: str) -> dict[str, Any]:
    """What preprocessor_config.json says."""
    if name == "gemma3":
        return {"image_processor_type": "Gemma3ImageProcessor", "size": {"height": 32, "width": 32}}
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"shortest_edge": 16 * 16, "longest_edge": 32 * 32},
        "patch_size": 4,
        "temporal_patch_size": 2,
        "merge_size": 2,
    }


def picture(width: int = 24, height: int = 16, seed: int = 0) -> Image.Image:
    """A picture of smooth colours, other ones for another seed."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.randint(0, 256, (4, 4, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(small.numpy(), "RGB").resize((width, height), Image.Resampling.BICUBIC)
