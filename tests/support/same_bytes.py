"""``python same_bytes.py WORK [PART]``: tiny runs, one a format and way of solving, and a sha256 of each result's
tensors and config.

Printed as one JSON object, run -> file -> sha256, of all runs or of one part of them ("quick" or "long"). The
arithmetic is the one that every x86-64 processor has: torch's kernels without vector extensions, MKL's compatible
branch, no oneDNN, one thread, our own loops as their torch twins. So the hashes that are committed beside
tests/end_to_end/test_same_bytes.py hold on any such machine with the same torch: a change of them is a change of
behaviour."""

import hashlib
import json
import os
import sys
from pathlib import Path

PINNED = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "LEANGRID_KERNELS": "torch",
    "HF_HUB_OFFLINE": "1",
}
# run -> (tiny model, dtype, fields of the recipe)
QUANTIZED: dict[str, tuple[str, str, dict]] = {
    "compressed-tensors": ("llama3", "bfloat16", {"scheme": "W4A16_G32"}),
    "compressed-tensors, 8 bits, symmetric": ("qwen3", "float16", {"scheme": "W8A16_SYM"}),
    "lut": ("llama3", "bfloat16", {"scheme": "NU4"}),
    "lut, encoder": ("bert", "float32", {"scheme": "NU3"}),
    "lut, conv1d": ("gpt2", "float32", {"scheme": "NU2"}),
    "gptq": ("llama3_tied", "float16", {"scheme": "W4A16_G32", "format": "gptq"}),
    "awq": ("qwen2", "float16", {"scheme": "W4A16_G32", "format": "awq"}),
    "mlx": ("gemma3", "bfloat16", {"scheme": "W3A16_G32", "format": "mlx"}),
    "gguf": ("llama3", "bfloat16", {"scheme": "Q4_K", "format": "gguf"}),
    "gguf, min-max": ("llama3", "bfloat16", {"scheme": "GPTQ_Q3_K", "format": "gguf"}),
    "experts": ("qwen3_moe", "float32", {"scheme": "W4A16_G32"}),
    "mixed layers": ("llama3", "float32", {"scheme": "W4A16_G32", "layers": {"down_proj": "W8A16_G32"}}),
    "exact": ("bert", "float32", {"scheme": "W3A16_EXACT"}),
    "gptq's own method": ("llama3", "float32", {"scheme": "GPTQ3_G32"}),
    "rounding": ("llama3", "float32", {"scheme": "RTN4"}),
    "uncorrected": ("llama3", "float32", {"scheme": "NU3", "correct": 0.0, "refine": 0, "guard": False}),
}
# With the algebra of solve/in_place.py; the name is the one in the recorded hashes.
IN_PLACE: dict[str, tuple[str, str, dict]] = {"lean algebra": ("llama3", "bfloat16", {"scheme": "NU4"})}
# run -> (the run that it starts from, format)
EXPORTED = {
    "export dense": ("lut", "dense"),
    "export gptq": ("compressed-tensors", "gptq"),
    "export compressed-tensors": ("awq", "compressed-tensors"),
    "export gguf": ("gguf", "gguf"),
}
# Runs that take seconds: torch's twin of the affine search is slow where there are many groups or 8 bits.
QUICK = (
    "compressed-tensors", "lut", "lut, encoder", "lut, conv1d", "awq", "gguf, min-max", "gptq's own method", "rounding",
    "uncorrected", "lean algebra",
)  # fmt: skip
PARTS = ("quick", "long")
FILES = ("*.safetensors", "config.json", "*.gguf")


def runs_of(part: str | None) -> list[str]:
    """The names of one part of the runs, each export with the run that it starts from; None: of all."""
    names = [name for name in QUANTIZED | IN_PLACE if part in (None, PARTS[name not in QUICK])]
    return names + [name for name, (start, _) in EXPORTED.items() if start in names]


def hashes(directory: Path) -> dict[str, str]:
    """File name -> sha256 of the files whose bytes an engine reads."""
    found = sorted(path for pattern in FILES for path in directory.glob(pattern))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def main(work: Path, part: str | None) -> None:
    """Make the runs of one part, or all, and print their hashes."""
    import tiny_models
    import torch

    import leangrid
    from leangrid.planning.placement import Placement

    torch.backends.mkldnn.enabled = False
    torch.set_num_threads(1)
    windows, found = tiny_models.tokens(4, 32), {}
    for name in runs_of(part):
        if name in EXPORTED:
            start, to = EXPORTED[name]
            leangrid.export(work / start, work / name, to)
            found[name] = hashes(work / name)
            continue
        model, dtype, fields = (QUANTIZED | IN_PLACE)[name]
        source = work / f"{model}-{dtype}"
        if not source.is_dir():
            tiny_models.save(model, source, getattr(torch, dtype))
        recipe = leangrid.Recipe(products="float32", **fields)
        placement = Placement(2, replay=True, host_streams=True, in_place=True) if name in IN_PLACE else None
        leangrid.quantize(
            source, work / name, recipe, windows=windows, threads=1, placement=placement, max_kl=float("inf")
        )
        found[name] = hashes(work / name)
    print(json.dumps(found))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    os.environ.update(PINNED)  # before torch is imported: MKL and ATen read them once
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
