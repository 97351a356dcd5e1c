"""The model that rules of eviction are compared on, against transformers and by hand."""

import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.accuracy.rule_search import ASKED_AT, Passage, compare, measure, page
from benchmarks.accuracy.rules import GROUPS, POLICIES, RULES, find_rules, policy
from benchmarks.accuracy.scores import attention_of, by_strata, surprise_of
from benchmarks.accuracy.slot_orders import authors, by_position, in_place
from benchmarks.accuracy.teacher_forcing import Llama, Reader, TextCandidates
from tests.support.query_statistics import statistics_file
from vase_vllm.errors import EvictionError
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.policies.candidates import Candidates, DenseTokens
from vase_vllm.policies.draws import Draws

LIMITS = EvictionLimits(budget=32, window=8, sinks=4)
TOKENS = torch.randperm(128, generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        initializer_range=0.5,
    )
    directory = tmp_path_factory.mktemp("llama")
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    return model, Llama(directory)


def test_the_full_cache_gives_the_probabilities_of_transformers(reference):
    theirs, ours = reference
    with torch.inference_mode():
        logprobs = theirs(torch.tensor([TOKENS])).logits[0].log_softmax(dim=-1)
    expected = -logprobs[torch.arange(127), TOKENS[1:]]
    never = EvictionLimits(budget=1000, window=8)
    for reader in (Reader(ours, [], None), Reader(ours, [RULES["vase"]] * 2, never)):
        nll, is_top, _ = reader.nll(TOKENS, range(1, 128))
        assert nll.shape == (max(1, len(reader.rules)), 127)
        torch.testing.assert_close(nll, expected.expand_as(nll), atol=1e-3, rtol=1e-3)
        assert is_top.tolist() == [
            (logprobs[:-1].argmax(dim=-1) == torch.tensor(TOKENS[1:])).tolist()
        ] * len(nll)


@pytest.mark.parametrize("length", [32, 40, 100])
def test_a_reader_evicts_on_schedule_and_streaming_keeps_the_newest(reference, length):
    """Values of the first layer are those of their tokens alone."""
    _, model = reference
    reader = Reader(model, [RULES["streaming"], RULES["random"]], LIMITS)
    reader.nll(TOKENS[:length])
    full = Reader(model, [], None)
    full.nll(TOKENS[:length])
    held = length if length < 40 else 32 + length % 8
    assert {values.shape[-2] for values in reader.values} == {held}
    streaming = reader.values[0][0, 0]
    same = (full.values[0][0, 0][:, None] - streaming).abs().amax(dim=-1) < 1e-5
    kept = same.any(dim=1).nonzero().flatten().tolist()
    assert kept == [*range(4), *range(length - held + 4, length)]


@pytest.mark.parametrize("order", [in_place, by_position, authors])
def test_orders_hold_the_same_tokens(reference, order):
    """Without smoothing nothing depends on the order: the survivors are the same ones."""
    _, model = reference
    rule = policy("vase", smoothing=1, sampling="greedy")
    found = []
    for chosen in (in_place, order):
        reader = Reader(model, [rule], LIMITS, orders=[chosen])
        nll, *_ = reader.nll(TOKENS, range(60, 128))
        held = reader.values[1][0, 0]
        found.append((nll, held[held[:, 0].argsort()], held))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])
    assert torch.equal(found[0][2], found[1][2]) == (order is in_place)


def test_the_authors_order():
    limits = EvictionLimits(budget=6, window=2, sinks=1)
    heads = torch.tensor([0])
    values = torch.tensor(
        [[[0.0, 1.0], [0.0, 5.0], [0.0, 2.0], [0.0, 9.0], [0.0, 3.0], [0.0, 4.0]]]
    )
    candidates = Candidates(
        num=6,
        queries=torch.ones(1, 2, 2),
        tokens=DenseTokens(values, values),
        scale=1.0,
        limits=limits,
        first=8,
        eviction_index=0,
        draws=Draws(limits, 0, 0, 6, [0], heads).of_layers([0]),
    )
    inf = torch.inf
    # The sink and the tokens 1 and 3 are protected, then 4 is drawn.
    priority = torch.tensor([[inf, inf, -3.0, inf, -1.0, -2.0]])
    keep = torch.tensor([[True, True, False, True, True, False]])
    assert authors(candidates, priority, keep).tolist() == [[0, 3, 1, 4, 6, 7]]
    assert by_position(candidates, priority, keep).tolist() == [[0, 1, 3, 4, 6, 7]]
    assert in_place(candidates, priority, keep).tolist() == [[0, 1, 6, 3, 4, 7]]


def test_a_question_is_forgotten(reference):
    _, model = reference
    reader = Reader(model, [RULES["distinct"]], LIMITS)
    reader.nll(TOKENS[:100])
    first = reader.ask(TOKENS[:7], [5, 6])
    again = reader.ask(TOKENS[:7], [5, 6])
    assert torch.equal(first[0], again[0])
    assert reader.read == 100


def test_a_rule_sees_queries_as_a_policy_does_and_gets_its_numbers_back(reference):
    """In the first layer, where they do not depend on what was evicted."""
    _, model = reference
    full = Reader(model, [], None)
    full.nll(TOKENS[:48])
    full.nll(TOKENS[48:56])
    evictions = []

    def spy(candidates, numbers):
        (layer,) = set(candidates.layers.tolist())
        keys = torch.cat([candidates.keys, candidates.window_keys], dim=-1)
        if candidates.eviction_index:
            assert torch.equal(numbers, keys[..., : candidates.num])
        if layer == 0:
            evictions.append(candidates)
        return candidates.draws.uniform(), keys

    Reader(model, [spy], LIMITS).nll(TOKENS[:56])
    assert [candidates.position for candidates in evictions] == [40, 48, 56]
    expected = full.queries[0][0].unflatten(0, (2, 3))  # [H, G, W, D]
    queries = evictions[-1].queries.unflatten(1, (8, 3)).transpose(1, 2)
    torch.testing.assert_close(queries, expected)
    torch.testing.assert_close(evictions[-1].window_keys.transpose(-1, -2), full.keys[0][0][:, -8:])


@pytest.mark.parametrize("name", sorted(RULES.keys() - POLICIES.keys()))
def test_every_rule_ranks_all_candidates(reference, name):
    _, model = reference
    reader = Reader(model, [RULES[name]], LIMITS)
    nll, *_ = reader.nll(TOKENS, range(60, 128))
    assert nll.isfinite().all()


def test_what_is_known_of_a_text_stays_with_its_tokens(reference):
    """Keys of the first layer and the NLL before evictions are those of the full cache."""
    theirs, model = reference
    full = Reader(model, [], None)
    full.nll(TOKENS[:64])
    keys = full.keys[0][0]
    seen = []

    def spy(c, numbers):
        expected = keys.gather(1, c.positions[..., None].expand(-1, -1, keys.shape[-1]))
        if c.depth == 0:
            torch.testing.assert_close(c.keys.transpose(-1, -2), expected)
            seen.append((len(c.surprise), c.queries_of_text.shape[1], c.positions.max().item()))
        return c.draws.uniform(), None

    reader = Reader(model, [RULES["random"], spy], LIMITS)
    reader.nll(TOKENS[:64])
    assert seen == [(40, 32, 31), (48, 32, 39), (56, 32, 47), (64, 32, 55)]
    with torch.inference_mode():
        logprobs = theirs(torch.tensor([TOKENS[:40]])).logits[0].log_softmax(dim=-1)
    expected = -logprobs[torch.arange(39), TOKENS[1:40]]
    torch.testing.assert_close(reader.surprise[1, 1:40], expected, atol=1e-3, rtol=1e-3)
    assert reader.surprise[1, 0] == pytest.approx(math.log(128))
    assert not torch.equal(reader.surprise[0, 40:], reader.surprise[1, 40:])


def test_scores_of_a_text_by_hand():
    limits = EvictionLimits(budget=4, window=1, sinks=0)
    # Three queries at the positions 2, 3 and 4, each with one query head; D is 1.
    queries = torch.tensor([[[[1.0]], [[2.0]], [[0.5]]]])
    tokens = torch.tensor([[[1.0], [0.0], [2.0], [-1.0]]])
    c = TextCandidates(
        num=4,
        queries=queries[:, -1],
        tokens=DenseTokens(tokens, tokens),
        scale=1.0,
        limits=limits,
        first=5,
        eviction_index=0,
        draws=Draws(limits, 0, 0, 4, [0], torch.tensor([0])).of_layers([0]),
        positions=torch.tensor([[3, 0, 1, 2]]),
        surprise=torch.tensor([1.0, 2.0, 6.0, 4.0, 5.0]),
        queries_of_text=queries,
        depth=0.0,
    )
    assert surprise_of(1)(c).tolist() == [[4.0, 1.0, 2.0, 6.0]]
    assert surprise_of(3)(c).tolist() == [[5.0, 1.5, 3.0, 4.0]]
    torch.testing.assert_close(attention_of(1)(c), c.attention())
    at_2 = torch.tensor([0.0, 2.0]).softmax(0)
    at_3 = torch.tensor([0.0, 4.0, -2.0]).softmax(0)
    at_4 = torch.tensor([0.5, 0.0, 1.0, -0.5]).softmax(0)
    expected = [
        at_4[0],
        (at_2[0] + at_3[0] + at_4[1]) / 3,
        (at_2[1] + at_3[1] + at_4[2]) / 3,
        (at_3[2] + at_4[3]) / 2,
    ]
    torch.testing.assert_close(attention_of(3)(c), torch.stack(expected)[None])
    # The older stratum is that of the positions 0 and 1.
    assert by_strata(surprise_of(1), 2)(c).tolist() == [[-2.0, -2.0, -1.0, -1.0]]


def test_the_page_has_a_row_for_each_rule_and_the_smallest_rise_first():
    rows = [
        {"rule": name, "budget": 256, "rise": rise, "rise of each passage": [rise]}
        | {
            f"{what} {at}": 1
            for what in ("facts at", "recalled at", "NLL at")
            for at in (ASKED_AT, 1024)
        }
        for name, rise in (("vase", 0.2), ("distinct", 0.1))
    ]
    # Results of an earlier version have no agreement.
    rows[1]["same top token"] = 0.875
    text = page({"half": "choice", "length": 1024, "command": "c", "date": "d", "results": rows})
    assert text.index("| distinct | +0.1000 | 87.5% | 0.100 | 1 of 1 |") < text.index(
        "| vase | +0.2000 | – |"
    )


def test_rules_are_compared_with_the_full_cache_on_what_it_recalls(reference):
    _, model = reference
    passage = Passage(TOKENS * 6, [TOKENS[:20], TOKENS[5:25]])
    full = measure(Reader(model, [], None), passage, first_scored=192)
    rules = {name: RULES[name] for name in ("vase", "distinct")}
    rows = compare(model, rules, [passage], [full], 256)
    assert [row["rule"] for row in rows] == ["vase", "distinct"]
    for row in rows:
        assert row["facts at 640"] == int(full.recalled[:2].sum())
        assert row["rise"] == pytest.approx(row["rise of each passage"][0])
        assert abs(row["rise"]) > 1e-3
        assert 0 < row["same top token"] < 1


def test_a_rule_may_be_a_policy_with_settings(reference):
    _, model = reference
    rules = find_rules(["distinct", "leverage of both .25, range .25", "rkv:lambda=0.125"])
    assert rules["distinct"] == RULES["distinct"]
    own = policy("rkv", weight=0.125)
    nlls = [
        Reader(model, [rule], LIMITS).nll(TOKENS, range(60, 128))[0]
        for rule in (rules["rkv:lambda=0.125"], own, RULES["rkv"])
    ]
    assert torch.equal(nlls[0], nlls[1])
    assert not torch.equal(nlls[0], nlls[2])
    assert find_rules(["surprise"]) == GROUPS["surprise"]
    with pytest.raises(EvictionError, match="unknown policy"):
        find_rules(["lru"])


def test_triattention_ranks_by_the_statistics_of_the_layer_that_is_read(reference):
    _, model = reference
    path = statistics_file(3, 8, layers=2, kv_heads=2)
    (rule,) = find_rules([f"triattention:statistics={path}"]).values()
    seen = []

    def spy(candidates, numbers):
        seen.append((candidates.layers.tolist(), candidates.kv_heads.tolist(), candidates.position))
        return rule(candidates, numbers)

    nll, *_ = Reader(model, [spy], LIMITS).nll(TOKENS[:56], range(41, 56))
    assert nll.isfinite().all()
    assert seen == [([layer] * 2, [0, 1], at) for at in (40, 48, 56) for layer in (0, 1)]
