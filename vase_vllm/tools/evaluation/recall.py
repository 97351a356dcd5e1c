"""Sequences that state a fact once and ask for it much later."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.texts import HALVES, Text

PLACES = (
    *("archive", "bakery", "cellar", "chapel", "cottage", "foundry", "granary", "harbour"),
    *("laundry", "lighthouse", "observatory", "orchard", "pharmacy", "quarry", "stable", "vault"),
)
SYLLABLES = ("bel", "cor", "dan", "fen", "gal", "hos", "jun", "lor", "mib", "nar", "pol", "quin")


Wording = tuple[str, str]
"""How a fact is stated, with {name} and {value}, and the beginning of a sentence that {value} ends.

The questions say it in other words than the statements: a model that has forgotten a fact but kept
the form of its sentence would otherwise do better than one that is asked in free words.
"""
PASSCODES: tuple[Wording, ...] = (
    (
        "\n\nThe passcode of the {name} is {value}.\n\n",
        "Question: What is the passcode of the {name}?\nAnswer: The passcode is",
    ),
    (" Remember that {value} is the passcode of the {name}.", "The passcode of the {name} is"),
    (
        "\n\nNote: whoever enters the {name} has to type the passcode {value} twice.\n\n",
        "To enter the {name}, type the passcode",
    ),
    (
        " The {name} has a new lock, and its passcode, which nobody else knows, is {value}.",
        "The passcode of the lock of the {name} is",
    ),
)
CONSTANTS: tuple[Wording, ...] = (
    (
        "\n\nThe value of the {name} constant is {value}.\n\n",
        "Question: What is the value of the {name} constant?\nAnswer: Its value is",
    ),
    (" We take {value} as the value of the {name} constant.", "The {name} constant is equal to"),
)


@dataclass(frozen=True)
class Fact:
    """What is stated, and its questions.

    Attributes:
        statement: the sentences that state it, with the space around them.
        questions: each the beginning of a sentence and the value that ends it.
    """

    statement: str
    questions: tuple[tuple[str, str], ...]

    @property
    def asked(self) -> str:
        """The questions with the right values, each a paragraph."""
        return "".join(f"\n\n{question} {value}." for question, value in self.questions)

    def value_spans(self) -> list[range]:
        """Where in :attr:`asked` each value is, in characters."""
        spans, start = [], 0
        for question, value in self.questions:
            start += len("\n\n") + len(question) + len(" ")
            spans.append(range(start, start + len(value)))
            start += len(value) + len(".")
        return spans


def passcode(rng: random.Random, wording: int) -> Fact:
    """Four digits, which nothing else in the text suggests."""
    return _passcodes(rng, 1, wording)


def constant(rng: random.Random, wording: int) -> Fact:
    """A number with a name that is no word."""
    name = "".join(rng.sample(SYLLABLES, 2)).capitalize()
    value = f"{rng.randrange(2, 10)}.{rng.randrange(100, 1000)}"
    return _worded(CONSTANTS[wording % len(CONSTANTS)], {name: value})


def two_facts(rng: random.Random, wording: int) -> Fact:
    """Two passcodes, stated together and asked for one after the other."""
    return _passcodes(rng, 2, wording)


def _passcodes(rng: random.Random, count: int, wording: int) -> Fact:
    places = rng.sample(PLACES, count)
    values = {place: f"{rng.randrange(1000, 10_000)}" for place in places}
    return _worded(PASSCODES[wording % len(PASSCODES)], values)


def _worded(wording: Wording, values: dict[str, str]) -> Fact:
    statement, question = wording
    return Fact(
        "".join(statement.format(name=name, value=value) for name, value in values.items()),
        tuple((question.format(name=name), value) for name, value in values.items()),
    )


Maker = Callable[[random.Random, int], Fact]
KINDS: dict[str, Maker] = {
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
    the texts, which say nothing of the facts. Every kind has several wordings, in turn.

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
                # Texts are alternately of one half and the other: each half gets every wording.
                wording = index // len(HALVES)
                fact = _absent_fact(make, rng, wording, tokenizer.decode(filler))
                before = [*beginning, *filler[:fact_at]]
                statement = tokenizer(fact.statement, **plain)["input_ids"]
                between = filler[fact_at:]
                questions, offsets = _encode_questions(tokenizer, fact)
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


def _absent_fact(make: Maker, rng: random.Random, wording: int, filler: str) -> Fact:
    """A fact whose values are nowhere in the filler."""
    while True:
        fact = make(rng, wording)
        if not any(value in filler for _, value in fact.questions):
            return fact


def _encode_questions(tokenizer: Any, fact: Fact) -> tuple[list[int], list[int]]:
    """The tokens of a fact's questions, and which of them are of the values."""
    encoded = tokenizer(fact.asked, add_special_tokens=False, return_offsets_mapping=True)
    values = {i for span in fact.value_spans() for i in span}
    offsets = [
        index
        for index, (start, end) in enumerate(encoded["offset_mapping"])
        if values & set(range(start, end))
    ]
    return encoded["input_ids"], offsets
