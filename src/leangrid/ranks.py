"""Several processes for one run, started by torchrun: who they are, and the few things they say to each other.

Calibration windows are split; partial sums meet on rank 0, which adds them in the order of ranks, a panel at a time; the linears
of a group are split and their results shared. All goes through gloo in host memory. Rank 0 alone touches the output.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from leangrid._version import __version__
from leangrid.devices import checked
from leangrid.errors import Interrupted, LeangridError, first_line
from leangrid.hessian import HessianSum
from leangrid.models.walk import Streams

_Sum = TypeVar("_Sum", bound=HessianSum)
_TIMEOUT = timedelta(hours=1)  # a rank that is gone is noticed at once, by its closed connection; this is for one that hangs
_START = timedelta(minutes=2)
_PANEL = 1 << 22  # numbers sent at once
_OF_THE_EXCHANGE = ("gloo", "Connection", "Broken pipe", "Timed out", "timed out")  # in what torch says when another rank is lost


class Ranks:
    """This process among ``count``; with one, every call gives back what it was given."""

    def __init__(self, rank: int = 0, count: int = 1) -> None:
        self.rank, self.count = rank, count

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which keeps journal and result."""
        return self.rank == 0

    def own(self, windows: Tensor) -> Tensor:
        """This rank's part of windows [samples, ...]; sizes differ by at most one.

        Raises:
            LeangridError: fewer windows than ranks.
        """
        if len(windows) < self.count:
            raise LeangridError(
                f"{len(windows)} calibration windows for {self.count} ranks", "--samples", "Use fewer ranks or more samples"
            )
        return windows.tensor_split(self.count)[self.rank]

    def sum(self, total: _Sum) -> _Sum:
        """``total`` with the tokens of all ranks: rank 0 adds 0, 1, 2, ... and everyone gets its bits."""
        if self.count == 1:
            return total
        for part in total.parts():
            for panel in part.view(-1).split(_PANEL):
                host = panel.cpu()
                pieces = [torch.empty_like(host) for _ in range(self.count)] if self.first else None
                dist.gather(host, pieces)
                for piece in (pieces or [])[1:]:
                    pieces[0] += piece  # pyright: ignore[reportOptionalSubscript]  # a loop over no pieces does not come here
                host = host if pieces is None else pieces[0]
                dist.broadcast(host, 0)
                panel.copy_(host)
        counts = self.all((total.tokens, total.dropped))
        total.tokens, total.dropped = sum(c[0] for c in counts), sum(c[1] for c in counts)
        return total

    def all(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order."""
        values = [value] * self.count
        if self.count > 1:
            dist.all_gather_object(values, value)
        return values

    def from_first(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def keep_own(self, streams: Streams) -> None:
        """Cut the whole streams, where they are, to this rank's windows."""
        if self.count > 1:
            for stream in [streams.quantized, *([] if streams.original is None else [streams.original])]:
                stream[:] = [self.own(torch.cat(stream)).clone()]

    def whole(self, streams: Streams) -> Streams:
        """The streams of all ranks, in the order of their windows, on rank 0; elsewhere those given."""
        if self.count == 1:
            return streams
        host = Streams([x.cpu() for x in streams.quantized], None if streams.original is None else [x.cpu() for x in streams.original])
        parts: list[Any] | None = [None] * self.count if self.first else None
        dist.gather_object(host, parts)
        if parts is None:
            return streams
        original = None if host.original is None else [x for part in parts for x in part.original]
        return Streams([x for part in parts for x in part.quantized], original)

    def alone(self, what: str) -> None:
        """LeangridError with more ranks than one: sums of ``what`` are not exchanged."""
        if self.count > 1:
            raise LeangridError(f"{what}: several ranks do not handle this", "torchrun", "Use one process")

    def agree(self, **facts: str) -> None:
        """LeangridError naming the first of ``facts`` in which the ranks differ, and the ranks."""
        everyone = self.all({"leangrid": __version__, "torch": torch.__version__, **facts})
        for name, mine in everyone[0].items():
            others = [rank for rank, theirs in enumerate(everyone) if theirs[name] != mine]
            if others:
                who = ", ".join(f"rank {rank}" for rank in others)
                raise LeangridError(f"{who} and rank 0 differ in {name}", "torchrun", "Start all ranks with the same command and files")


@contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks of this run and this rank's device; one, and torch.distributed untouched, where torchrun did not start us.

    Raises:
        LeangridError: the address is in use or no rank answers; what another rank raised, as "rank 1: ...".
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Ranks(), device
        return
    rank = int(os.environ["RANK"])
    try:
        dist.init_process_group("gloo", timeout=_START)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LeangridError(f"rank {rank} cannot join the others: {first_line(error)}", where, "Choose a free --master-port") from None
    store: Any = dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]  # no public name in torch 2
    dist.distributed_c10d._set_pg_timeout(_TIMEOUT, dist.group.WORLD)  # pyright: ignore[reportPrivateUsage]
    store.set_timeout(timedelta(seconds=10))
    try:
        mine = device
        if device == "cuda":
            mine = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        try:
            checked(mine)
        except LeangridError as error:
            raise LeangridError(f"rank {rank}: {error}") from None
        yield Ranks(rank, count), mine
    except LeangridError as error:
        _tell(store, rank, str(error), error.exit_code)
        raise
    except RuntimeError as error:
        if not any(word in str(error) for word in _OF_THE_EXCHANGE):
            _tell(store, rank, first_line(error), 1)
            raise
        raise _first_error(store, rank, error) from None
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _tell(store: Any, rank: int, sentence: str, code: int) -> None:
    """Leave word for the others; rank 0, whose process may hold the store, waits until they have read it."""
    try:
        store.compare_set("error", "", json.dumps([rank, sentence, code]))
        count = dist.get_world_size()
        dist.destroy_process_group()  # closes the connections: the others stop waiting, and read
        if rank == 0:
            store.wait([f"read{other}" for other in range(1, count)], timedelta(seconds=5))
    except RuntimeError:
        return  # nobody is left to read it


def _first_error(store: Any, rank: int, error: RuntimeError) -> LeangridError:
    """What ended a rank whose collective failed: the word another rank left, or that it is gone."""
    try:
        whose, sentence, code = json.loads(store.get("error"))
        store.set(f"read{rank}", "1")
    except (RuntimeError, ValueError):
        return Interrupted(
            f"another rank is gone: {first_line(error)}", f"rank {rank}", "Finished blocks are kept: run the same command again"
        )
    told = LeangridError(f"rank {whose}: {sentence}")
    told.exit_code = code
    return told
