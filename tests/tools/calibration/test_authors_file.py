"""The file of TriAttention's authors: read as their code writes it, or refused in one line."""

import pytest
import torch

from vase_vllm.errors import EvictionError
from vase_vllm.policies.base import AttentionShape
from vase_vllm.policies.query_statistics import rotation_pairs
from vase_vllm.tools.calibration.authors_file import read_authors_file

SHAPE = AttentionShape(num_layers=2, num_query_heads=4, num_kv_heads=2, head_size=8)
PAIRS = rotation_pairs(8, 8, is_neox_style=True)


def write_authors_file(path, mean, length, style="half") -> None:
    """As their `save_head_frequency_stats` does: mean [L, Q, F] complex, length [L, Q, F]."""
    layers, heads, _ = mean.shape
    stats = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": mean[layer, head].real.clone(),
            "q_mean_imag": mean[layer, head].imag.clone(),
            "q_abs_mean": length[layer, head].clone(),
        }
        for layer in range(layers)
        for head in range(heads)
    }
    metadata = {
        "head_dim": 2 * mean.shape[-1],
        "rope_style": style,
        "sampled_heads": [[layer, head] for layer in range(layers) for head in range(heads)],
    }
    torch.save({"metadata": metadata, "stats": stats}, path)


def test_what_was_written_is_read(tmp_path):
    mean, length = torch.randn(2, 4, 4, dtype=torch.complex64), torch.rand(2, 4, 4)
    write_authors_file(tmp_path / "stats.pt", mean, length)
    found = read_authors_file(tmp_path / "stats.pt", SHAPE, PAIRS)
    assert torch.equal(found[0], mean)
    assert torch.equal(found[1], length)
    pairs = rotation_pairs(8, 8, is_neox_style=False)
    write_authors_file(tmp_path / "stats.pt", mean, length, "interleaved")
    assert torch.equal(read_authors_file(tmp_path / "stats.pt", SHAPE, pairs)[0], mean)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((1, 4, 4), "it has no 'layer01_head00', so that it is not of this model (2 layers of 4"),
        ((2, 3, 4), "it has no 'layer00_head03'"),
        ((3, 4, 4), "it is not of this model (2 layers of 4 query heads and 2 KV heads of size 8)"),
        ((2, 5, 4), "it is not of this model"),
        ((2, 4, 2), "it is not of this model"),
    ],
)
def test_a_file_of_another_model_is_refused(tmp_path, size, message):
    file = tmp_path / "stats.pt"
    write_authors_file(file, torch.zeros(size, dtype=torch.complex64), torch.zeros(size))
    with pytest.raises(EvictionError) as error:
        read_authors_file(file, SHAPE, PAIRS)
    assert str(error.value).startswith(f"--convert {file}: {message}")


def test_a_model_that_turns_other_pairs_is_refused(tmp_path):
    file = tmp_path / "stats.pt"
    write_authors_file(file, torch.zeros(2, 4, 4, dtype=torch.complex64), torch.zeros(2, 4, 4))
    for pairs in (rotation_pairs(8, 4, True), rotation_pairs(8, 8, False)):
        with pytest.raises(EvictionError, match="RoPE turns other pairs"):
            read_authors_file(file, SHAPE, pairs)


def test_what_is_no_file_of_theirs_is_refused_in_one_line(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "weights")
    torch.save(torch.zeros(1), tmp_path / "tensor")
    torch.save({"metadata": {"rope_style": "half"}, "stats": SHAPE}, tmp_path / "code")
    for name in ("absent", "text", "weights", "tensor", "code"):
        with pytest.raises(EvictionError) as error:
            read_authors_file(tmp_path / name, SHAPE, PAIRS)
        assert str(error.value).startswith(f"--convert {tmp_path / name}")
        assert "\n" not in str(error.value)
