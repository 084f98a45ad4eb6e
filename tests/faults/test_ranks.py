"""Several ranks as real processes over loopback: the same bytes twice, what is refused, and what stops them in the
middle."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import forked_ranks
import pytest
import tiny_models
import torch
from forked_ranks import Ended, as_command, command
from ranks_run import KILLED, TOLERANCE, contents, losses, sentences, together, words
from safetensors.torch import load_file, save_file

from leangrid.errors import LeangridError
from leangrid.planning.placement import Placement
from leangrid.recipe import Recipe
from leangrid.run import ranks as ranks_module
from leangrid.run.quantize import quantize
from leangrid.solve import in_place
from leangrid.storage.manifest import list_differences


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save("llama1", tmp_path_factory.mktemp("ranks") / "llama")


@pytest.fixture(scope="module")
def expected(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of two ranks that nothing happened to."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = together(source, out, 2)
    assert [one.status for one in ended] == [0, 0], ended
    assert not ended[1].said.strip(), "rank 0 alone speaks"
    assert json.loads((out / "manifest.json").read_text())["determinism"]["scope"]["ranks"] == ["2"]
    return out


# Which rank dies where: "ranks.sum:6" is in the second of two blocks with four groups each.
DEATHS = {
    "a follower, in a block": (1, "ranks.sum:6"),
    "rank 0, in a block": (0, "ranks.sum:6"),
    "a follower, before anything is committed": (1, "ranks.sum:1"),
    "a follower, at a commit": (1, "ranks.whole:2"),
    "rank 0, at a commit": (0, "journal.after_block:2"),
    "rank 0, with the result written": (0, "publish.before_rename"),
    "rank 0, with the result in its place": (0, "publish.after_rename"),
}


@pytest.mark.fault("R4")
@pytest.mark.parametrize(
    "death", [name if name == next(iter(DEATHS)) else pytest.param(name, marks=pytest.mark.slow) for name in DEATHS]
)
def test_a_rank_that_dies_ends_the_others_and_the_same_command_goes_on(
    source: Path, expected: Path, tmp_path: Path, death: str
) -> None:
    out, (lost, failpoint) = tmp_path / expected.name, DEATHS[death]
    ended = together(source, out, 2, failing={lost: failpoint})
    other = ended[1 - lost]
    assert ended[lost].status == KILLED and other.status == 3, ended
    assert len(sentences(other.said)) == 1 and f"error: rank {lost} is lost" in other.said, other.said
    assert (
        "to go on, run the same command" in other.said and "Traceback" not in other.said and "frame #" not in other.said
    )
    if out.exists():
        assert "in its place" in death and not list_differences(out)
    assert [one.status for one in together(source, out, 2)] == [0, 0]
    assert not list_differences(out) and contents(out) == contents(expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"], "nothing is left behind"


@pytest.mark.slow
@pytest.mark.fault("R4")
def test_of_four_ranks_the_one_that_died_is_named_by_all(source: Path, tmp_path: Path) -> None:
    ended = together(source, tmp_path / "out", 4, failing={2: "ranks.sum:6"})
    assert [one.status for one in ended] == [3, 3, KILLED, 3], ended
    assert all("rank 2 is lost" in ended[rank].said and len(sentences(ended[rank].said)) == 1 for rank in (0, 1, 3)), (
        ended
    )


@pytest.mark.slow
@pytest.mark.fault("R4")
@pytest.mark.parametrize("hangs", [0, 1])
def test_a_rank_that_hangs_is_not_waited_for_forever(
    source: Path, tmp_path: Path, hangs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_FOR_OTHERS", "_FOR_FIRST"):
        monkeypatch.setattr(ranks_module, name, timedelta(seconds=4))
    ended = together(source, tmp_path / "out", 2, failing={hangs: "ranks.sum:6:sleep:12"})
    assert ended[1 - hangs].status == 3 and f"error: rank {hangs} is lost (Timed out" in ended[1 - hangs].said, ended
    assert ended[hangs].status == 3, "what slept finds the others gone"
    assert not (tmp_path / "out").exists()


@pytest.mark.fault("R4")
@pytest.mark.parametrize(("what", "status", "sentence"), [
    ("raise:ENOSPC", 3, "No space left on device"),
    pytest.param("raise:SIGINT", 3, "stopped", marks=pytest.mark.slow),
    pytest.param(
        "raise:OOM", 3, "out of memory, and 2 ranks cannot do with less (model.layers.1)", marks=pytest.mark.slow
    ),
])  # fmt: skip
def test_what_ends_one_rank_is_said_by_the_other(
    source: Path, tmp_path: Path, what: str, status: int, sentence: str
) -> None:
    ended = together(source, tmp_path / "out", 2, failing={1: f"ranks.sum:6:{what}"})
    assert [one.status for one in ended] == [status, status], ended
    assert f"error: rank 1: {sentence}" in ended[0].said and len(sentences(ended[0].said)) == 1, ended[0].said
    assert sentence in ended[1].said and "rank 1" not in ended[1].said
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.fault("R4")
def test_a_bug_in_one_rank_ends_the_other_with_its_code(source: Path, tmp_path: Path) -> None:
    def job(rank: int) -> object:
        if rank == 1:
            ranks_module.failpoint = lambda _: {}["a key"]  # pyright: ignore[reportAttributeAccessIssue]
        return command(*words(source, tmp_path / "out"))(rank)

    ended = forked_ranks.run(2, job)
    assert [one.status for one in ended] == [1, 1] and "error: rank 1: KeyError: 'a key'" in ended[0].said, ended
    assert "Traceback" in ended[1].said and "Traceback" not in ended[0].said, "the traceback is shown where it belongs"


def test_two_ranks_give_the_same_bytes_twice(source: Path, expected: Path, tmp_path: Path) -> None:
    assert [one.status for one in together(source, tmp_path / "out", 2)] == [0, 0]
    assert contents(tmp_path / "out") == contents(expected)


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_ranks_gives_the_same_losses_within_the_tolerance(
    source: Path, expected: Path, tmp_path: Path, count: int
) -> None:
    out = expected if count == 2 else tmp_path / "several"
    for directory, ranks in ((tmp_path / "one", 1), (out, count)):
        if not directory.exists():
            assert [one.status for one in together(source, directory, ranks)] == [0] * ranks
    alone, several = losses(tmp_path / "one"), losses(out)
    assert alone.keys() == several.keys() and len(alone) == 14
    assert several == {name: pytest.approx(loss, rel=TOLERANCE) for name, loss in alone.items()}
    page = (Path(__file__).resolve().parents[2] / "docs" / "distributed.md").read_text()
    assert f"{TOLERANCE:.0%}" in page, "the tolerance is what the page says"


@pytest.mark.fault("R5")
def test_ranks_that_disagree_on_the_recipe_refuse(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    ended = forked_ranks.run(2, lambda rank: command(*words(source, out, *(("--seed", "7") if rank else ())))(rank))
    assert all(one.status == 2 and "rank 1 and rank 0 differ in recipe" in one.said for one in ended), ended
    assert not list(tmp_path.glob("out*"))


def one_weight_differs(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][7, 7] += 1e-3
    save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})


def model_differs(folder: Path) -> None:
    tiny_models.save("llama1", folder / "model", seed=1)


def config_differs(folder: Path) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def text_differs(folder: Path) -> None:
    (folder / "text.txt").write_text("she sells sea shells by the sea shore " * 400)


def leangrid_differs(folder: Path) -> None:
    ranks_module.__version__ = "0.0.9"


def torch_differs(folder: Path) -> None:
    torch.__version__ = type(torch.__version__)("2.0.0")


@pytest.mark.fault("R5")
@pytest.mark.parametrize(("change", "name"), [
    (model_differs, "source"),
    (text_differs, "calibration"),
    pytest.param(one_weight_differs, "the weights of model.layers.0", marks=pytest.mark.slow),
    pytest.param(config_differs, "source", marks=pytest.mark.slow),
    pytest.param(leangrid_differs, "leangrid", marks=pytest.mark.slow),
    pytest.param(torch_differs, "torch", marks=pytest.mark.slow),
])  # fmt: skip
def test_ranks_that_disagree_on_a_file_or_a_version_refuse(
    tmp_path: Path, change: Callable[[Path], None], name: str
) -> None:
    """Every rank types the same names, which mean other things on its machine."""

    def job(rank: int) -> object:
        folder = tmp_path / f"machine{rank}"
        os.chdir(folder)
        if rank == 2:
            change(folder)
        return command(
            "quantize", "model", tmp_path / "out", "--calibration", "text.txt", "--samples", "4", "--length", "32"
        )(rank)

    for rank in range(3):
        tiny_models.save("llama1", tmp_path / f"machine{rank}" / "model")
        (tmp_path / f"machine{rank}" / "text.txt").write_text("the quick brown fox jumps over the lazy dog " * 400)
    ended = forked_ranks.run(3, job)
    assert all(one.status == 2 and f"rank 2 and rank 0 differ in {name} (torchrun)" in one.said for one in ended), ended
    assert not list(tmp_path.glob("out*"))


def python(source: Path, out: Path, **arguments: Any) -> Callable[[int], object]:
    """The same from Python; of each argument the rank's own value."""
    recipe = Recipe(scheme="W4A16_G32")
    return as_command(
        lambda rank: quantize(source, out, recipe, **{name: value[rank] for name, value in arguments.items()})
    )


@pytest.mark.fault("R5")
def test_ranks_that_disagree_on_the_tokens_refuse(source: Path, tmp_path: Path) -> None:
    other = tiny_models.tokens(4, 32)
    other[3, 31] += 1
    ended = forked_ranks.run(2, python(source, tmp_path / "out", windows=[tiny_models.tokens(4, 32), other]))
    assert all(one.status == 2 and "rank 1 and rank 0 differ in calibration" in one.said for one in ended), ended
    assert not list(tmp_path.glob("out*"))


def refused(ended: list[Ended], sentence: str, folder: Path) -> None:
    assert all(one.status == 2 and sentence in one.said and len(sentences(one.said)) == 1 for one in ended), ended
    assert not list(folder.glob("out*")), "nothing was written"


@pytest.mark.slow
def test_fewer_windows_than_ranks_are_refused(source: Path, tmp_path: Path) -> None:
    refused(together(source, tmp_path / "out", 2, "--samples", "1"), "1 calibration windows for 2 ranks", tmp_path)


def test_the_in_place_algebra_shares_the_rows_of_each_linear(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smaller = Placement(2, replay=True, host_streams=True, in_place=True)
    monkeypatch.setattr(in_place, "TILE_BYTES", 4 * 64 * 48)  # several tiles a rank, the last one short
    for out, ranks in (("one", 1), ("two", 2), ("again", 2)):
        job = python(source, tmp_path / out, windows=[tiny_models.tokens(4, 32)] * ranks, placement=[smaller] * ranks)
        ended = forked_ranks.run(ranks, job)
        assert [one.status for one in ended] == [0] * ranks, ended
    alone, several = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert several == {name: pytest.approx(loss, rel=TOLERANCE) for name, loss in alone.items()} and len(alone) == 14
    assert contents(tmp_path / "two") == contents(tmp_path / "again")


@pytest.mark.slow
def test_a_model_that_stays_on_the_hub_is_refused(tmp_path: Path) -> None:
    ended = forked_ranks.run(2, command(*words("stream:org/name", tmp_path / "out")))
    refused(ended, "a model that stays on the hub: 2 ranks do not handle this", tmp_path)


@pytest.mark.slow
def test_a_rank_without_its_device_is_named(source: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("every rank has one here")
    ended = forked_ranks.run(
        2, lambda rank: command(*words(source, tmp_path / "out", *(("--device", "cuda") if rank else ())))(rank)
    )
    assert "error: rank 1: 'cuda:0': torch" in ended[0].said and "error: 'cuda:0': torch" in ended[1].said, ended
    assert [one.status for one in ended] == [2, 2] and not list(tmp_path.glob("out*"))


def test_an_address_in_use_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))  # noqa: S104
        taken.listen()
        port = taken.getsockname()[1]
        said = tmp_path / "said"
        pid = forked_ranks.start(0, 2, port, lambda: command(*words(source, tmp_path / "out"))(0), said)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
    assert "error: rank 0 cannot join the others" in said.read_text() and f"127.0.0.1:{port}" in said.read_text()
    assert "Traceback" not in said.read_text() and not list(tmp_path.glob("out*"))


def test_a_world_without_a_rank_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(LeangridError, match="RANK"):
        quantize(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.slow
@pytest.mark.fault("R4")
def test_torchrun_itself(source: Path, expected: Path, tmp_path: Path) -> None:
    """As the page says: torchrun, whose agent keeps the store and stops the others; then the same command again."""
    out, options = tmp_path / expected.name, ("--nproc-per-node", "2", "--master-port", str(forked_ranks.free_port()))
    typed = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "leangrid", *map(str, words(source, out))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(typed, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    blocks, deadline = tmp_path / "out.partial" / "blocks", time.monotonic() + 60
    while not list(blocks.glob("*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    for worker in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split():
        if "RANK=1" in Path(f"/proc/{worker}/environ").read_text().split("\0"):
            os.kill(int(worker), signal.SIGKILL)
    said = running.communicate(timeout=60)[0]
    assert running.returncode == 1 and "exitcode  : -9" in said, said
    assert not out.exists() and list(blocks.glob("*.json"))
    done = subprocess.run(typed, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(out) == contents(expected)


def test_ranks_of_which_one_has_too_few_windows_to_hold_some_out_all_say_so(source: Path, tmp_path: Path) -> None:
    """Seven windows are four and three: the first rank alone could hold one out, and would wait for the other."""
    recipe, windows = Recipe(scheme="W3A16", tune=1), tiny_models.tokens(7, 32)
    job = as_command(lambda rank: quantize(source, tmp_path / "out", recipe, windows=windows, threads=1))
    ended = forked_ranks.run(2, job)
    assert all(one.status == 0 for one in ended), ended
    tuning = json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]["tuning"]
    assert tuning["tuned"] == 0 and "7 windows for 2 ranks are too few" in tuning["trouble"][0]


@pytest.mark.parametrize(("scheme", "draws"), [pytest.param("W3A16", 0, marks=pytest.mark.slow), ("RTN3", 2)])
def test_two_ranks_tune_blocks_together_and_give_the_same_bytes_twice(
    scheme: str, draws: int, source: Path, tmp_path: Path
) -> None:
    """Seventeen windows: nine on the first rank, eight on the second; of each one is held out."""
    recipe, windows = Recipe(scheme=scheme, tune=6, guide=draws), tiny_models.tokens(17, 32)
    for out in ("one", "other"):
        job = as_command(lambda rank, out=out: quantize(source, tmp_path / out, recipe, windows=windows, threads=1))
        ended = forked_ranks.run(2, job)
        assert all(one.status == 0 for one in ended), ended
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    tuning = json.loads((tmp_path / "one" / "manifest.json").read_text())["result"]["tuning"]
    assert tuning["tuned"] > 0 and not tuning["trouble"]
    assert 0 < tuning["held_error"] < 1


def test_two_ranks_finish_the_model_by_all_their_windows(source: Path, tmp_path: Path) -> None:
    recipe, windows = Recipe(scheme="RTN3", finish=4), tiny_models.tokens(17, 32)
    job = as_command(lambda rank: quantize(source, tmp_path / "out", recipe, windows=windows, threads=1))
    ended = forked_ranks.run(2, job)
    assert all(one.status == 0 for one in ended), ended
    found = json.loads((tmp_path / "out" / "manifest.json").read_text())["result"]["finish"]
    assert found["best"] > 0 and found["held_after"] < found["held_before"]


def test_two_ranks_choose_the_same_widths_within_a_budget(source: Path, tmp_path: Path) -> None:
    recipe, windows = Recipe(scheme="W4A16_G32", bits=4.7, steps=64), tiny_models.tokens(4, 32)
    job = as_command(lambda rank: quantize(source, tmp_path / "two", recipe, windows=windows, threads=1))
    ended = forked_ranks.run(2, job)
    assert all(one.status == 0 for one in ended), ended
    quantize(source, tmp_path / "one", recipe, windows=windows, threads=1)
    two, one = (json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("two", "one"))
    assert two["recipe"] == one["recipe"] and len(one["budget"]["widths"]) > 1
    pairs = zip(two["budget"]["units"], one["budget"]["units"], strict=True)
    assert all(a["distance"] == pytest.approx(b["distance"], rel=1e-3) for a, b in pairs)
