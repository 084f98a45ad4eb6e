"""Splits the expert tensors of transformers 5 into one matrix for each linear of each expert.

A block has two of them, [experts, 2 x intermediate, hidden] and [experts, hidden, intermediate]. They are row-major, so
each matrix is one range of bytes, which follows from the header alone. The matrices get the names that checkpoints with
one tensor for each matrix use."""

from collections.abc import Mapping

from leangrid.errors import CheckpointError
from leangrid.storage.dequantize import DequantizedInfo
from leangrid.storage.safetensors import TensorInfo

# Names of an expert's linears in the order gate, up, down; and of the two tensors that hold them all.
PLAIN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
FUSED = ("gate_up_proj", "down_proj")
_MAX_EXPERTS = 4096  # so that a header of a few bytes cannot become a list of millions


def split_fused_experts(tensors: Mapping[str, TensorInfo], mixtral: bool = False) -> dict[str, TensorInfo]:
    """``tensors`` with each fused tensor replaced by its experts' matrices [rows, cols]; other tensors stay, and so do
    experts with biases, which are gpt-oss's: they hold the transposed matrices.

    With ``mixtral`` the experts and their router get the names of Mixtral's checkpoints, ``block_sparse_moe``. Raises
    CheckpointError if an expert's matrix is also stored as a tensor of its own."""
    gate, up, down = MIXTRAL if mixtral else PLAIN
    found: dict[str, TensorInfo] = {}
    fused = {name for name, info in tensors.items() if _parts(name, info) and f"{name}_bias" not in tensors}
    mixtures = {name.rpartition(".experts.")[0] for name in fused}
    for name, info in tensors.items():
        mixture = next(
            (path for path in (name.rpartition(".experts.")[0], name.removesuffix(".gate.weight")) if path in mixtures),
            None,
        )
        new = (
            name
            if mixture is None or not mixtral
            else mixture.removesuffix("mlp") + "block_sparse_moe" + name.removeprefix(mixture)
        )
        leaves = ((gate, up), (down,))[FUSED.index(name.rpartition(".")[2])] if name in fused else ()
        pieces = _pieces(new.rpartition(".")[0], info, leaves) if leaves else {new: info}
        twice = next((one for one in pieces if one in found or (one in tensors and one != name)), None)
        if twice is not None:
            raise CheckpointError(
                f"'{twice}' is stored twice, alone and in '{name}'",
                info.file,
                "Get another copy of the checkpoint",
            )
        found |= pieces
    return found


def _parts(name: str, info: TensorInfo) -> int:
    """How many matrices of each expert a tensor holds: 2, 1, or 0 for a tensor that is not fused."""
    owner, _, leaf = name.rpartition(".")
    if (
        not owner.endswith(".experts")
        or leaf not in FUSED
        or len(info.shape) != 3
        or not 0 < info.shape[0] <= _MAX_EXPERTS
        or not info.nbytes
        or (isinstance(info, DequantizedInfo) and info.layout.transposed)
    ):
        return 0
    parts = 2 - FUSED.index(leaf)
    return parts if info.shape[1] % parts == 0 else 0


def _pieces(owner: str, info: TensorInfo, leaves: tuple[str, ...]) -> dict[str, TensorInfo]:
    """The matrices of one fused tensor by name, each as its range of bytes, or as what is dequantized for it."""
    count, rows, _ = info.shape
    size = rows // len(leaves)
    return {
        f"{owner}.{expert}.{leaf}.weight": matrix.rows(i * size, (i + 1) * size)
        for expert in range(count)
        for matrix in (info.entry(expert),)
        for i, leaf in enumerate(leaves)
    }
