"""What the loop asks of a system: batches, a model, loss terms, predictions. The loop knows nothing else about any of
them."""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from swim.data_tools.shards import Sample
from swim.train.batch import Batch
from swim.train.config import Config
from swim.train.encode import ConversationEncoder, Encoded
from swim.train.families import Clip

Detail = Literal["layers", "heads", "pixels"]
MAX_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Term:
    """One part of the loss: the sum over this micro-batch; the loop divides by the whole step's count of the same
    name."""

    sum: Tensor
    weight: float
    units: Tensor | None = None  # (U,) what `sum` adds up, without gradient, where it is to be told by source
    conversations: Tensor | None = None  # (U,) whose they are


@dataclass(frozen=True)
class Progress:
    """Where the run is: optimizer step from 0, and the number of steps."""

    step: int
    num_steps: int


@dataclass(frozen=True)
class Request:
    """A sample with the conversations chosen from it, as the plan wants it."""

    sample: Sample
    conversations: tuple[int, ...]


@dataclass(frozen=True)
class View:
    """What predictions hold beside answers and a map per noun.

    `keep` adds maps of layers and heads (of the layers that the rule `layers` names, else the supervised ones) or what
    pixel metrics need; `generated` takes maps over the model's own answer in place of the target.
    """

    keep: frozenset[Detail] = frozenset()
    layers: str | None = None
    generated: bool = False
    max_new_tokens: int = MAX_ANSWER_TOKENS


class Collator(Protocol):
    """Makes a batch in a loader worker: picklable, no parameters."""

    encoder: ConversationEncoder

    def __call__(self, requests: Iterable[Request]) -> Batch:
        """One micro-batch; what cannot be used becomes a hole, never a substitute.

        The work on a request is done before the next one is taken, so that a crash is blamed on the right one.
        """
        ...

    def measure(self, request: Request) -> list[tuple[str, Encoded, Clip | None]]:
        """Id, tokens and clip of the conversations of a batch of this request, nothing decoded and every step of the
        clip one cell; without those that would be holes."""
        ...


class System(Protocol):
    """A training method, built from the whole config by `systems/<name>/model.py:build`."""

    collator: Collator
    probe_collator: Collator  # of the batches that `probe` takes
    tokenizer: Any  # saved beside the model
    model_config: Any  # the transformers config

    def build_model(self, group: ProcessGroup | None = None) -> nn.Module:
        """The model to be wrapped by the engine (under ZeRO-3 its parameters are partitioned as they are made).

        The ranks of `group` are to be given the same batches, and hold each of them together (`sequence.py`).
        """
        ...

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Optimizer groups of the trainable parameters."""
        ...

    def loss(self, model: nn.Module, batch: Batch, progress: Progress) -> dict[str, Term]:
        """Forward pass and unnormalised loss terms of one micro-batch; this rank's shares of them when a group holds
        it."""
        ...

    def after_backward(self) -> dict[str, float]:
        """Numbers that exist only after the backward pass, summed over this rank's micro-batches of the step."""
        ...

    def summarise(self, totals: dict[str, float], num_ranks: int) -> dict[str, float]:
        """Numbers to log, made of the step's counts and of the sums over ranks of what `after_backward` gave."""
        ...

    def probe(self, model: nn.Module, batch: Batch) -> dict[str, dict[str, float]]:
        """What `swim.evaluation` measures of every conversation of a held-out batch that can be scored, by its id; one
        forward pass without gradient."""
        ...

    def predict(self, model: nn.Module, request: Request, view: View = View()) -> list[dict[str, Any]]:
        """One prediction per conversation, in the form `swim.evaluation` reads."""
        ...


def build_system(config: Config) -> System:
    """The system that `config.system` names."""
    return importlib.import_module(f"swim.train.systems.{config.system['name']}.model").build(config)


def page_writer(config: Config) -> Callable[..., tuple[int, int]]:
    """`write_page` of the system that `config.system` names: the page of what its recipe makes of samples."""
    writer = importlib.import_module(f"swim.train.systems.{config.system['name']}.inspect").write_page
    return cast(Callable[..., tuple[int, int]], writer)
