"""Measures, on a GPU, what supervision adds to a training step of a model of Qwen2.5-VL-7B's shape at 16 384 tokens:
forward and backward, vision tower included, no optimizer. As many layers as fit. Imports torch, transformers and the
lowest pieces of swim.
"""

import time
from typing import Any

import pytest
import torch

from benchmarks.measure import MIB, in_turns, ratios, write_result
from benchmarks.targets import missed

pytestmark = [
    pytest.mark.bench,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SECONDS = 80  # for the rounds, of which there are at least 2


def test_supervised_step_of_a_7b_model_on_a_gpu(benchmark):
    from benchmarks.qwen import Shape, layers_that_fit, steps

    shape = Shape(layers=layers_that_fit(torch.cuda.mem_get_info()[0]))
    kinds: dict[str, dict[str, Any]] = {}
    ways, once = {}, 0.0
    for name, step in steps(shape, "cuda", torch.bfloat16)[1].items():

        def synchronised(step: Any = step) -> None:
            step()
            torch.cuda.synchronize()

        step()  # compiles
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        assert torch.isfinite(step()).all(), name
        once += time.perf_counter() - began
        kinds[name] = {"peak_mib": torch.cuda.max_memory_allocated() / MIB}
        kinds[name]["memory"] = kinds[name]["peak_mib"] / kinds["plain"]["peak_mib"]
        ways[name] = synchronised
    result: dict[str, Any] = {
        "layers": shape.layers,
        "supervised_layers": shape.supervised,
        "tokens": shape.length,
        "visual_tokens": shape.grid[0] * shape.grid[1] * shape.grid[2],
        "kinds": kinds,
    }
    seconds = in_turns(benchmark, ways, max(2, min(9, int(SECONDS / once) - 1)))
    for name, figures in kinds.items():
        figures |= {"seconds": min(seconds[name]), "time": ratios(seconds[name], seconds["plain"])}
        print(f"\n{name}: {figures}", flush=True)
    benchmark.extra_info |= result
    write_result("gpu_step", result)
    assert not missed({"gpu_step": result})
