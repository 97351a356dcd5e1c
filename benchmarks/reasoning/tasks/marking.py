"""The functions that the tasks name: GPQA's choices in order, and an answer marked."""

from __future__ import annotations

import random
import re
from typing import Any

BOX = "\\boxed{"
LETTERS = "ABCD"
WRONG = [f"Incorrect Answer {n}" for n in (1, 2, 3)]


def final_box(text: str) -> str | None:
    r"""The answer from its last ``\boxed{`` on, or None; thoughts that are closed do not count."""
    answer = text.rpartition("</think>")[2]
    start = answer.rfind(BOX)
    return None if start < 0 else answer[start:]


def mark(text: str, is_right: Any) -> dict[str, float]:
    box = final_box(text)
    return {
        "exact_match": float(box is not None and is_right(box)),
        "no_answer": float(box is None),
    }


def mark_mathematics(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """By value: math-verify reads both as LaTeX and compares them with SymPy."""
    from math_verify import LatexExtractionConfig, parse, verify

    def parsed(box: str) -> list[Any]:
        # Without a word like "answer" nothing outside of the box is looked at.
        config = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
        return parse(box, [config])

    expected = doc["answer"] if "answer" in doc else doc["Answer"]
    gold = parsed(f"{BOX}{expected}}}")
    return mark(results[0], lambda box: verify(gold, parsed(box)))


def mark_choice(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    r"""By letter, which may stand in ``\text{}`` or in parentheses."""
    pattern = rf"{re.escape(BOX)}(?:\\[a-z]+\{{)?\s*\(?([{LETTERS}])\b"

    def is_right(box: str) -> bool:
        match = re.match(pattern, box)
        return match is not None and match[1] == doc["answer"]

    return mark(results[0], is_right)


def shuffle_choices(dataset: Any) -> Any:
    """Give each question of GPQA a ``problem`` with its choices, and an ``answer``: a letter.

    The order depends on the question alone, so that it is the same for every policy and seed.
    """

    def shuffled(doc: dict[str, str]) -> dict[str, str]:
        right = doc["Correct Answer"].strip()
        choices = [right, *(doc[name].strip() for name in WRONG)]
        random.Random(doc["Question"]).shuffle(choices)
        lines = [f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=True)]
        problem = "\n".join([doc["Question"].strip(), *lines])
        return {"problem": problem, "answer": LETTERS[choices.index(right)]}

    return dataset.map(shuffled)
