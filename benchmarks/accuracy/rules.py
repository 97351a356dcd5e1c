"""Rules of eviction that were tried, by name: the policies of the product, and others."""

from collections.abc import Sequence

from benchmarks.accuracy.combining import averaging, largest_so_far, parts, remembering
from benchmarks.accuracy.scores import (
    Score,
    attention,
    attention_less_redundancy,
    attention_of,
    by_strata,
    centred,
    distinctness,
    joint,
    keys,
    leverage_of,
    newest,
    norm_of_value,
    novelty_with,
    pair_norms_and_values,
    product,
    range_of_value,
    rare,
    square_root,
    surprise_of,
    unit_of,
    unlike_the_mean,
    values,
)
from benchmarks.accuracy.slot_orders import SlotOrder, authors, by_position, in_place
from benchmarks.accuracy.teacher_forcing import Rule
from vase_vllm.policies.registry import find_policy
from vase_vllm.tools.policy_label import parse_policy_label


def policy(name: str, **settings: object) -> Rule:
    """A policy of the product."""
    return find_policy(name)(**settings).rank


def score(name: str, **settings: object) -> Score:
    """What a policy of the product ranks by."""
    return find_policy(name)(**settings).priority


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
    "distinct:protected=0.375": policy("distinct", protected=0.375),
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
protected = (distinctness, 0.375)
SURPRISE: dict[str, Rule] = {
    "surprise .25": parts([(surprise_of(1), 0.25)]),
    "surprise .25, range .25": parts([(surprise_of(1), 0.25), quarter_range]),
    "surprise of 5 tokens .25": parts([(surprise_of(5), 0.25)]),
    "surprise of 5 tokens .25, range .25": parts([(surprise_of(5), 0.25), quarter_range]),
    "surprise of 5 tokens .25, distinctness .25": parts(
        [(surprise_of(5), 0.25), (distinctness, 0.25)]
    ),
    "surprise of 9 tokens .25, distinctness .25": parts(
        [(surprise_of(9), 0.25), (distinctness, 0.25)]
    ),
    "surprise of 5 tokens .125, distinctness .375": parts([(surprise_of(5), 0.125), protected]),
    "surprise * distinctness .375": parts([(product(surprise_of(1), distinctness), 0.375)]),
    "surprise of 5 tokens * distinctness .375": parts(
        [(product(surprise_of(5), distinctness), 0.375)]
    ),
}
QUERIES: dict[str, Rule] = {
    f"distinctness .375, then {queries} queries": parts([protected], attention_of(queries))
    for queries in (16, 32, 128, 256)
}
BY_DEPTH: dict[str, Rule] = {
    "distinctness .25 to .5 by depth": parts([(distinctness, lambda depth: 0.25 + depth / 4)]),
    "distinctness .5 to .25 by depth": parts([(distinctness, lambda depth: 0.5 - depth / 4)]),
    "distinctness .5 in the outer thirds, .125 in the middle": parts(
        [(distinctness, lambda depth: 0.125 if 1 / 3 < depth < 2 / 3 else 0.5)]
    ),
    "distinctness .5 in the middle third, .3125 in the outer": parts(
        [(distinctness, lambda depth: 0.5 if 1 / 3 < depth < 2 / 3 else 0.3125)]
    ),
}
STRATA: dict[str, Rule] = {
    "newest .125, distinctness .375": parts([(newest, 0.125), protected]),
    "newest .25, distinctness .25": parts([(newest, 0.25), (distinctness, 0.25)]),
    "distinctness .375, then attention by 2 strata": parts([protected], by_strata(attention, 2)),
    "distinctness .375, then attention by 4 strata": parts([protected], by_strata(attention, 4)),
    **{
        f"distinctness .5, then attention by {strata} strata": parts(
            [(distinctness, 0.5)], by_strata(attention, strata)
        )
        for strata in (2, 4)
    },
    "distinctness by 2 strata .375": parts([(by_strata(distinctness, 2), 0.375)]),
    "distinctness by 4 strata .375": parts([(by_strata(distinctness, 4), 0.375)]),
}
OTHER_RESTS: dict[str, Rule] = {
    "distinctness .375, drawn": parts([protected], draw=True),
    "distinctness .375, then R-KV": parts([protected], attention_less_redundancy),
    "distinctness .375, then attention * unlike, drawn": parts(
        [protected], product(attention, unlike), draw=True
    ),
    "distinctness .375, then the largest attention so far": largest_so_far([protected], 1.0),
    "distinctness .375, then the largest attention so far, decay .9": largest_so_far(
        [protected], 0.9
    ),
}
NEIGHBOURS: dict[str, Rule] = {
    f"rare both .25 by {neighbours} neighbours, range .25": parts(
        [(rare(joint, neighbours), 0.25), quarter_range]
    )
    for neighbours in (1, 2, 16)
}
IN_ANOTHER_ORDER: dict[str, tuple[Rule, SlotOrder]] = {
    "vase, survivors by position": (policy("vase"), by_position),
    "vase, survivors in the authors' order": (policy("vase"), authors),
}
GROUPS: dict[str, dict[str, Rule]] = {
    "policies": POLICIES,
    "others": OTHERS,
    "remembering": REMEMBERING,
    "surprise": SURPRISE,
    "queries": QUERIES,
    "by-depth": BY_DEPTH,
    "strata": STRATA,
    "other-rests": OTHER_RESTS,
    "neighbours": NEIGHBOURS,
    "orders": {name: rule for name, (rule, _) in IN_ANOTHER_ORDER.items()},
}
RULES = {name: rule for group in GROUPS.values() for name, rule in group.items()}


def order_of(name: str) -> SlotOrder:
    """In which order a rule's survivors lie."""
    return IN_ANOTHER_ORDER[name][1] if name in IN_ANOTHER_ORDER else in_place


def find_rules(names: Sequence[str]) -> dict[str, Rule]:
    """Rules by name or by the name of their group; any other name is a policy with its settings, as
    in rkv:lambda=0.3.

    Raises:
        ValueError: there is no such policy, or its settings are wrong.
    """
    found: dict[str, Rule] = {}
    for name in names:
        if name in GROUPS:
            found |= GROUPS[name]
        elif name in RULES:
            found[name] = RULES[name]
        else:
            policy_name, settings = parse_policy_label(name)
            found[name] = policy(policy_name, **settings)
    return found
