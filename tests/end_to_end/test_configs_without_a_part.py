"""Models whose config says that a part of their type is not there: no experts, or no shared ones. transformers makes
them without that part, or with linears that have no columns."""

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo_models as zoo
from zoo_configs import tiny_config
from zoo_plain import distance
from zoo_variants import Change, changed

import leangrid

WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "no experts": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),  # Granite 4's micro
    "no shared experts": ("deepseek_v3", {"n_shared_experts": 0}),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # torch's, of such a linear
@pytest.mark.parametrize("case", WITHOUT)
def test_a_model_without_a_part_of_its_type_is_quantized(case: str, tmp_path: Path) -> None:
    model_type, fields = WITHOUT[case]
    config = changed(tiny_config(model_type, decoder=True), [Change(case, fields)])
    torch.manual_seed(0)
    model: Any = zoo.model_class(model_type, "causal")(config).eval()
    zoo.save(model, tmp_path / "source")
    ids = zoo.tokens(4, 32, 1, config)
    recipe = leangrid.Recipe(scheme="W8A16_SYM", samples=4, length=32)
    leangrid.quantize(tmp_path / "source", tmp_path / "out", recipe, windows=ids)
    loaded, _ = leangrid.load(tmp_path / "out", dtype=torch.float32)
    assert distance(zoo.run(loaded, ids), zoo.run(model, ids)) < 0.05
    assert leangrid.verify(tmp_path / "out")
