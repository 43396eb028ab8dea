"""Promise: what the benchmarks compare computes the same thing, and their arithmetic of floors and memory is right."""

import json
from functools import partial

import pytest
import torch

from benchmarks import noun_rows, pixel_loss, qwen, report
from benchmarks.measure import MIB, Ceilings, PeakMemory, Work
from benchmarks.targets import missed

ROWS = {"frame": noun_rows.Case(3, 2, 48, text=8, heads=4, kv_heads=2, dim=16)}
ROWS["clip"] = ROWS["frame"]._replace(segments=1)
ROWS["uneven blocks of the identity"] = ROWS["frame"]._replace(keys=42)
FRAME_WAYS = {
    "eager": noun_rows.eager,
    "release": partial(noun_rows.all_text_rows, layers=2, supervised=1),
}
PIXELS = pixel_loss.Case(5, (3, 4), (13, 21))


@pytest.mark.parametrize("case", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("way", [*sorted(noun_rows.GPU_WAYS.keys() - {"triton"}), *FRAME_WAYS])
def test_noun_rows_are_the_same_in_every_way(case, way):
    p = noun_rows.problem(case)
    got = noun_rows.values_and_gradients({**noun_rows.GPU_WAYS, **FRAME_WAYS}[way], p)
    for x, y in zip(got, noun_rows.values_and_gradients(noun_rows.operator, p.double())):
        torch.testing.assert_close(x.double(), y, atol=1e-5, rtol=1e-4)


def test_pixel_losses_are_the_same_in_every_way():
    p = pixel_loss.problem(PIXELS)
    assert 0.05 < p.mask.float().mean() < 0.6
    want = pixel_loss.values_and_gradients(pixel_loss.operator, p.double())
    for way in pixel_loss.GPU_WAYS.keys() - {"triton"}:
        for x, y in zip(pixel_loss.values_and_gradients(pixel_loss.GPU_WAYS[way], p), want):
            torch.testing.assert_close(x.double(), y, atol=1e-3, rtol=1e-4)


def test_peak_memory_counts_what_is_alive_at_once():
    x = torch.zeros(MIB // 4, requires_grad=True)  # 1 MiB
    with PeakMemory() as memory:
        y = (x.exp().sin() + 1).sum()  # sin keeps exp's result
        (dx,) = torch.autograd.grad(y, x)
    # In the backward pass: exp's result, sin's gradient (y's is a view of a scalar), cos of it; never all six.
    assert 3 * MIB <= memory.peak() <= 4 * MIB + 100
    assert memory.peak() - MIB <= memory.peak(dx) <= memory.peak()


def test_the_floor_is_the_slowest_of_bytes_operations_and_special_functions():
    ceilings = Ceilings(bytes=4e12, flops=8e14, specials=4e12)
    assert Work(4e6, 0, 0).floor_us(ceilings) == pytest.approx(1)
    assert Work(4e6, 8e9, 4e6).floor_us(ceilings) == pytest.approx(10)
    assert Work(4e6, 8e8, 8e6).floor_us(ceilings) == pytest.approx(2)


def test_the_least_work_of_noun_rows():
    case = noun_rows.Case(rows=8, segments=1, keys=16384, text=2048)
    forward, backward = case.works()
    inputs = 16384 * 4 * 128 * 2 + 8 * 28 * 128 * 2
    assert forward == (inputs + 8 * 16384 * 4, 2 * 28 * 8 * 16384 * 128, 28 * 8 * 16384)
    assert backward.bytes == forward.bytes + (28 + 4) * 18432 * 128 * 2
    assert backward.flops == 3 * forward.flops
    assert case.launches() == 8
    assert noun_rows.Case(5, 16, 12288).launches() == 6


def test_the_least_work_of_the_pixel_side():
    (work,) = pixel_loss.Case(frames=80, grid=(17, 31), size=(480, 854)).works()
    assert work == (80 * (480 * 107 + 2 * 4 * 17 * 31 + 12), 0, 80 * 480 * 854)


@pytest.mark.parametrize("kind", ["gpu_noun_rows", "gpu_pixel_loss"])
def test_what_a_gpu_measures_is_written_and_judged(kind, monkeypatch, tmp_path):
    """The whole way of the GPU's benchmarks at toy sizes, with clocks that stand still."""
    pytest.importorskip("triton")
    pytest.importorskip("matplotlib")
    from benchmarks import device

    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(device, "measure_ceilings", lambda: Ceilings(4e12, 8e14, 4e12))
    monkeypatch.setattr(device, "launch_us", lambda _: [1.0, 2.0, 3.0])
    monkeypatch.setattr(device, "replayed_us", lambda run: [1.0 for _ in range(3) if run() is not None])
    monkeypatch.setattr(device, "eager_us", lambda run: [5.0 for _ in range(3) if run() is not None])
    monkeypatch.setenv("OUT", str(tmp_path))
    module, case = (noun_rows, ROWS["clip"]) if kind == "gpu_noun_rows" else (pixel_loss, PIXELS)

    def broken(_):
        raise RuntimeError("no such kernel")

    ways = {
        "triton": module.operator,
        "torch": module.operator,
        "broken": broken,
        "wrong": lambda p: -module.operator(p),
    }
    if kind == "gpu_noun_rows":
        ways["grouped, compiled"] = torch.compile(noun_rows.grouped, fullgraph=True, dynamic=False, backend="aot_eager")
    device.measure(kind, {"toy": case}, lambda _: ways, module.problem, module.values_and_gradients, {"": 1e-3})
    result = json.loads((tmp_path / f"{kind}.json").read_text())
    got = result["shapes"]["toy"]["ways"]
    assert got["broken"] == {"failed": "RuntimeError('no such kernel')"}
    assert got["wrong"]["failed"] == "wrong"
    assert got["triton"]["bit_equal"]
    assert got["triton"]["step_us"] == [1.0, 1.0, 1.0]
    report.draw({kind: result}, tmp_path)
    assert f"performance_{kind}.svg" in report.page({kind: result})
    assert (tmp_path / f"performance_{kind}.svg").exists()
    if kind == "gpu_noun_rows":
        assert not missed({kind: result})
    else:  # a microsecond is far above the floor of so few pixels
        assert [target.name for target in missed({kind: result})] == ["toy: time / floor"]


def test_supervision_adds_its_loss_to_the_plain_step_and_nothing_else():
    tiny = qwen.Shape(
        layers=3,
        grid=(2, 3, 4),
        length=64,
        nouns=2,
        answer=16,
        mask_size=(13, 21),
        text=(
            ("hidden_size", 64),
            ("intermediate_size", 96),
            ("num_attention_heads", 4),
            ("num_key_value_heads", 2),
            ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}),
        ),
        vision=(
            ("hidden_size", 32),
            ("intermediate_size", 64),
            ("out_hidden_size", 64),
            ("num_heads", 2),
            ("depth", 2),
            ("patch_size", 7),
            ("window_size", 28),
            ("fullatt_block_indexes", [1]),
        ),
    )
    model, steps = qwen.steps(tiny, "cpu", torch.float32)
    losses = {}
    for name in ("plain", "supervised, grid side (kl)", "supervised, pixel side (bce)", "plain"):
        loss = float(steps[name]())
        queries = [layer.self_attn.q_proj.weight.grad.clone() for layer in model.model.language_model.layers]
        assert losses.setdefault(name, (loss, queries))[0] == loss  # a supervised step leaves nothing behind
    for name in steps.keys() - {"plain", "vision tower alone"}:
        assert losses[name][0] > losses["plain"][0]
        assert not any(map(torch.equal, losses[name][1], losses["plain"][1]))
    assert all(parameter.grad is None for parameter in model.model.visual.parameters())


def test_layers_are_those_of_the_paper_and_as_many_as_fit():
    assert qwen.Shape().supervised == (2, 7, 12, 17, 22, 27)
    assert qwen.Shape(layers=4).supervised == (0, 1, 2, 3)
    assert qwen.layers_that_fit(140 * qwen.GIB) == 28
    assert 1 < qwen.layers_that_fit(40 * qwen.GIB) < 28
