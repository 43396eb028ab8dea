"""The part of `swim doctor` that needs several ranks: do they reach each other, and which node is slow?

Every rank times the same work alone and the same all-reduces together, and one rank of each node exchanges bytes with
those of its neighbours. Together all ranks are as slow as the slowest; alone and in pairs they differ, and a node is
named that takes 1.5 times the lower median of the nodes.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from swim.train.doctor import Finding, block, check_machine, host_name
from swim.train.world import find_place, set_place

SLOW = 1.5
JOIN_S = 120.0
MAX_SKEW_S = 5.0
ROUNDS = 8
MIB = 1 << 20


@dataclass(frozen=True)
class Timing:
    """What one rank measured, in seconds; `link` is that of a node's first rank, None on the others."""

    rank: int
    host: str
    compute: float
    copy: float
    reduce: float
    link: float | None
    clock: float


def check_ranks(disk: Path | None = None, data: str | None = None) -> int:
    """Check all machines of the job and their network; the first rank prints. The exit code, the same on all ranks."""
    rank, size, local = find_place()
    set_place(rank, size, local)
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    machine = check_machine(disk, data) if local == 0 else []
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=JOIN_S))
        timing = measure(rank, size, device)
    except (RuntimeError, ValueError) as error:  # torch's errors of the network are RuntimeErrors
        remedy = "look at the ranks that say nothing; NCCL_SOCKET_IFNAME, firewalls, host names; then NCCL_DEBUG=INFO"
        print(
            block([*machine, Finding("ranks", f"rank {rank} of {size} on {host_name()}: {error}", remedy)]), flush=True
        )
        return 1
    gathered: list[Any] = [None] * size
    distributed.all_gather_object(gathered, (timing, [asdict(finding) for finding in machine]))
    distributed.destroy_process_group()
    together = judge([timing for timing, _ in gathered], device.type)
    others = [
        Finding(**{**fields, "text": f"{other.host}: {fields['text']}"})
        for other, found in gathered[1:]
        for fields in found
        if fields["remedy"]
    ]
    if rank == 0:
        print(block([*machine, *others, *together]), flush=True)
    return int(any(fields["remedy"] for _, found in gathered for fields in found) or any(f.remedy for f in together))


def measure(rank: int, size: int, device: torch.device) -> Timing:
    """Time this rank, alone and with the others."""
    square = torch.rand(4096 if device.type == "cuda" else 384, device=device).repeat(384, 1)
    source, target = torch.rand(16 * MIB // 4), torch.empty(16 * MIB // 4, device=device)
    compute = _least(lambda: square @ square.T, device)
    copy = _least(lambda: target.copy_(source), device)
    small = torch.ones(MIB // 4, device=device)
    _together(lambda: distributed.all_reduce(small), device)  # the first one connects
    hosts: list[Any] = [None] * size
    distributed.all_gather_object(hosts, host_name())
    reduce = _least(lambda: distributed.all_reduce(small), device)
    link = _link(hosts, rank, device)
    _together(distributed.barrier, device)
    return Timing(rank, hosts[rank], compute, copy, reduce, link, time.time())


def judge(timings: Sequence[Timing], device: str) -> list[Finding]:
    """What the timings of all ranks say: one line for each kind of work, with the nodes that are slow at it."""
    hosts = list(dict.fromkeys(timing.host for timing in timings))
    reduce = statistics.median(timing.reduce for timing in timings)
    found = [
        Finding("ranks", f"{len(timings)} on {len(hosts)} nodes ({device}), all-reduce of 1 MiB {1e3 * reduce:.2f} ms")
    ]
    skews = {host: min(abs(t.clock - timings[0].clock) for t in timings if t.host == host) for host in hosts}
    far = [f"{host} by {skew:.0f} s" for host, skew in skews.items() if skew > MAX_SKEW_S]
    found.append(
        Finding("clocks", f"differ: {', '.join(far)}", "synchronise them (chrony): else heartbeats look silent")
        if far
        else Finding("clocks", "agree")
    )
    for kind, what in (("compute", "matrix product"), ("copy", "copy of 16 MiB"), ("link", "1 MiB to a neighbour")):
        of_host = {
            host: statistics.median_low(values)
            for host in hosts
            if (values := [value for t in timings if t.host == host and (value := getattr(t, kind)) is not None])
        }
        if not of_host:
            continue
        usual = statistics.median_low(list(of_host.values()))
        slow = {host: value / usual for host, value in of_host.items() if value > SLOW * usual}
        text = f"{what} {1e3 * usual:.2f} ms"
        named = ", ".join(f"{host} {factor:.1f} x" for host, factor in sorted(slow.items(), key=lambda pair: -pair[1]))
        remedy = f"leave it out (sbatch --exclude={','.join(slow)}) and look at its clocks, heat, links and other jobs"
        found.append(Finding(kind, f"{text}; slow: {named}" if slow else text, remedy if slow else None))
    return found


def _link(hosts: Sequence[str], rank: int, device: torch.device) -> float | None:
    """Least time of this node to a neighbour, in pairs (0, 1), (2, 3), ... and then (1, 2), (3, 4), ...: a slow node is
    slow with both its neighbours, while each of them has a fast pair as well."""
    first = [hosts.index(host) for host in dict.fromkeys(hosts)]
    if rank not in first or len(first) < 2:
        return None
    place, times = first.index(rank), []
    sent, received = torch.ones(MIB // 4, device=device), torch.empty(MIB // 4, device=device)
    for shift in (0, 1):
        other = place + 1 if (place + shift) % 2 == 0 else place - 1
        if not 0 <= other < len(first):
            continue

        def exchange(peer: int = first[other]) -> None:
            sends = distributed.P2POp(distributed.isend, sent, peer)
            for work in distributed.batch_isend_irecv([sends, distributed.P2POp(distributed.irecv, received, peer)]):
                work.wait()

        exchange()
        times.append(_least(exchange, device))
    return min(times)


def _least(work: Callable[[], Tensor | None], device: torch.device) -> float:
    # The least of some rounds: what other programs take at times is not the machine's.
    return min(_together(work, device) for _ in range(ROUNDS))


def _together(work: Callable[[], Any], device: torch.device) -> float:
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
