"""Promise: with heads divided over ranks, every rank has the maps of all heads, and gradients are those of one rank.

Real processes, gloo. Each rank computes what it was given and writes it to a file; the test puts the parts together.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing
from torch.utils.checkpoint import checkpoint

from swim.kernels.noun_attention import ClipKeys, Row, build_work_table, noun_attention

LENGTH = 60
CLIPS = [ClipKeys(0, 5, (3, 2, 4)), ClipKeys(1, 40, (1, 1, 1)), ClipKeys(1, 7, (4, 3, 2))]
SCATTERED = [CLIPS[0]._replace(positions=[*range(5, 53, 2)]), *CLIPS[1:]]
ROWS = [Row(*row, ((0, 31), (33, 50))) for row in [(0, 58), (0, 30), (0, 30), (1, 59), (2, 50), (2, 3)]]
# scope, rows, clips, query heads, kv heads
PROBLEMS = {
    "frame": ("frame", ROWS, CLIPS, 8, 4),
    "clip": ("clip", ROWS, CLIPS, 8, 4),
    "causal": ("causal", ROWS, CLIPS, 8, 4),
    "full": ("full", ROWS, CLIPS, 8, 4),
    "scattered": ("frame", ROWS, SCATTERED, 8, 4),
    "one kv head": ("frame", ROWS, CLIPS, 8, 1),
    "two kv heads": ("clip", ROWS, CLIPS, 28, 2),
    "no rows": ("frame", [], CLIPS, 8, 4),
}


def inputs(name: str, seed: int = 0) -> tuple[Tensor, Tensor]:
    heads = PROBLEMS[name][3:]
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(2, h, LENGTH, 16, generator=generator, dtype=torch.float64) for h in heads)
    return q.requires_grad_(), k.requires_grad_()


def loss_of(flat: Tensor) -> Tensor:
    """Not linear, so that it must be taken of the whole map."""
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(1), dtype=flat.dtype)
    return (flat * weights).sum() + 10 * flat.square().sum()


def share(rank: int, ranks: int, heads: int, kv_heads: int) -> tuple[slice, slice]:
    """Query and kv heads of a rank; kv heads fewer than ranks are held by several."""
    mine = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
    group = heads // kv_heads
    return mine, slice(mine.start // group, (mine.stop - 1) // group + 1)


def compute(rank: int, ranks: int, folder: str, order: list[int]) -> None:
    """What one rank of several does: `order` is the place of each rank among the heads."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    group: Any = dist.group.WORLD
    done: dict[str, Any] = {}
    for name, (scope, rows, clips, *heads) in PROBLEMS.items():
        table = build_work_table(rows, clips, scope)
        q, k = (
            x.detach()[:, mine].requires_grad_() for x, mine in zip(inputs(name), share(order[rank], ranks, *heads))
        )

        def layer(q: Tensor, k: Tensor, table: Any = table) -> Tensor:
            return noun_attention(q, k, table, scale=0.3, group=group)

        ways = {"": layer}
        if name == "frame":
            ways["compiled "] = torch.compile(layer, backend="aot_eager", fullgraph=True)
            ways["checkpointed "] = lambda q, k, f=layer: checkpoint(f, q, k, use_reentrant=False)
        for way, run in ways.items():
            flat = run(q, k)
            grads = torch.autograd.grad(loss_of(flat), (q, k)) if rows else (q * 0, k * 0)
            done[way + name] = [x.detach() for x in (flat, *grads)]
    # Two groups with data of their own.
    groups = [dist.new_group([*range(first, ranks, 2)]) for first in range(2)]
    q, k = (x[:, mine] for x, mine in zip(inputs("frame", rank % 2), share(rank // 2, ranks // 2, 8, 4)))
    flat = noun_attention(q, k, build_work_table(ROWS, CLIPS), scale=0.3, group=groups[rank % 2])
    done |= {"seed": rank % 2, "half": flat.detach()}
    torch.save(done, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[[0, 1], [2, 0, 3, 1]], ids=["2", "4"])
def ranks(request: Any, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Results of all ranks, in the order of their heads."""
    folder, order = tmp_path_factory.mktemp("ranks"), request.param
    multiprocessing.spawn(compute, (len(order), str(folder), order), nprocs=len(order))
    return [torch.load(folder / f"{order.index(place)}.pt") for place in range(len(order))]


@pytest.mark.parametrize("name", [*PROBLEMS, "compiled frame", "checkpointed frame"])
def test_maps_and_gradients_are_those_of_one_rank(ranks: list[dict[str, Any]], name: str) -> None:
    problem = name.split()[-1] if "frame" in name else name
    scope, rows, clips, heads, kv_heads = PROBLEMS[problem]
    q, k = inputs(problem)
    want = noun_attention(q, k, build_work_table(rows, clips, scope), scale=0.3)
    dq, dk = torch.autograd.grad(loss_of(want), (q, k)) if rows else (q * 0, k * 0)
    maps, got_dq, parts_of_dk = zip(*(done[name] for done in ranks))
    for flat in maps:
        assert torch.equal(flat, maps[0]), "ranks must agree to the bit, or their parameters part"
        torch.testing.assert_close(flat, want.detach(), atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(torch.cat(got_dq, 1), dq, atol=1e-12, rtol=1e-12)
    got_dk = torch.zeros_like(dk)
    for place, part in enumerate(parts_of_dk):
        got_dk[:, share(place, len(ranks), heads, kv_heads)[1]] += part
    torch.testing.assert_close(got_dk, dk, atol=1e-12, rtol=1e-12)
    assert not rows or min(float(x.norm()) for x in (dq, dk, *got_dq, *parts_of_dk)) > 1e-2


def test_groups_of_one_world_do_not_mix(ranks: list[dict[str, Any]]) -> None:
    table = build_work_table(ROWS, CLIPS)
    for done in ranks:
        want = noun_attention(*inputs("frame", seed=done["seed"]), table, scale=0.3).detach()
        torch.testing.assert_close(done["half"], want, atol=1e-12, rtol=1e-12)
