"""One rank of a training with faults, as a program: `faulty_train.py FAULTS RECIPE_OVERRIDE...`.

FAULTS is JSON: step -> "nan_loss" (on the last rank), "nan_gradient" (likewise) or a factor of the loss (on every
rank). The sum of this rank's master weights behind every step goes into RUN/weights_RANK.jsonl.
"""

import json
import os
import sys
from dataclasses import replace

import torch

from swim.train import loop
from swim.train.__main__ import _leave, main
from swim.train.systems.swim.model import SwimSystem

FAULTS = {int(step): fault for step, fault in json.loads(sys.argv[1]).items()}
LAST = int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1


def faulty_loss(self, model, batch, progress):
    terms = plain_loss(self, model, batch, progress)
    match FAULTS.get(progress.step):
        case "nan_loss" if LAST:
            terms["text"] = replace(terms["text"], sum=terms["text"].sum * float("nan"))
        case "nan_gradient" if LAST:
            # The loss stays what it is; the root of zero has no finite slope.
            root = (terms["text"].sum * 0).sqrt()
            terms["text"] = replace(terms["text"], sum=terms["text"].sum + root)
        case float() | int() as factor:
            terms["text"] = replace(terms["text"], sum=terms["text"].sum * factor)
    return terms


def weighed_step(run, batches, progress):
    result = plain_step(run, batches, progress)
    optimizer = run.engine.optimizer
    stage3 = hasattr(optimizer, "fp32_partitioned_groups_flat")
    masters = optimizer.fp32_partitioned_groups_flat if stage3 else optimizer.single_partition_of_fp32_groups
    with (run.config.run.folder / f"weights_{run.world.rank}.jsonl").open("a") as file:
        total = sum(float(part.detach().double().abs().sum()) for part in masters)
        file.write(json.dumps({"step": progress.step, "sum": total}) + "\n")
    return result


plain_loss, SwimSystem.loss = SwimSystem.loss, faulty_loss
plain_step, loop.train_step = loop.train_step, weighed_step
torch.set_num_threads(1)
try:
    main(sys.argv[2:])
except SystemExit as end:
    _leave(end.code if isinstance(end.code, int) else 1)
_leave(0)
