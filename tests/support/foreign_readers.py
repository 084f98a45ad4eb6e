"""Models as other projects' software reads them from our files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from torch import Tensor


def model_of_gguf(directory: Path, **given: Any) -> Any:
    """transformers' model of ``model.gguf``, dequantized to float32. ``given`` goes to from_pretrained."""
    config = hf.GgufConfig(dequantize=True)
    fields = {"gguf_file": "model.gguf", "dtype": torch.float32, "quantization_config": config, **given}
    return hf.AutoModelForCausalLM.from_pretrained(directory, **fields).eval()


def logits_of_mlx_lm(directory: Path, tokens: Tensor) -> Tensor:
    """Logits of mlx-lm's model on the CPU, in float32."""
    import mlx.core as mx
    from mlx_lm import utils  # pyright: ignore[reportMissingImports]

    mx.set_default_device(mx.cpu)
    model, _ = utils.load_model(directory)
    model.set_dtype(mx.float32)
    return torch.from_numpy(np.array(model(mx.array(tokens.numpy()))))
