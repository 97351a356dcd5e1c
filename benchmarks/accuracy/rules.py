"""Rules of eviction that were tried, by name: the policies of the product, and others.

A score is a function of the candidates, [H, n], of which the largest are kept. A rule is made of
scores: parts of the budget go to the largest of one after the other, the rest to the last.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.accuracy.slot_orders import SlotOrder, authors, by_position, in_place
from benchmarks.accuracy.teacher_forcing import Rule
from vase_vllm.kernels.torch_distinctness import whitened_length
from vase_vllm.kernels.torch_eviction import largest, value_range
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.received import mean_received_attention
from vase_vllm.policies.registry import find_policy
from vase_vllm.policies.rkv import mean_similarity
from vase_vllm.tools.policy_label import parse_policy_label

Score = Callable[[Candidates], Tensor]
Vectors = Callable[[Candidates], Tensor]
"""[H, D, n]."""


# What tokens are compared by


def keys(c: Candidates) -> Tensor:
    return c.keys


def values(c: Candidates) -> Tensor:
    return c.values.transpose(-1, -2)


def centred(of: Vectors) -> Vectors:
    """Less their mean over the candidates."""
    return lambda c: of(c) - of(c).mean(dim=-1, keepdim=True)


def unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=1, keepdim=True).clamp_min(1e-8)


def joint(c: Candidates) -> Tensor:
    """Key and value, each centred and of norm 1, one after the other."""
    return torch.cat([unit(centred(keys)(c)), unit(centred(values)(c))], dim=1)


def pair_norms_and_values(c: Candidates) -> Tensor:
    """As :func:`joint`, of the norms of the pairs that RoPE rotates, the same at every position."""
    norms = centred(lambda c: torch.hypot(*c.keys.chunk(2, dim=1)))
    return torch.cat([unit(norms(c)), unit(centred(values)(c))], dim=1)


# Scores


def whitening(sample: Tensor, ridge: float) -> Tensor:
    """[H, D, D], after which vectors have the policy ``distinct``'s ``whitened_length``.

    It is computed from the D directions in the place of the rows of the sample, which may be many.

    Args:
        sample: [H, m, D] fp32, finite.
    """
    gram = sample.transpose(-1, -2) @ sample
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    diagonal += (ridge * diagonal.mean(dim=-1, keepdim=True)).clamp_min(1e-8)
    lower = torch.linalg.cholesky(gram)
    identity = torch.eye(gram.shape[-1])
    return torch.linalg.solve_triangular(lower, identity, upper=False).transpose(-1, -2)


def rare(of: Vectors, neighbours: int) -> Score:
    """Minus the mean of the largest cosine similarities to others: n^2 D operations."""

    def score(c: Candidates) -> Tensor:
        x = unit(of(c))
        similarity = x.transpose(-1, -2) @ x
        similarity.diagonal(dim1=-2, dim2=-1).fill_(-torch.inf)
        return -similarity.topk(neighbours, dim=-1).values.mean(dim=-1)

    return score


def leverage_of(of: Vectors, ridge: float = 0.1) -> Score:
    """Ridge leverage scores among the candidates."""

    def score(c: Candidates) -> Tensor:
        rows = of(c).transpose(-1, -2)
        return (rows @ whitening(rows, ridge)).square().sum(dim=-1)

    return score


def unlike_the_mean(c: Candidates) -> Tensor:
    """1 less the mean cosine similarity of the key to the others."""
    return 1 - mean_similarity(c.keys)


def novelty_with(ridge: float) -> Score:
    """Squared length of the value after the whitening of the window's values."""
    return lambda c: whitened_length(c.window_values, ridge)(c.values).square()


def square_root(score: Score) -> Score:
    return lambda c: score(c).sqrt()


def product(*scores: Score) -> Score:
    return lambda c: torch.stack([score(c) for score in scores]).prod(dim=0)


def attention(c: Candidates) -> Tensor:
    return c.attention()


def attention_less_redundancy(c: Candidates) -> Tensor:
    """R-KV's, without smoothing."""
    return attention(c) - torch.softmax(mean_similarity(c.keys), dim=-1)


def range_of_value(c: Candidates) -> Tensor:
    return c.of_values(value_range)


def norm_of_value(c: Candidates) -> Tensor:
    return c.of_values(lambda part: part.float().norm(dim=-1))


# Rules


def parts(
    protected: Sequence[tuple[Score, float]], then: Score = attention, draw: bool = False
) -> Rule:
    """A rule.

    Args:
        protected: scores, and the parts of the budget that the largest of what is left get.
        then: score of the rest.
        draw: draw the rest in proportion to it.
    """

    def rule(c: Candidates, _numbers: Tensor | None) -> tuple[Tensor, None]:
        taken = torch.zeros(len(c.queries), c.num, dtype=torch.bool)
        taken[:, : c.limits.sinks] = True
        for score, part in protected:
            left = score(c).masked_fill(taken, -torch.inf)
            taken |= largest(left, int(part * c.limits.budget))
        rest = then(c)
        if draw:
            rest = rest.log() + c.draws.gumbel()
        return rest.masked_fill(taken, torch.inf), None

    return rule


def remembering(
    protected: Sequence[tuple[Score, float]], decay: float = 1.0, per_query: bool = False
) -> Rule:
    """As :func:`parts`, and the rest by the attention received since each token came.

    Args:
        decay: what is left of it at each eviction.
        per_query: divide it by the number of queries that can have paid it, likewise decayed.
    """
    by_parts = parts(protected, lambda c: torch.zeros(len(c.queries), c.num))

    def rule(c: Candidates, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        after = mean_received_attention(c, numbers, decay)
        rest = after[:, 0] / after[:, 1] if per_query else after[:, 0]
        taken, _ = by_parts(c, None)
        return rest[:, : c.num].masked_fill(taken.isinf(), torch.inf), after

    return rule


def averaging(protected: Sequence[tuple[Score, float]], decay: float) -> Rule:
    """As :func:`parts`, and the rest by the mean attention at the evictions of each token so far.

    Unlike :func:`remembering` it goes by attention to candidates alone: no query sees the window,
    and a token that leaves the window has received nothing.
    """
    by_parts = parts(protected, lambda c: torch.zeros(len(c.queries), c.num))

    def rule(c: Candidates, numbers: Tensor | None) -> tuple[Tensor, Tensor]:
        now = c.attention()
        after = torch.stack([now, torch.ones_like(now)], dim=1)
        if numbers is not None:
            after += decay * numbers
        taken, _ = by_parts(c, None)
        rest = (after[:, 0] / after[:, 1]).masked_fill(taken.isinf(), torch.inf)
        return rest, pad(after, (0, c.limits.window))

    return rule


def policy(name: str, **settings: object) -> Rule:
    """A policy of the product."""
    return find_policy(name)(**settings).rank


def score(name: str, **settings: object) -> Score:
    """What a policy of the product ranks by."""
    return find_policy(name)(**settings).priority


def unit_of(of: Vectors) -> Vectors:
    return lambda c: unit(of(c))


unit_centred_keys, unit_centred_values = unit_of(centred(keys)), unit_of(centred(values))
range_, unlike, novelty = range_of_value, unlike_the_mean, novelty_with(0.1)
# As the policy was when the rules with its name were tried: keys beside all candidates' keys.
distinct, expected = product(unlike, range_, novelty), score("expected")
root_of_novelty = square_root(novelty)
by_all_keys = product(unlike, range_, root_of_novelty)
quarter_range = (range_, 0.25)
of_both = leverage_of(joint)
of_unit_keys = leverage_of(unit_of(keys))
uncentred = product(of_unit_keys, leverage_of(unit_centred_values))
POLICIES: dict[str, Rule] = {
    "vase": policy("vase"),
    "vase:smoothing=1": policy("vase", smoothing=1),
    "rkv": policy("rkv"),
    "rkv:smoothing=1": policy("rkv", smoothing=1),
    "snapkv": policy("snapkv"),
    "random": policy("random"),
    "streaming": policy("streaming"),
    "cur": policy("cur"),
    "h2o": policy("h2o"),
    "distinct": policy("distinct"),
    "distinct:protected=0.25": policy("distinct", protected=0.25),
    "distinct:protected=0.5": policy("distinct", protected=0.5),
}
OTHERS: dict[str, Rule] = {
    "range .25": parts([quarter_range]),
    "range .25, then R-KV": parts([quarter_range], attention_less_redundancy),
    "rare keys .25, range .25": parts([(rare(centred(keys), 4), 0.25), quarter_range]),
    "rare values .25, range .25": parts([(rare(centred(values), 4), 0.25), quarter_range]),
    "rare both .25, range .25": parts([(rare(joint, 4), 0.25), quarter_range]),
    "leverage of keys .25, range .25": parts(
        [(leverage_of(unit_centred_keys), 0.25), quarter_range]
    ),
    "leverage of keys .5": parts([(leverage_of(unit_centred_keys), 0.5)]),
    "leverage of values .25, range .25": parts(
        [(leverage_of(unit_centred_values), 0.25), quarter_range]
    ),
    "leverage of raw values .5": parts([(leverage_of(centred(values)), 0.5)]),
    "leverage of both .25, range .25": parts([(of_both, 0.25), quarter_range]),
    "leverage of both .25, range .25, drawn": parts([(of_both, 0.25), quarter_range], draw=True),
    "leverage of both .25, range .25, ridge 1": parts(
        [(leverage_of(joint, 1.0), 0.25), quarter_range]
    ),
    "leverage of both .25, range .25, ridge .01": parts(
        [(leverage_of(joint, 0.01), 0.25), quarter_range]
    ),
    "leverage of both .25": parts([(of_both, 0.25)]),
    "leverage of both .5": parts([(of_both, 0.5)]),
    "leverage of pair norms and values .25, range .25": parts(
        [(leverage_of(pair_norms_and_values), 0.25), quarter_range]
    ),
    "leverage of keys * of values .25, range .25": parts(
        [
            (product(leverage_of(unit_centred_keys), leverage_of(unit_centred_values)), 0.25),
            quarter_range,
        ]
    ),
    "uncentred leverage of keys .5": parts([(of_unit_keys, 0.5)]),
    "uncentred leverage of keys * of values .25": parts([(uncentred, 0.25)]),
    "uncentred leverage of keys * of values .5": parts([(uncentred, 0.5)]),
    "uncentred leverage of keys * uncentred of values .5": parts(
        [(product(of_unit_keys, leverage_of(unit_of(values))), 0.5)]
    ),
    "uncentred leverage of keys * of values .25, range .25": parts(
        [(uncentred, 0.25), quarter_range]
    ),
    "uncentred leverage of keys * of values .5, range .125": parts(
        [(uncentred, 0.5), (range_, 0.125)]
    ),
    "uncentred leverage of keys * of values .25, range .25, then R-KV": parts(
        [(uncentred, 0.25), quarter_range], attention_less_redundancy
    ),
    "range .25, unlike .25": parts([quarter_range, (unlike, 0.25)]),
    "unlike * range .375": parts([(product(unlike, range_), 0.375)]),
    "unlike * range .375, drawn": parts([(product(unlike, range_), 0.375)], draw=True),
    "unlike * range .4375": parts([(product(unlike, range_), 0.4375)]),
    "unlike * range .5": parts([(product(unlike, range_), 0.5)]),
    "unlike^2 * range .375": parts([(product(unlike, unlike, range_), 0.375)]),
    "unlike * norm .375": parts([(product(unlike, norm_of_value), 0.375)]),
    "distinct by all keys": parts([(by_all_keys, 0.375)]),
    "distinct by all keys .25": parts([(by_all_keys, 0.25)]),
    "distinct by all keys .5": parts([(by_all_keys, 0.5)]),
    "distinct by no keys": parts([(product(range_, root_of_novelty), 0.375)]),
    "novelty .25": parts([(novelty, 0.25)]),
    "novelty .375": parts([(novelty, 0.375)]),
    "novelty .375, ridge 1": parts([(novelty_with(1.0), 0.375)]),
    "novelty .375, then R-KV": parts([(novelty, 0.375)], attention_less_redundancy),
    "novelty .4375": parts([(novelty, 0.4375)]),
    "novelty .5": parts([(novelty, 0.5)]),
    "unlike * novelty .375": parts([(product(unlike, novelty), 0.375)]),
    "unlike * novelty .375, then R-KV": parts(
        [(product(unlike, novelty), 0.375)], attention_less_redundancy
    ),
    **{
        f"distinct {part}, then expected": parts([(distinct, part)], expected)
        for part in (0.125, 0.25, 0.375, 0.5)
    },
    "distinct 0.375, then expected without norms": parts(
        [(distinct, 0.375)], score("expected", value_norm=False)
    ),
    "unlike * root of novelty .4375": parts([(product(unlike, root_of_novelty), 0.4375)]),
}
REMEMBERING: dict[str, Rule] = {
    "received": remembering([]),
    "received per query": remembering([], per_query=True),
    "received per query, decay .9": remembering([], 0.9, per_query=True),
    "received, decay .9": remembering([], 0.9),
    "distinct .25, then received": remembering([(distinct, 0.25)]),
    "distinct .375, then received": remembering([(distinct, 0.375)]),
    "distinct .375, then received per query": remembering([(distinct, 0.375)], per_query=True),
    "distinct .375, then received, decay .9": remembering([(distinct, 0.375)], 0.9),
    "distinct .375, then received, decay .75": remembering([(distinct, 0.375)], 0.75),
    **{
        f"distinct {part}, then received per query, decay .9": remembering(
            [(distinct, part)], 0.9, per_query=True
        )
        for part in (0.125, 0.25, 0.375)
    },
    **{
        f"distinct {part}, then attention per eviction, decay .9": averaging(
            [(distinct, part)], 0.9
        )
        for part in (0.25, 0.375)
    },
    "range .25, then received": remembering([quarter_range]),
}
IN_ANOTHER_ORDER: dict[str, tuple[Rule, SlotOrder]] = {
    "vase, survivors by position": (policy("vase"), by_position),
    "vase, survivors in the authors' order": (policy("vase"), authors),
}
RULES = (
    POLICIES | OTHERS | REMEMBERING | {name: rule for name, (rule, _) in IN_ANOTHER_ORDER.items()}
)


def order_of(name: str) -> SlotOrder:
    """In which order a rule's survivors lie."""
    return IN_ANOTHER_ORDER[name][1] if name in IN_ANOTHER_ORDER else in_place


def find_rules(names: Sequence[str]) -> dict[str, Rule]:
    """Rules by name; any other name is a policy with its settings, as in rkv:lambda=0.3.

    Raises:
        ValueError: there is no such policy, or its settings are wrong.
    """
    found = {}
    for name in names:
        policy_name, settings = parse_policy_label(name)
        found[name] = RULES.get(name) or policy(policy_name, **settings)
    return found
