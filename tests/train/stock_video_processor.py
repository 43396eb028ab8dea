"""Run as a program with a torchvision on PYTHONPATH: stock video processors on a folder's NAME.case.npz.

torchvision has no wheel for CPU-only torch: the CUDA build imports once its missing operator schemas are declared.
That is good enough for an oracle, not for a runtime dependency.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

_LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
_NUM_ARGUMENTS = {
    "nms": 3,
    "qnms": 3,
    "roi_align": 7,
    "ps_roi_align": 6,
    "roi_pool": 5,
    "ps_roi_pool": 5,
    "deform_conv2d": 14,
}
for _name, _count in _NUM_ARGUMENTS.items():
    for _variant in (_name, f"_{_name}_backward"):
        _LIBRARY.define(f"{_variant}({', '.join(f'Tensor a{i}' for i in range(_count))}) -> Tensor")


def main(folder: str) -> None:
    import transformers

    for source in Path(folder).glob("*.case.npz"):
        case = np.load(source)
        processor = getattr(transformers, str(case["processor"]))(**json.loads(str(case["fields"])))
        result = processor(
            videos=[torch.from_numpy(case["frames"]).permute(0, 3, 1, 2)],
            return_tensors="pt",
            do_sample_frames=False,
            input_data_format="channels_first",
            **json.loads(str(case["options"])),
        )
        target = source.with_name(source.name.replace(".case.", ".stock."))
        np.savez(target, **{name: np.asarray(tensor) for name, tensor in result.items()})


if __name__ == "__main__":
    main(sys.argv[1])
