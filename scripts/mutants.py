"""Does a test notice when a protection is missing? Removes one at a time in a copy of the tree and runs its tests.

    python scripts/mutants.py [NAME ...]

Prints a row of a Markdown table for each: what was removed, and the first test that failed. The exit code is 1 where no
test failed.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("src", "tests", "docs", "scripts", "ARCHITECTURE.md", "README.md", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One protection: where it is, the code with and without it, and the tests that should notice."""

    what: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS: dict[str, Mutant] = {
    "fsync": Mutant(
        "fsync before rename",
        "storage/files.py",
        "        os.fsync(descriptor)\n        step =",
        "        step =",
        "faults/test_power_loss.py",
    ),
    "dirsync": Mutant(
        "fsync of the directory after rename",
        "storage/files.py",
        "    try:\n        os.fsync(descriptor)\n    except OSError as error:",
        "    try:\n        pass\n    except OSError as error:",
        "faults/test_power_loss.py",
    ),
    "wipe": Mutant(
        "sync between removing blocks and removing whose they are",
        "storage/journal.py",
        "        files.sync_names(self.partial)",
        "        pass",
        "faults/test_power_loss.py",
    ),
    "order": Mutant(
        "a block's bytes before its commit",
        "storage/journal.py",
        '        sha256 = safetensors.save(path, tensors)\n        failpoint("journal.before_commit")\n',
        '        files.write_json(path.with_suffix(".json"), {"sha256": "", "bytes": 0, **entry})\n'
        "        sha256 = safetensors.save(path, tensors)\n",
        "faults/test_storage.py::test_nothing_gets_its_name_before_it_is_durable",
    ),
    "hash": Mutant(
        "the hash check at resume",
        "storage/journal.py",
        ' and files.hash_file(path) == entry["sha256"]',
        "",
        "faults/test_storage.py::test_a_damaged_journal_is_not_trusted",
    ),
    "verify": Mutant(
        "the hash check of verify",
        "storage/manifest.py",
        'return [] if files.hash_file(path) == entry.get("sha256") else',
        "return [] if True else",
        "faults/test_storage.py::test_verify_finds_any_damage_to_any_file",
    ),
    "lock": Mutant(
        "the lock",
        "storage/files.py",
        "fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "pass",
        "faults/test_storage.py::test_two_processes_and_a_killed_owner",
    ),
    "identity": Mutant(
        "the comparison of a resumed run's identity",
        "storage/journal.py",
        "        if difference:",
        "        if False:",
        "faults/test_storage.py::test_another_version_or_calibration_is_another_run",
    ),
    "pickle": Mutant(
        "the refusal of pickles",
        "storage/shards.py",
        "        raise _no_weights(directory)",
        "        import pickle\n"
        "        [pickle.loads(p.read_bytes()) for p in directory.iterdir() if p.suffix in PICKLES]\n"
        "        raise _no_weights(directory)",
        "faults/test_source.py",
    ),
    "paths": Mutant(
        "plain names in an index",
        "storage/shards.py",
        "not isinstance(name, str) or not _SHARD_NAME.fullmatch(name) or",
        "not isinstance(name, str) or",
        "faults/test_source.py",
    ),
    "overlap": Mutant(
        "holes and overlaps in a header",
        "storage/safetensors.py",
        "        if info.start != at:",
        "        if False:",
        "faults/test_source.py",
    ),
    "changed": Mutant(
        "the source is checked again while it is read",
        "storage/source.py",
        "        if now != self._stamps[path.name]:",
        "        if False:",
        "faults/test_source.py",
    ),
    "nan": Mutant(
        "weights must be finite",
        "storage/source.py",
        "        if check and tensor.is_floating_point():",
        "        if False:",
        "faults/test_source.py",
    ),
    "tokens": Mutant(
        "a layer without tokens is an error",
        "solve/hessian.py",
        "        if seen == 0:",
        "        if seen < 0:",
        "unit/solve/test_hessian.py",
    ),
    "badtokens": Mutant(
        "non-finite tokens are left out",
        "solve/hessian.py",
        "        if not all(kernels.squares_are_finite(s) for s in streams):",
        "        if False:",
        "unit/solve/test_hessian.py",
    ),
    "probe": Mutant(
        "a factor is checked on probes",
        "solve/factor.py",
        "if upper is not None and error < TOLERANCE:",
        "if upper is not None:",
        "unit/solve/test_factor.py",
    ),
    "rounding": Mutant(
        "worse than rounding is not kept",
        "solve/layer.py",
        'if not result.loss <= rounding.loss and method != "rtn":',
        "if False:",
        "unit/solve/test_layer.py",
    ),
    "gate": Mutant(
        "the quality gate's limit",
        "gate/quality.py",
        "return self.error is None and self.limit is not None and self.distance <= self.limit",
        "return True",
        "faults/test_quality_gate.py",
    ),
    "values": Mutant(
        "values of a loaded result are checked",
        "inference/transformers_quantizer.py",
        "                self.format.check(\n"
        "                    dict(layer.named_buffers()), self.schemes[name], "
        "(layer.out_features, layer.in_features), name\n"
        "                )\n",
        "",
        "unit/inference/test_load.py",
    ),
}


def find_failing_test(mutant: Mutant, folder: Path) -> str | None:
    """The first failing test without this protection, or None."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy2(source, target)
    path = folder / "src" / "leangrid" / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.file} holds this {text.count(mutant.old)} times, not once: {mutant.old!r}")
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-m",
        "not slow",
        "-p",
        "no:cacheprovider",
        f"tests/{mutant.tests}",
    ]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    found = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    return found[1].partition("[")[0] if found and done.returncode else None


def main(names: list[str]) -> int:
    missed = 0
    print("| removed | noticed by |\n| --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for name in names or MUTANTS:
            first = find_failing_test(MUTANTS[name], Path(folder))
            missed += first is None
            print(f"| {MUTANTS[name].what} | {'nothing' if first is None else f'`{first}`'} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(MUTANTS))
    raise SystemExit(main(parser.parse_args().names))
