"""What methods recall, beside what the full cache recalls."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from vase_vllm.tools.evaluation.likelihood import ALL, GROUPS
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.recall import RecallCase
from vase_vllm.tools.evaluation.scores import Scores
from vase_vllm.tools.evaluation.statistics import Estimate, mean_estimate, share_estimate

LEAST_SOLVED = 0.8
"""A kind at a distance counts if the full cache recalls at least this share of its cases."""


@dataclass(frozen=True)
class Grade:
    """What one run of the model made of one case.

    Attributes:
        case: the case.
        is_recalled: whether greedy decoding writes the values: each of their tokens is the most
            probable one after the right tokens before it.
        nll: mean negative log-likelihood of the values' tokens, in nats.
    """

    case: RecallCase
    is_recalled: bool
    nll: float


def grade(case: RecallCase, scores: Scores) -> Grade:
    """See :class:`Grade`."""
    # Row i of the scores is about token i + 1.
    rows = np.array(case.value_positions) - 1
    return Grade(case, bool((scores.ranks[rows] == 1).all()), float(scores.nll[rows].mean()))


@dataclass(frozen=True)
class RecallRow:
    """One method on the cases of one kind at one distance, of one half or of both.

    Attributes:
        group: of ``GROUPS``.
        method: the label; ``full`` is the full cache.
        budget: tokens kept at an eviction; None is the full cache.
        kind: kind of the fact.
        distance: tokens between the statement and the questions.
        cases: how many.
        counts: whether the full cache solves enough of the cases of both halves.
        recalled: share of cases that are recalled.
        nll: of a value's token; the interval is over cases.
    """

    group: str
    method: str
    budget: int | None
    kind: str
    distance: int
    cases: int
    counts: bool
    recalled: Estimate
    nll: Estimate


def recall_rows(grades: dict[Method, list[Grade]]) -> Iterator[RecallRow]:
    """A row for each group, kind, distance and method, the full cache first."""
    (full,) = (method for method in grades if method.budget is None)
    cells = dict.fromkeys((a.case.kind, a.case.distance) for a in grades[full])
    for group in GROUPS:
        for kind, distance in cells:
            solved = [a.is_recalled for a in _of(grades[full], ALL, kind, distance)]
            counts = sum(solved) >= LEAST_SOLVED * len(solved)
            for method, found in grades.items():
                if chosen := _of(found, group, kind, distance):
                    yield RecallRow(
                        group=group,
                        method=method.label,
                        budget=method.budget,
                        kind=kind,
                        distance=distance,
                        cases=len(chosen),
                        counts=counts,
                        recalled=share_estimate([a.is_recalled for a in chosen]),
                        nll=mean_estimate([a.nll for a in chosen]),
                    )


def _of(grades: Sequence[Grade], group: str, kind: str, distance: int) -> list[Grade]:
    return [
        grade
        for grade in grades
        if (grade.case.kind, grade.case.distance) == (kind, distance)
        and group in (grade.case.half, ALL)
    ]
