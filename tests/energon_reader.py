"""Prints what Megatron-Energon reads from a prepared folder, as JSON; runs in the environment of `make energon-env`."""

import hashlib
import json
import sys

from megatron.energon import WorkerConfig, get_loader, get_val_dataset
from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath


def main(folder: str, names: list[str]) -> None:
    config = WorkerConfig(rank=0, world_size=1, num_workers=0)
    records = {}
    for split in ("train", "val"):
        dataset = get_val_dataset(EPath(folder), split_part=split, worker_config=config, batch_size=None)
        records |= {sample.__key__: [split, sample.text] for sample in get_loader(dataset)}
    store = WebdatasetFileStore(EPath(folder))
    print(json.dumps({"records": records, "members": {n: hashlib.sha256(store[n][0]).hexdigest() for n in names}}))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
