"""A child that is forked rather than started: it begins with everything imported, where a new Python would take
seconds."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable

import torch

from leangrid.errors import OutputError
from leangrid.storage import failpoints


def status_of(job: Callable[[], object], failpoint: str | None = None, delay: float | None = None) -> int:
    """Run ``job`` in a forked child, killed at ``failpoint`` or after ``delay`` seconds.

    Returns:
        0, 2 where it was refused its output, 70 where it raised anything else (printed), -9 where a kill hit.
    """
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            torch.set_num_threads(1)  # the parent's other threads do not exist here: waiting for one would never end
            failpoints.reset()  # earlier tests of this process may have passed some
            if failpoint:
                os.environ["LEANGRID_FAILPOINT"] = failpoint
            job()
            status = 0
        except OutputError:
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)  # a child that has ended is a zombie until it is waited for
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
