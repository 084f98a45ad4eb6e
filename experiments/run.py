"""Runs the paper's experiments, line by line: ``make experiments SIZE=small``, or some of them by name.

    # all
    python experiments/run.py --size small --c4 c4.jsonl --wikitext wiki.test.raw --sts STS
    # two of them
    python experiments/run.py power start --size small --stories .models/stories260k

Each line is added to experiments/results/NAME.jsonl as soon as it is measured. A line that this kind of processor and
this version of leangrid have made is not measured again, so the same command continues where it was stopped (--again
measures anew); lines of another processor stay beside it. Data given by name (c4, wikitext2) are fetched; everything
else is a path. ``python benchmarks/table.py`` writes the lines into experiments/README.md.
"""

import argparse
import importlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "experiments"), str(ROOT / "benchmarks")]

EXPERIMENTS = (
    "perplexity",
    "zero_shot",
    "losses",
    "power",
    "steps",
    "start",
    "calibration",
    "groups",
    "cost",
    "search",
    "exact",
)
SHOWN = ("benchmark", "model", "scheme", "bits", "variant", "steps")


def parse_arguments() -> argparse.Namespace:
    from measure.sizes import SIZES, Data

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(EXPERIMENTS)}; all where none is given")
    parser.add_argument("--size", default="small", choices=tuple(SIZES))
    parser.add_argument("--model", help="only this one")
    for option, default in vars(Data()).items():
        parser.add_argument(
            f"--{option.replace('_', '-')}",
            default=default,
            help=f"a path or a corpus; {default}" if default else "a folder",
        )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--again", action="store_true", help="measure lines that are there")
    parser.add_argument("--list", action="store_true", help="say which lines there are to make, and make none")
    options = parser.parse_args()
    if unknown := set(options.names) - set(EXPERIMENTS):
        parser.error(f"no such experiment: {', '.join(sorted(unknown))}")
    return options


def list_missing(
    path: Path, tasks: Iterable[Any], options: argparse.Namespace, ours: Callable[[dict[str, Any]], bool]
) -> Iterator[Any]:
    """The tasks that have no line yet, on this kind of processor by this version, with all fields of their head."""
    from common import lines

    for task in tasks:
        head = json.loads(lines.text(task.head))
        done = any(ours(line) and head.items() <= line.items() for line in lines.read(path))
        if options.model in (None, task.head.get("model")) and (options.again or not done):
            yield task


def make_line(task: Any, again: bool, ours: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """The line of ``task``: measured, or with the figures of another experiment's line of the same recipe."""
    from common.machine import provenance
    from measure.whole_model import WholeModel

    shared = task.elsewhere() if isinstance(task, WholeModel) and not again else None
    found = shared if shared and ours(shared) else {**task.measure(), **provenance()}
    return task.head | {key: value for key, value in found.items() if key not in task.head}


def main() -> None:
    import torch

    import leangrid
    from common import lines
    from common.machine import machine
    from measure.sizes import Data, size
    from measure.whole_model import RESULTS, Bench

    options = parse_arguments()
    if options.threads:
        torch.set_num_threads(options.threads)
    data = Data(**{name: getattr(options, name) for name in vars(Data())})
    here, failed = lines.processor({"machine": machine()}), []

    def ours(line: dict[str, Any]) -> bool:
        return lines.processor(line) == here and line["versions"]["leangrid"] == leangrid.__version__

    with tempfile.TemporaryDirectory() as temporary:
        bench = Bench(size(options.size, data, Path(temporary)), Path(temporary), options.threads)
        for sentence in bench.size.left_out:
            print(f"left out: {sentence}", file=sys.stderr)
        for name in options.names or EXPERIMENTS:
            path = RESULTS / f"{name}.jsonl"
            for task in list_missing(path, importlib.import_module(name).tasks(bench), options, ours):
                shown = " ".join(str(task.head[key]) for key in SHOWN if key in task.head)
                print(shown, file=sys.stderr, flush=True)
                if options.list:
                    continue
                try:
                    lines.add(path, make_line(task, options.again, ours))
                except Exception:  # one line that cannot be made does not cost the others
                    traceback.print_exc()
                    failed.append(shown)
    if failed:
        sys.exit("not made:\n" + "\n".join(failed))


if __name__ == "__main__":
    main()
