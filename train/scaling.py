"""How long a step takes on many devices: a cost model of formulas, nothing in it is measured.

Bytes of collectives are exact for DeepSpeed 0.19 (tests count them on real engines); times divide them, and the
floating-point operations of `lengths.Cost`, by data-sheet rates and by assumptions named in `Network` and `Work`.
Communication hides behind computation layer by layer; a step takes the longer of both for every layer and pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from swim.train.memory import Parameter, Zero

GB = 10**9
Strategy = Literal["zero3", "hpz", "sequence"]


@dataclass(frozen=True)
class Device:
    """Data-sheet figures of an accelerator: bytes, dense bf16 operations a second, NVLink bytes a second and
    direction."""

    memory: int
    flops: float
    link: float
    source: str


# Memory as the data sheet's GB of 10^9 bytes: what a device has beyond that is left to CUDA and to fragmentation.
DEVICES = {
    "H100": Device(80 * GB, 989e12, 450e9, "NVIDIA H100 Tensor Core GPU data sheet, SXM"),
    "H100-PCIE": Device(80 * GB, 756e12, 300e9, "NVIDIA H100 Tensor Core GPU data sheet, PCIe with NVLink bridge"),
    "H200": Device(141 * GB, 989e12, 450e9, "NVIDIA H200 Tensor Core GPU data sheet, SXM"),
    "A100": Device(80 * GB, 312e12, 300e9, "NVIDIA A100 Tensor Core GPU data sheet, 80 GB SXM"),
    "A100-40": Device(40 * GB, 312e12, 300e9, "NVIDIA A100 Tensor Core GPU data sheet, 40 GB SXM"),
    "B200": Device(180 * GB, 2250e12, 900e9, "NVIDIA DGX B200 data sheet, an eighth of the system"),
    "L40S": Device(48 * GB, 362e12, 32e9, "NVIDIA L40S data sheet; no NVLink, PCIe 4.0 x16"),
}


def device_of(name: str) -> Device | None:
    """The device that a driver calls so ("NVIDIA H100 80GB HBM3"), if it is known."""
    words = name.upper().replace("-", " ").split()
    found = [key for key in DEVICES if all(word in words or f"{word}GB" in words for word in key.split("-"))]
    return DEVICES[max(found, key=len)] if found else None


@dataclass(frozen=True)
class Network:
    """What joins the devices; latencies are assumptions of the order of those in NCCL's tuning model."""

    per_node: int = 8
    node: float = 400e9  # bytes/s of a node in each direction: eight 400 Gb/s ports (DGX H100 data sheet)
    hop: float = 3.4e-6  # seconds a ring step takes inside a node
    node_hop: float = 14e-6  # seconds it takes between nodes

    def gather(self, size: float, world: int, device: Device) -> float:
        """Seconds of a ring all-gather or reduce-scatter whose whole tensor has `size` bytes."""
        inside = min(world, self.per_node)
        nodes = -(-world // self.per_node)
        links = size * (inside - 1) / inside / device.link
        ports = size * (nodes - 1) / nodes / self.node
        return max(links, ports) + (world - nodes) * self.hop + (nodes - 1) * self.node_hop


@dataclass(frozen=True)
class Traffic:
    """Bytes of the whole tensors of a rank's collectives; a ring moves (ranks - 1) / ranks of them over each link."""

    gathered: int = 0  # all-gathers of weights in a micro-batch
    scattered: int = 0  # reduce-scatters of gradients in a micro-batch
    reduced: int = 0  # all-reduces of gradients in a micro-batch
    updated: int = 0  # all-gathers of updated weights in a step
    once: int | None = None  # with hpZ: of a step's all-gathers, those of all ranks; the others stay in a node

    def of_step(self, micro_batches: int) -> int:
        """Bytes in a step."""
        return (self.gathered + self.scattered + self.reduced) * micro_batches + self.updated

    def near(self, micro_batches: int) -> int:
        """Bytes of those in a step that stay in a node."""
        return 0 if self.once is None else self.gathered * micro_batches - self.once


def traffic(
    parameters: Sequence[Parameter],
    zero: Zero,
    world: int,
    *,
    element: int,
    vision_flows: bool,
    embedding_flows: bool,
) -> Traffic:
    """Bytes that DeepSpeed's collectives carry; the flags say where the backward pass goes beside trained weights.

    ZeRO-3 gathers every weight in the forward and in the backward pass, what is used again within `zero.live` elements
    once, and checkpointed blocks a third time if a block has more than that. Its first two steps, in which it learns
    the order, gather more. With hpZ a step gathers trained weights once from all ranks, and else from the node's copy.
    """
    trained = [p for p in parameters if p.trained]
    if world == 1:
        return Traffic()
    if zero.stage == 3:
        large = [p for p in parameters if p.numel > zero.persistence]
        flows = {"vision": vision_flows, "embedding": embedding_flows}
        again = [p for p in large if flows.get(p.part, True)]
        distance, backward = 0, 0
        for p in reversed(again):
            backward += p.padded(world) * (distance >= zero.live)
            distance += 2 * p.numel
        blocks = [p for p in again if p.block]
        third = zero.live < max((p.numel for p in blocks), default=0)
        return Traffic(
            gathered=sum(p.padded(world) for p in large) + backward + sum(p.padded(world) for p in blocks) * third,
            scattered=element * sum(-(-p.numel // world) * world for p in trained),
            updated=sum(p.padded(world) for p in parameters if p.numel <= zero.persistence),
            once=sum(p.padded(world) for p in large if p.trained) if zero.hpz > 1 else None,
        )
    numel = sum(p.numel for p in trained)
    if zero.stage == 0:
        return Traffic(updated=element * numel)  # one all-reduce of the gradients in a step
    groups = (sum(p.numel for p in trained if p.group == group) for group in (0, 1))
    flat = element * sum(-(-size // (2 * world)) * 2 * world for size in groups)
    if zero.stage == 1:
        return Traffic(updated=flat + element * numel)
    return Traffic(reduced=element * numel, updated=flat)


def ulysses_bytes(tokens: int, *, heads: int, kv_heads: int, head_dim: int, element: int, degree: int) -> int:
    """Bytes that a rank hands to the all-to-alls of one layer's forward pass under sequence parallelism of so many
    ranks (Ulysses, arXiv 2309.14509): queries, keys, values and output of its share of the tokens."""
    held = max(kv_heads, degree)  # fewer key heads than ranks are repeated
    return element * head_dim * (tokens // degree) * (2 * heads + 2 * held) if degree > 1 else 0


@dataclass(frozen=True)
class Work:
    """What one pack costs: operations of a forward pass, bytes of weights, shape of attention."""

    tokens: int
    layers: int
    layer_flops: float
    vision_flops: float
    head_flops: float
    layer_bytes: int
    vision_bytes: int
    head_bytes: int  # embedding and output layer
    heads: int
    kv_heads: int
    head_dim: int
    element: int
    # Forward passes' worth of a step: 1, as much again where gradients flow, and for trained weights, and recomputed.
    layer_passes: float
    vision_passes: float
    efficiency: float = 0.4  # of the peak, an assumption: what published runs of dense models of this size report

    @property
    def flops(self) -> float:
        """Operations of a training step on the pack."""
        layers = self.layer_passes * self.layers * self.layer_flops
        return layers + 3 * self.head_flops + self.vision_passes * self.vision_flops


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step by formula, and what they are made of."""

    seconds: float
    compute: float  # seconds of computation alone
    exposed: float  # seconds of communication that nothing hides
    tokens_per_second: float


def predict(
    work: Work,
    device: Device,
    world: int,
    packs: int,
    *,
    strategy: Strategy = "zero3",
    network: Network = Network(),
) -> Prediction:
    """A step of `packs` packs on so many devices, gradients reduced in every micro-batch as ZeRO-3 does.

    hpz keeps a second copy of the weights within each node, from which a step gathers but for its first forward pass
    (ZeRO++, arXiv 2306.10209); sequence divides each pack among the ranks that would have none, within a node and by
    heads.
    """
    degree = 1
    while strategy == "sequence" and packs * degree * 2 <= world and degree * 2 <= network.per_node:
        degree *= 2
    micro_batches = -(-packs * degree // world)
    rate = device.flops * work.efficiency
    near = min(world, network.per_node)
    again = near if strategy == "hpz" else world
    exchanged = ulysses_bytes(
        work.tokens,
        heads=work.heads,
        kv_heads=work.kv_heads,
        head_dim=work.head_dim,
        element=work.element,
        degree=degree,
    )
    exchange = exchanged * (degree - 1) / degree / device.link + (4 * network.hop if degree > 1 else 0)
    compute = exposed = 0.0

    def both(number: int, seconds: float, hidden: float, open_: float = 0.0) -> None:
        nonlocal compute, exposed
        compute += number * seconds
        exposed += number * (max(0.0, hidden - seconds) + open_)

    for size, flops, count, passes in (
        (work.layer_bytes, work.layer_flops / degree, work.layers, work.layer_passes),
        # Vision tower and embeddings see the whole sequence on every rank.
        (work.vision_bytes, work.vision_flops, 1, work.vision_passes),
        (work.head_bytes, work.head_flops / degree, 1, 3),
    ):
        open_ = exchange if count > 1 else 0.0
        # The first micro-batch's forward pass gathers updated weights.
        both(count, flops / rate, network.gather(size, world, device), open_)
        both(count * (micro_batches - 1), flops / rate, network.gather(size, again, device), open_)
        if passes > 1:
            hidden = network.gather(size, again, device) + network.gather(size, world, device)
            both(count * micro_batches, (passes - 1) * flops / rate, hidden, (passes - 1) * open_)
    seconds = compute + exposed
    return Prediction(seconds, compute, exposed, packs * work.tokens / seconds)


def hiding_tokens(work: Work, device: Device, world: int, network: Network = Network()) -> int:
    """Tokens of a pack from which on the forward pass of a layer hides the gathering of the next one's weights."""
    wanted = network.gather(work.layer_bytes, world, device) * device.flops * work.efficiency
    return int(wanted / (work.layer_flops / work.tokens)) + 1


def scaling_page(work: Work, device_name: str, recipe: str, packs: int) -> str:
    """docs/scaling.md: formulas, assumptions and the prediction for 8 to 1 024 devices, in Markdown."""
    device, network = DEVICES[device_name], Network()
    worlds = [8 * 2**n for n in range(8)]
    fixed, grown, short = list[str](), list[str](), list[str]()
    brief = replace(work, tokens=work.tokens // 8, layer_flops=work.layer_flops / 8, vision_flops=work.vision_flops / 8)
    for world in worlds:
        plain, hpz, sequence = (predict(work, device, world, packs, strategy=s) for s in ("zero3", "hpz", "sequence"))
        best = min((plain.seconds, "ZeRO-3"), (hpz.seconds * 1.001, "hpZ"), (sequence.seconds, "sequence"))[1]
        best = "ZeRO-3" if sequence.seconds > 0.98 * plain.seconds and best == "sequence" else best
        fixed.append(
            f"| {world:,} | {plain.seconds:.2f} | {hpz.seconds:.2f} | {sequence.seconds:.2f} | "
            f"{plain.compute / plain.seconds:.0%} | {max(0, 1 - packs / world):.0%} | {best} |"
        )
        for lines, one in ((grown, work), (short, brief)):
            size = max(packs, world)
            plain, hpz = (predict(one, device, world, size, strategy=s) for s in ("zero3", "hpz"))
            lines.append(
                f"| {world:,} | {size:,} | {plain.seconds:.2f} | {plain.exposed / plain.seconds:.1%} | "
                f"{hpz.seconds:.2f} | {1 - hpz.seconds / plain.seconds:.1%} | "
                f"{plain.tokens_per_second / world:,.0f} | {hiding_tokens(one, device, world):,} |"
            )
    idle = next((w for w in worlds if w > packs), None)
    pays = next((w for w in worlds if _gain(work, device, w, packs) >= 0.05), None)
    brief_pays = next((w for w in worlds if _gain(brief, device, w, packs) >= 0.05), None)
    crossings = [
        f"- Packs of {work.tokens:,} tokens, one or more a rank: "
        + (f"hpZ gains 5 % or more from {pays:,} devices on." if pays else "plain ZeRO-3 up to 1 024 devices.")
        + " Gathers hide behind computation.",
        f"- Packs of {brief.tokens:,} tokens: "
        + (
            f"hpZ gains 5 % or more from {brief_pays:,} devices on."
            if brief_pays
            else "plain ZeRO-3 up to 1 024 devices."
        ),
        f"- {packs} packs a step: from {idle:,} devices on ranks run dummy packs, and sequence parallelism gives them\n"
        "  work, up to a node's eight ranks a pack.",
    ]
    table = "| GPUs | packs a step | ZeRO-3 s | not hidden | hpZ s | hpZ gains | tokens/s a GPU | tokens that hide |"
    rule = "| ---: " * 8 + "|"
    return _PAGE.format(
        recipe=recipe,
        device=device_name,
        source=device.source,
        tokens=work.tokens,
        brief=brief.tokens,
        efficiency=work.efficiency,
        tflops=device.flops / 1e12,
        link=device.link / GB,
        node=network.node / GB,
        hop=network.hop * 1e6,
        node_hop=network.node_hop * 1e6,
        work=work.flops / 1e12,
        layer=work.layer_bytes / 1e6,
        packs=packs,
        crossings="\n".join(crossings),
        fixed="\n".join(fixed),
        grown="\n".join([table, rule, *grown]),
        short="\n".join([table, rule, *short]),
    )


def _gain(work: Work, device: Device, world: int, packs: int) -> float:
    plain, hpz = (predict(work, device, world, max(packs, world), strategy=s) for s in ("zero3", "hpz"))
    return 1 - hpz.seconds / plain.seconds


_PAGE = """# Scaling

Written by `make scaling` (`swim estimate {recipe} --scaling`); a test says when it is stale.

**Every time here is a formula's, not a measurement**: nothing of this size was run. The formulas are
`train/scaling.py`. The bytes of ZeRO's collectives are equal to those counted on real engines with 2 and 4 ranks,
those of hpZ with 4 (`tests/train/test_estimate.py`); those of sequence parallelism, and all times, are checked against
nothing.
Loading is taken to be hidden; `swim data bench --recipe` measures what it costs.

## Formulas

| part | formula |
| --- | --- |
| computation | `lengths.Cost`: 2 operations a weight and token, 4 x width a pair of tokens |
| backward | a forward pass's worth where gradients flow, another for trained weights, another for checkpointed layers |
| its time | operations / ({efficiency} x {tflops:.0f} TFLOP/s): an assumed share of the peak |
| ZeRO-3, a layer | weights gathered forward and backward, gradients reduce-scattered, in every micro-batch |
| hpZ | a step gathers once from all ranks, then inside the node; costs an eighth of the weights in memory |
| sequence parallelism | four all-to-alls a layer and pass inside a node; the vision tower runs whole on every rank |
| gather of B bytes | max(B (k-1)/k / {link:.0f} GB/s, B (n-1)/n / {node:.0f} GB/s), k ranks a node, n nodes |
| its latency | a ring: {hop} us a hop inside a node, {node_hop:.0f} us between nodes (assumed) |
| overlap | a layer takes the longer of its computation and the gathers it hides |
| data | cores a GPU = clips a step and GPU x core-seconds a clip / seconds a step (`data_cost.cores_per_gpu`) |

{device}: {source}. Nodes of 8, eight 400 Gb/s ports each.

## Where what starts

{crossings}

## {packs} packs a step, as in `recipes/{recipe}.yaml`

A pack is one clip of {tokens:,} tokens: {work:.0f} TFLOP, {layer:.0f} MB of weights a layer.
Seconds a step, by formula.

| GPUs | ZeRO-3 | hpZ | sequence parallel | computing (ZeRO-3) | ranks without a pack | cheapest |
| ---: | ---: | ---: | ---: | ---: | ---: | --- |
{fixed}

## As many packs as ranks

Seconds by formula. *tokens that hide*: what a pack needs for a layer's forward pass to hide the next gather.

{grown}

## The same with packs of {brief:,} tokens

{short}
"""
