"""The nouns of a text, for marking: given by `<ins>` tags, else found by spaCy or by the built-in rules.

Unlike `nouns.first_phrase`, which gives up rather than name a wrong noun, this looks at every phrase of the text: what
it misses or marks too much costs a click.
"""

import re

from swim.data_tools import nouns
from swim.data_tools.sources.nl_refer import split_tags

Span = tuple[int, int]
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")


def words_of(text: str) -> list[Span]:
    """[start, end) of every word: letters and digits, with apostrophes and hyphens inside."""
    return [match.span() for match in _WORD.finditer(text)]


def marked_nouns(tagged: str, chunker: str = "auto") -> tuple[str, list[Span], str]:
    """Text without tags, [start, end) of its nouns and who found them; ValueError for tags that do not pair up."""
    text, spans = split_tags(tagged)
    if spans:
        return text, spans, "tagged"
    return text, *find_nouns(text, chunker)


def find_nouns(text: str, chunker: str = "auto") -> tuple[list[Span], str]:
    """[start, end) of the nouns of a text, and the name of what found them; ValueError if that is not installed."""
    found, parse = nouns.load_parser(chunker)
    if parse is None:
        return nouns.noun_heads(text), found
    return [(token.idx, token.idx + len(token)) for token in parse(text) if token.pos_ in ("NOUN", "PROPN")], found
