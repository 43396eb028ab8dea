"""Where this process is among the others, and the few collectives the loop needs."""

import os
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch

from swim.train.config import ConfigError

# Rank, size and local rank as torch's launchers, OpenMPI and SLURM name them.
_NAMES = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)
_SRUN_STEPS = 4294967280  # steps of srun count from 0; SLURM's own, a batch script or a shell, have larger numbers

_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """Rank and size of the job, and the device of this rank."""

    rank: int
    size: int
    device: torch.device
    timeout_s: float = 1800.0  # of collectives

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over ranks, by name; all ranks pass the same names. float64, so counts stay exact."""
        tensor = torch.tensor([values[name] for name in sorted(values)], dtype=torch.float64, device=self.device)
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return dict(zip(sorted(values), tensor.tolist()))

    def on_main(self, work: Callable[[], _T]) -> _T:
        """What `work` returns on the main rank, on every rank; its error is raised on all, which else would wait."""
        result, problem = None, None
        if self.is_main:
            try:
                result = work()
            except Exception as error:  # of any kind: the others must hear of it
                problem = error
        result, problem = self.gather((result, problem))[0]
        if problem is not None:
            raise problem
        return result

    def gather(self, value: Any) -> list[Any]:
        """The object of every rank, on every rank."""
        values: list[Any] = [None] * self.size
        if self.size == 1:
            return [value]
        torch.distributed.all_gather_object(values, value)
        return values

    def subgroup(self, size: int) -> torch.distributed.ProcessGroup | None:
        """This rank's group of `size` consecutive ranks, to be asked for by all ranks together; None for a size of 1.

        ConfigError when the ranks do not divide into such groups.
        """
        if self.size % size:
            raise ConfigError(
                f"parallel.sequence: {self.size} ranks do not divide into groups of {size}; start a multiple of {size} "
                "ranks, or change parallel.sequence"
            )
        if size == 1:
            return None
        # NCCL's own limit of ten minutes would end a rank whose neighbours still read.
        return torch.distributed.new_subgroups(size, timeout=timedelta(seconds=self.timeout_s))[0]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            torch.distributed.barrier()

    def close(self) -> None:
        """Leave the job in good order; without it gloo's threads abort the process at exit."""
        torch.distributed.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0


def init_world(timeout_s: float = World.timeout_s) -> World:
    """Join the job that the environment describes, alone if it describes none; nccl on GPUs, gloo on CPUs."""
    rank, size, local = find_place()
    set_place(rank, size, local)
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
        device, backend = torch.device("cuda", local), "nccl"
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        device, backend = torch.device("cpu"), "gloo"
    import deepspeed  # after DS_ACCELERATOR is set

    if device.type == "cpu":
        # The shared-memory collective is compiled on first use, a minute with a compiler and fatal without; gloo does
        # without it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(backend, timeout=timedelta(seconds=timeout_s), verbose=False, auto_mpi_discovery=False)
    return World(rank, size, device, timeout_s)


def find_place() -> tuple[int, int, int]:
    """Rank, size and local rank of this process, alone if nothing in the environment says otherwise."""
    in_step = int(os.environ.get("SLURM_STEP_ID", _SRUN_STEPS)) < _SRUN_STEPS
    names = next((names for names in _NAMES if names[0] in os.environ and (names != _NAMES[2] or in_step)), _NAMES[0])
    rank, size, local = (int(os.environ.get(name, default)) for name, default in zip(names, (0, 1, 0)))
    return rank, size, local


def set_place(rank: int, size: int, local: int) -> None:
    """Set the variables by which torch finds the other ranks; an address and a port that are given stay."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local))
    if "MASTER_ADDR" not in os.environ:
        os.environ["MASTER_ADDR"] = _master() if size > 1 else "127.0.0.1"
    # From the job's number, as in launch/slurm/job.sh: two jobs on a node differ, and all nodes know it.
    job = os.environ.get("SLURM_JOB_ID")
    os.environ.setdefault("MASTER_PORT", str(10000 + int(job) % 20000) if job and size > 1 else "29500")


def _master() -> str:
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return "127.0.0.1"

    def ask(*command: str) -> str:
        return subprocess.run(["scontrol", "show", *command], capture_output=True, text=True, check=True).stdout

    first = ask("hostnames", nodes).split()[0]
    # The address by which SLURM itself reaches the node: its name need not resolve.
    return next((w.partition("=")[2] for w in ask("node", first).split() if w.startswith("NodeAddr=")), first)
