"""What is compared when decode attention's log-sum-exp is to replace the first pass."""

import torch

from benchmarks.accuracy.attention_statistics import (
    Logits,
    Observer,
    candidates_share,
    page,
    products,
    subtracted_share,
    summary,
)
from benchmarks.accuracy.rules import policy
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.candidates import Candidates, DenseTokens
from vase_vllm.policies.draws import Draws

HEADS, GROUP, WINDOW, NUM, HEAD_SIZE = 2, 3, 4, 24, 32
LIMITS = EvictionLimits(budget=16, window=WINDOW, sinks=2)


def candidates(recent: float = 0.0) -> Candidates:
    """Random vectors; ``recent`` draws every query to the window's first token."""
    generator = torch.Generator().manual_seed(3)
    queries, keys, values, window_keys, window_values = (
        torch.randn(HEADS, count, HEAD_SIZE, generator=generator)
        for count in (WINDOW * GROUP, NUM, NUM, WINDOW, WINDOW)
    )
    queries[..., 0], window_keys[:, 0, 0] = 1.0, recent * HEAD_SIZE**0.5
    heads = torch.arange(HEADS)
    draws = Draws(LIMITS, key=1, eviction_index=0, num_candidates=NUM, layers=[5], kv_heads=heads)
    return Candidates(
        num=NUM,
        queries=queries,
        tokens=DenseTokens(keys, values, window_keys, window_values),
        scale=HEAD_SIZE**-0.5,
        limits=LIMITS,
        first=NUM + WINDOW,
        eviction_index=0,
        draws=draws.of_layers([5]),
    )


def exact(c: Candidates) -> Logits:
    return Logits.of(c, torch.float32, exact=True, reordered=False)


def test_the_share_is_that_of_a_causal_softmax():
    c = candidates()
    share = candidates_share(exact(c))
    for head in range(HEADS):
        for row in range(WINDOW * GROUP):
            seen = row // GROUP + 1
            keys = torch.cat([c.keys[head], c.window_keys[head, :, :seen]], dim=1).double()
            weights = (c.queries[head, row].double() @ keys * c.scale).softmax(dim=-1)
            torch.testing.assert_close(share[head, row], weights[:NUM].sum())


def test_the_subtraction_is_right_where_numbers_are_exact():
    logits = exact(candidates())
    subtracted = subtracted_share(logits, logits.all().logsumexp(dim=-1))
    torch.testing.assert_close(subtracted, candidates_share(logits), rtol=1e-12, atol=0)


def test_another_order_is_another_rounding_of_the_same_product():
    c = candidates()
    of = [products(c.queries, c.keys, reordered) for reordered in (False, True)]
    assert not torch.equal(*of)
    torch.testing.assert_close(*of)
    doubles = [products(c.queries.double(), c.keys.double(), x) for x in (False, True)]
    torch.testing.assert_close(*doubles, rtol=1e-12, atol=1e-12)


def test_the_ranking_is_vases():
    c = candidates()
    ranked, numbers = Observer()(c, None)
    assert numbers is None
    assert torch.equal(ranked, policy("vase")(c, None)[0])


def test_a_small_share_is_lost_by_subtraction_alone():
    observer = Observer()
    observer(candidates(recent=25.0), None)
    found = summary(observer.found["float32"])
    assert found["share"]["0.5"] < 1e-7
    errors = {way: row["error"]["0.5"] for way, row in found["ways"].items()}
    assert errors["two passes"] < 1e-5 < 0.1 < errors["subtracted"]
    easy = Observer()
    easy(candidates(), None)
    ways = summary(easy.found["float32"])["ways"]
    assert ways["subtracted"]["error"]["1.0"] < 1e-5
    assert ways["subtracted"]["changed_most"] == ways["two passes"]["changed_most"] == 0


def test_the_page_names_the_shares_and_the_ways():
    observer = Observer()
    observer(candidates(), None)
    dtypes = {name: summary(found) for name, found in observer.found.items()}
    fields = dict(command="python", date="today", model="m", budget=16, window=4)
    text = page({**fields, "texts": {"a": "0"}, "max_tokens": 28, "dtypes": dtypes})
    for part in ("of 24 queries", "| subtracted |", "in bfloat16"):
        assert part in text
