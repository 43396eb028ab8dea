"""What real DeepSpeed engines hold and send, in gloo processes: the measure of what `swim.train.memory` predicts."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist

from swim.train.config import parse_config
from swim.train.engine import build_engine
from swim.train.loader import Loader, Order
from swim.train.loop import combine
from swim.train.system import Progress, build_system
from swim.train.world import init_world


def count_collectives() -> Counter[str]:
    """Bytes of the whole tensor of every collective from now on, by name and number of ranks; what carries a few
    numbers is left out."""
    sent: Counter[str] = Counter()

    def counted(name: str, which: int, key: str) -> None:
        function = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            tensor = args[which] if len(args) > which else kwargs[key]
            if tensor.numel() > 8:
                sent[f"{name} of {dist.get_world_size(kwargs.get('group'))}"] += tensor.nbytes
            return function(*args, **kwargs)

        setattr(dist, name, call)

    counted("all_gather_into_tensor", 0, "output_tensor")
    counted("reduce_scatter_tensor", 1, "input")
    counted("all_reduce", 0, "tensor")
    counted("reduce", 0, "tensor")
    return sent


def storages(tensors: Any) -> int:
    """Bytes of the tensors' storages, each once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def states(engine: Any) -> dict[str, int]:
    """Bytes that this rank holds before the optimizer's step."""
    optimizer, parameters = engine.optimizer, list(engine.module.parameters())
    partitioned = hasattr(parameters[0], "ds_tensor")
    weights = storages(p.ds_tensor for p in parameters) if partitioned else storages(p.data for p in parameters)
    if partitioned:
        flat = storages(p.ds_tensor for p in parameters)
        whole = [p.data for p in parameters if p.ds_persist and p.ds_status.name == "AVAILABLE"]
        weights = flat + storages(
            t
            for t in whole
            if t.untyped_storage()._cdata not in {p.ds_tensor.untyped_storage()._cdata for p in parameters}
        )
        weights += storages(p.ds_secondary_tensor for p in parameters if p.ds_secondary_tensor is not None)
        gradients = optimizer.grad_partitions_flat_buffer.nbytes
        master, own = optimizer.fp32_partitioned_groups_flat, {p.ds_tensor.untyped_storage()._cdata for p in parameters}
    else:
        gradients = sum(t.nbytes for group in optimizer.averaged_gradients.values() for t in group or ())
        master, own = optimizer.single_partition_of_fp32_groups, {p.untyped_storage()._cdata for p in parameters}
    return {
        "weights": weights,
        "gradients": gradients,
        "master": storages(t for t in master if t.untyped_storage()._cdata not in own),
        "host gradients": storages(t.grad for t in master if t.grad is not None),  # offloading's, in fp32
    }


def moments(engine: Any) -> int:
    """Bytes of AdamW's moments."""
    inner = engine.optimizer.optimizer.state.values()
    return sum(t.nbytes for state in inner for t in state.values() if t.dim())


def main(cases: Path) -> None:
    """For every configuration in a JSON file, write `<number>.<rank>.json`: states in front of the third update, and
    the collectives of each of three steps."""
    sent = count_collectives()  # before DeepSpeed looks the functions up
    world = init_world()
    for number, fields in enumerate(json.loads(cases.read_text())):
        config = parse_config(fields, source="test")
        system = build_system(config)
        order = Order(config, system, writes=False)
        engine = build_engine(config, system, order.micro_batches(world.size), world, None)
        steps, found = [], {}
        loader = Loader(order, system.collator, rank=world.rank, size=world.size)
        for batches in loader.steps(0, 3):
            names = sorted(batches[0].counts)
            counts = world.sum({name: sum(batch.counts[name] for batch in batches) for name in names})
            sent.clear()
            for batch in batches:
                loss = system.loss(engine, batch, Progress(1, 2))
                engine.backward(combine(loss, counts) * world.size, scale_wrt_gas=False)
                if batch is not batches[-1]:
                    engine.step()
            found = states(engine)
            engine.step()
            steps.append(dict(sent))
        found["optimizer"] = found.pop("master") + moments(engine)
        result = {**found, "sent": steps, "micro_batches": len(batches)}
        (cases.parent / f"{number}.{world.rank}.json").write_text(json.dumps(result))
        engine.destroy()
    world.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
