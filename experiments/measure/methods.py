"""The methods of the paper's tables, each as a scheme and recipe fields."""

from common.variants import KNOWN

# "paper" is LeanQuant's plain procedure (p = 4, no correction, no refit, no guard), with the optimal grid; "default" is
# what ``leangrid quantize`` does.
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "rounding": ("RTN{bits}", {}),
    "GPTQ": ("GPTQ{bits}", {}),
    "affine, paper": ("W{bits}A16", KNOWN["paper"]),
    "affine, default": ("W{bits}A16", {}),
    "non-uniform, paper": ("NU{bits}", KNOWN["paper"]),
    "non-uniform, default": ("NU{bits}", {}),
}
