"""One type through the real path: a source made by transformers, quantized by leangrid, judged by transformers.

python tests/support/zoo_run.py [--family FAMILY] [--out FOLDER] [TYPE ...]     a line and a record for each
"""

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo_server import Server

LIMIT = 150  # seconds for each of the three parts
# What every trial imports: once in the server, not again in each of its children.
_TRANSFORMERS = ("transformers.generation.utils", "transformers.processing_utils", "compressed_tensors.compressors")
_LEANGRID = ("leangrid.inference.load", "leangrid.run.open_run", "leangrid.run.quantize", "leangrid.run.open_on_ranks")


@contextmanager
def servers() -> Iterator[tuple[Server, Server]]:
    """The plain side, where leangrid is never imported, and leangrid's."""
    plain, ours = Server("zoo_plain", *_TRANSFORMERS), Server("zoo_leangrid", *_TRANSFORMERS, *_LEANGRID)
    try:
        yield plain, ours
    finally:
        plain.close()
        ours.close()


@dataclass(frozen=True)
class Way:
    """How a type is tried.

    Attributes:
        command: the first scheme goes by the command line.
        vary: a seed of choices in the config.
        schemes: what is tried instead of the two that fit the model.
        first: only the first scheme is tried.
        source_only: leangrid is not asked.
    """

    command: bool = False
    vary: int | None = None
    schemes: tuple[str, ...] = ()
    first: bool = False
    source_only: bool = False


def trial(
    sides: tuple[Server, Server], model_type: str, family: str, way: Way, work: Path | None = None
) -> dict[str, Any]:
    """Try one type; its record. ``stage`` says where it ended: source, quantize, judge, inputs or done.

    Args:
        sides: what ``servers`` gives.
        work: an empty folder that is kept; None: a temporary one.
    """
    began = time.time()
    place = Path(tempfile.mkdtemp(prefix="zoo-")) if work is None else work
    try:
        record = _trial(sides, model_type, family, way, place)
    finally:
        if work is None:
            shutil.rmtree(place, ignore_errors=True)
    return {"type": model_type, "family": family, **record, "seconds": round(time.time() - began, 1)}


def _trial(sides: tuple[Server, Server], model_type: str, family: str, way: Way, place: Path) -> dict[str, Any]:
    plain, ours = sides
    named, wished = (
        {"model_type": model_type, "family": family},
        {"vary": way.vary, "schemes": list(way.schemes) or None},
    )
    made = plain.run("zoo_plain.make", place / "make.log", LIMIT, **named, **wished, work=str(place))
    record: dict[str, Any] = {"stage": "source", **made, "faults": [], "figures": {}}
    if "error" in made or way.source_only:
        return record
    for scheme in made["schemes"][: 1 if way.first else None]:
        part = {"work": str(place), "scheme": scheme}
        by_command = way.command and scheme == made["schemes"][0]
        done = ours.run("zoo_leangrid.quantize", place / f"{scheme}.log", LIMIT, command=by_command, **part)
        if "error" in done:
            begun = any((place / name).exists() for name in (scheme, f"{scheme}.partial"))
            refused = bool(done.get("refused")) and not begun  # a sentence, before work
            return record | {"stage": "quantize", **{k: done.get(k) for k in ("error", "where")}, "refused": refused}
        record |= {key: done[key] for key in ("layers",) if key in done}
        judged = plain.run("zoo_plain.judge", place / f"{scheme}.judge.log", LIMIT, **named, **part)
        if "error" in judged:
            return record | {"stage": "judge", **{k: judged.get(k) for k in ("error", "where")}}
        record["figures"] |= {f"{scheme}.{name}": value for name, value in judged["figures"].items()}
        record["faults"] += [f"{scheme}: {fault}" for fault in judged["faults"]]
    return record | _compare_inputs(sides, place, record)


def _compare_inputs(sides: tuple[Server, Server], place: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What linears read with their weights left alone, against hooks on transformers' model: the last of a trial."""
    plain, ours = sides
    scheme = record["schemes"][0]
    done = ours.run("zoo_leangrid.sum_inputs", place / "alone.log", LIMIT, work=str(place), scheme=scheme)
    judged = (
        done if "error" in done else plain.run("zoo_plain.judge_inputs", place / "alone.log", LIMIT, work=str(place))
    )
    if "error" in judged:
        return {"stage": "inputs", **{key: judged.get(key) for key in ("error", "where")}}
    figures = record["figures"] | judged["figures"]
    return {"stage": "done", "figures": figures, "faults": record["faults"] + judged["faults"]}


def line(record: dict[str, Any]) -> str:
    """A record in one line."""
    head = f"{record['family']:10} {record['type']:28} {record['seconds']:6}"
    if "error" in record:
        return f"{head} {record['stage']} failed: {record['error']} [{record.get('where', '')}]"[:400]
    figures = " ".join(f"{name}={value:.2g}" for name, value in record["figures"].items())
    return f"{head} {'; '.join(record['faults']) or 'good'} cover={record['cover']:.2f} {figures}"


def main() -> None:
    """Try the types that are named, or all, and keep their records."""
    import zoo_models as zoo

    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*")
    parser.add_argument("--family", choices=list(zoo.FAMILIES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--keep", type=Path, help="where the files of each type stay")
    parser.add_argument("--command", action="store_true")
    parser.add_argument("--vary", type=int)
    parser.add_argument("--schemes", nargs="+", default=[])
    parser.add_argument("--first", action="store_true", help="only the first scheme, in half the time")
    parser.add_argument("--source-only", action="store_true", help="make and look at the sources, without leangrid")
    given = parser.parse_args()
    way = Way(given.command, given.vary, tuple(given.schemes), given.first, given.source_only)
    wanted = [(f, t) for f in zoo.FAMILIES if given.family in (None, f) for t in zoo.model_types(f)
              if not given.types or t in given.types]  # fmt: skip
    with servers() as sides:
        for family, model_type in wanted:
            work = None if given.keep is None else given.keep / f"{family}.{model_type}"
            if work is not None:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir(parents=True)
            record = trial(sides, model_type, family, way, work)
            print(line(record), flush=True)
            if given.out is not None:
                given.out.mkdir(parents=True, exist_ok=True)
                (given.out / f"{family}.{model_type}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
