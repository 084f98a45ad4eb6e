"""inference/transformers_hook.py: ``import leangrid`` is enough, before or after transformers."""

from collections.abc import Callable
from pathlib import Path

import pytest
from quantized_checkpoints import write
from run_python import run_python

OPEN = "m = AutoModelForCausalLM.from_pretrained(sys.argv[1]); print(type(m.model.layers[0].mlp.up_proj).__name__)"


@pytest.mark.parametrize(
    "imports",
    [
        "import leangrid; from transformers import AutoModelForCausalLM",
        pytest.param(
            "import leangrid.inference.transformers_quantizer; from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
        pytest.param("from transformers import AutoModelForCausalLM; import leangrid", marks=pytest.mark.slow),
        pytest.param(
            "import transformers.quantizers.auto; import leangrid; from transformers import AutoModelForCausalLM",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_import_leangrid_is_enough_in_either_order(tiny: Callable[..., Path], tmp_path: Path, imports: str) -> None:
    write(tiny("llama2"), tmp_path / "out", "NU3")
    done = run_python(f"import sys; {imports}; {OPEN}", tmp_path / "out")
    assert done.returncode == 0 and done.stdout.split() == ["LutLinear"], done.stderr[-2000:]
