"""Several processes for one run, started by torchrun: who they are, and what they exchange.

Each rank has a part of the calibration windows. Rank 0 adds the partial sums of the Hessians in the order of ranks, a
panel at a time, so that the result has the same bits every time. The linears of a group are shared out, and what was
solved goes to all. The experts of a mixture are shared out whole: the sums of one go from every rank to the one that
solves it. Every exchange is between two ranks, by gloo in host memory: a rank that loses another knows which. Rank 0
alone writes."""

import json
import os
import re
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import zip_longest
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from leangrid._version import __version__
from leangrid.errors import Interrupted, LeangridError, first_line
from leangrid.machine.devices import is_out_of_memory, parse_device
from leangrid.models.streams import Streams
from leangrid.solve.hessian import HessianSum
from leangrid.storage.failpoints import failpoint

_Sum = TypeVar("_Sum", bound=HessianSum)
# A rank that dies closes its connections and is noticed at once; these are for one that hangs. Rank 0 waits for a part
# of the work that it shares, the others for all that rank 0 does alone: drawing the calibration text, writing and
# judging the result.
_FOR_OTHERS, _FOR_FIRST = timedelta(hours=1), timedelta(days=1)
_START, _READ = timedelta(minutes=2), timedelta(seconds=5)
_MOMENT = 0.5  # seconds
_PANEL = 1 << 22  # numbers sent at once
_ROWS = 512  # of a triangle that are sent at once


class Ranks:
    """This process, number ``rank`` of ``count``; with a count of one, every call returns what it was given.

    Calls that exchange something raise the error that ended another rank, as "rank 1: ..." and with its exit code, or
    Interrupted where another rank is gone without a word.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Any = None) -> None:
        self.rank, self.count = rank, count
        self._others = range(1, count)  # of rank 0
        self._store: Any = store  # torch's, where the first error is kept
        self._gone: set[int] = set()

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which keeps journal and result."""
        return self.rank == 0

    def share(self, windows: Any) -> Any:
        """This rank's part of windows [samples, ...], or of rows with pictures; sizes differ by at most one.

        Raises:
            LeangridError: fewer windows than ranks.
        """
        if len(windows) < self.count:
            raise LeangridError(
                f"{len(windows)} calibration windows for {self.count} ranks",
                "--samples",
                "Use fewer ranks or more samples",
            )
        return windows.tensor_split(self.count)[self.rank]

    def sum_hessians(self, total: _Sum) -> _Sum:
        """``total`` with the tokens of all ranks: rank 0 adds 0, 1, 2, ... and everyone gets its bits."""
        if self.count == 1:
            return total
        failpoint("ranks.sum")
        self.add(total.parts())
        total.counts = [sum(each) for each in zip(*self.gather(total.counts), strict=True)]
        return total

    def add(self, tensors: Sequence[Tensor]) -> None:
        """Add to each contiguous tensor, in place, those of all other ranks, which get the same bits."""
        for panel in (panel for tensor in tensors for panel in tensor.view(-1).split(_PANEL) if self.count > 1):
            host = panel.cpu()
            if self.first:
                piece = torch.empty_like(host)
                for other in self._others:
                    self._receive(piece, other)
                    host += piece
                for other in self._others:
                    self._send(host, other)
            else:
                self._send(host, 0)
                self._receive(host, 0)
            panel.copy_(host)

    def sum_for_owners(self, sums: Sequence[_Sum]) -> _Sum | None:
        """Of ``sums``, the i-th of which belongs to rank i, this rank's with the tokens of all ranks; None where there
        are fewer sums than ranks, and none for this one.

        Each rank adds to its own sum those of the ranks before it, from the nearest to the furthest (rank n - 1 is
        before rank 0). Only H is exchanged, of which the upper triangle holds everything.
        """
        own = sums[self.rank] if self.rank < len(sums) else None
        if self.count == 1:
            return own
        failpoint("ranks.owners")
        mine = [] if own is None else _pieces(own)
        for step in range(1, self.count):
            after, before = (self.rank + step) % self.count, (self.rank - step) % self.count
            sent = _pieces(sums[after]) if after < len(sums) else []
            for theirs, piece in zip_longest(sent, mine):
                received = self._swap(theirs, after, piece, before)
                if piece is not None:
                    piece += received.to(piece.device)
        if own is not None:
            own.counts = mine[0].tolist()
        return own

    def _swap(self, sent: Tensor | None, after: int, like: Tensor | None, before: int) -> Any:
        """Send ``sent`` to rank ``after`` and receive a tensor ``like`` another from rank ``before``, both at once."""
        host = None if sent is None else sent.cpu().contiguous()
        sending = None if host is None else self._with(after, dist.isend, host)
        received = None
        if like is not None:
            received = torch.empty(like.shape, dtype=like.dtype)
            self._with(before, _receive_soon, received)
        if sending is not None:
            self._with(after, lambda work, _: work.wait(), sending)
        return received

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, in order."""
        return self.broadcast(self._collect(value))

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if not self.first:
            return self._receive_object(0)
        for other in self._others:
            self._send_object(value, other)
        return value

    def wait_for_first(self) -> None:
        """Wait until rank 0 is here, too."""
        self.broadcast(None)

    def _collect(self, value: Any) -> list[Any]:
        """``value`` of every rank on rank 0; this rank's alone elsewhere."""
        if not self.first:
            self._send_object(value, 0)
        return [value, *(self._receive_object(other) for other in (self._others if self.first else ()))]

    def cut_to_share(self, streams: Streams) -> None:
        """Cut the whole streams, where they are, to this rank's windows."""
        if self.count > 1:
            for stream in [streams.quantized, *([] if streams.original is None else [streams.original])]:
                stream[:] = [self.share(torch.cat(stream)).clone()]

    def gather_streams(self, streams: Streams) -> Streams:
        """The streams of all ranks, in the order of their windows, on rank 0; elsewhere those given."""
        if self.count == 1:
            return streams
        host = Streams(
            [x.cpu() for x in streams.quantized],
            None if streams.original is None else [x.cpu() for x in streams.original],
        )
        failpoint("ranks.whole")
        parts = self._collect(host)
        if not self.first:
            return streams
        original = None if host.original is None else [x for part in parts for x in part.original]
        return Streams([x for part in parts for x in part.quantized], original)

    def refuse_several(self, what: str) -> None:
        """LeangridError with more ranks than one, which do not handle ``what``."""
        if self.count > 1:
            raise LeangridError(f"{what}: {self.count} ranks do not handle this", "torchrun", "Use one process")

    def require_agreement(self, **facts: str) -> None:
        """LeangridError naming the first of ``facts`` in which the ranks differ, and the ranks."""
        everyone = self.gather({"leangrid": __version__, "torch": torch.__version__, **facts})
        for name, mine in everyone[0].items():
            others = [rank for rank, theirs in enumerate(everyone) if theirs[name] != mine]
            if others:
                who = ", ".join(f"rank {rank}" for rank in others)
                raise LeangridError(
                    f"{who} and rank 0 differ in {name}", "torchrun", "Start all ranks with the same command and files"
                )

    def report_failure(self, error: BaseException) -> None:
        """Store what ends this rank, and close its connections: the others stop waiting and read the first such report.

        Rank 0, whose process may hold the store, waits until they have read it.
        """
        if self._store is None:
            return  # gone with rank 0, and nobody is left to read
        try:
            self._store.compare_set("error", "", json.dumps([self.rank, *_in_words(error)]))
            self._store.set(f"ends{self.rank}", "1")
            dist.destroy_process_group()
            if self.first:
                self._store.wait([f"ends{other}" for other in self._others if other not in self._gone], _READ)
        except RuntimeError:
            return  # as above

    def _send(self, tensor: Tensor, other: int) -> None:
        self._with(other, dist.send, tensor)

    def _receive(self, tensor: Tensor, other: int) -> None:
        self._with(other, dist.recv, tensor)

    def _send_object(self, value: Any, other: int) -> None:
        self._with(other, dist.send_object_list, [value])

    def _receive_object(self, other: int) -> Any:
        values: list[Any] = [None]
        self._with(other, dist.recv_object_list, values)
        return values[0]

    def _with(self, other: int, exchange: Callable[[Any, int], Any], what: Any) -> Any:
        """``exchange`` with ``other``; where that fails, raise what ended it, or that it is gone."""
        try:
            return exchange(what, other)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            why = first_line(error)
        # After the except: an error holds on to the frames of the exchange, and these to connections that
        # ``report_failure`` closes.
        self._gone.add(other)
        why = re.sub(r"^\[[^]]*\] ", "", why).partition(". ")[0]  # without gloo's own source line and advice
        raise self._reported_failure() or Interrupted(
            f"rank {other} is lost", why, "Finished blocks are kept: run the same command again"
        )

    def _reported_failure(self) -> LeangridError | None:
        """What the first rank to fail has reported, or None."""
        try:
            if 0 in self._gone and not _listening():
                raise ConnectionError  # before torch writes a page of warnings about it
            if not self._store.check(["error"]):
                return None
            whose, sentence, code = json.loads(self._store.get("error"))
        except (OSError, RuntimeError):
            self._store = None
            return None
        told = LeangridError(f"rank {whose}: {sentence}")
        told.exit_code = code
        return told


def _pieces(total: HessianSum) -> list[Tensor]:
    """What a sum is sent as: its counts of tokens, int64 [4], then views of the upper triangle of H, some rows
    each from the diagonal on."""
    matrix = total.parts()[0]
    rows = max(1, min(_ROWS, _PANEL // len(matrix)))
    panels = [matrix[start : start + rows, start:] for start in range(0, len(matrix), rows)]
    return [torch.tensor(total.counts), *panels]


def _receive_soon(tensor: Tensor, other: int) -> None:
    """Receive from a rank that sends now, too: nobody waits a day here, as others do for what rank 0 does alone."""
    work: Any = dist.irecv(tensor, other)
    work.wait(_FOR_OTHERS)


def _listening() -> bool:
    """Whether the process that holds the store, rank 0's or torchrun's, is there, and still is a moment later."""
    try:
        with socket.create_connection(
            (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])), timeout=_MOMENT
        ) as store:
            return bool(store.recv(1))
    except TimeoutError:  # it waits for us to begin
        return True
    except OSError:
        return False


def _in_words(error: BaseException) -> tuple[str, int]:
    """What ends a rank in one sentence, and its exit code."""
    if isinstance(error, LeangridError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"{error.strerror or error}{f' ({error.filename})' if error.filename else ''}", Interrupted.exit_code
    if isinstance(error, Exception):
        return traceback.format_exception_only(error)[0].splitlines()[0], 1
    return f"stopped{f' by {error}' if str(error) else ''}", Interrupted.exit_code


def checksum(module: nn.Module) -> str:
    """The sum of the bits of each weight of a module, as text: it differs where one number does."""
    return str(
        [int(weight.detach().contiguous().view(torch.int16).sum(dtype=torch.int64)) for weight in module.parameters()]
    )


@contextmanager
def join_ranks(device: str) -> Iterator[tuple[Ranks, str]]:
    """The ranks of this run, and this rank's device. Where torchrun did not start us it is one rank, without
    torch.distributed.

    Raises:
        LeangridError: the address is in use or a rank does not come; this rank has no such device.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks(), device
        return
    ranks = _join()
    try:
        own = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if device == "cuda" else device
        parse_device(own)
        yield ranks, own
    except BaseException as error:
        ranks.report_failure(error)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _join() -> Ranks:
    """Wait until all ranks are there; LeangridError where one does not come."""
    try:
        rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store: Any = next(rendezvous("env://", timeout=_START))[0]
        store.set(f"here{rank}", "1")
        store.wait([f"here{other}" for other in range(count)], _START)
        dist.init_process_group(
            "gloo",
            store=PrefixStore("gloo", store),
            rank=rank,
            world_size=count,
            timeout=_FOR_FIRST if rank else _FOR_OTHERS,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        who = f"rank {os.environ.get('RANK')} cannot join the others"
        raise LeangridError(
            f"{who}: {first_line(error)}", where, "Start all ranks, and choose a free --master-port"
        ) from None
    store.set_timeout(timedelta(seconds=10))
    return Ranks(rank, count, store)
