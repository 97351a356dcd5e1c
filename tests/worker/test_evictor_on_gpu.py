"""Evictions in plain torch on a device whose numbers the host does not know.

The meta device stands for a GPU: its tensors have a shape and a dtype, and no numbers. An operation
raises where its arguments are on different devices, and where the host would have to wait for a
number that only the device knows.
"""

import pytest
import torch

from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.kernels import torch_distinctness, torch_eviction
from vase_vllm.layout.block_table_row import RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.policies import triattention
from vase_vllm.policies.query_statistics import QueryStatistics
from vase_vllm.policies.registry import policy_names
from vase_vllm.policies.rkv import RKVPolicy
from vase_vllm.worker import evictor, pages
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import PlainPages

HEADS, GROUP, HEAD_SIZE, BLOCK_SIZE, WINDOW, BUDGET = 2, 3, 64, 16, 16, 96
LAYERS = (4, 5, 9)
VARIANTS = [
    {"policy": "vase", "protect": "random"},
    {"policy": "cur", "gaussian": "fixed"},
    {"policy": "distinct", "memory": 0.9, "strata": 4},
]


@pytest.fixture
def watched(monkeypatch):
    """What the evictor wants to be told later, on a device that is treated as a GPU."""
    found = []
    for at_once in (
        evictor._KEYS_TOGETHER,
        pages._VALUES_TOGETHER,
        torch_eviction._LOGITS_TOGETHER,
        torch_distinctness._KEYS_TOGETHER,
    ):
        monkeypatch.setitem(at_once, "meta", at_once["cuda"])
    own = statistics()
    monkeypatch.setattr(triattention.TriAttentionPolicy, "_read", lambda *_: own)
    monkeypatch.setattr(
        "vase_vllm.worker.nan_warnings.NaNWarnings.watch",
        lambda self, nan_keys, first: found.append(nan_keys),
    )
    return found


def statistics():
    """For the policy triattention, on the device."""
    shape = 12, HEADS * GROUP, HEAD_SIZE // 2
    mean = torch.zeros(shape, dtype=torch.complex64)
    pairs = torch.arange(HEAD_SIZE).view(2, -1)
    found = QueryStatistics(
        mean, mean.abs(), torch.zeros(12, HEAD_SIZE // 2).double(), pairs, HEADS
    )
    for name in ("mean", "mean_length", "frequencies", "pairs"):
        object.__setattr__(found, name, getattr(found, name).to("meta"))
    return found


def evict(settings, eviction_index, first):
    """One eviction of a sequence, of several layers at once."""
    config = EvictionConfig.parse({"budget": BUDGET, "window": WINDOW, **settings})
    state_blocks = config.num_state_blocks(GROUP, BLOCK_SIZE, HEAD_SIZE, torch.bfloat16)
    spec = EvictionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.bfloat16,
        schedule=config.schedule,
        num_state_blocks=state_blocks,
    )
    ring = RingLayout(WINDOW, GROUP, BLOCK_SIZE)
    of_plain_pages = TorchEvictor(config, spec, ring, PlainPages(), 0.125, torch.arange(HEADS))
    shape = 50, HEADS, BLOCK_SIZE, 2 * HEAD_SIZE
    caches = {layer: torch.empty(shape, dtype=torch.bfloat16, device="meta") for layer in LAYERS}
    num_columns = 4 + first // BLOCK_SIZE + state_blocks
    row = torch.zeros(num_columns, dtype=torch.int32, device="meta")
    header = RowHeader(first, key=7, budget=BUDGET, kept=0)
    return of_plain_pages.evict(caches, row, header, first + eviction_index * WINDOW)


@pytest.mark.parametrize("first", [BUDGET + WINDOW, 320], ids=["short", "long prompt"])
@pytest.mark.parametrize("eviction_index", [0, 3])
@pytest.mark.parametrize(
    "settings", [*({"policy": name} for name in policy_names()), *VARIANTS], ids=str
)
def test_no_policy_waits_for_the_device(settings, eviction_index, first, watched):
    dropped = evict(settings, eviction_index, first)
    assert dropped == (WINDOW if eviction_index else first - BUDGET)
    assert watched
    assert {nan_keys.device.type for nan_keys in watched} == {"meta"}


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda priority: priority if priority.isnan().any() else -priority, "meta tensors"),
        (lambda priority: priority[priority > 0], "meta"),
        (lambda priority: priority + torch.ones(priority.shape[-1]), "device"),
    ],
    ids=["asks for a number", "asks for how many", "is on the host"],
)
def test_a_policy_that_would_wait_is_found(mistake, message, watched, monkeypatch):
    original = RKVPolicy.priority
    monkeypatch.setattr(RKVPolicy, "priority", lambda self, c: mistake(original(self, c)))
    with pytest.raises((RuntimeError, NotImplementedError), match=message):
        evict({"policy": "rkv"}, 0, 320)
