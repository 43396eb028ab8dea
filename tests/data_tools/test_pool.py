"""Promise: results come in order whatever happens to the processes that make them; the item at fault is left out with
its reason, and no other; nothing outlives the trainer."""

import ctypes
import errno
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from swim.data_tools import pool as pool_module
from swim.data_tools.pool import ALL, Attempt, Pool, PoolError


def doubled(task, attempt: Attempt) -> tuple[list[int], dict[int, str]]:
    """Twice every item, and the items left out with their reasons; items that are functions do what they do first."""
    made, lost = [], {}
    for number, item in enumerate(task):
        if (reason := attempt.why_lost(number)) is not None:
            lost[number] = reason
            continue
        attempt.begin(number)
        if callable(item):
            item()
        else:
            made.append(2 * item)
    attempt.begin(ALL)
    return made, lost


def hang():
    ctypes.PyDLL(None).sleep(1000)  # with the interpreter locked, as in a decoder that never returns


def crash():
    signal.signal(signal.SIGSEGV, signal.SIG_DFL)  # pytest's handler would print
    os.kill(os.getpid(), signal.SIGSEGV)


def leave():
    os._exit(3)


def fail():
    raise ValueError("no such thing")


class Once:
    """Does something at the first call of all processes together."""

    def __init__(self, path: Path, what) -> None:
        self.path, self.what = path, what

    def __call__(self) -> None:
        if not self.path.exists():
            self.path.touch()
            self.what()


FAULTS = [
    (hang, "took longer than 0.3 s (data.deadline_s), twice"),
    (crash, "the process that read it ended with SIGSEGV, twice"),
    (leave, "the process that read it ended with exit code 3, twice"),
    (fail, "ValueError: no such thing (test_pool.py:"),
    (sys.exit, "ended with exit code 1, twice"),
]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_fault_costs_its_item_and_no_other(workers):
    tasks = [(1, 2), (3,), (), *((10 * n, fault, 10 * n + 1) for n, (fault, _) in enumerate(FAULTS)), (4,)]
    with Pool(doubled, workers=workers, deadline_s=0.3) as pool:
        results = list(pool.map(tasks, ahead=4))
    assert [made for made, _ in results] == [[2 * i for i in task if isinstance(i, int)] for task in tasks]
    for (_, lost), (_, reason) in zip(results[3:], FAULTS):
        assert list(lost) == [1]
        assert reason in lost[1]
    assert not any(lost for _, lost in [*results[:3], results[-1]])


def test_after_one_sample_that_hangs_the_others_of_its_pack_get_no_second_try():
    began = time.monotonic()
    with Pool(doubled, workers=1, deadline_s=0.5) as pool:
        ((made, lost),) = pool.map([(1, hang, hang, hang, hang, hang, 2)], ahead=1)
    assert (made, list(lost)) == ([2, 4], [1, 2, 3, 4, 5])
    assert [reason.endswith(", twice") for reason in lost.values()] == [True, False, False, False, False]
    assert time.monotonic() - began < 10 * 0.5, "six deadlines, not ten"


@pytest.mark.parametrize("what", [hang, crash], ids=["hang", "crash"])
def test_one_accident_costs_nothing(what, tmp_path):
    with Pool(doubled, workers=1, deadline_s=0.3) as pool:
        assert list(pool.map([(1, Once(tmp_path / "done", what), 2)], ahead=1)) == [([2, 4], {})]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_fails_as_a_whole_is_tried_item_by_item(workers):
    def together(task, attempt):
        for number, item in enumerate(task):
            if attempt.why_lost(number) is None:
                attempt.begin(number)
                if attempt.probing and item < 0:
                    raise ValueError(f"{item} is negative")
        attempt.begin(ALL)
        left = [item for number, item in enumerate(task) if attempt.why_lost(number) is None]
        if any(item < 0 for item in left):
            raise ArithmeticError("cannot be said which")
        if sum(left) > 100:
            raise ArithmeticError("too much together")
        return left, dict(attempt.lost)

    with Pool(together, workers=workers, deadline_s=5) as pool:
        first, second, third = pool.map([(1, -2, 3), (60, 70), (5,)], ahead=2)
    assert first[0] == [1, 3]
    assert list(first[1]) == [1]
    assert "-2 is negative" in first[1][1]
    assert second[0] == []
    assert "too much together" in second[1][ALL]
    assert third == ([5], {})


@pytest.mark.parametrize("workers", [0, 1])
def test_what_fails_even_for_nothing_is_an_error(workers):
    def broken(task, attempt):  # noqa: ARG001
        raise KeyError("mistake")

    with Pool(broken, workers=workers, deadline_s=5) as pool, pytest.raises(PoolError, match="mistake"):
        list(pool.map([(1, 2)], ahead=1))


def test_tensors_and_arrays_cross_unchanged():
    values = {
        "strided": torch.arange(24.0).view(4, 6).t()[1:, ::2],
        "empty": torch.zeros(1 << 20)[:0].view(0, 3),
        "odd strides": torch.arange(5).as_strided((0,), (0,)),
        "expanded": torch.arange(5)[3:4].expand(1, 1).as_strided((1, 1), (0, 0)),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flags": torch.tensor([True, False]),
        "brain": torch.randn(5, generator=torch.Generator().manual_seed(0)).bfloat16(),
        "gradient": torch.ones(2, requires_grad=True),
        "array": np.arange(6).reshape(2, 3)[:, ::-1],
        "large": torch.arange(300_000),
        "nested": [(torch.ones(1), {"a": None})],
    }
    with Pool(lambda task, attempt: values, workers=1, deadline_s=5) as pool:  # noqa: ARG005
        (found,) = pool.map([(0,)], ahead=1)
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert torch.equal(found[name], value)
    np.testing.assert_array_equal(found["array"], values["array"])
    assert torch.equal(found["nested"][0][0], torch.ones(1))
    found["large"] += 1  # whoever gets a batch may write to it


def test_a_small_part_that_is_kept_does_not_keep_the_memory_of_a_batch():
    batch = {"small": np.arange(10.0), "tensor": torch.ones(3), "large": torch.zeros(1 << 20)}
    with Pool(lambda task, attempt: batch, workers=1, deadline_s=5) as pool:  # noqa: ARG005
        (whole,) = pool.map([(0,)], ahead=1)
        held = len(os.listdir("/proc/self/fd"))
        kept = whole["small"], whole["tensor"]
        del whole
        assert len(os.listdir("/proc/self/fd")) == held - 1
    assert kept[0].sum() == 45
    kept[1].add_(1)


def test_closing_twice_and_results_of_nothing():
    pool = Pool(lambda task, attempt: None, workers=1, deadline_s=5)  # noqa: ARG005
    assert list(pool.map([(0,), (1,)], ahead=1)) == [None, None]
    pool.close()
    pool.close()


def test_results_wait_for_their_turn_and_no_more_than_asked_for_are_made(tmp_path):
    def slow_at_first(task, attempt):  # noqa: ARG001
        (tmp_path / str(task[0])).touch()
        time.sleep(0.3 if task[0] == 0 else 0)
        return task[0]

    with Pool(slow_at_first, workers=2, deadline_s=5) as pool:
        results = pool.map(((n,) for n in range(50)), ahead=5)
        assert next(results) == 0
        time.sleep(0.5)
        assert len(list(tmp_path.iterdir())) == 6, "five made ahead of the next"
        assert list(results) == list(range(1, 50))


def test_finish_is_applied_away_from_the_consumer_and_its_error_is_heard():
    threads = []

    def finish(result):
        threads.append(threading.current_thread())
        return -result if result < 3 else 1 / 0

    with Pool(lambda task, attempt: task[0], workers=1, deadline_s=5) as pool:  # noqa: ARG005
        results = pool.map([(1,), (2,), (3,)], ahead=1, finish=finish)
        assert [next(results), next(results)] == [-1, -2]
        assert threading.main_thread() not in threads
        with pytest.raises(ZeroDivisionError):
            next(results)


def test_many_tasks_leave_no_descriptors_memory_or_processes():
    def work(task, attempt):  # noqa: ARG001
        return torch.zeros(1 << 18)  # 1 MiB

    def children() -> str:
        return "".join(path.read_text() for path in Path("/proc/self/task").glob("*/children"))

    def used() -> tuple[int, int]:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return len(os.listdir("/proc/self/fd")), pages * os.sysconf("SC_PAGE_SIZE") >> 20

    before, family = used()[0], children()
    with Pool(work, workers=2, deadline_s=5) as pool:
        results = pool.map(((n,) for n in range(400)), ahead=8)
        for _ in range(100):
            next(results)
        descriptors, memory = used()
        assert sum(1 for _ in results) == 300
        assert used()[0] <= descriptors
        assert used()[1] < memory + 8, "300 MiB went through"
    assert used()[0] == before
    assert children() == family


def test_workers_keep_no_connection_of_the_trainer():
    """A worker that cannot be killed must not keep the port on which the next start listens."""

    def connections(task, attempt):  # noqa: ARG001
        paths = list(Path("/proc/self/fd").iterdir())  # the folder itself is closed again
        return sum(os.readlink(path).startswith("socket:") for path in paths if path.is_symlink())

    with socket.create_server(("127.0.0.1", 0)) as server:
        with Pool(connections, workers=1, deadline_s=5) as pool:
            assert list(pool.map([(0,)], ahead=1)) == [1], "its channel"
        with socket.create_connection(server.getsockname()):
            pass


@pytest.mark.parametrize(("failures", "works"), [(2, True), (10, False)])
def test_a_machine_full_of_processes_is_waited_for_and_then_named(monkeypatch, failures, works):
    fork, calls = pool_module._fork, []

    def full(*arguments):
        calls.append(0)
        if 1 < len(calls) <= 1 + failures:  # the first is the parent of the workers
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return fork(*arguments)

    monkeypatch.setattr(pool_module, "_fork", full)
    monkeypatch.setattr(pool_module, "_WAITS", (0, 0, 0))
    with Pool(doubled, workers=1, deadline_s=5) as pool:
        results = pool.map([(1,)], ahead=1)
        if works:
            assert list(results) == [([2], {})]
        else:
            with pytest.raises(PoolError, match=r"Resource temporarily unavailable; lower data\.workers"):
                next(results)


def test_leaving_early_ends_the_workers():
    def pid(task, attempt):  # noqa: ARG001
        return os.getpid()

    with Pool(pid, workers=2, deadline_s=5) as pool:
        results = pool.map(((n,) for n in range(1000)), ahead=10)
        pids = {next(results) for _ in range(20)}
        results.close()
        assert next(iter(pool.map([(1,)], ahead=1))) not in pids
    wait_for_end(pids)


def test_without_their_parent_the_next_result_is_an_error_and_not_a_wait():
    def parent(task, attempt):  # noqa: ARG001
        time.sleep(0.1)
        return os.getppid()

    with Pool(parent, workers=1, deadline_s=5) as pool:
        results = pool.map(((n,) for n in range(100)), ahead=1)
        os.kill(next(results), signal.SIGKILL)
        with pytest.raises(PoolError, match="their parent has ended"):
            list(results)


TRAINER = """
import os, sys, time
from swim.data_tools.pool import Pool

def work(task, attempt):
    if task[0]:
        time.sleep(1000)
    return os.getpid(), os.getppid()

results = Pool(work, workers=2, deadline_s=1000).map([(n,) for n in range(5)], ahead=5)
print(*next(results), flush=True)
time.sleep(1000)
"""


def test_a_killed_trainer_leaves_no_process(tmp_path):
    trainer = subprocess.Popen([sys.executable, "-c", TRAINER], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pids = set(map(int, trainer.stdout.readline().split()))
    assert len(pids) == 2
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    trainer.stdout.close()
    wait_for_end(pids)


def wait_for_end(pids: set[int]) -> None:
    """Until none of the processes runs; a process that has ended but was not waited for does not."""
    deadline = time.monotonic() + 20
    while any(running(pid) for pid in pids):
        assert time.monotonic() < deadline, "workers outlive their trainer"
        time.sleep(0.05)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
