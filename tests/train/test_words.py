"""Promise: what is supervised are the mentions of `system.words`; what is scored are nouns, whichever were."""

from pathlib import Path

import pytest
from tiny import requests, tiny_config

from swim.data_tools.shards import ShardSet
from swim.data_tools.synth import COLOURS, SHAPES, synthesise
from swim.train.system import build_system
from swim.train.systems.swim.model import SwimSystem


@pytest.fixture(scope="module")
def hard(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    return synthesise(tmp_path_factory.mktemp("hard"), clips=2, seed=1, hard=True)


@pytest.mark.parametrize(
    ("words", "kinds"),
    [(None, {"noun"}), (["attribute"], {"attribute"}), (["noun", "attribute"], {"noun", "attribute"})],
)
def test_the_mentions_of_these_kinds_own_the_rows(hard, words, kinds) -> None:
    config = tiny_config(Path(hard.folder), *([] if words is None else [f"system.words={words}"]))
    system = build_system(config)
    batch = system.collator(requests(hard, [0, 1]))
    assert {noun.kind for noun in batch.nouns} == kinds
    for noun in batch.nouns:
        assert noun.text in (SHAPES if noun.kind == "noun" else COLOURS)
        assert noun.object_ids
        # The very token of the word, with the space before it.
        row = batch.inputs["input_ids"][noun.conversation]
        assert [system.tokenizer.decode([row[token]]).strip() for token in noun.tokens] == [noun.text]
    assert batch.counts["supervised_nouns"] == sum(any(c is not None for c in steps) for steps in batch.coverages)


def test_predictions_are_about_nouns_whatever_was_supervised(hard) -> None:
    config = tiny_config(Path(hard.folder), "system.words=[attribute]", "data.tasks=[direction]")
    (request,) = requests(hard, [0], [0])
    for system, kinds in ((build_system(config), ["noun"]), (SwimSystem(config, ("noun", "attribute")), None)):
        (line,) = system.predict(system.build_model().eval(), request)
        assert [noun["kind"] for noun in line["nouns"]] == (kinds or ["noun", "attribute"])
