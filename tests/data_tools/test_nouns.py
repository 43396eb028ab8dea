"""The chunkers name what a caption is about or give up with a reason; content words are compared as the docs say."""

import re
from pathlib import Path
from typing import Any

import pytest
from noun_cases import TUNED, UNSEEN

from swim.data_tools.nouns import NoNounError, NounPhrase, content_words, find_chunker, first_phrase, parsed_phrase


def marked(phrase: NounPhrase) -> str:
    start, end = phrase.head
    return f"{phrase.text[:start]}_{phrase.text[start:end]}_{phrase.text[end:]}"


def scores(cases: dict[str, str | None]) -> tuple[int, int, int]:
    """Numbers of right, given up, wrong."""
    found = []
    for text, expected in cases.items():
        try:
            got = marked(first_phrase(text))
        except NoNounError:
            got = None
        found.append("right" if got == expected else "given up" if got is None else "wrong")
    return found.count("right"), found.count("given up"), found.count("wrong")


def test_the_built_in_rules_score_what_the_docs_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = re.findall(r"\| (\d+) captions .* \| (\d+) \| (\d+) \| (\d+) \|", page)
    said = [tuple(map(int, line)) for line in lines]
    assert said == [(len(cases), *scores(cases)) for cases in (TUNED, UNSEEN)]


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("A man wearing a red shirt walks.", "_man_ wearing a red shirt"),
        ("The man on the left claps.", "_man_ on the left"),
        ("A dog in front of the house barks.", "_dog_ in front of the house"),
        ("A woman dressed in a long black coat", "_woman_ dressed in a long black coat"),
    ],
)
def test_what_follows_the_noun_tells_it_from_others(text: str, phrase: str) -> None:
    assert marked(first_phrase(text, True)) == phrase


def test_giving_up_says_why() -> None:
    for text, why in {
        "": "it has no words",
        "It jumps.": "it begins with 'It', not with an article|no noun is found before",
        "The left side of the road": "'side' does not say what it is",
        "A goalkeeper": "nothing that would tell it apart follows",
    }.items():
        with pytest.raises(NoNounError, match=why):
            first_phrase(text, text == "A goalkeeper")


@pytest.mark.parametrize(
    "text", ["a " * 5000, "the" + " very" * 5000, "in " * 5000, "a, and " * 999, "\ud800 the", "\x00", "the 's"]
)
def test_no_text_is_too_odd(text: str) -> None:
    with pytest.raises(NoNounError):
        first_phrase(text)


def test_content_words() -> None:
    assert content_words("The Dogs' leash, and the dog’s bowls: it's in a glass bus!") == {
        "dog",
        "leash",
        "bowl",
        "glass",
        "bus",
    }
    assert content_words("He is on the left, then again.") == {"left"}


def test_a_chunker_that_is_missing_is_an_error() -> None:
    assert find_chunker("built-in")[1] is first_phrase
    with pytest.raises(ValueError, match="there are auto, spacy, built-in"):
        find_chunker("nltk")


def _parsed(words: str, pos: str, dep: str, heads: list[int], lemmas: str) -> Any:
    """A parse made by hand: spaCy's models are not on the package index."""
    spacy = pytest.importorskip("spacy")
    from spacy.tokens import Doc

    listed = words.split()
    starts = [i == 0 for i in range(len(listed))]
    return Doc(
        spacy.blank("en").vocab,
        words=listed,
        pos=pos.split(),
        deps=dep.split(),
        heads=heads,
        lemmas=lemmas.split(),
        sent_starts=starts,
    )


def test_a_parse_of_spacy_is_read() -> None:
    man = _parsed(
        "A man in a red jacket walks",
        "DET NOUN ADP DET ADJ NOUN VERB",
        "det nsubj prep det amod pobj ROOT",
        [1, 6, 1, 5, 5, 2, 6],
        "a man in a red jacket walk",
    )
    assert marked(parsed_phrase(man)) == "_man_"
    assert marked(parsed_phrase(man, True)) == "_man_ in a red jacket"
    car = _parsed(
        "The object is a small car",
        "DET NOUN AUX DET ADJ NOUN",
        "det nsubj ROOT det amod attr",
        [1, 2, 2, 5, 5, 2],
        "the object be a small car",
    )
    assert marked(parsed_phrase(car)) == "small _car_"
    toward = _parsed(
        "The object hits a car",
        "DET NOUN VERB DET NOUN",
        "det nsubj ROOT det dobj",
        [1, 2, 2, 4, 2],
        "the object hit a car",
    )
    with pytest.raises(NoNounError, match="no subject that is a noun"):
        parsed_phrase(toward)
