"""What the results have to show: one line for each target, met or missed."""

from collections.abc import Iterator, Mapping
from math import nan
from typing import Any, NamedTuple

PAPER, LONG = "paper", "8 rows x 16 384 keys"


class Target(NamedTuple):
    name: str
    value: float  # NaN where it could not be measured
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.value >= self.limit if self.at_least else self.value <= self.limit


def targets(results: Mapping[str, Any]) -> list[Target]:
    """Targets of the result files there are, by name of the file."""
    tests = {
        "cpu_step": _cpu_step,
        "cpu_noun_rows": _cpu_noun_rows,
        "gpu_noun_rows": _gpu_noun_rows,
        "gpu_pixel_loss": _gpu_pixel_loss,
        "gpu_step": _gpu_step,
    }
    return [target for name, test in tests.items() if name in results for target in test(results[name])]


def missed(results: Mapping[str, Any]) -> list[Target]:
    return [target for target in targets(results) if not target.met]


def _cpu_step(result: Any) -> Iterator[Target]:
    yield Target(
        "CPU, tiny model: time of a supervised step / plain", result["kinds"]["supervised"]["time"]["median"], 1.10
    )


def _cpu_noun_rows(result: Any) -> Iterator[Target]:
    for name, way in result["ways"].items():
        if name.startswith("eager"):
            yield Target("CPU: time of eager / noun rows", way["time"]["median"], 20, at_least=True)
            yield Target("CPU: memory of eager / noun rows", way["memory"], 100, at_least=True)
        elif name.startswith("release"):
            yield Target("CPU: memory of the release's way / noun rows", way["memory"], 10, at_least=True)


def _gpu_noun_rows(result: Any) -> Iterator[Target]:
    for name, shape in result["shapes"].items():
        ways = shape["ways"]
        ours, compiled = (_median(ways[way]) for way in ("triton", "grouped, compiled"))
        if name.startswith(PAPER):
            bound = max(shape["floor_us"], shape["launch_us"][1])
            yield Target(f"{name}: time / larger of floor and launches", ours / bound, 2.5)
        if name == LONG:
            yield Target(f"{name}: time of torch.compile / Triton", compiled / ours, 2, at_least=True)
        else:
            yield Target(f"{name}: time of Triton / torch.compile", ours / compiled, 1)
        yield _bit_equal(name, ways)


def _gpu_pixel_loss(result: Any) -> Iterator[Target]:
    for name, shape in result["shapes"].items():
        yield Target(f"{name}: time / floor", _median(shape["ways"]["triton"]) / shape["floor_us"], 2)
        yield _bit_equal(name, shape["ways"])


def _gpu_step(result: Any) -> Iterator[Target]:
    for kind, figures in result["kinds"].items():
        if kind.startswith("supervised"):
            yield Target(f"Qwen2.5-VL-7B's shape: time of a step, {kind} / plain", figures["time"]["median"], 1.02)


def _median(way: Mapping[str, Any]) -> float:
    return way["step_us"][1] if "step_us" in way else nan


def _bit_equal(name: str, ways: Mapping[str, Any]) -> Target:
    return Target(f"{name}: ten runs bit-equal", float(ways["triton"].get("bit_equal", nan)), 1, at_least=True)
