"""A rotation that is read from a rotary embedding of vLLM turns queries as the embedding does."""

import doctest

import pytest
import torch

from tests.support.query_statistics import rope_frequencies
from vase_vllm.policies.query_statistics import as_pairs
from vase_vllm.tools.calibration import rotation
from vase_vllm.tools.calibration.rotation import Rotation, table_frequencies

ROPES = {
    "plain": {},
    "partial": {"partial_rotary_factor": 0.5},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 256},
    "yarn, partial": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 256,
        "partial_rotary_factor": 0.25,
    },
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
}
HEAD_SIZE = 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_neox_style", [True, False], ids=["halves", "neighbours"])
@pytest.mark.parametrize("name", ROPES)
def test_a_rotation_turns_as_the_module_does(name, is_neox_style, dtype):
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.rotary_embedding import get_rope

    with set_current_vllm_config(VllmConfig()):
        module = get_rope(
            HEAD_SIZE, 2048, is_neox_style, {"rope_theta": 10_000.0, **ROPES[name]}, dtype
        )
        positions = torch.tensor([0, 1, 2, 63, 500, 2047])
        query = torch.randn(6, 3 * HEAD_SIZE, generator=torch.Generator().manual_seed(0))
        # In place, hence the copies.
        expected, _ = module.forward_native(positions, query.to(dtype).clone(), None)
    found = Rotation.of(module)
    scaled = as_pairs(query.view(6, 3, HEAD_SIZE), found.pairs) * found.scale
    turned = found.turned(scaled, positions)
    expected = as_pairs(expected.float().view(6, 3, HEAD_SIZE), found.pairs)
    error = (turned - expected).norm() / expected.norm()
    assert error < (1e-4 if dtype == torch.float32 else 1e-2)
    assert ("yarn" in name) == bool((found.scale != 1).any())


def test_frequencies_are_exact_to_the_last_digit_of_a_long_table():
    frequencies = rope_frequencies(HEAD_SIZE, 1e6)
    angles = torch.arange(1 << 16)[:, None] * frequencies.float()
    found = table_frequencies(torch.cat([angles.cos(), angles.sin()], dim=-1))
    torch.testing.assert_close(found, frequencies, rtol=2e-7, atol=1e-11)


def test_the_example_shows_what_happens():
    result = doctest.testmod(rotation)
    assert result.attempted
    assert not result.failed
