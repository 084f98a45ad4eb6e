"""GPUs by name, as ``plan --device h200`` or ``2xl40s`` describes them: memory and rates of products.

Rates are those of the makers' data sheets (NVIDIA's for A100 SXM, L40S, GeForce RTX 4090, H100 SXM, H200 and B200),
dense, without sparsity. Memory is what such a card reports as its own, which is less than its name says: error
correction takes a part of GDDR, the driver some of all. Of L40S and RTX 4090 it is what torch says in public reports of
running out (stepfun-ai/Step-Video-T2V issue 8, 3DTopia/Phidias-Diffusion issue 8); the others were not looked up anew,
and none of these cards was at hand."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """One GPU: GiB of memory as it reports them, and TFLOP/s of float32, TensorFloat-32 and bfloat16 products."""

    memory: float
    float32: float
    tf32: float
    half: float


CARDS = {
    "a100": Card(79.2, 19.5, 156.0, 312.0),
    "l40s": Card(44.4, 91.6, 183.0, 362.0),
    "rtx4090": Card(23.6, 82.6, 82.6, 165.0),
    "h100": Card(79.1, 67.0, 495.0, 989.0),
    "h200": Card(139.8, 67.0, 495.0, 989.0),
    "b200": Card(178.3, 75.0, 1125.0, 2250.0),
}
