"""Processes that make batches and may die of it: results come in the order of their tasks, whatever a sample does.

A task is a sequence of items. Its maker announces every item before it touches it, so that an exception, a crash or a
hang is blamed on one item, which the next attempt leaves out. Cost: a failure repeats its own task; otherwise 20 us a
message. Results cross as memory that both processes map, no byte is copied and no file has a name.

Workers are copies of a process that was forked when the pool was made: they share its data, and one that dies is
replaced in milliseconds by a copy that knows nothing of the locks, threads and devices of the trainer.
"""

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import resource
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Self, TypeVar

import torch

from swim.data_tools.messages import channels, payload_of, receive, send

ALL = -1  # the item that stands for what is made of all of them together
_PR_SET_PDEATHSIG = 1
_FORK, _KILL, _REAP, _TASK, _BEGIN, _RESULT = b"f", b"k", b"e", b"t", b"b", b"r"
# Sent to all processes of a job: the trainer saves, its workers end with it.
_TRAINER_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)

_WAITS = (0.5, 2.0, 8.0)  # seconds between attempts at a process

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class PoolError(RuntimeError):
    """Workers cannot be started, or make nothing even of no items; the message says why."""


@dataclass
class Attempt:
    """One try at a task: `lost` items (or ALL) are left out, for the reasons given.

    With `probing`, the whole has failed before: each item shall be tried alone, in its own turn.
    """

    lost: dict[int, str] = field(default_factory=dict)
    probing: bool = False
    begin: Callable[[int], None] = lambda _: None  # announces an item, or ALL
    suspects: set[int] = field(default_factory=set)
    twice: bool = False  # one item has failed again: the others get no second try, which would take as long

    def why_lost(self, item: int) -> str | None:
        """The reason to leave an item out."""
        return self.lost.get(item, self.lost.get(ALL))

    def blame(self, item: int, reason: str, *, certain: bool) -> None:
        """Leave an item out from now on, after a second failure if the first may be an accident; PoolError if nothing
        is left to leave out."""
        if ALL in self.lost or item in self.lost:
            raise PoolError(f"a batch without its samples cannot be made: {reason}")
        if item == ALL and not self.probing:
            self.probing = True
        elif certain or item == ALL or self.twice:
            self.lost[item] = reason
        elif item in self.suspects:
            self.twice, self.lost[item] = True, f"{reason}, twice"
        else:
            self.suspects.add(item)


Work = Callable[[Sequence[_Item], Attempt], _Result]


class Pool(Generic[_Item, _Result]):
    """`workers` processes that do `work` on tasks; with none, this process does, unprotected from crashes and hangs.

    An item that takes longer than `deadline_s`, or the whole longer than three times that, counts as a hang. Make the
    pool early, in the main thread: what this process holds then stays in memory as long as the pool.
    """

    def __init__(self, work: Work[_Item, _Result], *, workers: int, deadline_s: float) -> None:
        self._work, self._workers, self._deadline_s = work, workers, deadline_s
        self._nursery = _Nursery(work) if workers else None

    def map(
        self,
        tasks: Iterable[Sequence[_Item]],
        *,
        ahead: int,
        finish: Callable[[_Result], _Result] | None = None,
    ) -> Generator[_Result]:
        """Results of the tasks in their order, up to `ahead` of them made before they are taken; `finish` is applied in
        this process, in a thread if there are workers."""
        finish = finish or _as_it_is
        if self._nursery is None:
            return (finish(_attempt(self._work, task, Attempt())) for task in tasks)
        return self._from_workers(self._nursery, iter(tasks), ahead, finish)

    def _from_workers(
        self,
        nursery: "_Nursery",
        tasks: Iterator[Sequence[_Item]],
        ahead: int,
        finish: Callable[[_Result], _Result],
    ) -> Generator[_Result]:
        crew = _Crew(nursery, self._workers, self._deadline_s, finish)
        waiting = 0

        def submit(most: int) -> None:
            # Drawn by whoever takes the results: the source of the tasks need not know of threads.
            nonlocal waiting
            for task in itertools.islice(tasks, most):
                crew.submit(task)
                waiting += 1

        try:
            submit(ahead)
            while waiting:
                result = crew.take()
                waiting -= 1
                submit(1)
                yield result
        finally:
            crew.close()

    def close(self) -> None:
        """End all processes."""
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _as_it_is(result: Any) -> Any:
    return result


class _Job(NamedTuple):
    number: int
    task: Sequence[Any]
    attempt: Attempt


class _Worker:
    """A process, the job it is at, and the item it has announced, with the time of that."""

    def __init__(self, nursery: "_Nursery") -> None:
        self.channel, theirs = channels()
        with theirs:
            self.pid = nursery.fork(theirs)
        self.job: _Job | None = None
        self.item, self.since = ALL, 0.0

    def start(self, job: _Job) -> None:
        self.job, self.item, self.since = job, ALL, time.monotonic()
        with contextlib.suppress(ConnectionError):  # dead already: that is seen to like any other death
            send(self.channel, _TASK, payload=(job.task, job.attempt.lost, job.attempt.probing))

    def limit(self, deadline_s: float) -> float:
        """Time at which it counts as hanging."""
        assert self.job is not None
        return self.since + deadline_s * (3 if self.item == ALL else 1)


class _Crew:
    """The workers of one `map`, and the thread that looks after them."""

    def __init__(self, nursery: "_Nursery", workers: int, deadline_s: float, finish: Callable[[Any], Any]) -> None:
        self._nursery, self._deadline_s, self._finish = nursery, deadline_s, finish
        self._todo: deque[_Job] = deque()
        self._results: dict[int, Any] = {}
        self._submitted = self._taken = 0
        self._problem: BaseException | None = None
        self._changed = threading.Condition()
        self._bell, self._wake = socket.socketpair()
        self._workers = [_Worker(nursery) for _ in range(workers)]
        self._thread = threading.Thread(target=self._look_after, name="loader", daemon=True)
        self._thread.start()

    def submit(self, task: Sequence[Any]) -> None:
        self._todo.append(_Job(self._submitted, task, Attempt()))
        self._submitted += 1
        self._wake.send(b".")

    def take(self) -> Any:
        """The next result."""
        with self._changed:
            self._changed.wait_for(lambda: self._taken in self._results or self._problem is not None)
            if self._taken not in self._results:
                assert self._problem is not None
                raise self._problem
            result = self._results.pop(self._taken)
        self._taken += 1
        return result

    def close(self) -> None:
        self._wake.close()
        self._thread.join()
        self._bell.close()
        for worker in self._workers:
            with contextlib.suppress(PoolError):  # gone with the nursery
                self._nursery.kill(worker.pid)
            worker.channel.close()

    def _look_after(self) -> None:
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(self._bell, selectors.EVENT_READ)
                for worker in self._workers:
                    selector.register(worker.channel, selectors.EVENT_READ, worker)
                while self._turn(selector):
                    pass
        except BaseException as problem:
            with self._changed:
                self._problem = problem
                self._changed.notify()

    def _turn(self, selector: selectors.BaseSelector) -> bool:
        """Give out jobs, wait for what happens next, see to it; False when the crew is dismissed."""
        for worker in self._workers:
            if worker.job is None and self._todo:
                worker.start(self._todo.popleft())
        busy = [worker for worker in self._workers if worker.job is not None]
        nearest = min((worker.limit(self._deadline_s) for worker in busy), default=None)
        ready = selector.select(None if nearest is None else max(0.0, nearest - time.monotonic()))
        for key, _ in ready:
            if key.data is None:
                if not self._bell.recv(4096):
                    return False
            elif not self._hear(key.data):
                code = self._nursery.reap(key.data.pid)
                how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                self._replace(key.data, selector, f"the process that read it ended with {how}")
        # Only with all messages heard: this thread may have waited long for its turn.
        if not ready:
            for worker in busy:
                if worker.limit(self._deadline_s) <= time.monotonic():
                    self._nursery.kill(worker.pid)
                    self._replace(worker, selector, f"took longer than {self._deadline_s:g} s (data.deadline_s)")
        return True

    def _hear(self, worker: _Worker) -> bool:
        """See to one message; False if there will be none any more."""
        try:
            kind, number, descriptors = receive(worker.channel)
        except (EOFError, ConnectionError):
            return False
        if kind == _BEGIN:
            worker.item, worker.since = number, time.monotonic()
        else:
            assert worker.job is not None
            (result,) = payload_of(descriptors)
            if isinstance(result, PoolError):
                raise result
            result = self._finish(result)
            with self._changed:
                self._results[worker.job.number] = result
                self._changed.notify()
            worker.job = None
        return True

    def _replace(self, worker: _Worker, selector: selectors.BaseSelector, reason: str) -> None:
        selector.unregister(worker.channel)
        worker.channel.close()
        if worker.job is not None:
            worker.job.attempt.blame(worker.item, reason, certain=False)
            self._todo.appendleft(worker.job)
        new = _Worker(self._nursery)
        self._workers[self._workers.index(worker)] = new
        selector.register(new.channel, selectors.EVENT_READ, new)


class _Nursery:
    """A process without threads that forks workers on request, and ends with this one."""

    def __init__(self, work: Work[Any, Any]) -> None:
        self._channel, theirs = channels()
        with theirs:
            self._pid = _fork(lambda: _breed(theirs, work), self._channel)

    def fork(self, channel: socket.socket) -> int:
        """Process number of a new worker at the other end of `channel`."""
        if (number := self._ask(_FORK, 0, [channel.fileno()])) < 0:
            raise PoolError(f"no loader process can be started: {os.strerror(-number)}; lower data.workers")
        return number

    def kill(self, pid: int) -> None:
        """End a worker, without waiting for one that hangs in its file system."""
        self._ask(_KILL, pid)

    def reap(self, pid: int) -> int:
        """Exit code of a worker that has ended, a signal as a negative number."""
        return self._ask(_REAP, pid)

    def close(self) -> None:
        self._channel.close()
        os.waitpid(self._pid, 0)

    def _ask(self, kind: bytes, number: int, descriptors: Sequence[int] = ()) -> int:
        try:
            send(self._channel, kind, number, descriptors=descriptors)
            return receive(self._channel)[1]
        except (EOFError, OSError) as error:
            raise PoolError(f"no loader process can be started any more: their parent has ended ({error})") from None


def _breed(channel: socket.socket, work: Work[Any, Any]) -> None:
    _let_go_of_devices(channel)
    living: set[int] = set()
    killed: set[int] = set()
    while True:
        try:
            kind, number, descriptors = receive(channel)
        except EOFError:
            return
        if kind == _FORK:
            with socket.socket(fileno=descriptors[0]) as theirs:
                number = _fork_patiently(functools.partial(_serve, theirs, work), channel)
            if number > 0:
                living.add(number)
        elif kind == _KILL:
            if number in living:  # until it is waited for, its number is not given away
                os.kill(number, signal.SIGKILL)
                living.remove(number)
                killed.add(number)
        else:
            living.remove(number)
            number = os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])
        killed -= {pid for pid in killed if os.waitpid(pid, os.WNOHANG)[0]}
        send(channel, kind, number)


def _fork_patiently(main: Callable[[], None], not_theirs: socket.socket) -> int:
    """As `_fork`, with some patience for a machine that is full; then the number of the error, negative."""
    for wait in (*_WAITS, None):
        try:
            return _fork(main, not_theirs)
        except OSError as error:
            if wait is None:
                return -(error.errno or errno.EAGAIN)
            time.sleep(wait)
    raise AssertionError


def _let_go_of_devices(kept: socket.socket) -> None:
    """Put nothing in place of the trainer's connections and devices: a worker that cannot be killed, since it waits for
    a file system, must not keep a port or a GPU's memory."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if target.startswith(("socket:", "/dev/nvidia")) and number != kept.fileno():
                os.dup2(nothing, number, inheritable=False)  # the number stays taken: its owner may close it


def _fork(main: Callable[[], None], not_theirs: socket.socket) -> int:
    """Process number of a child that does `main` and ends when this process does."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        not_theirs.close()
        for number in _TRAINER_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            main()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(channel: socket.socket, work: Work[Any, Any]) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a decoder that crashes shall not write gigabytes
    torch.set_num_threads(1)  # workers are the parallelism; and threads of the trainer's OpenMP are not here
    while True:
        try:
            task, lost, probing = payload_of(receive(channel)[2])
        except EOFError:
            return
        attempt = Attempt(lost, probing, begin=functools.partial(send, channel, _BEGIN))
        try:
            result = _attempt(work, task, attempt)
        except PoolError as error:
            result = error
        send(channel, _RESULT, payload=(result,))
        del result


def _attempt(work: Work[Any, Any], task: Sequence[Any], attempt: Attempt) -> Any:
    """What `work` makes of a task, without the items at which it raises."""
    item, tell = ALL, attempt.begin

    def begin(which: int) -> None:
        nonlocal item
        item = which
        tell(which)

    attempt.begin = begin
    while True:
        item = ALL
        try:
            return work(task, attempt)
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{os.path.basename(frame.filename)}:{frame.lineno}"
            attempt.blame(item, f"{type(error).__name__}: {error} ({place})", certain=True)
