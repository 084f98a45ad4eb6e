"""What a line of the race says, and that every peer has its list and its runner."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leangrid.schemes import Scheme


def measured(seconds: float, cpu: float, peak: int) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "with_files": seconds + 1,
        "process_seconds": seconds + 2,
        "cpu_seconds": cpu,
        "peak_ram_bytes": peak,
    }


def test_ratios_are_those_within_a_round(bench: Any) -> None:
    ours = [measured(10.0, 20.0, 5), measured(20.0, 22.0, 7), measured(10.0, 21.0, 6)]
    peer = [measured(30.0, 60.0, 10), measured(80.0, 66.0, 10), measured(20.0, 63.0, 14)]
    found = bench("race").summarize(ours, {"other": peer})
    assert found["seconds"] == 10.0 and found["rounds_seconds"] == [10.0, 20.0, 10.0]
    assert found["speedup_over"] == {"other": 3.0}  # 3, 4, 2: not 30 / 10 of the medians by chance
    assert found["speedup_over_cpu_seconds"] == {"other": 3.0}
    assert found["peak_ram_bytes"] == 7 and found["peak_ram_share_of"] == {"other": 0.5}


def test_what_trains_runs_in_one_round(bench: Any) -> None:
    """AutoRound and the effort best are compared with the others by the first round alone."""
    ours = [measured(10.0, 20.0, 5), measured(20.0, 22.0, 7)]
    once = [measured(30.0, 60.0, 10)]
    race = bench("race")
    assert race.summarize(ours, {"autoround": once})["speedup_over"] == {"autoround": 3.0}
    assert race.summarize(once, {"gptqmodel": ours})["speedup_over"] == {"gptqmodel": 0.333}
    assert not race.ONCE - race.OURS.keys() - race.PEERS.keys()


def test_an_entrant_that_fails_is_out_and_the_others_go_on(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    race = bench("race")

    def step(entrant: Any) -> None:
        if entrant.name == "broken":
            raise SystemExit("its file has another shape")

    entrants = [SimpleNamespace(name=name) for name in ("leangrid", "broken", "gptqmodel")]
    assert [one.name for one in race.still_racing(entrants, step)] == ["leangrid", "gptqmodel"]
    assert "broken is out of the race: its file has another shape" in capsys.readouterr().err


@pytest.mark.parametrize(("scheme", "bits", "group"), [("W4A16_G64", 4, 64), ("W3A16", 3, None)])
def test_all_entrants_get_the_bits_and_groups_of_the_scheme(
    bench: Any, tmp_path: Path, scheme: str, bits: int, group: int | None
) -> None:
    race = bench("race")
    windows = torch.zeros(2, 8, dtype=torch.long)
    work = bench("common.workload").Workload("m", tmp_path, "c4", windows, tmp_path / "windows", 0)
    settings = race.Settings(work, tmp_path, tmp_path, 1)
    for name in (*race.OURS, *race.PEERS):
        recipe = race.Entrant(name, Scheme.parse(scheme), settings).recipe
        if name in race.OURS:
            assert recipe["scheme"] == scheme and (recipe["samples"], recipe["length"]) == (2, 8)
        else:
            assert (recipe["bits"], recipe["group_size"], recipe["symmetric"]) == (bits, group, False)


def test_every_peer_has_its_packages_and_its_runner(bench: Any) -> None:
    race, here = bench("race"), bench("common.peer").PEERS
    for name, _ in race.PEERS.values():
        pinned = (here / f"{name}.txt").read_text(encoding="utf-8").split()
        assert all("==" in line for line in pinned) and any(line.startswith("torch==") for line in pinned)
        compile((here / f"run_{name}.py").read_text(encoding="utf-8"), name, "exec")


def test_a_failed_peer_shows_its_last_words(bench: Any, tmp_path: Path) -> None:
    peer = bench("common.peer").Peer("gptqmodel", tmp_path)
    peer.python.parent.mkdir(parents=True)
    peer.python.write_text("#!/bin/sh\necho broken; exit 3\n", encoding="utf-8")
    peer.python.chmod(0o755)
    with pytest.raises(SystemExit, match=r"(?s)gptqmodel ended with 3.*broken"):
        peer.quantize({"out": str(tmp_path / "out"), "threads": 1}, tmp_path)
