"""How much memory a run needs at its peak, as sums of named parts: the plan prints them, a placement is chosen by them.

A phase lists everything that is alive at the same time; the peak is the largest phase. Sizes are bytes of tensors, as
torch.cuda.max_memory_allocated counts them. What no formula gives (how many copies a factorization holds) is measured:
tests/unit/planning/test_footprint.py compares these sums with the live tensors of real runs.

Symbols: T calibration tokens, t tokens a forward pass, h hidden size, S streams, and for a group of linears n columns,
R rows in all, r rows of its tallest.
"""

from dataclasses import dataclass, field, replace

from leangrid.grids import grid_class
from leangrid.machine.devices import usable_device_bytes
from leangrid.metrics.perplexity import CHUNK
from leangrid.models.skeleton import Skeleton
from leangrid.planning.demand import Demand
from leangrid.planning.gradients import drawing_parts, finishes_by_blocks, finishing_parts, tuning_parts
from leangrid.planning.groups import Group
from leangrid.planning.placement import Placement
from leangrid.planning.sizes import GATE_LENGTH, GATE_WINDOWS
from leangrid.recipe import Recipe
from leangrid.solve.in_place import PANEL, TILE_BYTES
from leangrid.solve.tuning import count_step_windows

_F32 = 4
TOKENS_A_BATCH = {"cpu": 1024, "cuda": 16384}  # full-speed products; on the CPU small enough for the cache
# Matrices of the Hessian's size at once. Plain: finish copies H; factorize holds two permuted, damped, flipped, L, I,
# U.
_FINISH, _FACTOR, _SOLVE = 4, 8, 3
_IN_PLACE_FACTOR, _IN_PLACE_PANELS, _IN_PLACE_SOLVE = 2, 3, 3
# Float32 copies of a layer's weights, of a tile of its rows where in place: target, sweep, codes, the refinement's two
# states.
_LAYER, _LAYER_SWEPT = 9, 5


@dataclass
class Footprint:
    """Bytes by phase and part on the device, and what waits in host memory meanwhile (nothing apart on the CPU)."""

    phases: dict[str, dict[str, int]] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes of the largest phase."""
        return max(sum(parts.values()) for parts in self.phases.values())

    @property
    def peak_phase(self) -> str:
        """Its name."""
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def host_peak(self) -> int:
        """Bytes that wait on the host."""
        return sum(self.host.values())


def sum_footprint(demand: Demand, placement: Placement) -> Footprint:
    """The sums for one placement."""
    result = Footprint(host=_host(demand, placement) if demand.accelerated else {})
    tokens = min(placement.windows, demand.samples) * demand.length
    away = placement.disk_streams or (placement.host_streams and demand.accelerated)
    streams = 0 if away else demand.states * (2 if demand.live else 1)  # live: those that left a block beside them
    drawn = 0 if away else demand.guide
    base = {"weights": demand.weights, "streams": streams} | ({"drawn gradients": drawn} if demand.draws else {})
    if demand.live:
        base["outside of the blocks"] = demand.outside
    if demand.accelerated and not placement.in_place:
        base["next block"] = demand.weights
    if demand.draws:
        result.phases["draw"] = drawing_parts(demand, drawn)
    result.phases["embedding"] = {
        "table": demand.vocabulary
        * demand.hidden
        * (demand.itemsize + (0 if demand.accelerated else demand.stored_itemsize)),
        "streams": streams // demand.streams,
        "batch": demand.transient(0, tokens),
    }
    if placement.host_block and demand.accelerated:
        return result
    for number, group in enumerate(demand.groups):
        waiting = base | _waiting(demand, placement, number)
        moving = base | _moving(demand, placement, number, tokens)
        result.phases[f"forward {number}"] = moving
        if number in placement.host_groups and demand.accelerated:
            continue
        square, both = _F32 * group.cols**2, max(demand.streams + demand.measured, group.sums)
        converted = tokens * group.cols * _F32 * demand.streams if demand.itemsize < _F32 and not demand.tiled else 0
        held = moving if placement.replay else waiting
        result.phases[f"hessian {number}"] = held | {"H and G": both * square, "batch in float32": converted}
        for phase, parts in _algebra(demand, placement, group).items():
            others = {"other experts' H": (group.sums - 1) * square} if group.sums else {}
            result.phases[f"{phase} {number}"] = waiting | parts | others
    result.phases["forward out"] = base | _moving(demand, placement, len(demand.groups), tokens)
    if demand.tuned:
        result.phases["tune"] = base | tuning_parts(demand)
    if demand.finished:
        result.phases["finish"] = finishing_parts(demand, finishes_by_blocks(placement, demand.live))
    if demand.has_lm_head and not demand.accelerated:
        result.phases["check"] = _check(demand)
    return result


def _check(demand: Demand) -> dict[str, int]:
    """The quality gate at its end: the head's table as it is read and as it computes, logits of its windows and of one
    more, a few chunks in float32. On a device the logits wait in host memory, and a block there is larger than the
    table."""
    window = min(demand.length, GATE_LENGTH) * demand.vocabulary
    table = demand.vocabulary * demand.hidden * (demand.itemsize + demand.stored_itemsize)
    return {
        "table": table,
        "logits": (min(demand.samples, GATE_WINDOWS) + 1) * window * demand.itemsize,
        "chunks": 5 * min(window, CHUNK * demand.vocabulary) * _F32,
    }


def _waiting(demand: Demand, placement: Placement, number: int) -> dict[str, int]:
    """What is held while group ``number`` is solved: all passes at that group, or the replaced weights beside the
    original ones."""
    if not placement.replay:
        return {"activations": demand.streams * demand.tokens * demand.held(number)}
    if placement.in_place and demand.accelerated:
        return {}  # parked on the host
    return {"new weights": _new_weights(demand, number)}


def _new_weights(demand: Demand, number: int) -> int:
    """Replayed with two streams, the new weights of the groups before ``number`` stand beside the original ones."""
    return demand.itemsize * sum(g.rows * g.cols for g in demand.groups[:number]) * (demand.streams - 1)


def _moving(demand: Demand, placement: Placement, number: int, tokens: int) -> dict[str, int]:
    """What is held while passes are on their way to group ``number`` (to the block's end where there is none)."""
    out = number == len(demand.groups)
    if placement.replay:  # one pass from the block's input on, and the other stream's input of the same batch
        widest = max(tokens * demand.held(n) + demand.transient(n, tokens) for n in range(number + 1))
        other = demand.itemsize * tokens * (demand.hidden if out else demand.groups[number].read) * (demand.streams - 1)
        away = placement.disk_streams or (placement.host_streams and demand.accelerated)
        leaving = demand.states if out and not away else 0
        read = demand.itemsize * tokens * demand.hidden if away else 0
        parts = {"one pass": widest + read, "other stream's input": other, "streams out": leaving}
        return parts | {"new weights": _new_weights(demand, number)}
    most = max(
        demand.held(number), demand.held(number - 1) if number else 0
    )  # batch after batch changes from the one to the other
    before = demand.groups[number - 1] if number else Group(0, 0, 0)
    activations = demand.streams * demand.tokens * most
    return {
        "activations": activations,
        "batch": demand.transient(number, tokens),
        "new weights": demand.itemsize * before.rows * before.cols,
    }


def _algebra(demand: Demand, placement: Placement, group: Group) -> dict[str, dict[str, int]]:
    """The phases of one group's algebra after its sums."""
    square, layer = _F32 * group.cols**2, _F32 * group.tallest * group.cols
    cross = demand.streams - 1 + demand.measured
    copies = _LAYER if demand.refined else _LAYER_SWEPT
    if placement.in_place:
        whole = group.rows >= group.cols  # then M stays, and the noise until the shares are known; else W (G - H) waits
        moves, stays = cross * whole, (demand.streams - 1) * whole
        panels = max(_IN_PLACE_PANELS * _F32 * min(PANEL, group.cols) * group.cols, square)
        new = group.rows * group.cols * (1 + demand.itemsize)
        tile = min(layer, max(TILE_BYTES, _F32 * group.cols))
        return {
            "factor": {"H, U": (_IN_PLACE_FACTOR + moves) * square, "panels, then H damped": panels},
            "solve": {
                "H, U, damped": (_IN_PLACE_SOLVE + stays) * square,
                "tile": copies * tile,
                "codes, new weights": new,
            }
            | _refit(demand, group.cols, tile // (_F32 * group.cols)),
        }
    return {
        "finish": {"H and G": (_FINISH + cross) * square},
        "factor": {"H, G and the factorization": (_FACTOR + cross) * square},
        "solve": {"H, U, damped, M": (_SOLVE + cross) * square, "layer": copies * layer}
        | _refit(demand, group.cols, group.tallest),
    }


def _refit(demand: Demand, cols: int, rows: int) -> dict[str, int]:
    """What a refit of ``rows`` rows together needs: the most of any scheme."""
    if not demand.refined or cols == 1:  # the block has no such group
        return {}
    fitting = [scheme.fitting(cols) for scheme in demand.schemes]
    sizes = (grid_class(scheme).refit_bytes(scheme, rows, cols, demand.accelerated) for scheme in fitting)
    return {"normal equations": max(sizes)}


def _host(demand: Demand, placement: Placement) -> dict[str, int]:
    """What waits in host memory beside a device."""
    parts = {
        "next block": demand.weights,
        "packed block": demand.packed,
        "table": demand.vocabulary * demand.hidden * demand.stored_itemsize,
    }
    if placement.host_streams and not placement.disk_streams:
        parts["streams in and out"] = 2 * demand.states
        parts |= {"drawn gradients": demand.guide} if demand.draws else {}
    if placement.host_groups or placement.host_block:
        alone = replace(placement, host_groups=(), host_block=False)
        parts["algebra"] = max(sum(p.values()) for g in demand.groups for p in _algebra(demand, alone, g).values())
    if placement.in_place and demand.streams == 2:
        parts["new weights"] = _new_weights(demand, len(demand.groups))
        folded = max((_F32 * g.rows * g.cols for g in demand.groups if g.rows < g.cols), default=0)
        parts["folded"] = folded * (1 + demand.measured)
    return parts


def choose_placement(
    skeleton: Skeleton,
    recipe: Recipe,
    samples: int,
    length: int,
    device: str,
    budget: int | None = None,
    host_budget: int | None = None,
) -> tuple[Placement, Footprint]:
    """The fastest placement whose memory fits, or the smallest where none does, and its footprint.

    Args:
        samples, length: windows of this process, and their tokens.
        budget: bytes on the device; None: what is free there.
        host_budget: bytes in host memory beside a device; None: what is free there.
    """
    demand = Demand.of(skeleton, recipe, samples, length, device)
    budget = usable_device_bytes(device) if budget is None else budget
    host_budget = usable_device_bytes("cpu") if host_budget is None else host_budget
    first = Placement(max(1, min(samples, TOKENS_A_BATCH["cuda" if demand.accelerated else "cpu"] // length)))
    if recipe.holds_out:  # whatever the memory: steps are bytes of the result
        first = Placement(count_step_windows(samples, length))
    options = [option for option in first.candidates() if not recipe.holds_out or option.windows == first.windows]
    every = [(option, sum_footprint(demand, option)) for option in options]
    here = [found for found in every if found[1].peak <= budget] or every[-1:]
    return next(
        (found for found in here if found[1].host_peak <= host_budget), min(here, key=lambda found: found[1].host_peak)
    )
