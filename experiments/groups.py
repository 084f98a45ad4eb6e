"""What do shorter groups gain at 4 and 3 bits, and cost in bits? Beside min-max GPTQ in the same groups."""

from collections.abc import Iterator

from measure.whole_model import Bench, Task


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.size.subjects:
        for bits in (4, 3):
            for group in (None, *subject.groups) if subject.groups else ():
                suffix = f"_G{group}" if group else ""
                for method, scheme in (("GPTQ", f"GPTQ{bits}"), ("default", f"W{bits}A16")):
                    label = {"variant": method, "bits": bits, "columns": group or "row"}
                    yield bench.whole("groups", subject, scheme + suffix, label)
