"""What a caption is about: its first noun phrase and the noun at its head, and the words of a text that carry content.

Two chunkers with one interface. spaCy parses; the built-in one reads from the determiner to the first word that cannot
belong to the phrase, knowing closed word classes, endings and the commonest adjectives and verbs of captions. It gives
up wherever that does not decide: a wrong noun would train attention onto the wrong object.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

VERSION = 1  # of the built-in rules
MAX_CHARS = 1000  # of a caption that are read


class NoNounError(ValueError):
    """A text does not begin with a noun phrase that the chunker is sure of; the message says why."""


@dataclass(frozen=True)
class NounPhrase:
    """A noun phrase without its article; `head` is the [start, end) of its noun in `text`."""

    text: str
    head: tuple[int, int]

    @property
    def noun(self) -> str:
        """The noun itself."""
        return self.text[slice(*self.head)]


Chunker = Callable[[str, bool], NounPhrase]
"""(text, longer) -> what its first sentence is about, with what follows the noun if `longer`; NoNounError."""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


SINGULAR = _words("a an this that another each every one")
NUMBERS = _words("two three four five six seven eight nine ten")
DETERMINERS = SINGULAR | NUMBERS | _words("the these those some several many few both his her its their my your our")
PREPOSITIONS = _words(
    """of in on at by with from to into onto over under near behind beside besides between among through across along
    against around above below beneath inside outside off toward towards up down during before after upon within
    without like for about past beyond underneath alongside atop via per than"""
)
AUXILIARIES = _words(
    """is are was were be been being am has have had having does do did can could will would may might must shall should
    isn't aren't wasn't weren't doesn't don't didn't can't"""
)
PRONOUNS = _words(
    """he she it they we you i him them us me himself herself itself themselves who whom whose which what that there
    here someone something anyone anything everyone everything nobody nothing mine hers theirs"""
)
CONJUNCTIONS = _words("and or but nor so yet while as when where because if though although until since whether then")
ADVERBS = _words(
    """very quite rather too also just only still again now away back together forward forwards backward backwards
    not no yes almost always never often once twice first later soon most more less much even ahead apart aside next"""
)
CLOSED = DETERMINERS | PREPOSITIONS | AUXILIARIES | PRONOUNS | CONJUNCTIONS

ADJECTIVES = _words(
    """red orange yellow green blue purple violet pink brown black white grey gray beige tan golden silver dark light
    bright pale blonde blond bald big small large little tiny huge tall short long wide narrow thin thick fat slim heavy
    old young new elderly adult middle-aged round square flat empty full open wet dry clean dirty shiny fluffy furry
    hairy curly wooden plastic metal metallic cotton woolen denim knitted plaid striped checkered spotted female male
    asian african american european similar same other different second third last single white-haired plain clear
    transparent soft hard loud quiet happy sad casual formal colorful colourful beautiful cute fast slow low high hot
    cold warm main entire whole left right upper lower front rear nearest"""
)
# Their forms end a phrase that has a noun; before one they are nouns or adjectives ("a jump rope", "glasses").
_VERBS = _words(
    """stand sit walk run move hold wear play lie jump ride look turn swim fly drive eat drink climb throw catch kick
    hit push pull carry lift drop roll spin slide swing hang rest lean wave smile talk speak sing dance cook cut open
    close
    pick put place touch point reach raise lower appear disappear enter leave approach pass cross follow chase bite lick
    sniff bark sleep wake stay remain seem become begin start continue stop fall rise float sail race work read write
    show hand wash clean brush shake bend kneel crouch step gesture stare watch gaze wait drift travel head go come get
    take make give keep let say tell use try need want feel see hear know think grab grip pour stir dig bounce glide"""
)
_PAST = _words(
    """stood sat ran held wore lay lain rode swam flew drove ate drank threw caught hit cut put spoke sang slept woke
    stayed became began fell rose shook bent knelt went came got took made gave kept let said told felt saw heard swung
    hung worn ridden driven eaten thrown taken given shown seen parked"""
)
_NOUNS_ING = _words(
    """building ceiling painting drawing ring king string wing swing clothing railing sling spring wedding earring
    evening pudding duckling sibling gosling plaything awning crossing bearing icing stocking herring"""
)
_NOUNS_ED = _words("bed shed sled seed weed reed steed speed moped biped newlywed")
_NOUNS_LY = _words("fly butterfly dragonfly belly family jelly lily bully trolley assembly ally doily")
_NOUNS_LIKE_ADJECTIVES = _words(
    "table cable vegetable stable dish radish olive hive beehive native detective locomotive fish"
)
_ALSO_NOUNS = _words("light adult square")
_ADJECTIVE_ENDINGS = ("ful", "ous", "less", "ish", "ive", "able", "ible")
_PLURALS = _words("people men women children police feet teeth mice geese")
_PARTITIVES = _words("pair group set piece kind type sort bunch couple slice team herd flock crowd row pile stack")
# Such a noun says nothing about what is seen there.
GENERIC = _words(
    """object objects thing things item items video clip image picture frame scene footage camera screen shot view side
    middle center centre background foreground corner edge bottom top beginning end part region area subject target
    color colour shape size way moment time left right front back one ones something position distance"""
)

_TOKEN = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*|\S")
_SENTENCE_END = re.compile(r"(?<=[\w)\"'])\s*[.!?;\n](?=\s|$)|\n")
_PLACE = re.compile(
    r"(?:in|on|at|throughout|during|from|near|inside|behind|initially|here)\b[^,]{0,60},\s*", re.IGNORECASE
)
_DETERMINER_NEXT = rf"(?=(?:{'|'.join(sorted(DETERMINERS))})\b)"
_COPULA = r"(?:is|are|was|were|(?:appear|seem|look)s?\s+to\s+be)"
_LEAD = re.compile(
    rf"""(?:there\s+{_COPULA}|(?:this|that|it|these|those|they|he|she)\s+{_COPULA}|(?:we|you|one)\s+(?:can\s+)?see
    |(?:the|this)\s+(?:\w+\s+){{0,2}}?(?:object|thing|item|video|clip|image|picture|scene|footage|frame|subject|region)
     \b[^,]{{0,30}}?\s(?:{_COPULA}|shows|features|depicts|captures|displays))\s+{_DETERMINER_NEXT}""",
    re.IGNORECASE | re.VERBOSE,
)


def content_words(text: str) -> set[str]:
    """The distinct words of a text that carry content: case folded, without closed-class words, possessive 's and
    plural s (but for -ss, -us, -is and words of three letters); nothing else is stemmed."""
    words = set()
    for match in _TOKEN.finditer(text.casefold().replace("’", "'")):
        word = match.group().removesuffix("'s")
        if not word[0].isalnum() or word in CLOSED or word in ADVERBS:
            continue
        words.add(word[:-1] if _looks_plural(word) and len(word) > 3 else word)
    return words


def first_phrase(text: str, longer: bool = False) -> NounPhrase:
    """The noun phrase that the first sentence of a caption, or a label, begins with, by the built-in rules; with what
    follows it up to the next noun if `longer`. NoNounError says what could not be decided."""
    sentence = _SENTENCE_END.split(text.strip()[:MAX_CHARS], maxsplit=1)[0]
    start = 0
    for pattern in (_PLACE, _PLACE, _LEAD):
        match = pattern.match(sentence, start)
        start = match.end() if match else start
    tokens = list(_TOKEN.finditer(sentence, start))
    if not tokens:
        raise NoNounError("it has no words")
    chunk = _Chunk([match.group().replace("’", "'") for match in tokens])
    first, head, end = chunk.read(0)
    if chunk.determiner is None and end < len(tokens) and chunk.lower[0] not in ADJECTIVES | _PLURALS:
        raise NoNounError(f"it begins with {tokens[0].group()!r}, not with an article")
    if chunk.lower[head] in GENERIC:
        raise NoNounError(f"{tokens[head].group()!r} does not say what it is")
    if longer:
        end = chunk.extend(end)
    base = tokens[first].start()
    phrase = sentence[base : tokens[end - 1].end()]
    if first == 0 and chunk.lower[0] in NUMBERS | ADJECTIVES | _PLURALS:
        phrase = phrase[0].lower() + phrase[1:]
    return NounPhrase(phrase, (tokens[head].start() - base, tokens[head].end() - base))


def find_chunker(name: str = "auto") -> tuple[str, Chunker]:
    """Name and function of the chunker 'spacy', 'built-in', or 'auto': spaCy where a model en_core_web_* is installed.

    ValueError if spaCy or its model is asked for and missing.
    """
    found, parse = load_parser(name)
    return found, first_phrase if parse is None else lambda text, longer: parsed_phrase(parse(text), longer)


def load_parser(name: str = "auto") -> tuple[str, Any]:
    """Name of a chunker and spaCy's parser, None for the built-in rules; `name` and errors as in `find_chunker`."""
    if name not in ("auto", "spacy", "built-in"):
        raise ValueError(f"chunker {name!r}: there are auto, spacy, built-in")
    models: list[str] = []
    if name != "built-in" and importlib.util.find_spec("spacy"):
        import spacy

        models = [model for model in spacy.util.get_installed_models() if model.startswith("en_core_web_")]
    if models:
        nlp = spacy.load(max(models))
        return f"spaCy {spacy.__version__} {nlp.meta['name']} {nlp.meta['version']}", nlp
    if name == "spacy":
        raise ValueError(
            "chunker 'spacy': no model en_core_web_* is installed; python -m spacy download en_core_web_sm"
        )
    return f"built-in {VERSION}", None


def noun_heads(text: str) -> list[tuple[int, int]]:
    """[start, end) of the nouns that the built-in rules find in a text, for marking them: one for every phrase that
    begins with a determiner, a number, an adjective or an irregular plural. What cannot be decided is passed over."""
    matches = list(_TOKEN.finditer(text))
    chunk = _Chunk([match.group().replace("’", "'") for match in matches])
    heads, at = [], 0
    while at < len(matches):
        try:
            if chunk.lower[at] not in DETERMINERS | ADJECTIVES | _PLURALS:
                raise NoNounError("no phrase begins here")
            first, head, end = chunk.read(at)
        except NoNounError:
            at += 1
            continue
        # "which way does the circle move": the verb that an auxiliary in front of the phrase leaves to its end.
        asked = any(word in AUXILIARIES for word in chunk.lower[:at])
        if asked and head > first and chunk.lower[head] in _VERBS and chunk.lower[head - 1] not in ADJECTIVES:
            head -= 1
        heads.append(matches[head].span())
        at = end
    return heads


def parsed_phrase(document: Any, longer: bool = False) -> NounPhrase:
    """As `first_phrase`, of a text parsed by spaCy: its subject, or what its subject is said to be or to show."""
    showing = ("be", "show", "feature", "depict", "capture", "display", "see", "appear", "seem")
    for chunk in next(document.sents).noun_chunks if len(document) else ():
        noun = chunk.root
        named = noun.pos_ == "NOUN" and noun.text.lower() not in GENERIC
        subject = noun.dep_ in ("nsubj", "nsubjpass", "ROOT")
        if not named or not (subject or (noun.dep_ in ("attr", "dobj", "oprd") and noun.head.lemma_ in showing)):
            continue
        first = next(i for i in range(chunk.start, noun.i + 1) if document[i].lower_ not in DETERMINERS - NUMBERS)
        last = max(token.i for token in noun.subtree) if longer else noun.i
        if longer and last == noun.i:
            raise NoNounError("nothing that would tell it apart follows the noun")
        start = document[first].idx
        text = document.text[start : document[last].idx + len(document[last])]
        return NounPhrase(text, (noun.idx - start, noun.idx - start + len(noun)))
    raise NoNounError("its first sentence has no subject that is a noun")


class _Chunk:
    """Reads one noun phrase from tokens."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.lower = tokens, [token.lower() for token in tokens]
        self.determiner: str | None = None

    def read(self, at: int) -> tuple[int, int, int]:
        """(first, head, end) of the phrase at a token, without its determiner; NoNounError if there is none."""
        first, self.determiner = at, None
        while first < len(self.lower) and self.lower[first] in DETERMINERS:
            self.determiner = self.lower[first]
            if self.determiner in NUMBERS:
                break
            first += 1
        end, head = first + (self.determiner in NUMBERS), -1
        while end < len(self.lower):
            role = self._role(end, noun_before=head >= 0)
            if role is None:
                break
            head = end if role == "noun" else head
            end += 1
        if head != end - 1 or head < 0:
            word = self.tokens[min(end, len(self.tokens) - 1)]
            raise NoNounError(f"no noun is found before {word!r}")
        if end - first > 6:
            raise NoNounError(f"a phrase of {end - first} words, the limit is 6")
        if self.lower[head] in _PARTITIVES and self._next(head) == "of":
            determiner = self.determiner
            _, head, end = self.read(end + 1)
            self.determiner = determiner
        return first, head, end

    def extend(self, at: int) -> int:
        """End of what follows a phrase and tells it from others: 'wearing a red shirt', 'on the left'."""
        start = at
        while at < len(self.lower) and at - start < 3 and self._links(at):
            at += 1
        if at == start or at == len(self.lower):
            raise NoNounError("nothing that would tell it apart follows the noun")
        if self._next(at) is None and self.lower[at] in ("left", "right"):
            return at + 1
        if self.lower[at : at + 2] in (["the", "left"], ["the", "right"]):
            return at + 2
        return self.read(at)[2]

    def _links(self, at: int) -> bool:
        word = self.lower[at]
        return word in PREPOSITIONS or word in ("front", "next") or word.endswith(("ing", "ed")) or word in _PAST

    def _next(self, at: int) -> str | None:
        return self.lower[at + 1] if at + 1 < len(self.lower) else None

    def _open(self, word: str | None) -> bool:
        """Whether a word may be a noun or an adjective."""
        return word is not None and word[0].isalnum() and word not in CLOSED and word not in ADVERBS

    def _role(self, at: int, *, noun_before: bool) -> str | None:
        """'noun' (so far), 'modifier', or None for the end of the phrase; NoNounError where it cannot be told."""
        word, after, before = self.lower[at], self._next(at), self.lower[at - 1] if at else ""
        if word in (",", "and", "-"):
            between = not noun_before and before in ADJECTIVES and after is not None
            return "modifier" if between and (after in ADJECTIVES or word == ",") else None
        if word in ADVERBS or (word.endswith("ly") and word not in _NOUNS_LY):
            return None if noun_before else "modifier"
        if not self._open(word):
            return None
        if word.endswith("'s") or word.isdecimal():
            return "modifier"
        if word in _ALSO_NOUNS and (noun_before or not self._open(after)):
            return "noun"
        if word in ADJECTIVES or (word.endswith(_ADJECTIVE_ENDINGS) and word not in _NOUNS_LIKE_ADJECTIVES):
            if noun_before and self._open(after):
                raise NoNounError(f"{self.tokens[at]!r} may or may not belong to the phrase")
            return None if noun_before else "modifier"
        if word.endswith(("ing", "ed")) and word not in _NOUNS_ING | _NOUNS_ED:
            return self._participle(at, noun_before)
        if noun_before and self._ends(at, word, before, after):
            return None
        if not noun_before and before in ADJECTIVES and _is_verb(word):
            raise NoNounError(f"{self.tokens[at]!r} may be a verb or a noun")
        return "noun"

    def _participle(self, at: int, noun_before: bool) -> str | None:
        """'a running man' and 'a man running'; 'a leather padded chair' cannot be told from 'a man named John'."""
        word, after = self.tokens[at], self._next(at)
        follows = self._open(after) and not str(after).endswith("ly")
        if not noun_before and follows:
            return "modifier"
        if not noun_before or (follows and word.endswith("ed") and self.tokens[at + 1].islower()):
            raise NoNounError(f"{word!r} may be a verb or a noun")
        return None

    def _ends(self, at: int, word: str, before: str, after: str | None) -> bool:
        """Whether a word after a noun is a verb."""
        plural_before = before in _PLURALS or _looks_plural(before)
        if word in _PAST or (word in _VERBS and plural_before):
            return True
        if not _looks_plural(word):
            return False
        if _is_verb(word) or self.determiner in SINGULAR or after in DETERMINERS:
            return True
        if self.determiner in NUMBERS or after in AUXILIARIES or (self.determiner is None and after is None):
            return False
        raise NoNounError(f"{self.tokens[at]!r} may be a verb or a noun")


def _is_verb(word: str) -> bool:
    """Whether it is the form in -s of a known verb."""
    stems = {word[:-1], word.removesuffix("es"), word.removesuffix("ies") + "y"}
    return _looks_plural(word) and bool(stems & _VERBS)


def _looks_plural(word: str) -> bool:
    return len(word) > 2 and word.endswith("s") and not word.endswith(("ss", "us", "is", "'s"))
