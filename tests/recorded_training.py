"""A run of the real training loop, in one process a rank, that writes down every batch it is about to train on."""

import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from swim.train import loop
from swim.train.__main__ import free_port
from swim.train.config import Config
from swim.train.replay import batch_tensors


def train_recorded(config: Config, out: Path, *, ranks: int, kill_in_step: int | None = None) -> None:
    """Train with `ranks` processes; `out`/step<N>_rank<R>.safetensors are their batches, N from 1.

    All die in step `kill_in_step`, behind the batch and before the update.
    """
    out.mkdir(parents=True, exist_ok=True)
    port = free_port()
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["recorded_training"])
    arguments = (ranks, port, config, out, kill_in_step)
    started = [context.Process(target=_train, args=(rank, *arguments)) for rank in range(ranks)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        assert process.exitcode == (0 if kill_in_step is None else 9), process.exitcode


def _train(rank: int, ranks: int, port: int, config: Config, out: Path, kill_in_step: int | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    real = loop.train_step

    def train_step(run, batches, progress):
        micro_batches = next(batches)
        names = [f"rank{rank}.batch{number}" for number in range(len(micro_batches))]
        tensors = [pair for name, batch in zip(names, micro_batches) for pair in batch_tensors(batch, name)]
        save_file(dict(tensors), out / f"step{progress.step + 1}_rank{rank}.safetensors")
        if progress.step + 1 == kill_in_step:
            os._exit(9)
        return real(run, iter([micro_batches]), progress)

    loop.train_step = train_step
    loop.train(config)
    os._exit(0)  # threads of gloo abort at exit now and then
