"""Bytes that a rank of a training step holds, before there is a rank: states from sizes, activations from a trace.

States follow from parameter sizes, the type and the ZeRO stage (arXiv 1910.02054, as DeepSpeed 0.19 lays them out).
Activations are counted by running the text model and the vision blocks on the meta device, where tensors have shapes
and no data, and adding up what autograd keeps for the backward pass; attention keeps what flash attention keeps.
"""

import inspect
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from swim.kernels.noun_attention import ClipKeys, Row, WorkTable, build_work_table
from swim.kernels.noun_attention import _forward_op as noun_attention_op
from swim.train.attention import MODEL_KWARG, Capture
from swim.train.batch import Batch
from swim.train.layout import Layout, attend
from swim.train.preprocess import side_of

_TRACED = "swim_traced"
_ALIGNMENT = 2  # ZeRO-1 and 2 pad every parameter group to this times the number of ranks


@dataclass(frozen=True)
class Zero:
    """What decides about memory and traffic in a DeepSpeed file."""

    stage: int = 0
    bucket: int = 500_000_000  # elements
    persistence: int = 100_000  # ZeRO-3 keeps parameters of up to so many elements whole
    live: int = 1_000_000_000  # elements that ZeRO-3 may keep gathered
    prefetch: int = 50_000_000  # elements
    sub_group: int = 1_000_000_000  # elements updated at a time by ZeRO-3
    hpz: int = 1  # ranks among which the secondary partition is divided
    overlap: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "Zero":
        """From the fields of a DeepSpeed file, DeepSpeed's own defaults for the others."""
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it announces its choice on stdout
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

        given = DeepSpeedZeroConfig(**fields.get("zero_optimization", {}))
        offloaded = (given.offload_optimizer, given.offload_param)
        optimizer, parameters = (part is not None and part.device != "none" for part in offloaded)
        return cls(
            stage=int(given.stage),
            bucket=int(given.reduce_bucket_size),
            persistence=int(given.param_persistence_threshold),
            live=int(min(given.max_reuse_distance, given.max_live_parameters)),
            prefetch=int(given.prefetch_bucket_size),
            sub_group=int(given.sub_group_size),
            hpz=int(given.zero_hpz_partition_size),
            overlap=bool(given.overlap_comm),
            offload_optimizer=optimizer,
            offload_parameters=parameters,
        )


@dataclass(frozen=True)
class Parameter:
    """Size of a parameter, and whether and in which optimizer group it is trained."""

    name: str
    numel: int
    trained: bool
    group: int  # 0 with weight decay (matrices), 1 without
    element: int  # bytes; those of adapters may differ from the model's
    part: str = "text"  # vision | embedding | text | head
    block: bool = False  # whether checkpointing runs it again: in a checkpointed block, and not its last module

    def padded(self, world: int) -> int:
        """Bytes of its partitions on so many ranks."""
        return self.element * -(-self.numel // world) * world


_VISION = re.compile(r"visual|vision_tower|multi_modal_projector")
_BLOCK = re.compile(r"(.*\.(?:layers|blocks|layer)\.\d+)\.(?!mlp\.(?:down_proj|linear_fc2|fc2)\.)")


def parameters_of(model: nn.Module) -> list[Parameter]:
    """Sizes of the parameters of a model, which may be on the meta device, in the order of their use; tied ones
    once."""

    recomputed = {
        name
        for name, module in model.named_modules()
        if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing
    }

    def size(name: str, p: Tensor) -> Parameter:
        block = _BLOCK.match(name)
        part = "vision" if _VISION.search(name) else "embedding" if "embed_tokens" in name else "text"
        part = "head" if "lm_head" in name else part
        return Parameter(
            name,
            p.numel(),
            p.requires_grad,
            int(p.dim() <= 1),
            p.element_size(),
            part,
            block is not None and block[1] in recomputed,
        )

    order = ("vision", "embedding", "text", "head")
    return sorted((size(*item) for item in model.named_parameters()), key=lambda p: order.index(p.part))


@dataclass(frozen=True)
class States:
    """Bytes of one rank on its device; `host` is what offloading moves to main memory instead."""

    weights: int
    gradients: int
    optimizer: int  # master weights and both moments, without the moments' step counters of 4 bytes
    buffers: int  # reduction buckets and, under ZeRO-3, weights gathered at a time
    update: int  # fp32 gradients of the optimizer step, when activations are gone
    host: int

    @property
    def kept(self) -> int:
        """Bytes held throughout."""
        return self.weights + self.gradients + self.optimizer


def model_states(parameters: Sequence[Parameter], zero: Zero, world: int, *, element: int) -> States:
    """Bytes per rank of weights, gradients and AdamW states with weights of `element` bytes (2: bf16, 4: fp32)."""
    trained = [p for p in parameters if p.trained]
    numel = sum(p.numel for p in trained)
    if zero.stage == 3:
        own = sum(-(-p.numel // world) for p in trained)
        partitions = sum(p.padded(world) for p in parameters) // world
        # One rank alone gathers nothing: its partition is the parameter.
        small = [p for p in parameters if p.numel <= zero.persistence] if world > 1 else []
        whole = sum(p.padded(world) for p in small)
        # Small trained ones stay whole instead.
        copied = [p for p in parameters if p.numel > zero.persistence or not p.trained] if zero.hpz > 1 else []
        second = sum(p.padded(world) // min(zero.hpz, world) for p in copied)
        large = [p.numel for p in parameters if p.numel > zero.persistence] if world > 1 else []
        gathered = min(sum(large), max(zero.live, max(large, default=0)) + zero.prefetch)
        optimizer = 12 * own  # a master copy also of fp32 weights
        gradients = element * own
        buffers = element * (zero.bucket + gathered)
        update = 4 * min(own, zero.sub_group) if element != 4 else 0
        # The host's Adam reads fp32 gradients of its own.
        host = (optimizer + gradients + 4 * own if zero.offload_optimizer else 0) + partitions * zero.offload_parameters
        return States(
            weights=(0 if zero.offload_parameters else partitions) + whole + second,
            gradients=0 if zero.offload_optimizer else gradients,
            optimizer=0 if zero.offload_optimizer else optimizer,
            buffers=buffers,
            update=0 if zero.offload_optimizer else update,
            host=host,
        )
    frozen = sum(p.numel for p in parameters if not p.trained)
    if zero.stage == 0:
        optimizer, own, flat = numel * (8 if element == 4 else 12), numel, numel
    else:
        sizes = [sum(p.numel for p in trained if p.group == group) for group in (0, 1)]
        step = _ALIGNMENT * world
        flat = sum(-(-size // step) * step for size in sizes)
        own = flat // world
        optimizer = 12 * own
    gradients = element * (own if zero.stage == 2 else numel)
    buckets = zero.bucket * (1 + zero.overlap) if zero.stage else 0
    offload = zero.offload_optimizer and zero.stage > 0
    return States(
        weights=element * (flat + frozen),
        gradients=gradients,
        optimizer=0 if offload else optimizer,
        buffers=element * buckets,
        update=0 if offload or element == 4 else 4 * own,
        host=(optimizer + 4 * own) if offload else 0,
    )


def checkpoint_bytes(parameters: Sequence[Parameter], *, element: int) -> int:
    """Bytes of a checkpoint of all ranks: weights, and fp32 master weights and moments of the trained ones."""
    return sum(p.numel * (element + 12 * p.trained) for p in parameters)


@dataclass(frozen=True)
class Pack:
    """Shapes of a micro-batch: what decides about activations."""

    rows: int
    length: int  # tokens of a row, with padding
    layout: Layout | None  # None: rows of one plain sequence each, under a padding mask
    table: WorkTable
    labels: int
    label_columns: int
    frames: tuple[int, ...] = ()  # vision patches of every temporal step of every clip

    @classmethod
    def of(cls, batch: Batch, model_config: Any) -> "Pack":
        """Shapes of a batch of a model with this transformers config."""
        grids = batch.inputs.get("video_grid_thw")
        if grids is not None:
            frames = [h * w for t, h, w in grids.tolist() for _ in range(t)]
        else:  # whole frames of one size
            pixels = next(tensor for name, tensor in batch.inputs.items() if name.startswith("pixel_values"))
            side = side_of(model_config.vision_config, "patch_size")
            frames = [pixels.shape[-2] // side * (pixels.shape[-1] // side)] * math.prod(pixels.shape[:-3])
        rows, length = batch.inputs["input_ids"].shape
        labels, columns = len(batch.labels), len(batch.label_columns)
        return cls(rows, length, batch.layout, batch.table, labels, columns, tuple(frames))

    @classmethod
    def assumed(cls, tokens: int, *, rows: int, labels: int, merge: int, steps: int) -> "Pack":
        """One clip of `steps` temporal steps in seven eighths of so many tokens, noun rows and labels behind it."""
        cells = max(1, tokens * 7 // 8 // steps)
        table = build_work_table(
            [Row(0, tokens - 1)] * rows, [ClipKeys(0, 0, (steps, 1, cells))] if rows else [], "frame"
        )
        layout = Layout(rows=(((tokens,),),), length=tokens)
        return cls(1, tokens, layout, table, labels, labels, (cells * merge**2,) * steps)

    @property
    def tokens(self) -> int:
        """Tokens with padding, as the model computes them."""
        return self.rows * self.length


@dataclass(frozen=True)
class Activations:
    """Bytes of a micro-batch: kept for the backward pass, and how much more there is at the worst moment."""

    kept: int
    supervision: int  # of `kept`: noun rows, weights of every head where torch makes the maps, and maps
    logits: int  # of `kept`
    recomputed: int  # a checkpointed layer whose activations are made again, else 0
    transient: int  # logits and their gradients, or the widest layer's gradients

    @property
    def peak(self) -> int:
        """Bytes at the worst moment of the backward pass."""
        return self.kept + max(self.recomputed, self.transient)


def map_bytes(table: WorkTable, layers: Sequence[int]) -> int:
    """Bytes of the fp32 maps of all supervised layers."""
    return 4 * sum(table.map_sizes) * len(layers)


class Tracer:
    """Counts activations of a model on the meta device; `triton` counts what those kernels keep, else the torch
    reference."""

    def __init__(self, model: Any, layers: tuple[int, ...], *, flash: bool, triton: bool) -> None:
        self._layers, self._flash, self._triton = layers, flash, triton
        stock = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._text, self._vision = _part(stock, "language_model"), _part(stock, "visual", "vision_tower")
        self._projector = next((m for n, m in stock.named_modules() if n.endswith("multi_modal_projector")), None)
        self._head, self._embedding = stock.get_output_embeddings(), stock.get_input_embeddings()
        self._flags = {m: m.gradient_checkpointing for m in stock.modules() if hasattr(m, "gradient_checkpointing")}
        # At the first recomputation what the layers behind it keep is gone: there is none but in the last layer.
        self._recomputes = _blocks(self._text)[-1].gradient_checkpointing
        self._found: dict[int, Activations] = {}
        self._weights = {p.untyped_storage()._cdata for p in [*model.parameters(), *model.buffers()]}
        model.train()

    def activations(self, pack: Pack) -> Activations:
        """Activations of one micro-batch of the model; those of a pack are counted once."""
        if id(pack) not in self._found:
            self._found[id(pack)] = self._activations(pack)
        return self._found[id(pack)]

    def _activations(self, pack: Pack) -> Activations:
        vision, flows = self._vision_bytes(pack)
        kept, logits = self._text_bytes(pack, self._layers, flows=flows)
        plain, _ = self._text_bytes(pack, (), flows=flows)
        layer = 0
        if self._recomputes:
            self._switch(dict.fromkeys(self._flags, False))
            layer = (self._text_bytes(pack, self._layers, flows=flows)[0] - logits) // len(self._text.layers)
            self._switch(self._flags)
        element = self._head.weight.element_size()
        of_logits = pack.labels * self._head.weight.shape[0] * (2 * element + 8) - logits
        of_layer = pack.tokens * 3 * self._text.config.intermediate_size * element
        return Activations(kept + vision, kept - plain, logits, layer, max(of_logits, of_layer))

    def vision_flows(self, pack: Pack) -> bool:
        """Whether the backward pass goes through the vision tower, trained or not."""
        return self._vision_bytes(pack)[1]

    def _switch(self, flags: dict[Any, bool]) -> None:
        for module, on in flags.items():
            module.gradient_checkpointing = on

    def _text_bytes(self, pack: Pack, layers: tuple[int, ...], *, flows: bool) -> tuple[int, int]:
        """Kept bytes of text model, maps and loss, and those of the logits among them."""
        text, rows, length = self._text, pack.rows, pack.length
        # Positions of text alone are one row, multimodal ones three.
        planes = (3,) if "mrope_section" in (getattr(text.config, "rope_parameters", None) or {}) else ()
        positions = torch.empty(*planes, rows, length, dtype=torch.int64, device="meta")
        # Handed over whole: making one asks for values.
        mask = torch.empty(rows, 1, length, length, dtype=torch.bool, device="meta")
        capture = _TracedCapture(pack, layers, triton=self._triton, flash=self._flash)
        kept, before = _Kept(self._weights), text.config._attn_implementation
        try:
            text.config._attn_implementation = _TRACED
            with kept, _FlashKeeps():
                x = self._embedding(torch.empty(rows, length, dtype=torch.int64, device="meta"))
                hidden = text(
                    inputs_embeds=x * 1 if x.requires_grad else (x * 1).requires_grad_(flows),
                    attention_mask=mask if pack.layout is None and not self._flash else None,
                    position_ids=positions,
                    use_cache=False,
                    **{MODEL_KWARG: capture},
                ).last_hidden_state
                places = torch.empty(2, pack.labels, dtype=torch.int64, device="meta")
                logits = self._head(hidden[:, : pack.label_columns])
                chosen = logits[places[0], places[1]].float()
                F.cross_entropy(chosen, places[0], reduction="sum")
                if maps := list(capture.flat.values()):
                    kept.add(torch.stack(maps))
        finally:
            text.config._attn_implementation = before
        return kept.bytes, 4 * chosen.numel() if chosen.requires_grad else 0

    def _vision_bytes(self, pack: Pack) -> tuple[int, bool]:
        """Kept bytes of the vision tower, and whether gradients flow into it."""
        blocks, patches = _blocks(self._vision), sum(pack.frames)
        dtype = next(blocks[0].parameters()).dtype
        kept = _Kept(self._weights)
        with kept, _FlashKeeps():
            if (entry := getattr(self._vision, "patch_embed", None)) is not None:
                weight = entry.proj.weight
                x = entry(torch.empty(patches, weight[0].numel(), device="meta", dtype=dtype))
                heads = self._vision.config.num_heads
                rope = torch.empty(2, patches, x.shape[-1] // heads, device="meta")
                ends = torch.tensor([0, *torch.tensor(pack.frames).cumsum(0).tolist()])
                extra: dict[str, Any] = {"cu_seqlens": ends, "position_embeddings": (rope[0], rope[1])}
            else:  # whole frames, all of one size
                width = next(p for p in blocks[0].parameters() if p.dim() == 1).numel()
                flows = any(p.requires_grad for p in self._vision.parameters())
                masked = "attention_mask" in inspect.signature(type(blocks[0]).forward).parameters
                shape, extra = (len(pack.frames), pack.frames[0], width), {"attention_mask": None} if masked else {}
                side = side_of(self._vision.config, "patch_size")
                pixels = torch.empty(patches, 3 * side**2, device="meta", dtype=dtype)
                x = torch.empty(shape, device="meta", dtype=dtype, requires_grad=flows)
                if flows:
                    kept.add(pixels)
            for block in blocks:
                x = block(x, **extra)
                x = x[0] if isinstance(x, tuple) else x
            if entry is None and self._projector is not None:
                linear = next(m for m in self._projector.modules() if isinstance(m, nn.Linear))
                x = self._projector(x.reshape(-1, linear.in_features))
            if (merger := getattr(self._vision, "merger", None)) is not None:
                for deep in getattr(self._vision, "deepstack_merger_list", ()):
                    deep(x)
                x = merger(x)
        return kept.bytes, x.requires_grad


class _Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of the storages that autograd keeps inside, each once and without weights."""

    def __init__(self, ignored: set[int]) -> None:
        self._ignored, self._storages = ignored, dict[int, Any]()
        super().__init__(self.add, lambda x: x)

    def add(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self._ignored:
            self._storages[storage._cdata] = storage
        return x

    @property
    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._storages.values())


class _Attention(torch.autograd.Function):
    """Shapes of attention; keeps inputs, output, one log-sum-exp a query and the mask in the inputs' type."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        out = torch.empty_like(q)
        masks = [] if mask is None else [mask.new_empty(mask.shape, dtype=q.dtype)]
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:3], dtype=torch.float32), *masks)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        raise NotImplementedError("shapes alone have no gradient")


class _FlashKeeps(TorchFunctionMode):
    """Attention that is not fused on the meta device counts as if it were."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return _Attention.apply(*args[:3], kwargs.get("attn_mask"))
        return func(*args, **kwargs)


class _TracedCapture(Capture):
    """Maps of shapes alone."""

    def __init__(self, pack: Pack, layers: tuple[int, ...], *, triton: bool, flash: bool) -> None:
        super().__init__(pack.table.to("meta"), layers, layout=pack.layout)
        self.triton, self.flash = triton, flash

    @property
    def flat(self) -> dict[int, Tensor]:
        return self._maps

    def observe(self, layer: int, q_BHLD: Tensor, k_BKLD: Tensor, scale: float, *, num_kv_heads: int) -> None:
        if self.triton:
            self._maps[layer] = noun_attention_op(q_BHLD, k_BKLD, self.table.tensors, self.table.sizes, scale)[0]
        else:
            super().observe(layer, q_BHLD, k_BKLD, scale, num_kv_heads=num_kv_heads)


def _traced_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    capture: _TracedCapture = kwargs.pop(MODEL_KWARG)
    layer: Any = module.layer_idx
    if layer in capture.layers:
        capture.observe(layer, query, key, query.shape[-1] ** -0.5, num_kv_heads=key.shape[1])
    base = _varlen if capture.flash else AttentionInterface()["sdpa"]
    kwargs.pop("is_causal", None)
    layout, cache = capture.layout, capture.layout_cache
    if layout is None:
        return base(module, query, key, value, attention_mask, **kwargs)
    return attend(base, module, query, key, value, layout, flash=capture.flash, cache=cache, **kwargs), None


def _varlen(_: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:  # noqa: ARG001
    return _Attention.apply(q, k, v, None).transpose(1, 2), None


AttentionInterface.register(_TRACED, _traced_attention)


def _part(model: nn.Module, *names: str) -> Any:
    return next(m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in names)


def _blocks(vision: nn.Module) -> list[nn.Module]:
    # Not the mergers of Qwen3-VL, a list beside its blocks.
    lists = (m for m in vision.modules() if isinstance(m, nn.ModuleList))
    return next(list(found) for found in lists if isinstance(found[0], GradientCheckpointingLayer))
