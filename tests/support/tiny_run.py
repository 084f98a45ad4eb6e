"""What a run does on disk, without its mathematics, for the fault tests: start or resume, commit two blocks, finish
them, publish.

``python tiny_run.py SOURCE WORK`` is the crash test: for n = 1, 2, ... a forked child makes the run and is killed at
its n-th failpoint; then the result must be absent or complete, and a second child must finish it with the bytes of an
undisturbed run. It ends at the first n that the child survives and prints one JSON line. (One process that forks:
importing torch two hundred times would take minutes.)"""

import hashlib
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forked import status_of
from safetensors.torch import save_file

from leangrid.storage.journal import Journal
from leangrid.storage.manifest import amend_result, list_differences
from leangrid.storage.source import open_source
from leangrid.storage.writer import check_output_path, finish_interrupted_rename, write_result

BLOCKS = 2
CONFIG = {"model_type": "tiny", "hidden_size": 8, "num_hidden_layers": BLOCKS, "vocab_size": 16}


def tensors() -> dict[str, torch.Tensor]:
    """The weights of the source: an embedding and one matrix per block."""
    generator = torch.Generator().manual_seed(0)
    weights = {f"blocks.{i}.weight": torch.randn(8, 8, generator=generator) for i in range(BLOCKS)}
    return {"embed.weight": torch.randn(16, 8, generator=generator).bfloat16(), **weights}


def write_source(
    directory: Path, config: dict[str, Any] | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    """A sound checkpoint, written by the reference library."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors() if weights is None else weights, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG if config is None else config))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def identity(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What the journal compares at a resume."""
    return {"recipe": {"scheme": "NU4", "seed": 0}, "source": source, "windows": "abc", "version": "0.1.0", **changes}


def run(source: Path, out: Path, overwrite: bool = False, restart: bool = False, **changes: Any) -> dict[str, Any]:
    """From ``source`` to ``out``; resumes what it finds. Returns the manifest."""
    finished = finish_interrupted_rename(out)
    if finished is not None:
        return finished
    check_output_path(out, source, overwrite)
    with (
        open_source(source) as checkpoint,
        Journal.for_output(out).start_or_resume(identity(checkpoint.identity, **changes), restart) as journal,
    ):
        if journal.load_artifact("windows") is None:
            journal.save_artifact("windows", {"tokens": torch.arange(8)})
        first = journal.find_resume_point()
        state = journal.load_state(first) if first else {"x": torch.ones(2, 8)}
        state = {} if state is None and journal.read_finished_info() is not None else state  # nothing reads it then
        assert state is not None
        for index in range(first, BLOCKS):
            weight = checkpoint.read(f"blocks.{index}.weight")
            state = {"x": torch.tanh(state["x"] @ weight.T)}
            journal.commit_block(
                index, {f"blocks.{index}.weight": weight.round(), f"blocks.{index}.x": state["x"]}, {"loss": 0.5}
            )
            journal.save_state(index + 1, state)
        if journal.read_finished_info() is None:
            journal.commit_finished({f"blocks.{BLOCKS - 1}.x": 2 * state["x"]}, {"passes": 1})
        head = [("embed.weight", checkpoint.tensors["embed.weight"]), ("norm.weight", torch.ones(8))]
        records = "".join(json.dumps(journal.read_block_info(i)) + "\n" for i in range(BLOCKS))
        return write_result(
            journal,
            out,
            head,
            checkpoint.config,
            checkpoint.side_files(),
            {"records.jsonl": records},
            {"recipe": {"scheme": "NU4"}},
            overwrite=overwrite,
            shard_bytes=600,
        )


def digest(directory: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file."""
    files = sorted(p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def crash_everywhere(source: Path, work: Path, overwrite: bool) -> dict[str, Any]:
    """The loop of the module docstring. With ``overwrite`` an older result lies at the output from the start."""
    expected_dir = work / "expected"
    run(source, expected_dir)
    expected = digest(expected_dir)
    problems: list[str] = []
    published = 0
    for n in range(1, 10_000):
        out = work / f"out{n}"
        if overwrite:
            shutil.copytree(expected_dir, out)
            amend_result(out, {"older.txt": b"an older result"})
        again = partial(run, source, out, overwrite=overwrite)
        killed = status_of(again, f"*:{n}")
        if out.exists():
            published += killed == -9
            problems += [f"{n}: {difference}" for difference in list_differences(out)]
        if killed == 0:
            return {"failpoints": n - 1, "published_then_killed": published, "problems": problems}
        if killed != -9:
            problems.append(f"{n}: the child ended with {killed}")
        journal = out.with_name(f"{out.name}.partial")
        forgotten = (
            out.exists() and not (journal / "sealed.json").exists()
        )  # so late that nothing is left to say who made OUT
        second = status_of(again)
        if second != 0 and not (second == 2 and forgotten and not overwrite):
            problems.append(f"{n}: the second run ended with {second}")
        elif digest(out) != expected:
            problems.append(f"{n}: other bytes")
        leftovers = [p.name for p in work.iterdir() if p.name.startswith(f"{out.name}.")]
        problems += [f"{n}: left behind {leftovers}"] if leftovers else []
        shutil.rmtree(out, ignore_errors=True)
    raise RuntimeError("a run never survived")


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(crash_everywhere(Path(sys.argv[1]), Path(sys.argv[2]), overwrite=sys.argv[3:] == ["--overwrite"])))
