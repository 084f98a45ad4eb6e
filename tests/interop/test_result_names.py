"""Packed tensors under the names that models/conversion_names.py chooses, opened by plain transformers: every weight as
unpacked by the container's own reader, nothing missing, nothing left over."""

import json
import re
from pathlib import Path

import pytest
import torch
import zoo_models
from described_tensors import described, empty, saved
from safetensors.torch import save_file
from torch import Tensor, nn

from leangrid.formats import FORMATS
from leangrid.grids import AffineGrid
from leangrid.models.conversion import Conversion
from leangrid.models.conversion_names import ResultNames
from leangrid.schemes import Scheme

pytestmark = pytest.mark.interop

SCHEME = Scheme.parse("W8A16_SYM")
CONTAINER = FORMATS["compressed-tensors"]
KEPT = re.compile(r"vision|router|\.gate$|conv")  # linears that stay as they are


def pack(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The packed tensors of ``weight`` rounded to nearest, and the weight that they are."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    codes = (torch.round(weight / scale) + 128).clamp(0, 255).to(torch.uint8)
    grid = AffineGrid(scale, torch.full_like(scale, 128).to(torch.uint8), 8, None).rounded(torch.float32)
    packed = CONTAINER.pack(codes, grid, torch.float32, SCHEME)
    return packed, CONTAINER.dense(packed, SCHEME, (weight.shape[0], weight.shape[1]))


class Result:
    """The tensors of a result of ``conversion`` by name, and the weights that they stand for by name in the model."""

    def __init__(self, conversion: Conversion, source: dict[str, Tensor], linears: set[str]) -> None:
        self.conversion, self.source, self.names = conversion, source, ResultNames(conversion)
        self.tensors: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        for name in conversion.sources:
            module = name.removesuffix(".weight")
            if module in linears:
                self.weights[name] = self.add(self.names.packed(module), conversion.read(name, source.__getitem__))
            elif not self.experts(name):
                self.keep(name, linears)

    def add(self, name: str | None, weight: Tensor) -> Tensor:
        assert name is not None
        packed, dense = pack(weight)
        self.tensors |= {f"{name}.{suffix}": tensor for suffix, tensor in packed.items()}
        return dense

    def experts(self, name: str) -> bool:
        parts = self.conversion.expert_parts(name) or ()
        packed = {part.stored: part.stored.removesuffix(".weight") for part in parts}
        if not parts or not self.names.takes_expert(packed[parts[0].stored], name.rpartition(".")[0]):
            return False
        self.weights[name] = torch.empty(self.conversion.shapes[name])
        for part in parts:
            dense = self.add(packed[part.stored], self.source[part.stored])
            self.weights[name][part.expert, part.rows] = dense
        return True

    def keep(self, name: str, linears: set[str]) -> None:
        kept = self.names.kept(name, linears)
        assert kept is not None
        if kept.as_stored:
            self.tensors |= {stored: self.source[stored] for stored in kept.names}
        else:
            self.tensors[kept.names[0]] = self.conversion.read(name, self.source.__getitem__).contiguous()


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("gemma3", "image-text"),
        ("mixtral", "causal"),
        ("kimi_linear", "causal"),
        ("nomic_bert", "encoder"),
        ("step3p7", "image-text"),
        ("minimax_m3_vl", "image-text"),
        ("unlimited_ocr", "image-text"),
        ("hrm_text", "causal"),
        ("molmo2", "image-text"),
    ],
)
def test_plain_transformers_finds_every_tensor(kind: str, family: str, tmp_path: Path) -> None:
    model = zoo_models.build(kind, family)
    twin, head = empty(model), model.get_output_embeddings()
    source = saved(model, tmp_path)
    conversion = Conversion(twin, described(source))
    linears = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and not KEPT.search(path)
    }
    result = Result(conversion, source, linears)
    assert result.weights and result.names.obstacle(dict.fromkeys(linears, SCHEME), [SCHEME]) is None
    save_file({name: one.clone() for name, one in result.tensors.items()}, tmp_path / "model.safetensors")
    ignore = [path for path, module in model.named_modules() if isinstance(module, nn.Linear) and path not in linears]
    stated = CONTAINER.config(dict.fromkeys(linears, SCHEME), ignore)
    if not result.names.dequantize([SCHEME], [SCHEME]):
        del stated["dequantize"]
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": stated}))

    opened, info = type(model).from_pretrained(tmp_path, dtype=torch.float32, output_loading_info=True)
    assert not set(info["missing_keys"]) - set(model.all_tied_weights_keys) and not info["unexpected_keys"]
    with torch.no_grad():
        for name, weight in result.weights.items():
            model.get_parameter(name).copy_(weight)
        ids = zoo_models.tokens(config=model.config)
        assert torch.equal(zoo_models.run(opened.eval(), ids), zoo_models.run(model, ids))
