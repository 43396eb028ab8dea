"""Is this machine fit to train? `swim doctor` prints a block of text to paste: what there is, and what will break.

A finding has a remedy exactly when training will fail or crawl because of it; the rest is for whoever reads the block.
"""

import fcntl
import os
import platform
import random
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import InvalidRequirement, Requirement

from swim import __version__

MIB = 1 << 20
TESTED_MIB = 256  # written and read; more than the caches of a disk, seconds on a slow one
MIN_FREE_GIB = 5.0
MIN_SHM_MIB = 512
MIN_FILES = 1024
MAX_FSYNC_S = 0.5
MAX_SKEW_S = 5.0
READS, READ_S = 500, 10.0
_SHOWN = ("torch", "deepspeed", "transformers", "triton", "safetensors", "flash-attn", "liger-kernel", "peft")
_DECODERS = ("av", "torchcodec", "decord")


@dataclass(frozen=True)
class Finding:
    """A line of the block; `remedy` is what to do about it, where it breaks training."""

    name: str
    text: str
    remedy: str | None = None

    def __str__(self) -> str:
        line = f"{'BAD' if self.remedy else 'ok':4}{self.name:14}{self.text}"
        return f"{line}\n    {'':14}-> {self.remedy}" if self.remedy else line


def host_name() -> str:
    """What SLURM calls this node, else the host name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def check_machine(disk: Path | None = None, data: str | None = None) -> list[Finding]:
    """Everything about this machine, a folder that runs are written to, and a data set."""
    found = [*_versions(), *_devices(), *_network(), *_limits(), *_tools()]
    if disk is not None:
        found += check_disk(disk)
    if data is not None:
        found.append(check_data(data))
    return found


def block(findings: Iterable[Finding]) -> str:
    """The findings under a line that says when and where."""
    head = f"swim doctor  {time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())}  {host_name()}"
    return "\n".join([head, *map(str, findings)])


def _versions() -> Iterator[Finding]:
    yield Finding("system", f"{platform.platform()}, {_num_cores()} cores, Python {platform.python_version()}")
    yield Finding("swim", __version__)
    wanted = _wanted()
    for name in _SHOWN:
        version = _version(name)
        limits = wanted.get(name)
        if version and limits and version not in limits.specifier:
            remedy = f"pip install '{limits}'"
            yield Finding(name, f"{version}, tested with {limits.specifier}", remedy)
        elif version or limits:
            yield Finding(name, version or "missing", None if version else f"pip install '{limits}'")
    decoders = [f"{name} {version}" for name in _DECODERS if (version := _version(name))]
    yield Finding("decoders", f"{', '.join(decoders)}; FFmpeg: {_ffmpeg()}")
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else "none"
    yield Finding("CUDA, NCCL", f"torch built for CUDA {torch.version.cuda or 'none'}, NCCL {nccl}")


def _wanted() -> dict[str, Requirement]:
    """What the installed package asks for, extras left out; nothing in a clone that is not installed."""
    try:
        lines = metadata.requires("swim-train") or []
    except metadata.PackageNotFoundError:
        return {}
    found = {}
    for line in lines:
        with suppress(InvalidRequirement):
            requirement = Requirement(line)
            if requirement.marker is None:
                found[requirement.name] = requirement
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _ffmpeg() -> str:
    try:
        import av
    except (ImportError, OSError) as error:
        return f"av does not load ({error})"
    return ", ".join(
        f"{name} {'.'.join(map(str, av.library_versions[name]))}" for name in ("libavcodec", "libavformat")
    )


def _num_cores() -> int:
    return len(os.sched_getaffinity(0))


def _ask(*command: str) -> str:
    """Output of a program; nothing where it is missing, fails or hangs (a driver in trouble does)."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _devices() -> Iterator[Finding]:
    listed = _ask("nvidia-smi", "-L").splitlines()
    if not torch.cuda.is_available():
        remedy = (
            f"install a torch built for CUDA, this one is for {torch.version.cuda or 'CPUs'}; then look at the driver"
        )
        yield Finding("GPUs", f"torch sees none, nvidia-smi {len(listed)}", remedy if listed else None)
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        try:
            free, total = torch.cuda.mem_get_info(index)
        except RuntimeError as error:
            yield Finding(f"GPU {index}", f"{properties.name}: {error}", "reset the device, or leave this node out")
            continue
        taken = (total - free) / total
        kind = f"{properties.name} (sm_{properties.major}{properties.minor})"
        busy = f"another process holds {taken:.0%} of it: nvidia-smi names it" if taken > 0.1 else None
        yield Finding(f"GPU {index}", f"{kind}, {free / MIB:,.0f} of {total / MIB:,.0f} MiB free", busy)
    yield Finding("driver", _ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0])
    links = [
        word
        for line in _ask("nvidia-smi", "topo", "-m").splitlines()
        if line.startswith("GPU")
        for word in line.split()
    ]
    kinds = {
        kind: links.count(kind) // 2
        for kind in dict.fromkeys(links)
        if kind[:2] in ("NV", "SY", "NO", "PH", "PX", "PI")
    }
    text = ", ".join(f"{count} pairs by {kind}" for kind, count in kinds.items()) or "one device, or unknown"
    yield Finding("topology", text + ("; SYS goes through the processors" if "SYS" in kinds else ""))


def _network() -> Iterator[Finding]:
    nodes = len(list(Path("/sys/devices/system/node").glob("node[0-9]*")))
    ports = sorted(Path("/sys/class/infiniband").glob("*/ports/*"))
    states = [f"{p.parts[-3]} {_read(p / 'state').partition(': ')[2]} {_read(p / 'rate')}" for p in ports]
    yield Finding("fabric", f"{', '.join(states) or 'no InfiniBand'}; {nodes or 1} memory nodes")
    host = socket.gethostname()
    try:
        yield Finding("host name", f"{host} is {socket.gethostbyname(host)}")
    except OSError as error:
        yield Finding("host name", f"{host}: {error}", f"add '127.0.1.1 {host}' to /etc/hosts: gloo looks it up")
    port = int(os.environ.get("MASTER_PORT", "0"))
    # Where there are several ranks, the first of them is using the port.
    with socket.socket() as probe:
        try:
            probe.bind(("", 0 if int(os.environ.get("WORLD_SIZE", "1")) > 1 else port))
            yield Finding("port", f"{probe.getsockname()[1]} is free")
        except OSError as error:
            yield Finding("port", f"MASTER_PORT {port}: {error}", "unset MASTER_PORT, or give a free one")


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return "unknown"


def _limits() -> Iterator[Finding]:
    files, memlock = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK))
    few = files != resource.RLIM_INFINITY and files < MIN_FILES
    remedy = f"ulimit -n {4 * MIN_FILES}: shards, workers and ranks hold files open" if few else None
    yield Finding("open files", _limit(files), remedy)
    fabric, limited = any(Path("/sys/class/infiniband").glob("*")), memlock != resource.RLIM_INFINITY
    remedy = (
        "ulimit -l unlimited: InfiniBand pins memory; under SLURM set it for slurmd" if fabric and limited else None
    )
    yield Finding("locked memory", _limit(memlock, MIB, " MiB"), remedy)
    shm = _size("/dev/shm")
    remedy = "containers: --shm-size=16g or --ipc=host; NCCL and loader workers share memory there"
    yield Finding("/dev/shm", f"{shm / MIB:,.0f} MiB", remedy if shm < MIN_SHM_MIB * MIB else None)


def _limit(value: int, unit: int = 1, name: str = "") -> str:
    return "unlimited" if value == resource.RLIM_INFINITY else f"{value // unit:,}{name}"


def _size(folder: str) -> int:
    try:
        return shutil.disk_usage(folder).total
    except OSError:
        return 0


def _tools() -> Iterator[Finding]:
    tools = {name: shutil.which(name) for name in ("g++", "ninja", "nvcc")}
    missing = ", ".join(name for name, path in tools.items() if path is None)
    # DeepSpeed compiles what offload needs; nothing in the recipes here is compiled.
    text = f"no {missing}; only offload_optimizer and fused CPU optimizers need them" if missing else "g++, ninja, nvcc"
    yield Finding("compiler", text)


def check_disk(folder: Path) -> list[Finding]:
    """Space, bandwidth, fsync, locks and clock of the file system of a folder, by a file that is removed again."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        with tempfile.TemporaryDirectory(dir=folder, prefix=".doctor_") as scratch:
            return list(_measure(folder, Path(scratch), free))
    except OSError as error:
        return [Finding("disk", f"{folder}: {error}", "name a folder that can be written to, with space left")]


def _measure(folder: Path, scratch: Path, free: int) -> Iterator[Finding]:
    remedy = f"less than {MIN_FREE_GIB:g} GiB: a checkpoint of a 7B model takes about 100 GiB, of the tiny one 20 MiB"
    yield Finding(
        "disk", f"{folder}: {free / (1 << 30):,.1f} GiB free", remedy if free < MIN_FREE_GIB * 2**30 else None
    )
    size, chunk, path = min(TESTED_MIB, free // MIB // 4), random.randbytes(MIB), scratch / "bytes"
    with path.open("wb", buffering=0) as file:
        before, began = time.time(), time.perf_counter()
        for _ in range(size):
            file.write(chunk)
        os.fsync(file.fileno())
        written = time.perf_counter() - began
        skew = path.stat().st_mtime - (before + time.time()) / 2
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # else memory is read, not the disk
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.read(MIB):
            pass
    read = time.perf_counter() - began
    yield Finding(
        "bandwidth", f"write {size / written:,.0f} MiB/s with fsync, read {size / read:,.0f} MiB/s ({size} MiB)"
    )
    waits = [_fsync(scratch / f"small_{number}") for number in range(11)]
    slow = statistics.median(waits) > MAX_FSYNC_S
    text = f"median {1e3 * statistics.median(waits):.1f} ms, longest {1e3 * max(waits):.1f} ms of 4 KiB"
    yield Finding("fsync", text, "a save waits for it once per file: put run.output on another disk" if slow else None)
    # A program that wrote for long ages its own file: only a clock beyond both ends is another clock.
    late = max(abs(skew) - written, 0)
    text = f"files are dated {skew:+.1f} s from this clock"
    yield Finding("clock", text, "synchronise the clocks (chrony)" if late > MAX_SKEW_S else None)
    kept = _is_kept_out(scratch / "lock")
    remedy = "mount with locks (NFS: without nolock, Lustre: -o flock), else two runs can write one folder"
    yield Finding(
        "locks", "another process is kept out" if kept else "another process is not kept out", None if kept else remedy
    )


def _fsync(path: Path) -> float:
    with path.open("wb", buffering=0) as file:
        file.write(bytes(4096))
        began = time.perf_counter()
        os.fsync(file.fileno())
        return time.perf_counter() - began


def _is_kept_out(path: Path) -> bool:
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        # A lock is a process's own: only another one can tell.
        program = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        return bool(subprocess.run([sys.executable, "-c", program, path], stderr=subprocess.DEVNULL).returncode)


def check_data(where: str) -> Finding:
    """Samples and bytes per second of reads at random by the index, checksums included."""
    from swim.data_tools.shards import BadSample, ShardError, ShardSet

    name = "shards"
    try:
        shards = ShardSet(where)
    except (ShardError, OSError) as error:
        return Finding(name, f"{where}: {error}", "repair what is named there")
    if not len(shards):
        return Finding(name, f"{where}: no samples", "name a folder of shards")
    numbers = random.Random(0).choices(range(len(shards)), k=READS)
    bad, size, count, began = set[str](), 0, 0, time.perf_counter()
    for number in numbers:
        for member in shards.entries[number].members:
            try:
                size += len(shards.read_member(number, member))
            except BadSample as error:
                bad.add(str(error))
        count += 1
        if time.perf_counter() - began > READ_S:
            break
    spent = time.perf_counter() - began
    text = f"{where}: {count / spent:,.0f} samples/s, {size / MIB / spent:,.0f} MiB/s, {count} at random by one process"
    remedy = f"{len(bad)} of them are bad, e.g. {min(bad)}: swim data check {where}" if bad else None
    return Finding(name, text, remedy)
