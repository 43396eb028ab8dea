"""What one model answers about a video and where its words look: rows of attention in, a `View` of the page out.

The answer comes from the stock `generate`. Then prompt and answer go through the model once more, as the very tokens
that were generated, and `RowMaps` reads the rows of their words in every layer that is kept.
"""

import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from swim import __version__
from swim.data_tools.all_nouns import find_nouns, words_of
from swim.data_tools.records import Conversation, Masks, Mention, Turn
from swim.data_tools.video import VideoInfo, choose_frames, decode_frames
from swim.evaluation.explain_page import View, Word
from swim.train.attention import MODEL_KWARG
from swim.train.batch import BatchOptions, make_batch
from swim.train.config import Config
from swim.train.encode import IGNORE, ConversationEncoder, Encoded
from swim.train.explain.row_maps import RowMaps
from swim.train.explain.sources import Source
from swim.train.families import Clip, family_of, sampled_clip
from swim.train.predict import safetensors_digest
from swim.train.stock import build_stock_model, greedy, tokenizer_and_config
from swim.train.systems.swim.config import resolve_layers
from swim.train.systems.swim.targets import step_coverages


@dataclass(frozen=True)
class Subject:
    """What is looked at: a video with a constant rate, where it is from (None: unknown), masks with labels, and the
    answers that its record gives to prompts."""

    name: str
    video: bytes
    info: VideoInfo
    source: str | None
    masks: Masks
    labels: Mapping[str, str]
    answers: Mapping[str, str]


@dataclass(frozen=True)
class Options:
    """How to look; None leaves frames and pixels to the model's recipe, and layers to all."""

    frames: int | None = None
    pixels: int | None = None
    layers: str | None = None
    nouns: str = "auto"
    answer_tokens: int = 64
    side: int = 360  # pixels of the shorter side of the video in the page
    page_mib: float = 12.0  # of maps in the page, at most


@dataclass(frozen=True)
class _Tokens:
    """A word, characters [start, end) of its text, and the columns of its tokens; none if its maps are not kept."""

    start: int
    end: int
    noun: bool
    columns: tuple[int, ...]


@dataclass(frozen=True)
class _Contents:
    """What of the maps fits the page."""

    layers: tuple[int, ...]
    heads: tuple[int, ...]
    nouns_only: bool
    left_out: tuple[str, ...]


class Loaded:
    """A loaded model with what makes its inputs."""

    def __init__(self, config: Config) -> None:
        self.tokenizer, self.config = tokenizer_and_config(config.model)
        self.family = family_of(self.config, self.tokenizer)
        self.encoder = ConversationEncoder(self.tokenizer, self.family)
        self.data = config.data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model: Any = build_stock_model(config.model, self.config, seed=0)
        self.model = model.eval().to(self.device)

    def load_clip(self, subject: Subject) -> Clip:
        """The clip's sampled frames, as training samples them; VideoError if they cannot be decoded."""
        info, annotated = subject.info, None
        if self.data.frame_sampling == "annotated":
            annotated = sorted({frame for frames in subject.masks.values() for frame in frames})
        chosen = choose_frames(info.num_frames, self.data.frames_of(info.num_frames, info.fps), annotated)
        frames = decode_frames(subject.video, chosen)
        pixels, grid = self.family.pixels(frames, **self.data.pixel_limits(len(chosen)))
        return sampled_clip("explain", chosen, pixels, grid, per_step=self.family.frames_per_step, fps=info.fps)

    def encode(self, prompt: str, nouns: Sequence[tuple[int, int]], clip: Clip) -> tuple[Encoded, list[_Tokens]]:
        """Tokens up to where the answer begins, and the words of the prompt; RecordError for control tokens in it."""
        spans = words_of(prompt)
        mentions = [Mention(start=a, end=b, head=(a, b), object_ids=[str(i)]) for i, (a, b) in enumerate(spans)]
        turns = [Turn(role="user", text=prompt, mentions=mentions), Turn(role="assistant", text="")]
        whole = self.encoder(Conversation(task="explain", turns=turns), name="prompt", clip=clip)
        end = whole.answer_start
        asked = replace(whole, ids=whole.ids[:end], types=whole.types[:end], labels=whole.labels[:end], nouns=[])
        # A word in front of the clip sees none of it and owns no columns.
        columns = {int(noun.object_ids[0]): noun.tokens for noun in whole.nouns}
        words = [_Tokens(a, b, _is_noun((a, b), nouns), columns.get(i, ())) for i, (a, b) in enumerate(spans)]
        return asked, words

    @torch.no_grad()
    def generate(self, asked: Encoded, clip: Clip, limit: int) -> list[int]:
        """Ids of the greedy answer without vision placeholders; the token that ends it is among them if it comes."""
        types = torch.from_numpy(asked.types)[None]
        ids = torch.from_numpy(asked.ids)[None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **self.family.inputs([clip], types)}
        # An answer with a placeholder for vision could not be read again: there is nothing to put in its place.
        ids_of = (getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video"))
        places = {int(place) for place in ids_of if place is not None}
        config = greedy(limit, pad=self._pad(), eos=self.tokenizer.eos_token_id, suppress=sorted(places))
        tokens = self.model.generate(**{k: v.to(self.device) for k, v in inputs.items()}, generation_config=config)
        return [int(token) for token in tokens[0, ids.shape[1] :]]

    def answer_words(self, generated: Sequence[int], first: int, nouns: str) -> tuple[str, list[_Tokens]]:
        """Text of a generated answer whose first token has the column `first`, and its words."""
        texts = [self._decode(generated[:end]) for end in range(len(generated) + 1)]
        ends = [len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in texts]
        spans = list(pairwise(ends))
        # A character of several tokens is there with the last of them, and belongs to all.
        for i in reversed(range(len(spans) - 1)):
            if len(texts[i + 1]) > ends[i + 1]:
                spans[i] = (spans[i][0], spans[i + 1][1])
        text, words = texts[-1], []
        found = find_nouns(text, nouns)[0]
        for start, end in words_of(text):
            columns = [first + i for i, (a, b) in enumerate(spans) if max(a, start) < min(b, end)]
            words.append(_Tokens(start, end, _is_noun((start, end), found), tuple(columns)))
        return text, words

    @torch.no_grad()
    def read(self, sequence: Encoded, clip: Clip, capture: RowMaps) -> None:
        """One forward call over prompt and answer, in which `capture` reads the rows."""
        batch = make_batch([("explain", sequence, clip)], self.encoder, BatchOptions(pad_token=self._pad()))
        inputs = batch.to(self.device).inputs
        self.model(**inputs, use_cache=False, logits_to_keep=1, **{MODEL_KWARG: capture})

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _pad(self) -> int:
        pad = self.tokenizer.pad_token_id
        return int(pad if pad is not None else self.tokenizer.eos_token_id)


def look(
    subject: Subject, prompt: str, nouns: Sequence[tuple[int, int]], source: Source, options: Options, *, share: int
) -> View:
    """One model's view of the subject; `share` models divide the page's room for maps.

    ValueError for frames that cannot be decoded, a prompt without words behind the clip, or maps that do not fit.
    """
    config = source.config_with(options.frames, options.pixels)
    model = Loaded(config)
    text_config = model.config.get_text_config()
    clip = model.load_clip(subject)
    asked, words = model.encode(prompt, nouns, clip)
    generated = model.generate(asked, clip, options.answer_tokens)
    answer, own = model.answer_words(generated, len(asked.ids), options.nouns)
    own_layers = source.own_layers(text_config.num_hidden_layers)
    contents = choose_contents(
        [word.noun for word in (*words, *own) if word.columns],
        chosen_layers(options.layers or "all", text_config),
        text_config.num_attention_heads,
        clip.num_cells,
        own_layers,
        int(options.page_mib * 2**20 / share),
    )
    if contents.nouns_only:
        words, own = ([w if w.noun else replace(w, columns=()) for w in some] for some in (words, own))
    sequence = appended(asked, generated)
    capture = RowMaps(
        range(asked.prefix, len(sequence.ids)),
        [word.columns for word in (*words, *own) if word.columns],
        np.nonzero(sequence.types)[0][: clip.num_cells].tolist(),
        steps=clip.grid[0],
        layers=contents.layers,
        heads=contents.heads,
    )
    model.read(sequence, clip, capture)
    entries = iter(range(len(capture.words)))
    statement, warns = source.about_training(subject.source)
    return View(
        name=source.name,
        answer=answer,
        prompt_words=[_shown(word, entries) for word in words],
        answer_words=[_shown(word, entries) for word in own],
        grid=clip.grid,
        frames=clip.frames,
        maps={layer: planes.numpy() for layer, planes in capture.maps().items()},
        heads=contents.heads,
        num_heads=text_config.num_attention_heads,
        own_layers=own_layers,
        coverages={id: step_coverages([[id]], subject.masks, clip.frames, clip.grid[1:])[0] for id in subject.masks},
        about_training=statement,
        warns=warns,
        left_out=contents.left_out,
        provenance=_provenance(subject, source, config, model, clip, len(generated)),
    )


def choose_contents(
    nouns: Sequence[bool], layers: Sequence[int], num_heads: int, cells: int, own_layers: Sequence[int], limit: int
) -> _Contents:
    """What of the maps of words (True: a noun) fits `limit` bytes of a page, in base64: all of it, else without single
    heads, else only in the run's own layers (six spread ones without any), else of nouns alone.

    ValueError if not even that fits.
    """
    layers, every = tuple(layers), tuple(range(num_heads))
    few = tuple(layer for layer in layers if layer in own_layers) or tuple(
        layers[i] for i in sorted({round(i) for i in np.linspace(0, len(layers) - 1, min(6, len(layers)))})
    )
    mean = f"single heads ({num_heads} a layer)"
    rest = f"layers other than {', '.join(map(str, few))}"
    tries = [
        (layers, every, False, []),
        (layers, (), False, [mean]),
        (few, (), False, [mean, rest]),
        (few, (), True, [mean, rest, "words that are no nouns"]),
    ]
    for chosen, heads, nouns_only, lost in tries:
        words = sum(nouns) if nouns_only else len(nouns)
        size = (words + 1) * len(chosen) * (2 + len(heads)) * cells * 4 // 3
        if words and size <= limit:
            said = f"Not in this page, whose maps may take {limit / 2**20:.3g} MiB a model: {'; '.join(lost)}."
            return _Contents(chosen, heads, nouns_only, (said,) if lost else ())
    if not any(nouns):
        raise ValueError(
            f"the maps of {len(nouns)} words do not fit the page, and none is a noun behind the video; mark one "
            "with <ins>...</ins>, or raise --page-mib"
        )
    raise ValueError(
        f"the maps of {sum(nouns)} nouns in {len(few)} layers over {cells} cells take {size / 2**20:.3g} MiB, the page "
        f"has room for {limit / 2**20:.3g}; raise --page-mib, or give fewer --layers, --frames or --pixels"
    )


def chosen_layers(text: str, text_config: Any) -> tuple[int, ...]:
    """The layers that numbers with commas, or a rule as in `system.layers`, name; ValueError for something else, and
    for layers that see a window only, whose rows `RowMaps` would get wrong."""
    numbers = text.split(",")
    listed = all(number.strip().isdecimal() for number in numbers)
    rule = [int(number) for number in numbers] if listed else text
    layers = resolve_layers(rule, text_config.num_hidden_layers)
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"] * text_config.num_hidden_layers
    if windows := [layer for layer in layers if kinds[layer] != "full_attention"]:
        raise ValueError(f"layers {windows} have {kinds[windows[0]]}, only full_attention can be read; give --layers")
    return layers


def _is_noun(span: tuple[int, int], nouns: Sequence[tuple[int, int]]) -> bool:
    return any(max(span[0], start) < min(span[1], end) for start, end in nouns)


def appended(asked: Encoded, generated: Sequence[int]) -> Encoded:
    """The sequence of prompt and answer."""
    new = np.array(generated, dtype=np.int64)
    return replace(
        asked,
        ids=np.concatenate([asked.ids, new]),
        types=np.concatenate([asked.types, np.zeros_like(new)]),
        labels=np.concatenate([asked.labels, np.full_like(new, IGNORE)]),
    )


def _shown(word: _Tokens, entries: Iterator[int]) -> Word:
    if not word.columns:
        return Word(word.start, word.end, word.noun)
    return Word(word.start, word.end, word.noun, next(entries), float(np.mean(word.columns)) + 1)


def _provenance(
    subject: Subject, source: Source, config: Config, model: Loaded, clip: Clip, num_generated: int
) -> dict[str, Any]:
    info = subject.info
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    steps, rows, columns = clip.grid
    weights = sum(parameter.numel() for parameter in model.model.parameters())
    return {
        "video": f"{subject.name}, {info.width}x{info.height}, {info.num_frames} frames, {info.fps:.4g}/s",
        "source of the video": subject.source or "a file; unknown",
        "model": f"{model.config.model_type}, {weights / 1e6:.3g} M parameters",
        "weights (SHA-256)": safetensors_digest(Path(str(source.config.model.path)))[:16],
        "trained": source.history,
        "frames": f"{config.data.frame_sampling}: {', '.join(str(f) for step in clip.frames for f in step)}",
        "grid": f"{steps} steps of {rows} x {columns} cells",
        "pixels of a frame": f"{config.data.min_pixels} to {config.data.max_pixels}",
        "answer": f"greedy, {num_generated} tokens",
        "type, device": f"{config.model.dtype}, {model.device.type}",
        "attention": config.model.attention,
        "swim": f"{__version__}, {commit or 'not a git checkout'}",
        "torch, transformers": f"{version('torch')}, {version('transformers')}",
        "python": platform.python_version(),
    }
