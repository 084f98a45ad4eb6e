"""Experts in two tensors a block, [experts, 2 x intermediate, hidden] and [experts, hidden, intermediate], as
transformers 5 has them.

Row-major, each matrix of each expert lies in one piece: the header alone says where. Seen from here on under the names
that checkpoints with one tensor a matrix have."""

from collections.abc import Mapping
from dataclasses import replace

from leangrid.errors import CheckpointError
from leangrid.storage.safetensors import TensorInfo

# Of the expert's linears: gate, up, down.
PLAIN = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = ("w1", "w3", "w2")
FUSED = ("gate_up_proj", "down_proj")
_MOST = 4096  # experts; a header of a few bytes must not become a list of millions


def unfused(tensors: Mapping[str, TensorInfo], mixtral: bool = False) -> dict[str, TensorInfo]:
    """``tensors`` with every fused one as its experts' matrices [rows, cols]; a tensor of another kind stays.

    With ``mixtral`` their mixture gets the name it has in Mixtral's checkpoints, ``block_sparse_moe``, and its router
    with it. Raises CheckpointError where an expert's matrix is stored a second time."""
    gate, up, down = MIXTRAL if mixtral else PLAIN
    found: dict[str, TensorInfo] = {}
    mixtures = {name.rpartition(".experts.")[0] for name, info in tensors.items() if _parts(name, info)}
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
        leaves = ((gate, up), (down,))[FUSED.index(name.rpartition(".")[2])] if _parts(name, info) else ()
        pieces = _pieces(new.rpartition(".")[0], info, leaves) if leaves else {new: info}
        if twice := pieces.keys() & (found.keys() | (tensors.keys() - {name})):
            raise CheckpointError(
                f"'{min(twice)}' is stored twice, alone and in '{name}'",
                info.file,
                "Get another copy of the checkpoint",
            )
        found |= pieces
    return found


def _parts(name: str, info: TensorInfo) -> int:
    """How many matrices of an expert a tensor holds; 0 where it is no fused one."""
    owner, _, leaf = name.rpartition(".")
    if (
        not owner.endswith(".experts")
        or leaf not in FUSED
        or len(info.shape) != 3
        or not 0 < info.shape[0] <= _MOST
        or not info.nbytes
    ):
        return 0
    parts = 2 - FUSED.index(leaf)
    return parts if info.shape[1] % parts == 0 else 0


def _pieces(owner: str, info: TensorInfo, leaves: tuple[str, ...]) -> dict[str, TensorInfo]:
    count, rows, cols = info.shape
    size, names = (
        info.nbytes // (count * len(leaves)),
        [f"{owner}.{expert}.{leaf}.weight" for expert in range(count) for leaf in leaves],
    )
    one = replace(info, shape=(rows // len(leaves), cols))
    return {
        name: replace(one, start=info.start + i * size, end=info.start + (i + 1) * size) for i, name in enumerate(names)
    }
