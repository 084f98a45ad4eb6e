"""Ever thriftier placements: the order, and the ladder's end."""

from leangrid.planning.placement import Placement


def test_the_ladder_is_bounded_and_ends() -> None:
    for failed in ("forward", "algebra"):
        for accelerated in (True, False):
            placement, words = Placement(8), []
            while step := placement.reduced(failed, 3, 4, accelerated):
                placement, said = step
                words.append(said)
            assert len(words) == len(set(words)) <= 8
            assert placement.replay and placement.host_streams and placement.host_block == accelerated


def test_what_failed_decides_what_gives_way() -> None:
    placement = Placement(4)
    assert placement.reduced("forward", 0, 4, True) == (Placement(2), "2 instead of 4 windows a forward pass")
    step = placement.reduced("algebra", 3, 4, True)
    assert step is not None and step[0] == Placement(4, replay=True, host_streams=True)
    lean = Placement(4, replay=True, host_streams=True, in_place=True)
    one = lean.reduced("algebra", 3, 4, True)
    assert one is not None and one[0].host_groups == (3,) and not one[0].host_block
    two = one[0].reduced("algebra", 1, 4, True)
    assert two is not None and two[0].host_groups == (1, 3)
    everything = Placement(1, replay=True, host_streams=True, in_place=True).reduced("forward", 0, 4, True)
    assert everything is not None and everything[0].host_groups == (0, 1, 2, 3)
    last = lean.reduced("algebra", 3, 4, False)
    assert last is not None and last[0].disk_streams, "on the CPU states can only go to the disk"
    assert last[0].reduced("algebra", 3, 4, False) is None


def test_options_begin_with_the_fastest_and_never_repeat() -> None:
    options = list(Placement(8, host_block=True).options())
    assert options[0] == Placement(8) and options[-1] == Placement(
        1, replay=True, host_streams=True, disk_streams=True, in_place=True
    )
    assert options[-2] == Placement(1, replay=True, host_streams=True, in_place=True)
    assert len(options) == len(set(options)) == 12


def test_json_and_back() -> None:
    placement = Placement(2, replay=True, host_groups=(1, 3))
    assert Placement.from_json(placement.to_json() | {"of a later version": 1}) == placement
    assert Placement.from_json({"windows": 4}) == Placement(4)
