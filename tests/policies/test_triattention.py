"""TriAttention: one product with a rotated key is the series; its file; what is refused."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.support.query_statistics import random_statistics, rope_frequencies, statistics_file
from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.policies.base import AttentionShape
from vase_vllm.policies.query_statistics import QueryStatistics, read_statistics, rotation_pairs
from vase_vllm.policies.triattention import (
    TriAttentionPolicy,
    key_scores,
    mean_of_queries_to_come,
)

EVICTION = {"policy": "triattention", "budget": 128, "window": 16}


def rotated(key: list[float], frequencies: list[float], pairs, position: int) -> list[float]:
    """RoPE by its definition, one pair after the other."""
    result = list(key)
    for frequency, (real, imaginary) in zip(frequencies, pairs, strict=True):
        angle = torch.tensor(frequency * position, dtype=torch.float64)
        cosine, sine = float(angle.cos()), float(angle.sin())
        result[real] = key[real] * cosine - key[imaginary] * sine
        result[imaginary] = key[real] * sine + key[imaginary] * cosine
    return result


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 1000),
    is_neox_style=st.booleans(),
    rotary_dim=st.sampled_from([4, 8, 12]),
    position=st.integers(0, 100_000),
    age=st.integers(1, 1000),
    longest_offset=st.integers(1, 65536),
)
def test_one_product_is_the_series_over_distances(
    seed, is_neox_style, rotary_dim, position, age, longest_offset
):
    """Of a key that was turned at its own position, with dimensions that are not turned at all."""
    head_size = 12
    generator = torch.Generator().manual_seed(seed)
    pairs = rotation_pairs(head_size, rotary_dim, is_neox_style)
    frequencies = torch.zeros(head_size // 2, dtype=torch.float64)
    frequencies[: rotary_dim // 2] = rope_frequencies(rotary_dim, 10_000.0)
    mean = torch.randn(1, 1, head_size // 2, generator=generator, dtype=torch.complex64)
    weights = torch.rand(1, 1, head_size // 2, generator=generator)
    key = torch.randn(head_size, generator=generator, dtype=torch.float64)

    expected = 0.0
    offsets = [2**power for power in range(17) if 2**power <= longest_offset]
    for f, (real, imaginary) in enumerate(pairs.T.tolist()):
        length = torch.hypot(key[real], key[imaginary])
        phase = mean[0, 0, f].angle().double() - torch.atan2(key[imaginary], key[real])
        for offset in offsets:
            cosine = torch.cos(frequencies[f] * (offset + age) + phase)
            expected += mean[0, 0, f].abs().double() * length * cosine / len(offsets)
        expected += weights[0, 0, f].double() * length

    policy = TriAttentionPolicy(longest_offset=longest_offset)
    assert policy.offsets.tolist() == offsets
    query = mean_of_queries_to_come(mean, frequencies[None], position + age, policy.offsets)
    turned = rotated(key.tolist(), frequencies.tolist(), pairs.T.tolist(), position)
    score = key_scores(torch.tensor(turned)[None, :, None], query, weights, pairs)
    assert score.shape == (1, 1, 1)
    assert float(score) == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("is_neox_style", [False, True])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(8, 8), (8, 4), (12, 2)])
def test_pairs_cover_every_dimension_once(head_size, rotary_dim, is_neox_style):
    pairs = rotation_pairs(head_size, rotary_dim, is_neox_style)
    assert sorted(pairs.flatten().tolist()) == list(range(head_size))
    assert set(pairs[:, : rotary_dim // 2].flatten().tolist()) == set(range(rotary_dim))


def test_a_file_gives_back_what_was_saved(tmp_path):
    origin = {"model": "some/model", "tokens": "4096"}
    statistics = replace(random_statistics(2, 8), origin=origin)
    statistics.save(tmp_path / "file")
    found = read_statistics(str(tmp_path / "file"))
    for name in ("mean", "mean_length", "frequencies", "pairs"):
        assert torch.equal(getattr(found, name), getattr(statistics, name))
        assert getattr(found, name).dtype == getattr(statistics, name).dtype
    assert found.origin == origin
    assert found.shape == statistics.shape == AttentionShape(8, 24, 12, 8)


def test_statistics_that_do_not_fit_each_other_are_refused():
    statistics = random_statistics(2, 8)
    for change in (
        {"mean_length": statistics.mean_length[1:]},
        {"frequencies": statistics.frequencies[:, 1:]},
        {"pairs": statistics.pairs.roll(1, 0)[:, :2]},
        {"num_kv_heads": 5},
    ):
        with pytest.raises(EvictionError, match="do not fit each other"):
            replace(statistics, **change)


def test_a_file_that_is_missing_or_something_else_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"mean": torch.zeros(1)}, tmp_path / "weights")
    for file, message in (
        (None, "--kv-eviction-config: statistics is missing, which triattention needs: give a"),
        ("absent", "--kv-eviction-config: statistics: absent cannot be read: "),
        (str(tmp_path), f"--kv-eviction-config: statistics: {tmp_path} cannot be read: "),
        (str(tmp_path / "text"), "text cannot be read: "),
        (str(tmp_path / "weights"), "weights has no statistics of queries: give a file that vase-"),
    ):
        with pytest.raises(EvictionError) as error:
            EvictionConfig.parse({**EVICTION, "statistics": file})
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_file_of_another_model_stops_the_engine_before_it_loads_the_model(models):
    from vllm.engine.arg_utils import EngineArgs

    def make_config(statistics):
        eviction = {**EVICTION, "statistics": statistics}
        EngineArgs(
            model=str(models.qwen3()),
            additional_config={"kv_eviction": eviction},
            max_model_len=2048,
            skip_tokenizer_init=True,
            block_size=32,
        ).create_engine_config()

    make_config(statistics_file(2, 64, layers=2, kv_heads=2))
    for group, head_size, shape in (
        (2, 64, {"layers": 3, "kv_heads": 2}),
        (2, 64, {"layers": 2, "kv_heads": 4}),
        (1, 64, {"layers": 2, "kv_heads": 2}),
        (2, 32, {"layers": 2, "kv_heads": 2}),
    ):
        with pytest.raises(EvictionError) as error:
            make_config(statistics_file(group, head_size, **shape))
        message = str(error.value)
        assert message.startswith("--kv-eviction triattention: statistics ")
        assert "this one has 2 layers of 4 query heads and 2 KV heads of size 64" in message
        assert message.endswith("has written for this model")
        assert "\n" not in message


def test_the_statistics_belong_to_layers_and_heads(tmp_path):
    """A mean query of its own for one head of one layer changes the ranking of that head alone."""
    from tests.support.dense_eviction import DenseEviction

    statistics = random_statistics(2, 16)
    changed = statistics.mean.clone()
    changed[3, 2 * 5 + 1] *= -1
    QueryStatistics(
        changed,
        statistics.mean_length,
        statistics.frequencies,
        statistics.pairs,
        statistics.num_kv_heads,
    ).save(tmp_path / "changed")
    common = {"policy": "triattention", "budget": 20, "window": 4, "sinks": 1}
    before = DenseEviction.random({**common, "statistics": statistics_file(2, 16)}, 24)
    after = DenseEviction.random({**common, "statistics": str(tmp_path / "changed")}, 24)
    for layer in (2, 3):
        for first_head in (4, 6):
            which = {"layer": layer, "first_head": first_head}
            same = (before.priority(**which) == after.priority(**which)).all(dim=-1).tolist()
            assert same == [True, not (layer == 3 and first_head == 4)]
