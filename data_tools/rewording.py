"""The same conversation in other words: nouns of prompts replaced by synonyms, options of a question in another order.

Mentions are character spans, so a word is replaced where it is meant, and every span moves along.
"""

import re
from collections.abc import Mapping

import numpy as np

from swim.data_tools.records import Conversation, Mention, Turn

OPTION = re.compile(r"^[ \t]*\(?([A-Z])[).:][ \t]*(\S.*?)[ \t]*$", re.MULTILINE)
LETTER = re.compile(r"^[ \t]*\(?([A-Z])(?=[).:]|\s*$)")


def replace_nouns(conversation: Conversation, words: Mapping[str, str]) -> tuple[Conversation, int]:
    """The conversation with the heads of its prompts' mentions replaced, looked up in lower case; and how many were."""
    turns, count = [], 0
    for turn in conversation.turns:
        if turn.role == "user":
            turn, replaced = _replace(turn, words)
            count += replaced
        turns.append(turn)
    return conversation.model_copy(update={"turns": turns}), count


def _replace(turn: Turn, words: Mapping[str, str]) -> tuple[Turn, int]:
    heads = sorted({mention.head for mention in turn.mentions})
    chosen = [(start, end, word) for start, end in heads if (word := words.get(turn.text[start:end].lower()))]
    text, last, moves = "", 0, list[tuple[int, int, int]]()
    for start, end, word in chosen:
        if start < last:
            raise ValueError(f"the mentions at characters {start} and before {last} overlap; replace one of them only")
        word = word[0].upper() + word[1:] if turn.text[start].isupper() else word
        text += turn.text[last:start] + word
        moves.append((start, end, len(text)))
        last = end
    text += turn.text[last:]

    def moved(at: int) -> int:
        """Where a boundary of a span is now; none lies inside a word that was replaced, but for its ends."""
        shift = 0
        for start, end, new_end in moves:
            if at >= end and at > start:
                shift = new_end - end
        return at + shift

    mentions = [
        Mention(
            start=moved(mention.start),
            end=moved(mention.end),
            head=(moved(mention.head[0]), moved(mention.head[1])),
            kind=mention.kind,
            object_ids=mention.object_ids,
        )
        for mention in turn.mentions
    ]
    return turn.model_copy(update={"text": text, "mentions": mentions}), len(chosen)


def options_of(prompt: str) -> dict[str, str]:
    """Letter -> text of the options that stand in a prompt, one a line: the last A and what follows it in order."""
    return {match[1]: match[2] for match in _options(prompt)}


def _options(prompt: str) -> list[re.Match[str]]:
    # "Q: What is it?" has the form of an option, too.
    found = list(OPTION.finditer(prompt))
    first = max((i for i, match in enumerate(found) if match[1] == "A"), default=len(found))
    return [match for i, match in enumerate(found[first:]) if match[1] == chr(ord("A") + i)]


def letter_of(target: str) -> str | None:
    """The letter that a target such as "(B)", "B" or "B. a cup" begins with."""
    match = LETTER.match(target)
    return match[1] if match else None


def shuffle_options(conversation: Conversation, seed: int, name: str) -> Conversation:
    """The conversation with the texts of its options in another order and its target's letter changed accordingly.

    The order depends on the seed and on `name`, and no option stays where it was. ValueError without two different
    options, without a letter as target, and for mentions behind the first option, which would lose their place.
    """
    asked = max((i for i, turn in enumerate(conversation.turns) if turn.role == "user"), default=-1)
    prompt, target = conversation.turns[asked], conversation.turns[-1]
    found, letter = _options(prompt.text), letter_of(target.text)
    texts = [match[2] for match in found]
    if asked < 0 or not 1 < len(set(texts)) == len(texts) or letter not in {match[1] for match in found}:
        raise ValueError(f"{name}: no question with lettered options and a letter as answer")
    if any(mention.end > found[0].start() for mention in prompt.mentions):
        raise ValueError(f"{name}: a mention lies in the options, which cannot be shuffled")
    # Turned round, so that every option moves, the right one too: a model that likes a letter is to be found out.
    shift = int(np.random.default_rng([seed, *name.encode()]).integers(1, len(texts)))
    order = [(i + shift) % len(texts) for i in range(len(texts))]
    text, last = "", 0
    for match, source in zip(found, order):
        text += prompt.text[last : match.start(2)] + texts[source]
        last = match.end(2)
    text += prompt.text[last:]
    new_letter = found[order.index([match[1] for match in found].index(letter))][1]
    turns = list(conversation.turns)
    turns[asked] = prompt.model_copy(update={"text": text})
    turns[-1] = Turn(role="assistant", text=f"({new_letter})")
    return conversation.model_copy(update={"turns": turns})
