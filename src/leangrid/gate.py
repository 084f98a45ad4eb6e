"""The quality gate: the finished files are opened again and held against the original, before the directory gets its name.

Both models are walked block by block, side by side, on the first two calibration windows, so the gate holds one block of each. It sees
the bytes that were written, not the tensors that were meant: a convention shifted by one, a layer in the wrong place or a file that no
reader can open ends here. A decoder is judged by its mean KL from the original, an encoder by its mean-pooled states' cosine distance.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from leangrid import memory
from leangrid.devices import accelerated, out_of_memory, release_cached
from leangrid.errors import CheckpointError, Interrupted, LeangridError, first_line
from leangrid.evaluate.divergence import divergence
from leangrid.evaluate.embedding import cosine_distance
from leangrid.evaluate.perplexity import CHUNK, negative_log_likelihood, perplexity
from leangrid.formats import CONFIG_KEYS, format_of, schemes_of
from leangrid.models.skeleton import Skeleton
from leangrid.models.walk import embed
from leangrid.storage.safetensors import TensorInfo
from leangrid.storage.source import open_source

WINDOWS, LENGTH = 2, 256
WORST = 3
_PROBED = 64  # tokens of a window on which linears are compared one by one

# Above these a model is broken rather than quantized. Measured on SmolLM2: 0.11 at 4 bits, 0.47 at 3, and 3.3 for plain rounding at 3,
# which is perplexity 371 instead of 13.
KL_LIMITS = {8: 0.1, 5: 0.5, 4: 1.0, 3: 2.0, 2: 6.0}
COSINE_LIMITS = {8: 0.02, 5: 0.1, 4: 0.2, 3: 0.4, 2: 0.7}
_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def default_limit(bits: int, measure: str) -> float:
    """The largest distance that passes at ``bits`` bits; ``measure`` is kl or cosine."""
    limits = COSINE_LIMITS if measure == "cosine" else KL_LIMITS
    return limits[max((known for known in limits if known <= bits), default=min(limits))]


def judge(original: Skeleton, directory: Path, windows: Int64[Tensor, "samples length"], bits: int, device: str) -> dict[str, Any]:
    """What the manifest keeps as ``quality``: measure, value, windows, tokens, worst_layers; of a decoder top1_agreement and both
    perplexities on these calibration tokens; or ``error``, one sentence.

    A result that cannot be opened or run is an answer, not an exception; Interrupted (the source changed) passes.
    """
    ids = windows[:WINDOWS, :LENGTH]
    try:
        try:
            found = _measure(original, directory, ids, device)
        except RuntimeError as error:
            if not (accelerated(device) and out_of_memory(error)):
                raise
            release_cached(device)
            found = _measure(original, directory, ids, "cpu")
    except Interrupted:
        raise
    except (LeangridError, RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError, OSError) as error:
        return {"error": f"the result cannot be opened again and run: {first_line(error)}"}
    kind = found["measure"]
    if found["value"] is None:
        found["error"] = "the result's predictions are not finite"
    return found | {"limit": default_limit(bits, kind), "windows": ids.shape[0], "tokens": ids.numel()}


def passed(quality: Mapping[str, Any], limit: float | None = None) -> bool:
    """Whether what ``judge`` found is within ``limit`` (its own default where None). Nothing found is nothing passed."""
    value, allowed = quality.get("value"), quality.get("limit") if limit is None else limit
    return "error" not in quality and value is not None and allowed is not None and value <= allowed


def verdict(quality: Mapping[str, Any], limit: float | None = None) -> str:
    """Why a result did not pass, in one sentence."""
    if "error" in quality:
        return str(quality["error"])
    what = "the mean KL from the original" if quality.get("measure") == "kl" else "the distance of the embeddings from the original's"
    worst = ", ".join(f"{layer['name']} ({layer['error']:.2g})" for layer in quality.get("worst_layers", []))
    allowed = quality.get("limit") if limit is None else limit
    return f"{what} is {quality.get('value')}, {allowed} is allowed; worst layers by the relative error of their outputs: {worst}"


class Reopened:
    """A finished directory as the weights of a dense model: packed linears are checked and dequantized as they are read."""

    def __init__(self, directory: Path, original: Skeleton) -> None:
        self._files = open_source(directory, allow_quantized=True)
        stored = next((self._files.config[key] for key in CONFIG_KEYS if key in self._files.config), None)
        if not isinstance(stored, dict):
            raise CheckpointError("there is no quantization_config", directory / "config.json")
        self._format = format_of(stored)
        self._turned = original.architecture.layer == "conv1d"
        self.directory, self.notices = directory, self._files.notices
        self.config: dict[str, Any] = {key: value for key, value in self._files.config.items() if key not in CONFIG_KEYS}
        self._shapes = {name: original.shape(name) for i in range(len(original.blocks)) for name in original.linear_names(i)}
        self._schemes = schemes_of(stored, self._shapes)
        self._parts: dict[str, dict[str, str]] = {name: {} for name in self._shapes}
        self.tensors: dict[str, TensorInfo] = {}
        for name, info in self._files.tensors.items():
            owner, _, suffix = name.rpartition(".")
            if owner in self._parts and suffix != "bias":
                self._parts[owner][suffix] = name
            else:
                self.tensors[name] = info
        for name, (rows, cols) in self._shapes.items():
            shape = (cols, rows) if self._turned else (rows, cols)
            self.tensors[f"{name}.weight"] = TensorInfo(directory, _NAMES[original.dtype], shape, 0, 0)

    def read(self, name: str) -> Tensor:
        """One tensor of the dense model; CheckpointError where its packed parts are not sound."""
        owner = name.removesuffix(".weight")
        if owner not in self._parts:
            return self._files.read(name)
        packed = {suffix: self._files.read(part) for suffix, part in self._parts[owner].items()}
        weight = self._format.dense(packed, self._schemes[owner], self._shapes[owner], owner)
        return weight.t().contiguous() if self._turned else weight

    def close(self) -> None:
        """Close the file that is held open."""
        self._files.close()


@torch.no_grad()
def _measure(original: Skeleton, directory: Path, ids: Int64[Tensor, "windows length"], device: str) -> dict[str, Any]:
    weights = Reopened(directory, original)
    try:
        result = Skeleton(weights, original.compute_dtype)
        theirs, their_calls = embed(original, ids.split(1), device)
        ours, our_calls = embed(result, ids.split(1), device)
        errors: dict[str, float] = {}
        for index in range(len(original.blocks)):
            with original.block(index, device) as block, result.block(index, device) as quantized:
                names = [name for group in original.groups(index) for name in group]
                with _probed(block, quantized, names, f"{original.block_name(index)}.", errors):
                    theirs = [_through(block, x, *their_calls.of(index, 1, x.device)) for x in theirs]
                ours = [_through(quantized, x, *our_calls.of(index, 1, x.device)) for x in ours]
            memory.return_free()  # two models' blocks in turn leave holes: 3 to 10 MB more a block
        worst = sorted(errors, key=lambda name: -errors[name])[:WORST]
        found = _distance(original, result, ids, theirs, ours, device)
        return found | {"worst_layers": [{"name": name, "error": round(errors[name], 4)} for name in worst]}
    finally:
        weights.close()


def _through(block: nn.Module, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    result = block(hidden, *args, **kwargs)
    return result[0] if isinstance(result, tuple) else result


@contextmanager
def _probed(block: nn.Module, quantized: nn.Module, names: list[str], prefix: str, errors: dict[str, float]) -> Iterator[None]:
    """Inside the ``with``, each linear of ``block`` that runs is compared with its twin on the same inputs: |y^ - y| / |y|."""

    def compare(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            expected = output[..., :_PROBED, :].float()
            got = quantized.get_submodule(name)(args[0][..., :_PROBED, :].contiguous()).float()
            error = float((got - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))
            errors[prefix + name] = max(errors.get(prefix + name, 0.0), error if math.isfinite(error) else 1e30)

        return hook

    hooks = [block.get_submodule(name).register_forward_hook(compare(name)) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _distance(original: Skeleton, result: Skeleton, ids: Tensor, theirs: list[Tensor], ours: list[Tensor], device: str) -> dict[str, Any]:
    """From the hidden states that leave the last block, window by window."""
    if original.architecture.kind == "encoder":
        value = cosine_distance(*(torch.cat(states).double().mean(1).cpu() for states in (theirs, ours)))
        return {"measure": "cosine", "value": _rounded(value)}
    reference = list(_logits(original, ids, theirs, device))
    compared, surprises = [], []
    for one, other, window in zip(reference, _logits(result, ids, ours, device), ids.cpu(), strict=True):
        for start in range(0, len(window) - 1, CHUNK):
            part = slice(start, min(start + CHUNK, len(window) - 1))
            compared.append(divergence(torch.log_softmax(one[part].float(), -1), other[start:]))
        surprises.append([negative_log_likelihood(logits, window) for logits in (other, one)])
    perplexities = [_rounded(perplexity(torch.cat(parts))) for parts in zip(*surprises, strict=True)]
    return {
        "measure": "kl",
        "value": _rounded(float(torch.cat([one.kl for one in compared]).mean())),
        "top1_agreement": _rounded(float(torch.cat([one.agrees for one in compared]).double().mean())),
        "perplexity": perplexities[0],
        "reference_perplexity": perplexities[1],
    }


def _logits(skeleton: Skeleton, ids: Tensor, hidden: list[Tensor], device: str) -> Iterator[Float[Tensor, "length vocab"]]:
    """The rest of the model after its blocks, window by window, in its dtype: they hand ``hidden`` on, whatever comes in."""
    with skeleton.without_blocks(device, head=True) as model:
        for window, states in zip(ids.split(1), hidden, strict=True):
            for block in skeleton.blocks:
                block.forward = lambda *_args, handed=states, **_kwargs: handed
            try:
                output: Any = model(input_ids=window.to(device), use_cache=False)
            finally:
                for block in skeleton.blocks:
                    del block.forward
            yield output.logits[0].cpu()


def _rounded(value: float) -> float | None:
    """Six digits: what differs beyond them is the machine's, not the result's."""
    return float(f"{value:.6g}") if math.isfinite(value) else None
