"""SWIM as a system: a stock video LLM, the capture attention function, the objective and its predictions."""

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from swim.data_tools.records import Masks
from swim.evaluation.alignment import mean_metrics, noun_metrics
from swim.train.attention import MODEL_KWARG, Capture, shard_text_model
from swim.train.batch import Batch, BatchOptions
from swim.train.config import Config
from swim.train.encode import ConversationEncoder
from swim.train.families import family_of
from swim.train.sequence import check_sequence
from swim.train.stock import build_stock_model, greedy, parameter_groups, tokenizer_and_config
from swim.train.system import Progress, Request, Term, View
from swim.train.systems.swim.config import Config as SwimConfig
from swim.train.systems.swim.config import resolve_layers
from swim.train.systems.swim.data import Conversations, SwimBatch, SwimCollator
from swim.train.systems.swim.details import HeadCapture, noun_details, with_answers
from swim.train.systems.swim.objective import noun_maps, swim_loss


class SwimSystem:
    """Builds the model and its batches, turns batches into loss terms and samples into predictions, which have maps of
    the mentions of the kinds `looked_at`, whichever were supervised."""

    def __init__(self, config: Config, looked_at: Collection[str] = ("noun",)) -> None:
        self.config = config
        self.options = SwimConfig.model_validate({k: v for k, v in config.system.items() if k != "name"})
        self.tokenizer, self.model_config = tokenizer_and_config(config.model)
        check_sequence(config.parallel.sequence, self.model_config)
        self.layers = resolve_layers(self.options.layers, self.model_config.get_text_config().num_hidden_layers)
        family = family_of(self.model_config, self.tokenizer)
        encoder = ConversationEncoder(self.tokenizer, family, self.options.words)
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        options = BatchOptions(
            pad_token=pad,
            packed=config.data.packed,
            shared_prefix=config.data.shared_prefix,
            scope=self.options.softmax_scope,
            row_offset=self.options.row_offset,
            sequence=config.parallel.sequence,
        )
        self.collator = SwimCollator(encoder, config.data, options, self.options)
        # A noun has one map when it is looked at, however many terms it has in training; and no losses are computed.
        whole = self.options.model_copy(update={"subtokens": "mean", "mask_side": "grid"})
        looking = ConversationEncoder(self.tokenizer, family, looked_at)
        self.probe_collator = SwimCollator(looking, config.data, options, whole)
        self._captures: list[Capture] = []
        self._group: ProcessGroup | None = None

    def build_model(self, group: ProcessGroup | None = None) -> nn.Module:
        """The stock model with capture registered, checkpointing, adapters and frozen parameters set; `group` holds
        its micro-batches together."""
        model: Any = build_stock_model(self.config.model, self.model_config, seed=self.config.run.seed)
        self._group = group
        if group is not None:
            shard_text_model(model)
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Trainable parameters, decayed when they are matrices."""
        return parameter_groups(model, self.config.optim.weight_decay)

    def loss(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Term]:
        """Text and mask terms of one micro-batch."""
        assert isinstance(batch, SwimBatch)
        every = self.options.gradient_every
        terms, capture = swim_loss(
            model,
            batch,
            self.options,
            self.layers,
            measure=every > 0 and progress.step % every == 0,
            group=self._group,
        )
        if capture.measure:
            self._captures.append(capture)
        return terms

    def after_backward(self) -> dict[str, float]:
        """Squared gradient norms of the mask loss alone at q and k of each supervised layer, when they were
        measured."""
        squares: dict[str, float] = {}
        for capture in self._captures:
            for layer in capture.layers:
                q, k = capture.gradient_squares.get(layer, torch.zeros(2)).tolist()
                squares[f"mask_grad/q{layer}"] = squares.get(f"mask_grad/q{layer}", 0.0) + q
                squares[f"mask_grad/k{layer}"] = squares.get(f"mask_grad/k{layer}", 0.0) + k
        self._captures.clear()
        return squares

    def summarise(self, totals: dict[str, float], num_ranks: int) -> dict[str, float]:
        """Share of all nouns that carry a mask loss, and the gradient norms of the weighted mask loss."""
        # The engine's factor undone: the gradient of the logged loss, whatever the number of ranks.
        norms = {k: math.sqrt(v) / num_ranks for k, v in totals.items() if k.startswith("mask_grad/")}
        return {
            "supervised_share": totals["supervised_nouns"] / max(totals["nouns"] + totals["blind_nouns"], 1.0),
            **norms,
        }

    @torch.no_grad()
    def probe(self, model: nn.Module, batch: Batch) -> dict[str, dict[str, float]]:
        """Alignment of the noun maps of every conversation, mean over its nouns with a mask."""
        assert isinstance(batch, SwimBatch)
        rows: dict[str, list[dict[str, float]]] = {}
        for number, (noun, flat) in enumerate(zip(batch.nouns, self._maps(model, batch))):
            clip = batch.clips[noun.conversation]
            assert clip is not None
            if (row := noun_metrics(flat.view(clip.grid).cpu().numpy(), _coverage(batch, number))) is not None:
                rows.setdefault(batch.ids[noun.conversation], []).append(row)
        return {name: mean for name, of_nouns in rows.items() if (mean := mean_metrics(of_nouns)) is not None}

    def _maps(self, model: nn.Module, batch: SwimBatch) -> list[Tensor]:
        capture = Capture(batch.table, self.layers, layout=batch.layout, detach=True, group=self._group)
        model(**batch.inputs, use_cache=False, logits_to_keep=1, **{MODEL_KWARG: capture})
        return noun_maps(capture.maps(), batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, request: Request, view: View = View()) -> list[dict[str, Any]]:  # noqa: B008
        """Free answer and noun maps per conversation, teacher-forced unless `view` wants them over the answer, in the
        form `swim.evaluation` reads."""
        conversations, holes = self.probe_collator.encode(request)
        failed = [{"id": hole.id, "clip": request.sample.key, "error": hole.reason} for hole in holes]
        if not conversations:
            return failed
        record, shown = request.sample.record, request.sample.record
        answers = self._answers(model, conversations, view.max_new_tokens)
        unsaid: dict[str, list[dict[str, Any]]] = {}
        if view.generated:
            shown, unsaid = with_answers(record, {name: text for (name, *_), text in zip(conversations, answers)})
            again = Request(replace(request.sample, record=shown), tuple(_number(name) for name, *_ in conversations))
            conversations, holes = self.probe_collator.encode_clip(again, conversations[0][2])
            failed += [{"id": hole.id, "clip": request.sample.key, "error": hole.reason} for hole in holes]
        said = dict(zip([name for name, *_ in conversations], answers, strict=True))
        batch, maps, details = self._look(model, conversations, request.sample.masks, view)
        predictions = []
        for number, name in enumerate(batch.ids):
            # By its id: a conversation that could not be encoded has no row.
            conversation = record.conversations[_number(name)]
            own = [i for i, noun in enumerate(batch.nouns) if noun.conversation == number]
            line = {
                "id": name,
                "clip": request.sample.key,
                "task": conversation.task,
                "prompt": next((turn.text for turn in reversed(conversation.turns) if turn.role == "user"), ""),
                "target": conversation.turns[-1].text,
                "answer": said[name],
                "nouns": [self._noun(batch, i, maps[i]) | details[i] for i in own],
            }
            predictions.append(line | ({"unsaid": unsaid[name]} if unsaid.get(name) else {}))
        return failed + predictions

    def _look(
        self, model: nn.Module, conversations: Conversations, masks: Masks, view: View
    ) -> tuple[SwimBatch, list[Tensor], list[dict[str, Any]]]:
        """The conversations' batch, each noun's map and what else `view` keeps of it."""
        device = next(model.parameters()).device
        batch = self.probe_collator.assemble(conversations, [masks] * len(conversations)).to(device)
        num_layers = self.model_config.get_text_config().num_hidden_layers
        kept = resolve_layers(view.layers, num_layers) if view.layers is not None else self.layers
        layers = tuple(sorted({*self.layers, *(kept if view.keep else ())}))
        kind = HeadCapture if "heads" in view.keep else Capture
        capture = kind(batch.table, layers, layout=batch.layout, detach=True)
        model(**batch.inputs, use_cache=False, logits_to_keep=1, **{MODEL_KWARG: capture})
        found = capture.maps()
        maps = noun_maps({layer: found[layer] for layer in self.layers}, batch)
        return batch, maps, noun_details(capture, batch, masks, view.keep, kept=kept, supervised=self.layers)

    def _noun(self, batch: SwimBatch, number: int, flat: Tensor) -> dict[str, Any]:
        noun = batch.nouns[number]
        clip = batch.clips[noun.conversation]
        assert clip is not None
        return {
            "text": noun.text,
            "kind": noun.kind,
            "turn": noun.turn,
            "start": noun.start,
            "end": noun.end,
            "object_ids": list(noun.object_ids),
            "grid": list(clip.grid),
            "frames": clip.frames,
            "map": flat.view(clip.grid).tolist(),
            "coverage": [None if c is None else c.tolist() for c in _coverage(batch, number)],
        }

    def _answers(self, model: Any, conversations: Conversations, max_new_tokens: int) -> list[str]:
        """Greedy answers by the stock `generate`; prompts are the training prompts, left-padded."""
        device = next(model.parameters()).device
        longest = max(e.answer_start for _, e, _ in conversations)
        ids = torch.full((len(conversations), longest), self.collator.options.pad_token)
        types, mask = torch.zeros_like(ids), torch.zeros_like(ids)
        for row, (_, e, _) in enumerate(conversations):
            own = slice(longest - e.answer_start, None)
            ids[row, own] = torch.from_numpy(e.ids[: e.answer_start])
            types[row, own] = torch.from_numpy(e.types[: e.answer_start])
            mask[row, own] = 1
        clips = [clip for _, _, clip in conversations if clip is not None]
        visual = self.collator.encoder.family.inputs(clips, types) if clips else {}
        inputs = {"input_ids": ids, "attention_mask": mask, **visual}
        tokens = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            generation_config=greedy(
                max_new_tokens, pad=self.collator.options.pad_token, eos=self.tokenizer.eos_token_id
            ),
        )
        return [text.strip() for text in self.tokenizer.batch_decode(tokens[:, longest:], skip_special_tokens=True)]


def _coverage(batch: SwimBatch, number: int) -> list[np.ndarray | None]:
    """Coverage of every step for noun `number`, without the rounding errors that would count as a touch of the mask."""
    return [None if c is None else np.round(c, 6) for c in batch.coverages[number]]


def _number(id: str) -> int:
    """Number of the conversation in its record."""
    return int(id.rsplit("#", 1)[1])


def build(config: Config) -> SwimSystem:
    """The SWIM system of a run."""
    return SwimSystem(config)
