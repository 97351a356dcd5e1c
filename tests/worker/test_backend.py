"""What the GPU kernels cannot take is refused when the layers are wrapped, in one line."""

from types import SimpleNamespace

import pytest

from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.worker.backend import check_kernels

CONFIG = EvictionConfig(budget=128, window=16)


def layers(backend="FLASH_ATTN", head_size=128, num_heads=8, num_kv_heads=2):
    layer = SimpleNamespace(
        attn_backend=SimpleNamespace(get_name=lambda: backend),
        head_size=head_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
    )
    return {"model.layers.0": layer}


@pytest.mark.parametrize(
    ("shape", "block_size", "reason"),
    [
        ({"head_size": 80}, 16, "layer model.layers.0: head size 80 is not one of 64, 96, 128,"),
        ({"num_heads": 34}, 16, "layer model.layers.0: 17 query heads per KV head are not 1 to 16"),
        ({}, 48, "--block-size 48; set --block-size to one of 16, 32, 64, 128"),
    ],
    ids=["head size", "group size", "block size"],
)
@pytest.mark.parametrize("backend", ["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN"])
def test_what_the_kernels_cannot_take(backend, shape, block_size, reason):
    with pytest.raises(EvictionError) as error:
        check_kernels(layers(backend, **shape), block_size, CONFIG)
    message = str(error.value)
    assert message.startswith(f"--kv-eviction vase: the GPU kernels do not take {reason}")
    assert message.endswith(("; remove --kv-eviction", "one of 16, 32, 64, 128"))
    assert "\n" not in message
    # In plain torch on a CPU there is no such limit.
    check_kernels(layers("CPU_ATTN", **shape), block_size, CONFIG)


def test_what_they_take():
    check_kernels(layers(num_heads=32), 16, CONFIG)
