"""Our own reading of the original held against transformers': what both sides of the gate share, the gate cannot see
otherwise.

transformers opens the same files by itself. Every parameter and buffer must be the same, and what its model gives out
for the gate's windows is what ours, block by block, must give. A model that memory does not hold is compared tensor by
tensor with the files."""

import re
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from leangrid.errors import CheckpointError
from leangrid.machine import memory
from leangrid.machine.devices import available_bytes, has_own_memory
from leangrid.metrics.embedding import states
from leangrid.models.original import open_original, original_on_disk, tensors_of
from leangrid.models.skeleton import Skeleton
from leangrid.storage.fused import FUSED, MIXTRAL, PLAIN

_SMALL = 1 << 27  # bytes that the gate may take whatever the run took before
_CHUNK = 1 << 24  # values that are compared at once
_SHOWN = 3
# A typical token's relative error of our walk against transformers' model, in 32 and 16 bits, and in 16 where experts
# are joined. Measured: 0 for every dense model of the table in any dtype, at most 0.007 for a mixture in bfloat16,
# which transformers adds otherwise.
_OUTPUTS = {"exact": 1e-3, "half": 1e-2, "joined": 5e-2}
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)\.weight")


@dataclass
class Reference:
    """The original, to hold the result and our reading against.

    ``model`` is transformers' own, None where there is none to run; ``kind`` what our reading was compared with, in
    words; ``problems`` one phrase for each difference."""

    model: nn.Module | None
    kind: str
    problems: list[str]
    tolerance: float = 0.0

    def outputs(self, ids: Tensor, predicts: bool, device: str) -> list[Tensor]:
        """Logits [length, vocab] of each window, or the last hidden states; one window at a time, as our walk goes."""
        model: Any = self.model
        found = []
        for window in ids.to(device).split(1):
            given = model(input_ids=window, use_cache=False).logits if predicts else states(model, input_ids=window)
            found.append(given[0].cpu())
        return found

    def compare(self, expected: list[Tensor], own: Iterator[Tensor]) -> None:
        """Hold what our walk of the original gives out against ``outputs``: a typical token's relative error."""
        errors = [_token_error(ours, theirs) for ours, theirs in zip(own, expected, strict=True)]
        if not max(errors) <= self.tolerance:
            self.problems.append(f"its outputs differ by {max(errors):.2g}")


@contextmanager
def held_against(ours: Skeleton, device: str) -> Iterator[Reference]:
    """The reference for the length of the ``with``: as much of it as memory holds, so that no run takes more because of
    its gate.

    A dense model's weights stay in their files. Where its dtype is not the stored one, transformers looks at all of
    them as it loads, so that a large one is opened as it is stored and compared tensor by tensor. Experts, which
    transformers joins as it loads, need the whole model in memory; where the run has not taken as much before, the
    tensors of two blocks are compared with the files."""
    shards = {info.file for info in ours.checkpoint.tensors.values()}
    remote = getattr(ours.checkpoint, "remote", None) is not None
    stored = 0 if remote else sum(shard.stat().st_size for shard in shards)
    with ExitStack() as stack:
        if remote or not memory.can_map(stored):
            reference = Reference(
                None, "nothing: " + ("its files are not here" if remote else "the process may not map its files"), []
            )
        elif ours.architecture.sparse and not _fits(ours, device):
            problems, which = _file_differences(ours)
            reference = Reference(None, which, problems)
        else:
            try:
                runs = ours.architecture.sparse or ours.compute_dtype == ours.dtype or stored <= _spare()
                model = stack.enter_context(
                    _transformers_model(ours, ours.compute_dtype if runs else ours.dtype, device)
                )
                kind, problems = "transformers" if runs else "transformers' tensors", _differences(ours, model)
                reference = Reference(model if runs else None, kind, problems, _tolerance(ours))
            except CheckpointError as error:
                reference = Reference(None, "transformers", [error.what])
        yield reference
    memory.return_freed_memory()


@contextmanager
def _transformers_model(ours: Skeleton, dtype: torch.dtype, device: str) -> Iterator[nn.Module]:
    model_class: Any = type(ours.model)
    if ours.architecture.sparse:
        model, _ = open_original(ours.checkpoint, model_class, None, dtype, ours.naming.absent)
        yield model.to(device)  # pyright: ignore[reportArgumentType]
    else:
        with original_on_disk(ours.checkpoint, model_class, dtype, ours.naming.absent, device) as model:
            yield model


def _token_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| of the median token: a rounding that sends one token to another expert changes that
    token alone."""
    error = torch.linalg.vector_norm(ours.float() - theirs.float(), dim=-1)
    return float(
        (error / torch.linalg.vector_norm(theirs.float(), dim=-1).clamp_min(torch.finfo(torch.float32).tiny)).median()
    )


def _tolerance(ours: Skeleton) -> float:
    if ours.compute_dtype.itemsize >= 4:
        return _OUTPUTS["exact"]
    return _OUTPUTS["joined" if ours.architecture.sparse else "half"]


def _spare() -> int:
    """What the gate may take beside its own blocks: what the run took before and gave back."""
    return min(max(_SMALL, memory.peak_bytes() - memory.resident_bytes()), available_bytes("cpu"))


def _fits(ours: Skeleton, device: str) -> bool:
    need = ours.compute_dtype.itemsize * sum(parameter.numel() for parameter in ours.model.parameters())
    return need <= _spare() and (not has_own_memory(device) or need <= available_bytes(device))


def _differences(ours: Skeleton, theirs: nn.Module) -> list[str]:
    """One phrase for each parameter or buffer that we read otherwise than transformers, or that only one side has."""
    own = set(ours.model.state_dict(keep_vars=True)) | {name for name, _ in ours.model.named_buffers()}
    found, met, stored = [], set(), set(ours.parameter_names())
    for name, tensor in tensors_of(theirs):
        for same, part in _apart(ours, name, tensor):
            met.add(same)
            if set(same.split(".")) & set(ours.naming.absent):
                continue
            if same not in own:
                found.append(f"{same} is not read")
            elif not _equal(_read(ours, same, stored), part):
                found.append(f"{same} is another")
    return found + [f"{name} is no part of transformers' model" for name in sorted(own - met)]


def _file_differences(ours: Skeleton) -> tuple[list[str], str]:
    """The same for the first and the last block and all outside of them, tensor by tensor from the files, and which
    these were."""
    shards = sorted({Path(info.file) for info in ours.checkpoint.tensors.values()})
    places = {name: shard for shard in shards for name in _keys(shard)}
    blocks = sorted({0, len(ours.blocks) - 1})
    kept = tuple(f"{ours.block_name(index)}." for index in blocks)
    found = []
    for name in ours.parameter_names():
        if name.startswith(ours.blocks_prefix) and not name.startswith(kept):
            continue
        theirs = _in_files(ours, name, places)
        if theirs is None or not _equal(ours.read(name), theirs):
            found.append(f"{name} is {'in no file' if theirs is None else 'another'}")
    return found, f"tensors of {len(blocks)} blocks"


def said(what: str, problems: list[str]) -> str:
    """The differences as one sentence."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{what}: {'; '.join(problems[:_SHOWN])}{more}"


def _read(ours: Skeleton, name: str, stored: Collection[str]) -> Tensor:
    """What our walk computes with under this name: stored, tied to what is stored, or a table."""
    tied = getattr(ours.model, "all_tied_weights_keys", None) or {}
    while name not in stored and name in tied:
        name = tied[name]
    return ours.read(name) if name in stored else ours.model.get_buffer(name)


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether both hold the same values in the dtype of ``theirs``, a piece at a time."""
    if ours.shape != theirs.shape or ours.is_floating_point() != theirs.is_floating_point():
        return False
    pairs = zip(ours.reshape(-1).split(_CHUNK), theirs.reshape(-1).split(_CHUNK), strict=True)
    return all(torch.equal(one.to("cpu", theirs.dtype), other.to("cpu")) for one, other in pairs)


def _apart(ours: Skeleton, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of transformers' model under the names of ours, where every expert's matrices stand alone."""
    mixtral = ours.config.model_type == "mixtral"
    name = name.replace(".mlp.", ".block_sparse_moe.") if mixtral else name
    owner, _, leaf = name.rpartition(".")
    if not owner.endswith(".experts") or leaf not in FUSED:
        yield name, tensor
        return
    gate, up, down = MIXTRAL if mixtral else PLAIN
    leaves = (gate, up) if leaf == FUSED[0] else (down,)
    for number, expert in enumerate(tensor):
        yield from (
            (f"{owner}.{number}.{one}.weight", part)
            for one, part in zip(leaves, expert.chunk(len(leaves)), strict=True)
        )


def _keys(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as opened:
        return list(opened.keys())


def _in_files(ours: Skeleton, name: str, places: dict[str, Path]) -> Tensor | None:
    """The tensor that transformers takes for ``name``: by its own name, with or without the base model's, or a part of
    joined experts."""
    base = ours.model.base_model_prefix
    spelled = [name, f"{base}.{name}", name.removeprefix(f"{base}.")]
    spelled += [
        one.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        for one in spelled
    ]
    for one in spelled:
        if one in places:
            with safe_open(places[one], framework="pt") as opened:
                return opened.get_tensor(one)
    matched = _EXPERT.fullmatch(name)
    if matched is None:
        return None
    owner, number, leaf = matched[1].replace(".block_sparse_moe.", ".mlp."), int(matched[2]), matched[3]
    part = (MIXTRAL if leaf in MIXTRAL else PLAIN).index(leaf)
    fused = f"{owner}.{FUSED[part == 2]}"
    if fused not in places:
        return None
    with safe_open(places[fused], framework="pt") as opened:
        expert = opened.get_slice(fused)[number]
    return expert if part == 2 else expert.chunk(2)[part]
