"""Sequences that state a fact once and ask for it much later."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.texts import Text

PLACES = (
    *("archive", "bakery", "cellar", "chapel", "cottage", "foundry", "granary", "harbour"),
    *("laundry", "lighthouse", "observatory", "orchard", "pharmacy", "quarry", "stable", "vault"),
)
SYLLABLES = ("bel", "cor", "dan", "fen", "gal", "hos", "jun", "lor", "mib", "nar", "pol", "quin")


@dataclass(frozen=True)
class Fact:
    """What is stated, and its questions.

    Attributes:
        questions: each the beginning of a sentence and the value that ends it. The sentences in
            full are the statement.
    """

    questions: tuple[tuple[str, str], ...]

    @property
    def sentences(self) -> str:
        """The statement; the questions with the right values are the same words."""
        return " ".join(f"{question} {value}." for question, value in self.questions)

    def value_spans(self) -> list[range]:
        """Where in the sentences each value is, in characters."""
        spans, start = [], 0
        for question, value in self.questions:
            start += len(question) + 1
            spans.append(range(start, start + len(value)))
            start += len(value) + 2
        return spans


def passcode(rng: random.Random) -> Fact:
    """Four digits, which nothing else in the text suggests."""
    return _passcodes(rng, 1)


def constant(rng: random.Random) -> Fact:
    """A number with a name that is no word."""
    name = "".join(rng.sample(SYLLABLES, 2)).capitalize()
    value = f"{rng.randrange(2, 10)}.{rng.randrange(100, 1000)}"
    return Fact(((f"The value of the {name} constant is", value),))


def two_facts(rng: random.Random) -> Fact:
    """Two passcodes, stated together and asked for one after the other."""
    return _passcodes(rng, 2)


def _passcodes(rng: random.Random, count: int) -> Fact:
    places = rng.sample(PLACES, count)
    values = [f"{rng.randrange(1000, 10_000)}" for _ in places]
    return Fact(
        tuple(
            (f"The passcode of the {place} is", value)
            for place, value in zip(places, values, strict=True)
        )
    )


KINDS: dict[str, Callable[[random.Random], Fact]] = {
    "passcode": passcode,
    "constant": constant,
    "two facts": two_facts,
}


@dataclass(frozen=True)
class RecallCase(Sample):
    """A sequence that asks for a fact.

    Attributes:
        kind: kind of the fact.
        distance: tokens between the statement and the questions.
        value_positions: positions of the tokens of the values.
    """

    kind: str
    distance: int
    value_positions: tuple[int, ...]


def recall_cases(
    texts: Sequence[Text],
    tokenizer: Any,
    distances: Sequence[int],
    instances: int,
    fact_at: int,
) -> list[RecallCase]:
    """Cases of every kind at every distance.

    The tokens in front of the statement and between it and the questions are a passage of one of
    the texts, which say nothing of the facts.

    Args:
        texts: what the passages are from; a case is of the half of its text.
        tokenizer: of Hugging Face; it must tell which characters a token is from.
        instances: cases of each kind at each distance.
        fact_at: tokens in front of the statement.

    Raises:
        EvictionError: a text is too short, or the tokenizer cannot tell.
    """
    if not tokenizer.is_fast:
        raise EvictionError("--suite recall needs a fast tokenizer; use --suite likelihood")
    plain = {"add_special_tokens": False, "verbose": False}
    passages = [tokenizer(text.content, **plain)["input_ids"] for text in texts]
    beginning = tokenizer("")["input_ids"]  # what the model wants in front, mostly nothing
    cases = []
    for distance in dict.fromkeys(distances):
        for kind, make in KINDS.items():
            for index in range(instances):
                text, passage = texts[index % len(texts)], passages[index % len(texts)]
                name = f"{kind}, distance {distance}, {index + 1}"
                if (surplus := len(passage) - fact_at - distance) < 0:
                    raise EvictionError(
                        f"{text.name} has {len(passage)} tokens: --fact-at {fact_at} and "
                        f"--distances {distance} need {fact_at + distance}; give longer --texts"
                    )
                rng = random.Random(name)
                start = rng.randrange(surplus + 1)
                filler = passage[start : start + fact_at + distance]
                fact = _absent_fact(make, rng, tokenizer.decode(filler))
                before = [*beginning, *filler[:fact_at]]
                statement = _encode(tokenizer, fact)[0]
                between = filler[fact_at:]
                questions, offsets = _encode(tokenizer, fact)
                asked_at = len(before) + len(statement) + len(between)
                cases.append(
                    RecallCase(
                        name=name,
                        half=text.half,
                        token_ids=(*before, *statement, *between, *questions),
                        top_logprobs=0,
                        kind=kind,
                        distance=distance,
                        value_positions=tuple(asked_at + offset for offset in offsets),
                    )
                )
    return cases


def _absent_fact(make: Callable[[random.Random], Fact], rng: random.Random, filler: str) -> Fact:
    """A fact whose values are nowhere in the filler."""
    while True:
        fact = make(rng)
        if not any(value in filler for _, value in fact.questions):
            return fact


def _encode(tokenizer: Any, fact: Fact) -> tuple[list[int], list[int]]:
    """The tokens of a fact's sentences in a paragraph of their own, and which are of its values."""
    opening = "\n\n"
    encoded = tokenizer(
        f"{opening}{fact.sentences}\n\n", add_special_tokens=False, return_offsets_mapping=True
    )
    values = {len(opening) + i for span in fact.value_spans() for i in span}
    offsets = [
        index
        for index, (start, end) in enumerate(encoded["offset_mapping"])
        if values & set(range(start, end))
    ]
    return encoded["input_ids"], offsets
