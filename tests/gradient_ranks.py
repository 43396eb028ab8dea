"""One step's gradient on 1, 2, ... ranks, in gloo processes: what the loop computes, without the engine."""

from pathlib import Path

import torch
import torch.distributed as dist

from swim.train.config import Config
from swim.train.loader import Loader, Order
from swim.train.loop import combine
from swim.train.system import Progress, build_system


def gradients_of_step(rank: int, size: int, config: Config, step: int, out: Path) -> None:
    """Processes 0 ... size - 1: for every world of the first 1 to `size` of them, the main rank saves {parameter:
    gradient} of a step as `out`/ranks_<world>.pt, and `counts` and the packs' ids among them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{out / 'meeting'}", rank=rank, world_size=size)
    system = build_system(config)
    order, model = Order(config, system, writes=False), system.build_model().train()
    for world in range(1, size + 1):
        group = dist.new_group(list(range(world)))
        if rank >= world:
            continue
        batches = next(Loader(order, system.collator, rank=rank, size=world).steps(step, step + 1))
        names = sorted(batches[0].counts)
        counts = torch.tensor([sum(batch.counts[name] for batch in batches) for name in names], dtype=torch.float64)
        dist.all_reduce(counts, group=group)
        model.zero_grad()
        for batch in batches:
            loss = system.loss(model, batch, Progress(step, step + 1))
            combine(loss, dict(zip(names, counts.tolist()))).backward()
        system.after_backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
        for gradient in gradients.values():
            dist.all_reduce(gradient, group=group)
        ids: list[list[list[str]]] = [[]] * world
        dist.all_gather_object(ids, [batch.ids for batch in batches], group=group)
        if rank == 0:
            saved = {"counts": counts, "ids": ids, "gradients": gradients}
            torch.save(saved, out / f"ranks_{world}.pt")
    dist.barrier()
    dist.destroy_process_group()
