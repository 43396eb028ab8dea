"""Promise: another wording keeps every mention on its words and every target on its option."""

import pytest

from swim.data_tools.records import Conversation, Mention, Turn
from swim.data_tools.rewording import letter_of, options_of, replace_nouns, shuffle_options


def _mention(text: str, words: str, head: str, occurrence: int = 0) -> Mention:
    start = -1
    for _ in range(occurrence + 1):
        start = text.index(words, start + 1)
    at = start + words.index(head)
    return Mention(start=start, end=start + len(words), head=(at, at + len(head)), object_ids=["0"])


def test_nouns_are_replaced_where_they_are_meant_and_spans_move_along() -> None:
    text = "Dog or dog? The brown dog there chases a dog and a cat."
    mentions = [
        _mention(text, "Dog", "Dog"),
        _mention(text, "brown dog there", "dog"),
        _mention(text, "brown", "brown"),
        _mention(text, "cat", "cat"),
    ]
    answer = Turn(role="assistant", text="The dog.", mentions=[_mention("The dog.", "dog", "dog")])
    conversation = Conversation(task="x", turns=[Turn(role="user", text=text, mentions=mentions), answer])
    changed, count = replace_nouns(conversation, {"dog": "terrier", "cat": "pet", "red": "blue"})
    turn = changed.turns[0]
    assert turn.text == "Terrier or dog? The brown terrier there chases a dog and a pet."
    assert count == 3
    assert [turn.text[m.start : m.end] for m in turn.mentions] == ["Terrier", "brown terrier there", "brown", "pet"]
    assert [turn.text[slice(*m.head)] for m in turn.mentions] == ["Terrier", "terrier", "brown", "pet"]
    assert changed.turns[1] == answer
    assert replace_nouns(conversation, {})[0] == conversation


def test_two_mentions_of_one_word_are_replaced_once() -> None:
    twice = [_mention("a dog", "dog", "dog"), _mention("a dog", "a dog", "dog")]
    conversation = Conversation(task="x", turns=[Turn(role="user", text="a dog", mentions=twice)])
    changed, count = replace_nouns(conversation, {"dog": "it"})
    assert (changed.turns[0].text, count) == ("a it", 1)
    assert [(m.start, m.end, m.head) for m in changed.turns[0].mentions] == [(2, 4, (2, 4)), (0, 4, (2, 4))]


QUESTION = "Which cup moves?\n(A) the red one\n(B) the blue one\n(C) both\n(D) none"


def _asked(text: str = QUESTION, answer: str = "(B)", mentions: tuple[Mention, ...] = ()) -> Conversation:
    asked = Turn(role="user", text=text, mentions=list(mentions))
    return Conversation(task="multiple_choice", turns=[asked, Turn(role="assistant", text=answer)])


@pytest.mark.parametrize("seed", range(6))
def test_shuffled_options_keep_the_answer_and_change_its_place(seed: int) -> None:
    mention = _mention(QUESTION, "cup", "cup")
    changed = shuffle_options(_asked(mentions=(mention,)), seed, "a#0")
    prompt, target = changed.turns[0].text, letter_of(changed.turns[1].text)
    options = options_of(prompt)
    assert target is not None
    assert options[target] == "the blue one"
    assert sorted(options.values()) == sorted(options_of(QUESTION).values())
    assert all(options[letter] != text for letter, text in options_of(QUESTION).items())
    assert prompt.startswith("Which cup moves?\n(A) ")
    assert changed.turns[0].mentions == [mention]
    assert shuffle_options(_asked(mentions=(mention,)), seed, "a#0") == changed


def test_a_question_in_the_form_of_an_option_is_none() -> None:
    asked = "A. Note first.\nQ: Which cup moves?\n(A) red\n(B) blue"
    assert options_of(asked) == {"A": "red", "B": "blue"}
    turned = shuffle_options(_asked(asked), 0, "a#0").turns
    assert (turned[0].text, turned[1].text) == ("A. Note first.\nQ: Which cup moves?\n(A) blue\n(B) red", "(A)")


def test_orders_differ_between_questions() -> None:
    assert len({shuffle_options(_asked(), 0, f"a#{i}").turns[0].text for i in range(20)}) == 3


@pytest.mark.parametrize("target", ["B", "(B)", "B.", "(B) the blue one", "B: the blue one", " B "])
def test_targets_name_their_option_in_usual_ways(target: str) -> None:
    assert letter_of(target) == "B"


def test_what_has_no_options_is_refused() -> None:
    for conversation in (_asked("What moves?"), _asked(answer="the blue one"), _asked(answer="(E)")):
        with pytest.raises(ValueError, match="a#0: no question with lettered options"):
            shuffle_options(conversation, 0, "a#0")
    with pytest.raises(ValueError, match="lies in the options"):
        shuffle_options(_asked(mentions=(_mention(QUESTION, "blue", "blue"),)), 0, "a#0")
