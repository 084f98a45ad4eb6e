"""The config.json of a result: the source's, with the container's entry, so that engines open the right layers."""

import json
from copy import deepcopy
from typing import Any

from leangrid.formats import FORMATS
from leangrid.models.linears import has_matrix
from leangrid.models.skeleton import Skeleton
from leangrid.planning.readers import plain_reading_of
from leangrid.planning.sizes import stored_schemes
from leangrid.recipe import Recipe
from leangrid.storage.config import add_older_rope_keys
from leangrid.storage.dtypes import torch_name

_TIED = "tie_word_embeddings"
_NOT_COPIED = ("auto_map", "transformers_version")  # code of the checkpoint's own is not passed on


def make_config(skeleton: Skeleton, recipe: Recipe) -> dict[str, Any]:
    """config.json of ``skeleton``'s model quantized by a resolved ``recipe``, as plain JSON values.

    What is not quantized is named as ignored. That includes routers and matrices beside the model: engines take
    every matrix for a linear, and every linear that is not ignored for a quantized one.
    """
    source = skeleton.checkpoint.config
    config: dict[str, Any] = deepcopy({key: value for key, value in source.items() if key not in _NOT_COPIED})
    config["architectures"] = [type(skeleton.model).__name__]
    config["dtype"] = torch_name(skeleton.dtype)
    config.setdefault(_TIED, bool(getattr(skeleton.config, _TIED, False)))  # mlx-lm's default is tied
    if skeleton.naming.untied:
        inner = (value for value in config.values() if isinstance(value, dict) and _TIED in value)
        for section in (config, *inner):
            section[_TIED] = False
    quantized, reading = stored_schemes(skeleton, recipe), plain_reading_of(skeleton, recipe)
    paths = {skeleton.path(name) for name in quantized}
    matrices = {name for name, module in skeleton.model.named_modules() if has_matrix(module)}
    for path, form in skeleton.expert_forms.items():
        matrices |= {f"{path}.{expert}.{leaf}" for expert in range(form.count) for leaf in form.leaves}
    matrices -= paths
    ignored = {skeleton.stored.module_name(path) for path in matrices}
    ignored |= {name.rpartition(".")[0] for name in skeleton.naming.extra}
    if reading is None or not reading.dequantize:  # readers then look for transformers' own modules
        ignored |= matrices
    entries = FORMATS[recipe.format].config_entries(quantized, sorted(ignored), reading)
    return json.loads(json.dumps(add_older_rope_keys(config) | entries, default=str))
