"""Placements that need less and less memory: their order, and where it ends."""

from leangrid.planning.placement import Placement


def test_smaller_placements_come_to_an_end() -> None:
    for failed in ("forward", "algebra"):
        for accelerated in (True, False):
            placement, words = Placement(8), []
            while step := placement.next_smaller(failed, 3, 4, accelerated):
                placement, said = step
                words.append(said)
            assert len(words) == len(set(words)) <= 8
            assert placement.replay and placement.host_streams and placement.host_block == accelerated


def test_what_failed_decides_what_is_made_smaller() -> None:
    placement = Placement(4)
    assert placement.next_smaller("forward", 0, 4, True) == (Placement(2), "2 instead of 4 windows a forward pass")
    step = placement.next_smaller("algebra", 3, 4, True)
    assert step is not None and step[0] == Placement(4, replay=True, host_streams=True)
    in_place = Placement(4, replay=True, host_streams=True, in_place=True)
    one = in_place.next_smaller("algebra", 3, 4, True)
    assert one is not None and one[0].host_groups == (3,) and not one[0].host_block
    two = one[0].next_smaller("algebra", 1, 4, True)
    assert two is not None and two[0].host_groups == (1, 3)
    everything = Placement(1, replay=True, host_streams=True, in_place=True).next_smaller("forward", 0, 4, True)
    assert everything is not None and everything[0].host_groups == (0, 1, 2, 3)
    last = in_place.next_smaller("algebra", 3, 4, False)
    assert last is not None and last[0].disk_streams, "on the CPU states can only go to the disk"
    assert last[0].next_smaller("algebra", 3, 4, False) is None


def test_options_begin_with_the_fastest_and_never_repeat() -> None:
    options = list(Placement(8, host_block=True).candidates())
    assert options[0] == Placement(8) and options[-1] == Placement(
        1, replay=True, host_streams=True, disk_streams=True, in_place=True
    )
    assert options[-2] == Placement(1, replay=True, host_streams=True, in_place=True)
    assert len(options) == len(set(options)) == 12


def test_json_and_back() -> None:
    placement = Placement(2, replay=True, host_groups=(1, 3))
    assert Placement.from_json(placement.to_json() | {"of a later version": 1}) == placement
    assert Placement.from_json({"windows": 4}) == Placement(4)


def test_a_run_of_an_older_version_goes_on_with_its_placement() -> None:
    older = Placement(2, replay=True, in_place=True).to_json()
    older["lean"] = older.pop("in_place")
    assert Placement.from_json(older) == Placement(2, replay=True, in_place=True)
