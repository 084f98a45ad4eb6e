"""Whether plain transformers opens a compressed-tensors result, and how its config has to say it.

Asked before work, so that a run says what its result opens in; and when the config is written."""

from collections import Counter
from collections.abc import Collection, Mapping

from leangrid.formats.base import Reading
from leangrid.models.conversion_names import ResultNames
from leangrid.schemes import Scheme

_NO_PLACE = "it has no place for packed experts of this model"
_DROPS = "it drops experts that stay as they are beside packed layers"


def plain_reading(
    names: ResultNames,
    paths: Mapping[str, str],
    mixtures: Mapping[str, int],
    schemes: Mapping[str, Scheme],
    not_found: Collection[str] = (),
) -> Reading:
    """How plain transformers reads a result.

    Args:
        names: what it finds.
        paths: layer -> path of its linear in the model with one linear for each matrix of each expert.
        mixtures: the paths of the mixtures of experts in that model -> how many linears each has; without those that
            all stay, in tensors of all experts.
        schemes: layer -> the scheme that the files say.
        not_found: paths of linears that it finds packed under no name.
    """
    experts = {name: owner for name, path in paths.items() if (owner := path.rsplit(".", 2)[0]) in mixtures}
    firsts = {owner: name for name, owner in reversed(experts.items())}
    refused = any(not names.takes_expert(name, owner) for owner, name in firsts.items())
    replaced = {owner for owner in firsts if names.replaces_experts(owner)}
    packed = Counter(experts.values())
    dropped = any(packed[path] < count and not names.replaces_experts(path) for path, count in mixtures.items())
    merged = frozenset(name for name, owner in experts.items() if owner not in replaced)
    linears = {path: schemes[name] for name, path in paths.items() if name not in merged}
    several = {id(scheme): scheme for scheme in map(schemes.__getitem__, merged)}  # to compare schemes takes longer
    of_experts = list(dict.fromkeys(several.values()))
    lost = next((path for path in paths.values() if path in not_found), None) if not_found else None
    if refused:
        obstacle = _NO_PLACE
    elif dropped:
        obstacle = _DROPS
    elif lost is not None:
        obstacle = f"it does not find '{lost}' packed"
    else:
        obstacle = names.obstacle(linears, of_experts)
    return Reading(paths, merged, names.dequantize(linears.values(), of_experts), obstacle)
