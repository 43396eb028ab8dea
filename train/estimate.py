"""What a run will need before the money is spent: memory of a rank, traffic, steps, a verdict, and ways to fit.

Nothing is loaded and nothing is trained: the model is built on the meta device, packs come from the plan. Model states,
collectives and maps are exact for DeepSpeed 0.19 and activations within 15 % (tests compare them with real ones); times
are formulas of `scaling.py`.
"""

import importlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AutoConfig

from swim.data_tools.mixture import PlanError
from swim.data_tools.shards import ShardError
from swim.train.config import Config, ConfigError, LoraConfig, engine_file
from swim.train.lengths import Cost
from swim.train.loader import Order
from swim.train.memory import (
    Activations,
    Pack,
    Parameter,
    States,
    Tracer,
    Zero,
    checkpoint_bytes,
    map_bytes,
    model_states,
    parameters_of,
)
from swim.train.scaling import DEVICES, Strategy, Traffic, Work, predict, scaling_page, traffic
from swim.train.stock import build_stock_model, tokenizer_and_config
from swim.train.system import Request, System, build_system

HOST_LINK = 25e9  # bytes/s between a device and main memory, PCIe 4.0 x16 as far as it is reached
HOST_MEMORY = 25e9  # bytes/s of main memory for each rank of a node of eight
WAYS_SHOWN = 2
_LITTLE = 100_000_000  # elements that ZeRO-3 keeps gathered when memory is short


@dataclass(frozen=True)
class Way:
    """A change after which the run fits."""

    change: str
    slowdown: float  # device-seconds a token, in parts of those of the recipe as it is; a formula
    same_result: bool  # whether it trains the same parameters on the same data
    need: int


@dataclass(frozen=True)
class Estimate:
    """Bytes are of one rank unless they say otherwise; seconds are formulas."""

    ranks: int
    device: str | None
    memory: int | None
    trained: int
    frozen: int
    stage: int
    states: States
    packs: dict[str, tuple[int, Activations, int]]  # name: tokens, activations, bytes of maps
    traffic: Traffic
    micro_batches: int
    steps: int
    step_seconds: float | None
    checkpoint: int  # of all ranks
    model: int  # of the saved model
    need: int
    ways: list[Way] = field(default_factory=list)

    @property
    def fits(self) -> bool | None:
        """Whether the need is below the device's memory."""
        return None if self.memory is None else self.need <= self.memory


@dataclass(frozen=True)
class Setup:
    """What ways to fit change of a run."""

    config: Config
    zero: Zero
    ranks: int
    share: float = 1.0  # of the recipe's pack


class Model:
    """A recipe's model on the meta device, and the packs to be estimated."""

    def __init__(self, config: Config, tokens: int | None = None, rows: int = 8) -> None:
        self.config, self._built = config, dict[str, Any]()
        if tokens is None:
            self.model_config, self.packs = _planned(config)
        else:
            self.model_config = _model_config(config)
            steps = max(1, config.data.num_frames // 2)
            merge = getattr(self.model_config.vision_config, "spatial_merge_size", 2)
            assumed = Pack.assumed(tokens, rows=rows, labels=max(1, tokens // 64), merge=merge, steps=steps)
            self.packs = {"given": (tokens, assumed)}
        self.layers = _supervised(config, self.model_config.get_text_config().num_hidden_layers)
        self.cost = Cost(self.model_config)

    def of(self, config: Config, *, cuda: bool) -> tuple[list[Parameter], Tracer]:
        """Parameters and tracer under a changed configuration."""
        key = config.model.model_dump_json() + str(cuda)
        if key not in self._built:
            model = meta_model(config, self.model_config)
            triton = cuda and config.system.get("backend") != "torch"
            flash = "flash" in config.model.attention
            tracer = Tracer(model, self.layers, flash=flash, triton=triton)
            self._built[key] = parameters_of(model), tracer
        return self._built[key]


def meta_model(config: Config, model_config: Any) -> Any:
    """The model of a run on the meta device: shapes without weights."""
    source = config.model.model_copy(update={"path": None, "attention": "sdpa", "liger": False})
    with torch.device("meta"):
        return build_stock_model(source, model_config, seed=config.run.seed)


def parse_gpus(text: str) -> tuple[int, str]:
    """Count and name from "8xH100"; ConfigError lists the known devices."""
    match = re.fullmatch(r"(\d+)x([\w-]+)", text)
    name = match[2].upper() if match else ""
    if not match or name not in DEVICES or int(match[1]) < 1:
        raise ConfigError(f"--gpus {text!r}: write COUNTxDEVICE, as in 8xH100; devices: {', '.join(DEVICES)}")
    return int(match[1]), name


def estimate(
    config: Config, gpus: str | None, *, tokens: int | None = None, ranks: int = 1, memory: int | None = None
) -> Estimate:
    """Estimate of a run on `gpus` ("8xH100"), else on so many CPU ranks; `tokens` stands for packs of data that is not
    there, `memory` (bytes) for the device's own."""
    device = None
    if gpus is not None:
        ranks, device = parse_gpus(gpus)
        memory = memory or DEVICES[device].memory
    model = Model(config, tokens)
    setup = Setup(config, Zero.of(json.loads(engine_file(config).read_text())), ranks)
    found = _estimate(model, setup, device, memory)
    if found.fits is False:
        return replace(found, ways=_ways(model, setup, device, memory, found))
    return found


def _estimate(model: Model, setup: Setup, device: str | None, memory: int | None) -> Estimate:
    config, zero, world = setup.config, setup.zero, setup.ranks
    parameters, tracer = model.of(config, cuda=device is not None)
    element = 2 if config.model.dtype == "bfloat16" else 4
    states = model_states(parameters, zero, world, element=element)
    packs = {}
    for name, (tokens, pack) in model.packs.items():
        held = _scaled(tracer.activations(pack), setup.share)
        packs[name] = int(tokens * setup.share), held, int(map_bytes(pack.table, model.layers) * setup.share)
    largest = max(held.peak for _, held, _ in packs.values())
    flows = tracer.vision_flows(next(iter(model.packs.values()))[1])
    embedding = any(p.trained for p in parameters if p.part in ("embedding", "vision"))
    sent = traffic(
        parameters,
        zero,
        world,
        element=element,
        vision_flows=flows,
        embedding_flows=embedding,
    )
    packs_per_step = math.ceil(config.data.packs_per_step / setup.share)
    seconds = None
    if device is not None:
        one = work(model, setup, device)
        strategy: Strategy = "hpz" if zero.hpz > 1 else "zero3"
        seconds = predict(one, DEVICES[device], world, packs_per_step, strategy=strategy).seconds
        seconds += _host_seconds(states)
    return Estimate(
        ranks=world,
        device=device,
        memory=memory,
        trained=sum(p.numel for p in parameters if p.trained),
        frozen=sum(p.numel for p in parameters if not p.trained),
        stage=zero.stage,
        states=states,
        packs=packs,
        traffic=sent,
        micro_batches=-(-packs_per_step // world),
        steps=config.run.steps,
        step_seconds=seconds,
        checkpoint=checkpoint_bytes(parameters, element=element),
        model=sum(p.numel for p in parameters) * element,
        need=states.kept + max(states.buffers + largest, states.update),
    )


def work(model: Model, setup: Setup, device: str | None = None) -> Work:
    """What the largest pack costs, for the formulas of `scaling.py`."""
    config, text = setup.config, model.model_config.get_text_config()
    parameters, tracer = model.of(config, cuda=device is not None)
    tokens, pack = max(model.packs.values(), key=lambda item: item[0])
    tokens = int(tokens * setup.share)
    cost, element = model.cost, 2 if config.model.dtype == "bfloat16" else 4
    size = {part: sum(p.numel * p.element for p in parameters if p.part == part) for part in ("vision", "text")}
    ends = [p for p in parameters if p.part in ("embedding", "head")]

    def passes(part: str) -> float:
        # Adapters are a small part of the operations.
        trained = any(p.trained and ".lora_" not in p.name for p in parameters if p.part == part)
        again = config.model.checkpointing
        return 2 + trained + (1 / again if again else 0)

    # A frame's patches see each other, as in Cost.
    vision = sum(frame * (cost.patch + frame * cost.patch_pair) for frame in pack.frames) * setup.share
    layers = text.num_hidden_layers
    return Work(
        tokens=tokens,
        layers=layers,
        layer_flops=(cost.linear * tokens + cost.pair * tokens**2 / 2) / layers,
        vision_flops=vision,
        head_flops=2.0 * text.hidden_size * text.vocab_size * pack.labels * setup.share,
        layer_bytes=size["text"] // layers,
        vision_bytes=size["vision"],
        head_bytes=sum(p.numel * p.element for p in ends),
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        element=element,
        layer_passes=passes("text"),
        vision_passes=passes("vision") if tracer.vision_flows(pack) else 1,
    )


def _scaled(held: Activations, share: float) -> Activations:
    return Activations(**{name: int(value * share) for name, value in asdict(held).items()})


def _host_seconds(states: States) -> float:
    """Seconds a step that offloaded states take: gradients out, weights back, and AdamW reading and writing 36 bytes
    for the 18 it keeps."""
    return states.host * (4 / 18 / HOST_LINK + 2 / HOST_MEMORY)


@dataclass(frozen=True)
class Lever:
    """A change of the fixed list; those of one `kind` exclude each other."""

    kind: str
    change: str
    apply: Callable[[Setup], Setup]
    same_result: bool = True


def _levers(config: Config, zero: Zero) -> Iterator[Lever]:
    """The fixed list of ways to fit, without what is in force already."""
    section = "zero_optimization"

    def model(**fields: Any) -> Callable[[Setup], Setup]:
        return lambda s: replace(
            s, config=s.config.model_copy(update={"model": s.config.model.model_copy(update=fields)})
        )

    def engine(**fields: Any) -> Callable[[Setup], Setup]:
        return lambda s: replace(s, zero=replace(s.zero, **fields))

    def pack(share: float) -> Callable[[Setup], Setup]:
        return lambda s: replace(s, share=s.share * share)

    def more(factor: int) -> Callable[[Setup], Setup]:
        return lambda s: replace(s, ranks=s.ranks * factor)

    if not config.model.checkpointing:
        yield Lever("checkpointing", "model.checkpointing=2", model(checkpointing=2))
    if config.model.checkpointing != 1:
        yield Lever("checkpointing", "model.checkpointing=true", model(checkpointing=True))
    if zero.stage < 3:
        yield Lever("stage", f"{section}.stage=3", engine(stage=3))
    if not zero.offload_optimizer and zero.stage > 0:
        yield Lever("offload", f"{section}.offload_optimizer={{device: cpu}}", engine(offload_optimizer=True))
    if zero.stage == 3 and zero.live > _LITTLE:
        yield Lever("live", f"{section}.stage3_max_reuse_distance={_LITTLE}", engine(live=_LITTLE))
    data = config.data
    for share in (0.5, 0.25):
        if data.tokens_per_pack is not None:
            yield Lever("pack", f"data.tokens_per_pack={int(data.tokens_per_pack * share)}", pack(share))
        elif (data.clips_per_pack or 1) * share >= 1:
            clips = int((data.clips_per_pack or 1) * share)
            yield Lever("pack", f"data.clips_per_pack={clips}", pack(share))
        else:
            yield Lever("pack", f"data.max_pixels={int(data.max_pixels * share)}", pack(share), same_result=False)
    for factor in (2, 4, 8):
        yield Lever("ranks", f"{factor} times as many GPUs", more(factor))
    if config.model.lora is None:
        lora = LoraConfig.model_validate({})
        yield Lever("lora", f"model.lora={{rank: {lora.rank}}}", model(lora=lora), same_result=False)


def _ways(model: Model, setup: Setup, device: str | None, memory: int | None, found: Estimate) -> list[Way]:
    """The cheapest ways of the list that fit, alone or, failing that, in twos and threes; those that leave the result
    as it is come first."""
    levers = list(_levers(setup.config, setup.zero))
    ways: list[Way] = []
    enough: list[set[str]] = []  # kinds that fit: no more of them, nor others beside them
    for count in (1, 2, 3):
        for chosen in itertools.combinations(levers, count):
            kinds = {lever.kind for lever in chosen}
            if len(kinds) < count or any(fitting <= kinds for fitting in enough):
                continue
            changed = setup
            for lever in chosen:
                changed = lever.apply(changed)
            try:
                new = _estimate(model, changed, device, memory)
            except ConfigError:  # adapters without peft
                continue
            if not new.fits:
                continue
            enough.append(kinds)
            seconds = (new.step_seconds or 1.0) * new.ranks, (found.step_seconds or 1.0) * found.ranks
            same = all(lever.same_result for lever in chosen)
            ways.append(Way(" and ".join(x.change for x in chosen), seconds[0] / seconds[1], same, new.need))
        if len(ways) >= WAYS_SHOWN:
            break
    return sorted(ways, key=lambda way: (not way.same_result, way.slowdown))[:WAYS_SHOWN]


def _supervised(config: Config, num_layers: int) -> tuple[int, ...]:
    """Layers whose attention the system reads, none for a system without."""
    section = importlib.import_module(f"swim.train.systems.{config.system['name']}.config")
    resolve = getattr(section, "resolve_layers", None)
    return () if resolve is None else resolve(config.system["layers"], num_layers)


def _model_config(config: Config) -> Any:
    if config.model.path is None:
        return tokenizer_and_config(config.model)[1]
    try:
        return AutoConfig.from_pretrained(config.model.path)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"model.path: no config of {config.model.path} ({reason}); go online, or give a folder that holds it"
        ) from None


def _planned(config: Config) -> tuple[Any, dict[str, tuple[int, Pack]]]:
    """Model config, and the packs with the median, the 95th percentile and the most tokens of the first epoch; they are
    decoded, so that rows, labels and maps are the real ones."""
    _model_config(config)
    try:
        system = build_system(config)
        order = Order(config, system, counted=True)
    except (ShardError, PlanError, OSError) as error:
        raise ConfigError(f"{error}; without data give --tokens, the tokens of a pack") from None
    plan = order.plan(0)
    if plan.tokens is None or not plan.num_packs:
        raise ConfigError("data.train: the first epoch has no clips; give --tokens, the tokens of a pack")
    ranking = np.argsort(plan.tokens, kind="stable")
    packs = {}
    for name, share in (("p50", 0.5), ("p95", 0.95), ("max", 1.0)):
        number = int(ranking[min(int(share * len(ranking)), len(ranking) - 1)])
        packs[name] = int(plan.tokens[number]), _pack(system, order, number, config.data.packs_per_step)
    return system.model_config, packs


def _pack(system: System, order: Order, number: int, size: int) -> Pack:
    units = order.plan(0).rank_packs(number // size, number % size, size)[0] or ()
    requests = (Request(order.shards[u.dataset].read(u.clip), u.conversations) for u in units)
    return Pack.of(system.collator(requests), system.model_config)


def describe(found: Estimate) -> dict[str, Any]:
    """The estimate as plain data, for JSON."""
    packs = {
        name: {"tokens": tokens, **asdict(held), "peak": held.peak, "maps": maps}
        for name, (tokens, held, maps) in found.packs.items()
    }
    return {**asdict(found), "packs": packs, "fits": found.fits, "sent_per_step": _sent(found)}


def _sent(found: Estimate) -> int:
    return found.traffic.of_step(found.micro_batches)


def report(found: Estimate) -> str:
    """The estimate for people."""
    states, where = found.states, f"{found.ranks} x {found.device or 'CPU rank'}"
    lines = [
        f"parameters   {found.trained:,} trained, {found.frozen:,} frozen",
        f"ranks        {where}, ZeRO stage {found.stage}, {found.micro_batches} micro-batches each a step",
        "per rank",
        f"  weights    {gib(states.weights)}",
        f"  gradients  {gib(states.gradients)}",
        f"  optimizer  {gib(states.optimizer)}" + (f"; {gib(states.host)} in main memory" if states.host else ""),
        f"  buffers    {gib(states.buffers)} (reduction buckets, weights gathered at a time)",
    ]
    for name, (tokens, held, maps) in found.packs.items():
        lines.append(
            f"  {name:<10} pack of {tokens:,} tokens: activations {gib(held.peak)} at most, {gib(held.kept)} kept "
            f"(supervision {gib(held.supervision)}, its maps {gib(maps)}; logits {gib(held.logits)})"
        )
    sent = found.traffic
    lines += [
        f"traffic      {gib(_sent(found))} a step: all-gather {gib(sent.gathered)}, reduce-scatter "
        f"{gib(sent.scattered)}, all-reduce {gib(sent.reduced)} a micro-batch, update {gib(sent.updated)} a step"
        + (f"; {gib(near)} of it inside nodes" if (near := sent.near(found.micro_batches)) else ""),
        f"steps        {found.steps:,}"
        + (f"; {found.step_seconds:.2f} s each by formula, not measured" if found.step_seconds else ""),
        f"checkpoint   {gib(found.checkpoint)} of all ranks; the saved model {gib(found.model)}",
    ]
    if found.memory is not None:
        margin = found.memory - found.need
        verb = f"fits: {gib(margin)} to spare" if found.fits else f"does not fit: {gib(-margin)} too much"
        lines.append(f"verdict      needs {gib(found.need)} of {gib(found.memory)}, {verb}")
        if found.device:
            lines.append(f"device       {DEVICES[found.device].source}")
    else:
        lines.append(f"needs        {gib(found.need)}")
    for way in found.ways:
        kept = "" if way.same_result else ", trains something else"
        lines.append(
            f"way          {way.change}: needs {gib(way.need)}, {way.slowdown:.2f} x the device time a token by "
            f"formula{kept}"
        )
    if found.fits is False and not found.ways:
        lines.append("way          none of the list fits; take a smaller model or a larger device")
    return "\n".join(lines)


def gib(count: float) -> str:
    """Bytes as GiB, small ones as MiB."""
    value = count / 2**30
    return f"{value:,.1f} GiB" if value >= 10 else f"{value:.2f} GiB" if value >= 0.1 else f"{count / 2**20:,.2f} MiB"


def scaling(config: Config, recipe: str) -> str:
    """The page docs/scaling.md of a recipe whose packs are one clip of as many tokens as it allows."""
    data, model_config = config.data, _model_config(config)
    cell = model_config.vision_config.patch_size * model_config.vision_config.spatial_merge_size
    steps = -(-data.num_frames // 2)
    visual = steps * (data.max_pixels // cell**2)
    model = Model(config, visual * 8 // 7)
    zero = Zero.of(json.loads(engine_file(config).read_text()))
    return scaling_page(work(model, Setup(config, zero, 8), "H100"), "H100", recipe, data.packs_per_step)


def walk(config: Config, world: int) -> tuple[str, bool]:
    """What `world` ranks will do, without them: the model's parameters, the packs of every rank in the first epoch and
    the DeepSpeed configuration, and whether all is well."""
    problems = []
    _model_config(config)  # its message about a hub that cannot be reached
    system = build_system(config)
    model = meta_model(config, system.model_config)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    order = Order(config, system, counted=True)
    plan, each = order.plan(0), order.micro_batches(world)
    packs, tokens, dummies = np.zeros(world, int), np.zeros(world, int), 0
    assert plan.tokens is not None
    size = config.data.packs_per_step
    for step in range(plan.num_steps):
        seen = []
        for rank in range(world):
            own = order.packs(step, rank, world)
            if len(own) != each:
                problems.append(f"step {step + 1}: rank {rank} has {len(own)} micro-batches, the others {each}")
            numbers = [step * size + rank + world * i for i, pack in enumerate(own) if pack is not None]
            packs[rank] += len(numbers)
            tokens[rank] = max([tokens[rank], *(int(plan.tokens[n]) for n in numbers)])
            dummies += len(own) - len(numbers)
            seen += numbers
        if sorted(seen) != list(range(step * size, min((step + 1) * size, plan.num_packs))):
            problems.append(f"step {step + 1}: its packs are not each on one rank")
    if not plan.num_packs:
        problems.append("the first epoch has no packs; raise data.train's repeat")
    if (idle := int((packs == 0).sum())) and plan.num_packs:
        problems.append(
            f"{idle} of {world} ranks never have a pack: data.packs_per_step is {size}; raise it or take fewer ranks"
        )
    try:
        check_engine_config(config, each, world)
    except (ConfigError, ValueError, AssertionError) as error:
        problems.append(f"{engine_file(config)}: {error}")
    lines = [
        f"parameters  {trained:,} trained, {frozen:,} frozen",
        f"plan        {plan.num_steps:,} steps an epoch, {plan.num_packs:,} packs; run.steps {config.run.steps:,}",
        f"ranks       {world}, {each} micro-batches each a step; {dummies:,} dummy packs an epoch",
        f"packs       {packs.min():,} to {packs.max():,} a rank; largest pack of a rank {tokens.min():,} to "
        f"{tokens.max():,} tokens",
        f"deepspeed   {config.deepspeed}: batch of {each * world} = 1 x {each} x {world}",
        *(f"problem     {problem}" for problem in problems[:10]),
    ]
    return "\n".join([*lines, "ready" if not problems else f"not ready: {len(problems)} problems"]), not problems


def check_engine_config(config: Config, micro_batches: int, world: int) -> None:
    """Have DeepSpeed's own class read the configuration as it would among so many ranks; ValueError or AssertionError
    as there."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it announces its choice on stdout
    from deepspeed.runtime.config import DeepSpeedConfig

    from swim.train.engine import engine_config

    fields = engine_config(config, micro_batches, world)
    # It asks the process group for the number of ranks, and takes 1 where there is none.
    ranks = SimpleNamespace(get_rank=lambda *_: 0, get_world_size=lambda *_: world)
    with patch("deepspeed.runtime.config.dist", ranks):
        DeepSpeedConfig(fields)
