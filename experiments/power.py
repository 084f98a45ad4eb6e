"""Which exponent p of g_j = U_jj^-p is best on the whole model, with the guard and without it (the paper's ablation)?

"guard" and "no-guard" are the defaults otherwise; "paper" has no correction, no refit and no guard.
"""

from collections.abc import Iterator

from common.variants import KNOWN
from measure.whole_model import Bench, Task

POWERS = (0, 2, 4, 6)
PROCEDURES: dict[str, dict[str, str]] = {"guard": {}, "no-guard": {"guard": "false"}, "paper": KNOWN["paper"]}


def tasks(bench: Bench) -> Iterator[Task]:
    for subject in bench.size.subjects:
        for scheme in subject.swept:
            for procedure, fields in PROCEDURES.items():
                for p in POWERS:
                    label = {"variant": procedure, "row": f"{subject.name} {scheme}, {procedure}"}
                    yield bench.whole("power", subject, scheme, label, **{**fields, "p": str(p)})
