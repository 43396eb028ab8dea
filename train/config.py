"""The run configuration: one YAML file, one pydantic model, one line of documentation per field.

`load_config(path, ["optim.lr=1e-4"])` reads a recipe and applies overrides; an unknown key is an error that names the
nearest known one. Each system adds a section of its own under `system`, validated by that system's `Config`.
"""

import difflib
import importlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


class ConfigError(ValueError):
    """A configuration cannot be used; the message names file, field, value and remedy."""


class Section(BaseModel):
    """A part of the configuration: unknown keys are errors, field docstrings are the documentation."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        coerce_numbers_to_str=True,  # YAML reads run.name=2024 as a number
    )


class RunConfig(Section):
    """Where the run writes and how long it goes on."""

    name: str = "run"
    """Name of the run; its folder is `output`/`name`."""
    output: Path = Path("runs")
    """Folder that holds the run folders."""
    seed: int = 0
    """Seed of initialisation and order."""
    steps: int = Field(gt=0)
    """Optimizer steps."""
    save_every: int = Field(0, ge=0)
    """Steps between checkpoints; 0 saves at the end only."""
    keep: int = Field(3, gt=0)
    """Newest checkpoints that are kept; older ones are removed once a newer one is complete."""
    max_hours: float | None = Field(None, gt=0)
    """End with a checkpoint and exit code 75 after so many hours; null leaves that to signals and the stop file."""
    stop_after: int | None = Field(None, gt=0)
    """End with a checkpoint after this step, as if interrupted; the schedule still counts `steps`."""

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self.output / self.name

    @property
    def cache(self) -> Path:
        """What runs on the same data need not make twice; it may be removed at any time."""
        return self.output / ".cache"


class TokenizerConfig(Section):
    """A small byte-level BPE trained on the fly, for models built from a config."""

    corpus: Literal["synth"] = "synth"
    """Sentences it is trained on."""
    vocab_size: int = Field(512, ge=300)
    """Entries, special tokens included."""


class LoraConfig(Section):
    """Low-rank adapters on the text model, trained instead of the model's own weights; needs the `peft` extra."""

    rank: int = Field(16, gt=0)
    """Rank of every adapter."""
    alpha: int = Field(32, gt=0)
    """Scale: the update is alpha / rank times the product of the two matrices."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout in front of the adapters."""
    targets: str = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    """Regular expression that the whole name of a linear layer must match to get an adapter."""


class ModelConfig(Section):
    """The stock model: pretrained weights at `path`, or random weights for an inline `config`."""

    path: str | None = None
    """Hub id or local folder of a pretrained model, processor and tokenizer."""
    config: dict[str, Any] | None = None
    """Inline transformers config (with `model_type`) of a model with random weights."""
    tokenizer: TokenizerConfig | None = None
    """Tokenizer of a model built from `config`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of weights and activations."""
    attention: Literal["sdpa", "flash_attention_2", "flash_attention_3"] = "sdpa"
    """Attention backend of the text model; the vision tower uses sdpa or the same flash."""
    checkpointing: bool | int = Field(False, ge=0)
    """Recompute activations in the backward pass (always non-reentrant): of all layers (`true`), or of every n-th (n),
    counted through the model as transformers does."""
    liger: Literal["auto", True, False] = False
    """Liger's fused RMSNorm and gated MLP in the text model, on GPUs: `auto` where liger-kernel is installed, `true`
    must."""
    lora: LoraConfig | None = None
    """Train adapters instead of all weights; the saved model has them merged, with the adapters beside it."""
    freeze: list[str] = []
    """Regular expressions; a parameter whose name one of them matches anywhere is not trained."""

    @model_validator(mode="after")
    def _one_source(self) -> "ModelConfig":
        if (self.path is None) == (self.config is None):
            raise ValueError("give exactly one of model.path (pretrained) and model.config (random weights)")
        if (self.config is None) != (self.tokenizer is None):
            raise ValueError("model.tokenizer belongs to model.config: give both or neither")
        return self


class SynthConfig(Section):
    """Synthetic clips, rendered into `data.train` by the first rank when that folder is not there yet."""

    clips: int = Field(gt=0)
    """Number of clips."""
    seed: int = 0
    """Seed of the clips."""
    size: int = 112
    """Side of a frame in pixels."""


class TrainSet(Section):
    """A data set and its share of an epoch."""

    path: str
    """Folder of shards or of JSONL files, a JSONL file, or the URL of such."""
    layers: list[str] = []
    """Folders or URLs of layers that change what is said about its clips, joined one after the other."""
    repeat: float = Field(1.0, gt=0)
    """Times that each clip comes in an epoch; with 2.5, twice or three times, and equally often over the epochs."""
    proportion: float | None = Field(None, gt=0)
    """Share of an epoch's clips, relative to the other folders; give it to all folders or to none. An epoch then has as
    many clips as all folders together."""

    @model_validator(mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        value = {"path": value} if isinstance(value, str | Path) else value
        if isinstance(value, dict) and isinstance(value.get("path"), Path):
            return {**value, "path": str(value["path"])}
        return value

    @model_validator(mode="after")
    def _one_share(self) -> "TrainSet":
        if self.proportion is not None and self.repeat != 1:
            raise ValueError(f"data.train: {self.path} has repeat and proportion; give one of them")
        return self


class DataConfig(Section):
    """What is trained on and how it becomes batches."""

    train: list[TrainSet] = Field(min_length=1)
    """Data sets (shards, JSONL files, URLs), each as its path or as {path, layers, repeat or proportion}; one path
    may stand without brackets. By default every clip comes exactly once an epoch."""
    cache: Path | None = None
    """Folder on a local disk for files behind URLs, shared by all runs and ranks of a machine; null:
    `run.output`/.cache/files."""
    cache_gib: float = Field(64.0, ge=0)
    """Size of that folder at most, in GiB; 0 reads URLs in ranges and keeps nothing."""
    synth: SynthConfig | None = None
    """How to render `train` if it is missing."""
    tasks: list[str] | None = None
    """Tasks to keep; null keeps all."""
    max_conversations: int | None = Field(None, gt=0)
    """Conversations drawn per clip and epoch; null takes all."""
    clips_per_pack: int | None = Field(None, gt=0)
    """Clips in a micro-batch, with all their chosen conversations; 1 unless `tokens_per_pack` is given."""
    tokens_per_pack: int | None = Field(None, gt=0)
    """Instead: fill micro-batches up to so many tokens, visual ones and a shared prefix once included, and make the
    packs of a step cost about the same; needs `packed`."""
    packs_per_step: int = Field(1, gt=0)
    """Micro-batches of an optimizer step over all ranks."""
    shuffle_shards: int | None = Field(None, gt=0)
    """Shuffle shards, then clips among so many shards, for storage that reads shards whole; null shuffles all clips."""
    shared_prefix: bool = True
    """Conversations about a clip share its tokens: one copy of the clip, a branch for each conversation."""
    packed: bool = False
    """Lay all sequences of a micro-batch into one row instead of padding each."""
    num_frames: int = Field(32, gt=0)
    """Frames sampled per clip; with `fps`, the most."""
    frame_sampling: Literal["annotated", "uniform", "fps"] = "annotated"
    """The middles of `num_frames` equal segments (`uniform`), each moved to the nearest frame with a mask in its
    segment (`annotated`); or of as many segments as `fps` times the clip's seconds (`fps`)."""
    fps: float = Field(2.0, gt=0)
    """Frames per second of frame_sampling `fps`."""
    min_frames: int = Field(4, gt=0)
    """Fewest frames of frame_sampling `fps`, for clips that have so many."""
    min_pixels: int = Field(28 * 28 * 4, gt=0)
    """Smallest resized frame in pixels."""
    max_pixels: int = Field(28 * 28 * 768, gt=0)
    """Largest resized frame in pixels."""
    clip_pixels: int | None = Field(None, gt=0)
    """Largest sum of the resized frames of a clip in pixels, as far as `min_pixels` allows; null: no limit."""
    upscale: bool = False
    """Allow a `min_pixels` that enlarges stored frames, which costs tokens and adds nothing to see."""
    decoder: Literal["pyav", "torchcodec", "decord"] = "pyav"
    """What decodes video; all give the same pixels. `decord` takes videos inside shards only, and the other two need
    the `decode` extra."""
    workers: int = Field(1, ge=0)
    """Loader processes per rank; 0 reads in the training process, which a crashing decoder then ends."""
    deadline_s: float = Field(60.0, gt=0)
    """Seconds for one sample; whatever takes longer twice is left out, as is what crashes a worker twice."""
    prefetch: int = Field(2, gt=0)
    """Steps that the workers make ahead."""
    max_bad: int = Field(100, ge=0)
    """Conversations that may turn out unreadable; one more stops the run, with a checkpoint."""

    @field_validator("train", mode="before")
    @classmethod
    def _one_folder(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @model_validator(mode="before")
    @classmethod
    def _one_clip(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("clips_per_pack") is value.get("tokens_per_pack") is None:
            return {**value, "clips_per_pack": 1}
        return value

    @model_validator(mode="after")
    def _one_size(self) -> "DataConfig":
        if None not in (self.clips_per_pack, self.tokens_per_pack):
            raise ValueError(
                f"data.tokens_per_pack {self.tokens_per_pack} and data.clips_per_pack {self.clips_per_pack} are both "
                "given; set one of them to null"
            )
        if self.tokens_per_pack is not None and not self.packed:
            # A row for each sequence is as wide as the longest: memory that no sum of tokens bounds.
            raise ValueError(
                "data.tokens_per_pack needs all sequences of a micro-batch in one row: set data.packed=true"
            )
        return self

    @model_validator(mode="after")
    def _all_or_none(self) -> "DataConfig":
        without = [str(part.path) for part in self.train if part.proportion is None]
        if 0 < len(without) < len(self.train):
            raise ValueError(f"data.train: {without[0]} has no proportion, others have; give it to all or to none")
        return self

    @model_validator(mode="after")
    def _pixels_in_order(self) -> "DataConfig":
        if self.min_pixels > self.max_pixels:
            raise ValueError(f"data.min_pixels {self.min_pixels} is above data.max_pixels {self.max_pixels}")
        return self

    @model_validator(mode="after")
    def _frames_in_order(self) -> "DataConfig":
        if self.frame_sampling == "fps" and self.min_frames > self.num_frames:
            raise ValueError(f"data.min_frames {self.min_frames} is above data.num_frames {self.num_frames}")
        return self

    def frames_of(self, stored: int, fps: float) -> int:
        """Number of frames sampled of a clip of `stored` frames at `fps` per second."""
        if self.frame_sampling != "fps":
            return self.num_frames
        return min(max(int(stored / fps * self.fps), self.min_frames), self.num_frames, stored)

    def pixel_limits(self, num_frames: int) -> dict[str, int]:
        """`min_pixels` and `max_pixels` of each of so many sampled frames."""
        most = self.max_pixels if self.clip_pixels is None else min(self.max_pixels, self.clip_pixels // num_frames)
        return {"min_pixels": self.min_pixels, "max_pixels": max(most, self.min_pixels)}


class OptimConfig(Section):
    """AdamW and its schedule."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW coefficients."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of parameters with two or more dimensions."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up, down to `min_lr_ratio`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Final learning rate as a share of the peak."""
    clip: float = Field(1.0, ge=0)
    """Gradient norm limit; 0 switches clipping off."""


class GuardConfig(Section):
    """What a run does about steps that go wrong and ranks that get no further."""

    max_refused: int = Field(3, gt=0)
    """Steps in a row that may change nothing (loss or gradient not finite, spikes) before the run ends."""
    spike: Literal["none", "skip", "rewind", "stop"] = "none"
    """About a loss far above the last ones: nothing; pass over the step; go back to the weights of the last checkpoint
    and pass over the steps since; or end the run."""
    spike_deviations: float = Field(10.0, gt=0)
    """A spike is this many robust standard deviations (1.48 MAD) above the median of the window."""
    spike_window: int = Field(100, gt=1)
    """Applied steps that a loss is compared with; without so many there are no spikes."""
    hang_s: float = Field(600.0, gt=0)
    """Seconds that a part of a step may take (data, forward, backward, update); then all ranks dump stacks and exit."""
    start_s: float = Field(3600.0, gt=0)
    """The same for what comes before the second step, and for saving."""


class ParallelConfig(Section):
    """How a micro-batch is divided among ranks."""

    sequence: int = Field(1, gt=0)
    """Consecutive ranks that hold one micro-batch together, each a part of its tokens, for long videos
    (docs/sequence.md); divides the number of ranks and that of attention heads."""


class WandbConfig(Section):
    """A run on Weights & Biases; a resumed run goes on in the same one."""

    project: str
    """Project."""
    entity: str | None = None
    """User or team; null: the default of the account."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """`offline` writes into the run folder, to be sent by `wandb sync`."""


class LogConfig(Section):
    """Where the numbers of a run go beside metrics.jsonl."""

    tensorboard: bool = False
    """Write events into the run folder's tensorboard/ (needs the `track` extra)."""
    wandb: WandbConfig | None = None
    """Send to Weights & Biases (needs the `track` extra)."""
    curves: bool = True
    """Draw training_curves.png in the run folder, at saves a minute or more apart and at the end."""


class ProbeConfig(Section):
    """Held-out clips on which attention is compared with masks during training, as `swim evaluate` does behind it."""

    data: str
    """Folder of shards or of JSONL files, a JSONL file, or the URL of such."""
    every: int = Field(100, gt=0)
    """Steps between probes."""
    clips: int = Field(16, gt=0)
    """Clips, the same ones in every run."""


class ProfileConfig(Section):
    """Steps that are recorded by torch.profiler into the run folder's profile/."""

    start: int = Field(gt=0)
    """First of these steps, from 1."""
    steps: int = Field(3, gt=0)
    """How many; a trace of one step of a large model has hundreds of megabytes."""
    ranks: list[int] = [0]
    """Ranks that are recorded."""
    memory: bool = False
    """Record allocations too; on CUDA also a snapshot for pytorch.org/memory_viz."""


class LaunchConfig(Section):
    """How the run is started."""

    ranks: int | None = Field(None, gt=0)
    """Processes on this node; null: one per GPU, or one on a CPU. The `deepspeed --num_gpus` form has its own count."""


class Config(Section):
    """A complete run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    optim: OptimConfig
    parallel: ParallelConfig = ParallelConfig(sequence=1)
    launch: LaunchConfig = LaunchConfig(ranks=None)
    guard: GuardConfig = GuardConfig.model_validate({})
    log: LogConfig = LogConfig.model_validate({})
    probe: ProbeConfig | None = None
    """Alignment on held-out clips during training; null: none."""
    profile: ProfileConfig | None = None
    """Steps to be profiled; null: none."""
    deepspeed: str = "zero3_cpu"
    """A file of ds_configs/ by name, or a path to a DeepSpeed JSON file."""
    system: dict[str, Any]
    """`name` of a folder under train/systems and that system's own fields."""

    @model_validator(mode="after")
    def _patient(self) -> "Config":
        # A pack with several samples that hang takes several deadlines.
        if self.guard.hang_s < 5 * self.data.deadline_s:
            raise ValueError(
                f"guard.hang_s {self.guard.hang_s:g} is less than 5 times data.deadline_s {self.data.deadline_s:g}: a "
                "few bad samples would end the run; raise the one or lower the other"
            )
        return self

    @field_validator("system")
    @classmethod
    def _known_system(cls, value: dict[str, Any]) -> dict[str, Any]:
        known = sorted(p.name for p in (Path(__file__).parent / "systems").iterdir() if (p / "model.py").exists())
        if value.get("name") not in known:
            raise ValueError(f"system.name is {value.get('name')!r}; known systems: {', '.join(known)}")
        # Kept as plain data: the schema of a system is that system's business, this file knows none by name.
        section = importlib.import_module(f"swim.train.systems.{value['name']}.config").Config
        fields = {key: item for key, item in value.items() if key != "name"}
        try:
            return {"name": value["name"], **section.model_validate(fields).model_dump(mode="json")}
        except ValidationError as error:
            raise ValueError(_explain(error, section, ("system",))) from None


class _Loader(yaml.SafeLoader):
    """The safe loader; 1e-4 is a number as people type it (YAML 1.1 wants 1.0e-4 and would read a string)."""


_FLOAT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe (a path, or the name of a file in recipes/) and apply `section.key=value` overrides; ConfigError if
    unusable."""
    file = _find(path)
    try:
        data = yaml.load(file.read_text(), _Loader)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: holds {type(data).__name__}, not sections of a run; see recipes/tiny_cpu.yaml")
    for override in overrides:
        _apply(data, override)
    return parse_config(data, source=str(path))


def engine_file(config: Config) -> Path:
    """The DeepSpeed JSON file that `config.deepspeed` names; ConfigError lists the known ones."""
    folder = Path(__file__).resolve().parent.parent / "ds_configs"
    candidates = (folder / f"{config.deepspeed}.json", Path(config.deepspeed))
    if (path := next((p for p in candidates if p.is_file()), None)) is None:
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise ConfigError(f"deepspeed: {config.deepspeed!r} is neither a file nor one of: {known}")
    return path


def parse_config(data: dict[str, Any], *, source: str) -> Config:
    """Config from plain data; ConfigError names `source`, the field, the value and the nearest known key."""
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{source}: {_explain(error, Config)}") from None


def _find(path: str | Path) -> Path:
    recipes = Path(__file__).resolve().parent.parent / "recipes"
    candidates = [Path(path), recipes / f"{path}", recipes / f"{path}.yaml", recipes.parent / path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = ", ".join(sorted(p.stem for p in recipes.glob("*.yaml")))
    raise ConfigError(f"{path}: no such recipe; give a YAML file or one of: {known}")


def _apply(data: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    *sections, last = key.split(".")
    if not separator or not all([*sections, last]):
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    for section in sections:
        if data.get(section) is None:
            data[section] = {}
        data = data[section]
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {section!r} is a value, not a section")
    try:
        data[last] = yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {override!r}: the value is not YAML ({error}); quote it") from None


def _explain(error: ValidationError, model: type[BaseModel], prefix: tuple[str, ...] = ()) -> str:
    lines = []
    for item in error.errors(include_url=False):
        where = ".".join(map(str, (*prefix, *item["loc"]))) or "configuration"
        if item["type"] == "extra_forbidden":
            known = _fields_at(model, item["loc"][:-1])
            near = difflib.get_close_matches(str(item["loc"][-1]), known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
            lines.append(f"{where}: unknown key; {hint}")
        elif item["type"] == "missing":
            lines.append(f"{where}: missing; give a value")
        else:
            message = item["msg"].removeprefix("Value error, ")
            shown = (
                "" if message.startswith(where) or isinstance(item["input"], dict) else f", got {item['input']!r:.80}"
            )
            lines.append(
                message
                if message.startswith(("system", "model.", "data.", "optim.", "give"))
                else f"{where}: {message}{shown}"
            )
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: Sequence[str | int]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation if str(part) in model.model_fields else None
        options = [annotation, *getattr(annotation, "__args__", ())]
        inner = next((o for o in options if isinstance(o, type) and issubclass(o, BaseModel)), None)
        if inner is None:
            break
        model = inner
    return list(model.model_fields)
