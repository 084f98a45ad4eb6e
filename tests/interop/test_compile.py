"""torch.compile and the packed layers: one graph, the same numbers. In processes of their own: dynamo does not trace
beartype's checks."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from quantized_checkpoints import write

import leangrid

SRC = Path(leangrid.__file__).parents[1]


def run(code: str, *args: object) -> None:
    env = {**os.environ, "PYTHONPATH": str(SRC), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, args)], env=env, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


LAYERS = """
import sys, torch
from leangrid.kernels import packed
from leangrid.inference.layers import AffineLinear, LutLinear
torch.manual_seed(0)
for layer in (LutLinear(48, 10, 4, True, torch.float32), AffineLinear(48, 10, 4, True, torch.float32, group_size=16)):
    for tensor in (*layer.buffers(), layer.bias):
        is_packed = tensor.dtype == torch.int32
        tensor.copy_(torch.randint(0, 2**31 - 1, tensor.shape) if is_packed else torch.randn(tensor.shape))
    layer.prepare()
    compiled = torch.compile(layer, fullgraph=True, backend=sys.argv[1])
    for tokens in (1, 17):
        x = torch.randn(tokens, 48)
        assert torch.equal(compiled(x), layer(x))
    x = torch.randn(2, 48, requires_grad=True)
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight_hat.sum(0).expand(2, 48))
"""

MODEL = """
import sys, torch, leangrid
model, _ = leangrid.load(sys.argv[1], dtype=torch.float32)
compiled = torch.compile(model, backend=sys.argv[2])
with torch.no_grad():
    for length in (1, 24):
        tokens = torch.arange(4, 4 + length)[None]
        found, wanted = (each(input_ids=tokens, use_cache=False).logits for each in (compiled, model))
        torch.testing.assert_close(found, wanted)
"""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_layer_is_one_graph(backend: str) -> None:
    run(LAYERS, backend)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["NU4", "W4A16_G32"])
def test_a_compiled_model_gives_the_same_logits(tiny: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    write(tiny("llama3_tied", torch.bfloat16), tmp_path / "out", scheme)
    run(MODEL, tmp_path / "out", "inductor")
