"""What opens the result of a run, known before it: said by the plan, as a notice of the run, and in the manifest."""

from collections.abc import Mapping
from typing import Any

from leangrid.errors import ArchitectureError
from leangrid.formats import FORMATS
from leangrid.formats.base import Layout, Reading
from leangrid.models import gguf_names
from leangrid.models.plain_readers import plain_reading
from leangrid.models.skeleton import Skeleton
from leangrid.planning import mlx_lm
from leangrid.planning.sizes import by_name, stored_kinds, stored_schemes
from leangrid.recipe import Recipe
from leangrid.schemes import Scheme
from leangrid.storage.config import add_older_rope_keys
from leangrid.storage.dtypes import NAMES
from leangrid.storage.safetensors import TensorInfo

LOAD, TRANSFORMERS, LLAMA_CPP, MLX_LM = "leangrid.load", "transformers", "llama.cpp", "mlx-lm"
BLOCKS = "gguf"  # the container whose results export writes as one file for llama.cpp
MLX = "mlx"
_DENSE = "what leangrid export --to dense makes of the result"
_MAY_READ = f"it may read {_DENSE}"
_STACKS = "leangrid export --to mlx stacks the experts of the result where it opens them so"
_SOME_EXPERTS = (
    "it merges experts that are packed one by one for some architectures only; "
    "where it is installed (pip install mlx-lm), leangrid asks it"
)
PLAIN = "compressed-tensors"  # the container that transformers reads with neither leangrid nor another library of ours


def merges_experts(recipe: Recipe) -> bool:
    """Whether the result of a resolved ``recipe`` holds experts that all stay in the tensors of all experts that plain
    transformers reads, where the source has them one by one."""
    return recipe.format == PLAIN


def plain_reading_of(skeleton: Skeleton, recipe: Recipe) -> Reading | None:
    """How plain transformers reads the result of a resolved ``recipe``; None for a container that it does not read."""
    return _reading(skeleton, stored_schemes(skeleton, recipe)) if recipe.format == PLAIN else None


def opened_in(skeleton: Skeleton, recipe: Recipe) -> dict[str, str]:
    """Reader -> "yes", or "no: " and why it does not open the result of a resolved ``recipe``, and what it would
    open; of the readers that can be asked before work."""
    if recipe.format == BLOCKS:
        return {LOAD: "yes", LLAMA_CPP: _llama_cpp(skeleton)}
    if recipe.format == MLX:
        word = _mlx_lm(skeleton, recipe)
        return {LOAD: "yes"} if word is None else {LOAD: "yes", MLX_LM: word}
    reading = plain_reading_of(skeleton, recipe)
    if reading is None:
        return {LOAD: "yes"}
    if reading.obstacle is None:
        return {LOAD: "yes", TRANSFORMERS: "yes"}
    kinds = [(alike, one.model_copy(update={"symmetric": True})) for alike, one in stored_kinds(skeleton, recipe)]
    other = _reading(skeleton, by_name(skeleton, kinds))
    named = sorted({scheme.name for _, scheme in kinds})
    opens = " and ".join(named) if other is not None and other.obstacle is None else _DENSE
    return {LOAD: "yes", TRANSFORMERS: describe_obstacle(reading, opens)}


def describe_obstacle(reading: Reading, opens: str = _DENSE) -> str:
    """ "yes", or "no: " and why plain transformers does not open a result that it reads so, and what it ``opens``."""
    return "yes" if reading.obstacle is None else f"no: {reading.obstacle}; it opens {opens}"


def describe_readers(skeleton: Skeleton, recipe: Recipe) -> list[str]:
    """One sentence for each reader of the format that does not open the result."""
    return describe_words(opened_in(skeleton, recipe))


def describe_words(opened: Mapping[str, str]) -> list[str]:
    """One sentence for each reader that does not open a result, or may not, of the words of ``opened_in``."""
    without = {TRANSFORMERS: "transformers without leangrid"}
    verbs = {"no": "does not", "perhaps": "may not"}
    return [
        f"{LOAD} opens the result, {without.get(reader, reader)} {verbs[word.partition(': ')[0]]}: "
        f"{word.partition(': ')[2]}"
        for reader, word in opened.items()
        if word != "yes"
    ]


def ask_mlx_lm(
    config: dict[str, Any], tensors: Mapping[str, TensorInfo | Layout], experts: bool, opens: str = _MAY_READ
) -> str | None:
    """ "yes", "no: " and why mlx-lm does not open a result in MLX's container, or "perhaps: " and why it may not where
    it is not installed; None where nobody can be asked, and nothing is doubtful.

    Args:
        config: its config.json.
        tensors: every tensor that is not quantized by its name, and the layout of every quantized linear by its.
        experts: whether experts are quantized.
        opens: what is said behind an obstacle, of what it may open.
    """
    if not mlx_lm.is_installed():
        return f"perhaps: {_SOME_EXPERTS}" if experts else None
    described: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, one in tensors.items():
        if isinstance(one, TensorInfo):
            described[name] = (one.dtype, one.shape)
        else:
            described |= {f"{name}.{suffix}": (NAMES[dtype], shape) for suffix, (dtype, shape) in one.items()}
    obstacle = mlx_lm.find_obstacle(config, described)
    return "yes" if obstacle is None else f"no: {obstacle}; {opens}"


def _mlx_lm(skeleton: Skeleton, recipe: Recipe) -> str | None:
    """What ``ask_mlx_lm`` says of the result of a resolved ``recipe``."""
    schemes, container = stored_schemes(skeleton, recipe), FORMATS[MLX]
    blocks = (None, *range(len(skeleton.blocks)))
    tensors: dict[str, TensorInfo | Layout] = {
        name: info for index in blocks for name, info, _ in skeleton.plain_tensors(index, merges_experts(recipe))
    }
    tensors |= {name: skeleton.checkpoint.tensors[name] for name in skeleton.naming.extra}
    tensors |= {name: container.layout(one, skeleton.shape(name), skeleton.dtype) for name, one in schemes.items()}
    owners = {skeleton.path(name).rsplit(".", 2)[0] for name in schemes}
    config = add_older_rope_keys(skeleton.checkpoint.config) | container.config_entries(schemes, [])
    experts = not owners.isdisjoint(skeleton.expert_forms)
    return ask_mlx_lm(config, tensors, experts, _STACKS if experts else _MAY_READ)


def _llama_cpp(skeleton: Skeleton) -> str:
    """Whether the export to one .gguf file knows the architecture, and has a place for every quantized linear."""
    try:
        model = gguf_names.describe(skeleton.checkpoint.config, "")
        for name in skeleton.all_linear_names():
            model.tensor_name(f"{name}.weight")
    except ArchitectureError as error:
        return f"no: {error}"
    return "yes"


def _reading(skeleton: Skeleton, schemes: Mapping[str, Scheme]) -> Reading | None:
    names = skeleton.stored.result_names
    if names is None:
        return None
    paths = {name: skeleton.path(name) for name in schemes}
    blocks = skeleton.structure.blocks  # of a group either all linears are a mixture's, or none is
    packed = {f"{block.path}.{group[0]}".rsplit(".", 2)[0] for block in blocks for group in block.groups}
    mixtures = {
        path: form.linears
        for path, form in skeleton.expert_forms.items()
        if path in packed or skeleton.stored.kept_whole(path, merge=True) is None
    }
    return plain_reading(names, paths, mixtures, schemes, skeleton.stored.not_found)
