"""The likelihood suite: how far a model under eviction is from the model itself, on texts."""

from dataclasses import dataclass

import numpy as np

from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.scores import Floats, Scores, divergence
from vase_vllm.tools.evaluation.statistics import Estimate, mean_estimate
from vase_vllm.tools.evaluation.texts import HALVES

ALL = "all"
GROUPS = (*HALVES, ALL)


@dataclass(frozen=True)
class Comparison:
    """One method on one text, beside the full cache; means over the positions that count.

    Those are the ones that are computed after the first eviction.

    Attributes:
        sample: name of the text.
        half: its half.
        full_nll: negative log-likelihood of a token with the full cache, in nats.
        rise: by how much the method's is larger.
        divergence: lower bound of KL(full || method), in nats.
        same_top: share of positions with the same most probable token.
        rises: the rise at each position of the sequence, the first ones too: [n - 1].
    """

    sample: str
    half: str
    full_nll: float
    rise: float
    divergence: float
    same_top: float
    rises: Floats


def compare(sample: Sample, method: Method, full: Scores, evicted: Scores) -> Comparison:
    """See :class:`Comparison`."""
    counts = slice(method.first_scored, None)
    rises = evicted.nll - full.nll
    return Comparison(
        sample=sample.name,
        half=sample.half,
        full_nll=float(full.nll[counts].mean()),
        rise=float(rises[counts].mean()),
        divergence=float(divergence(full[counts], evicted[counts]).mean()),
        same_top=float((full.top_tokens == evicted.top_tokens)[counts].mean()),
        rises=rises,
    )


@dataclass(frozen=True)
class LikelihoodRow:
    """One method on the texts of one half, or of both.

    Attributes:
        group: of :data:`GROUPS`.
        method: the label.
        budget: tokens kept at an eviction.
        texts: how many.
        full_nll: the full cache's, at the positions that count for this budget.
        rise, divergence, same_top: as in :class:`Comparison`; intervals are over texts.
        minus_first: the rise less that of the first method at the same budget, text by text; None
            for this one.
    """

    group: str
    method: str
    budget: int
    texts: int
    full_nll: float
    rise: Estimate
    divergence: Estimate
    same_top: Estimate
    minus_first: Estimate | None


def likelihood_rows(comparisons: dict[Method, list[Comparison]]) -> list[LikelihoodRow]:
    """A row for each group and method."""
    rows = []
    first: dict[int | None, Method] = {}
    for method in comparisons:
        first.setdefault(method.budget, method)
    for group in GROUPS:
        for method, found in comparisons.items():
            chosen = [c for c in found if group in (c.half, ALL)]
            if not chosen:
                continue
            assert method.budget is not None
            reference = {c.sample: c.rise for c in comparisons[first[method.budget]]}
            differences = [c.rise - reference[c.sample] for c in chosen]
            rows.append(
                LikelihoodRow(
                    group=group,
                    method=method.label,
                    budget=method.budget,
                    texts=len(chosen),
                    full_nll=float(np.mean([c.full_nll for c in chosen])),
                    rise=mean_estimate([c.rise for c in chosen]),
                    divergence=mean_estimate([c.divergence for c in chosen]),
                    same_top=mean_estimate([c.same_top for c in chosen]),
                    minus_first=(
                        None if first[method.budget] == method else mean_estimate(differences)
                    ),
                )
            )
    return rows
