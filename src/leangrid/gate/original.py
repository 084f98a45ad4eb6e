"""Our reading of the original compared with transformers'.

Both models that the gate compares are read by our code, so an error of that code would be in both and not be seen.
transformers opens the same files by itself: every parameter and buffer must be equal, and its outputs for the gate's
windows must be those of our walk, block by block. A model that does not fit in memory is compared with the files tensor
by tensor."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from leangrid.errors import CheckpointError
from leangrid.machine import memory
from leangrid.machine.devices import has_own_memory, is_out_of_memory, usable_device_bytes
from leangrid.models.dequantized import is_dequantized
from leangrid.models.discovery import ELSEWHERE
from leangrid.models.experts import mixtures_in, modules_outside_experts
from leangrid.models.model_inputs import Inputs, arguments_of, moved_inputs
from leangrid.models.original import open_original, original_on_disk, tensors_of
from leangrid.models.skeleton import Skeleton
from leangrid.models.whole import result_of

_SMALL = 1 << 27  # bytes that the gate may use however little memory the run needed
_CHUNK = 1 << 24  # values that are compared at once
_SHOWN = 3
# The largest relative error of our walk's outputs that passes (median token): in float32, in 16 bits, and in 16 bits
# for mixtures of experts. Measured: 0 for every dense model of the table in any dtype, at most 0.007 for a mixture in
# bfloat16, whose experts' outputs transformers adds in another order.
_TOLERANCES = {"float32": 1e-3, "half": 1e-2, "half_experts": 5e-2}


@dataclass
class OriginalModel:
    """The original as transformers reads it.

    Attributes:
        model: transformers' model; None where it cannot be run here.
        kind: what our reading was compared with, in words.
        problems: one phrase for each difference of our reading.
        tolerance: the largest relative error of our outputs that is no difference.
        entry: the path in the model of the module that our walk runs.
    """

    model: nn.Module | None
    kind: str
    problems: list[str]
    tolerance: float = 0.0
    entry: str = ""

    def outputs(self, windows: Sequence[Inputs], has_lm_head: bool, device: str, dtype: torch.dtype) -> list[Tensor]:
        """Logits [length, vocab] of each window, or the last hidden states; one window at a time, as our walk goes."""
        if self.model is None:
            raise RuntimeError("there is no model that could be run")
        module = self.model if has_lm_head else self.model.get_submodule(self.entry)
        moved = (moved_inputs(window, device, dtype) for window in windows)
        return [result_of(module(**arguments_of(module, inputs)), has_lm_head)[0].cpu() for inputs in moved]

    def compare(self, expected: list[Tensor], own: Iterator[Tensor]) -> None:
        """Compare the outputs of our walk (``own``) with those of transformers' model (``expected``); a median relative
        error over ``tolerance`` is a problem."""
        errors = [_token_error(ours, theirs) for ours, theirs in zip(own, expected, strict=True)]
        if not max(errors) <= self.tolerance:
            self.problems.append(f"its outputs differ by {max(errors):.2g}")


@contextmanager
def open_reference(ours: Skeleton, device: str) -> Iterator[OriginalModel]:
    """Context: the original as transformers reads it, and how ``ours`` differs. It uses no more memory than the run
    did.

    A dense model's weights stay in their files. Where it computes in another dtype than the stored one, transformers
    converts all weights as it loads, so a large model is opened in its stored dtype, compared tensor by tensor and not
    run. The experts of a mixture are merged as it loads, which needs the whole model in memory; where the run did not
    use as much before, the tensors of two blocks are compared with the files instead."""
    shards = {info.file for info in ours.checkpoint.tensors.values()}
    dequantized = is_dequantized(ours.checkpoint)
    remote = getattr(ours.checkpoint, "remote", None) is not None
    stored = 0 if remote else sum(shard.stat().st_size for shard in shards)
    with ExitStack() as stack:
        if remote or not memory.can_map(stored):
            reference = OriginalModel(
                None, "nothing: " + ("its files are not here" if remote else "the process may not map its files"), []
            )
        elif dequantized and not _fits(ours, device):
            reference = OriginalModel(None, "nothing: dequantized as a whole it does not fit in memory", [])
        elif _is_converted(ours) and not _fits(ours, device):
            problems, which = _file_differences(ours)
            reference = OriginalModel(None, which, problems)
        else:
            try:
                runs = _is_converted(ours) or ours.compute_dtype == ours.dtype or stored <= _spare()
                model = stack.enter_context(
                    _transformers_model(ours, ours.compute_dtype if runs else ours.dtype, device)
                )
                kind, problems = "transformers" if runs else "transformers' tensors", _differences(ours, model)
                kind = "transformers, with weights dequantized by leangrid" if dequantized else kind
                reference = OriginalModel(model if runs else None, kind, problems, _tolerance(ours), ours.entry_path)
            except CheckpointError as error:
                reference = OriginalModel(None, "transformers", [error.what])
        yield reference
    memory.return_freed_memory()


@contextmanager
def _transformers_model(ours: Skeleton, dtype: torch.dtype, device: str) -> Iterator[nn.Module]:
    model_class: Any = type(ours.model)
    if _is_converted(ours):
        model, _ = open_original(ours.checkpoint, model_class, None, dtype, ours.naming.absent)
        yield model.to(device)  # pyright: ignore[reportArgumentType]
        return
    with original_on_disk(ours.checkpoint, model_class, dtype, ours.naming.absent, device) as model:
        if _runs(model, ours, device) or not _fits(ours, device):
            yield model
            return
    model, _ = open_original(ours.checkpoint, model_class, None, dtype, ours.naming.absent)
    yield model.to(device)  # pyright: ignore[reportArgumentType]


def _runs(model: nn.Module, ours: Skeleton, device: str) -> bool:
    """Whether a model runs whose weights are left in their files: not where its code reads the weight of a module
    without calling it."""
    module = model.get_submodule(ours.entry_path)
    try:
        module(**arguments_of(module, torch.zeros(1, 2, dtype=torch.int64, device=device)))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return False
    return True


def _is_converted(ours: Skeleton) -> bool:
    """Whether transformers makes other tensors of the stored ones as it loads, for which memory has to hold them all:
    merges experts, cuts or joins tensors, dequantizes. Also where a weight is read outside of its own module's forward
    pass, as weights that are left in files cannot be."""
    fixed = (why for block in ours.structure.blocks for why in block.fixed.values())
    elsewhere = any(why.startswith(ELSEWHERE) for why in fixed)
    return ours.has_experts or bool(ours.naming.converted) or is_dequantized(ours.checkpoint) or elsewhere


def _token_error(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs| of the median token. Not of the worst: rounding may route a single token to another
    expert, which is no error."""
    error = torch.linalg.vector_norm(ours.float() - theirs.float(), dim=-1)
    return float(
        (error / torch.linalg.vector_norm(theirs.float(), dim=-1).clamp_min(torch.finfo(torch.float32).tiny)).median()
    )


def _tolerance(ours: Skeleton) -> float:
    if ours.compute_dtype.itemsize >= 4:
        return _TOLERANCES["float32"]
    return _TOLERANCES["half_experts" if ours.has_experts else "half"]


def _spare() -> int:
    """Bytes that the gate may use beside its own blocks: what the run used before and freed."""
    return min(max(_SMALL, memory.peak_bytes() - memory.resident_bytes()), usable_device_bytes("cpu"))


def _fits(ours: Skeleton, device: str) -> bool:
    outside = (module._parameters.values() for _, module in modules_outside_experts(ours.model))
    numbers = {id(one): one.numel() for parameters in outside for one in parameters if one is not None}
    experts = sum(form.numbers for form in ours.expert_forms.values())
    need = ours.compute_dtype.itemsize * (sum(numbers.values()) + experts)
    return need <= _spare() and (not has_own_memory(device) or need <= usable_device_bytes(device))


def _differences(ours: Skeleton, theirs: nn.Module) -> list[str]:
    """One phrase for each parameter or buffer that we read otherwise than transformers, or that only one side has."""
    own = set(ours.model.state_dict(keep_vars=True)) | {name for name, _ in ours.model.named_buffers()}
    for path, mixture in mixtures_in(ours.model).items():  # whose linears are made a block at a time
        own |= {f"{path}.{name}" for name in mixture.parameter_names()}
    found, met, stored = [], set(), set(ours.parameter_names())
    for name, tensor in tensors_of(theirs):
        for same, part in _split_experts(ours, name, tensor):
            met.add(same)
            if set(same.split(".")) & set(ours.naming.absent):
                continue
            if same not in own:
                found.append(f"{same} is not read")
            elif not _equal(_read(ours, same, stored), part):
                found.append(f"{same} is another")
    return found + [f"{name} is no part of transformers' model" for name in sorted(own - met)]


def _file_differences(ours: Skeleton) -> tuple[list[str], str]:
    """One phrase for each tensor of the first block, the last block or outside the blocks that we read otherwise than
    it is in the files; and which tensors these were, in words."""
    shards = sorted({Path(info.file) for info in ours.checkpoint.tensors.values()})
    places = {name: shard for shard in shards for name in _keys(shard)}
    blocks = sorted({0, len(ours.blocks) - 1})
    compared = tuple(f"{ours.block_name(index)}." for index in blocks)
    found = []
    for name in ours.parameter_names():
        if name.startswith(ours.block_prefixes) and not name.startswith(compared):
            continue
        theirs = _read_from_files(ours, name, places)
        if theirs is None or not _equal(ours.read(name), theirs):
            found.append(f"{name} is {'in no file' if theirs is None else 'another'}")
    return found, f"tensors of {len(blocks)} blocks"


def describe_problems(what: str, problems: list[str]) -> str:
    """One sentence: ``what`` and the first of the problems."""
    more = f"; and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return f"{what}: {'; '.join(problems[:_SHOWN])}{more}"


def _read(ours: Skeleton, name: str, stored: Collection[str]) -> Tensor:
    """The tensor that our walk uses under this name: a stored one, the one it is tied to, or a buffer."""
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


def _split_experts(ours: Skeleton, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor of transformers' model under the names of ours: merged experts as one matrix for each expert."""
    owner, _, leaf = name.rpartition(".")
    form = ours.expert_forms.get(owner)
    if form is None or leaf not in form.fused_names:
        yield name, tensor
        return
    for kind in ("weight", "bias"):
        for one in (one for leaves in form.stages for one in leaves if form.fused_name(one, kind) == leaf):
            take = form.taken(one, kind)
            yield from ((f"{owner}.{number}.{one}.{kind}", take(tensor[number])) for number in range(form.count))


def _keys(shard: Path) -> list[str]:
    with safe_open(shard, framework="pt") as opened:
        return list(opened.keys())


def _read_from_files(ours: Skeleton, name: str, places: dict[str, Path]) -> Tensor | None:
    """The tensor that transformers reads for ``name``, of the stored one that it renames to it or cuts it from; None
    where the tensor is made of several, or of none."""
    place = ours.stored.places[name]
    if len(place.stored) != 1 or place.converted is not None or place.stored[0] not in places:
        return None
    with safe_open(places[place.stored[0]], framework="pt") as opened:
        found = opened.get_slice(place.stored[0])
        found = found[:] if place.expert is None else found[place.expert]
    return found if place.take is None else place.take(found)
