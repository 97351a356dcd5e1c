"""The check of attention over evicted pages sees what an attention does wrong.

xformers itself has no kernels for a CPU. Attention in plain torch stands in for it, with the block
table and the lengths that it would get.
"""

from dataclasses import replace

import pytest
import torch

from benchmarks.kernels.policies import unscored
from benchmarks.kernels.workload import Shape
from benchmarks.kernels.xformers_attention import BLOCK_SIZE, wrong_outputs
from vase_vllm.kernels.parameters import EvictionParameters

CPU = torch.device("cpu")
DRAWN = Shape(EvictionParameters(100, 8, 25), 2, 1, 2, 2, 64, dtype=torch.float16, extra=40)
STREAMING = replace(DRAWN, parameters=unscored(DRAWN.parameters)["streaming"])


def attention(step, query, lengths=None):
    outputs = []
    for row, length in enumerate(lengths or step.num_cached):
        blocks = step.block_table[row].long()
        slots = (blocks[:, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()[:length]
        keys, values = step.pages[slots].float().transpose(0, 1).chunk(2, dim=-1)
        logits = query[row].float() @ keys.transpose(1, 2) * query.shape[-1] ** -0.5
        outputs.append(torch.softmax(logits, dim=-1) @ values)
    return torch.stack(outputs).to(query.dtype)


@pytest.mark.parametrize("shape", [DRAWN, STREAMING], ids=["drawn", "streaming"])
def test_attention_over_the_survivors_is_right(shape):
    torch.manual_seed(0)
    assert wrong_outputs(shape, CPU, attention) == (0, 0, 4)


@pytest.mark.parametrize("more", [-1, 1], ids=["one too few", "one too many"])
def test_a_token_too_few_or_too_many_is_seen(more):
    def wrong(step, query):
        assert step.num_cached == [101, 101]
        return attention(step, query, [length + more for length in step.num_cached])

    torch.manual_seed(0)
    assert wrong_outputs(DRAWN, CPU, wrong)[0] == 4


def test_another_page_is_seen():
    def wrong(step, query):
        step.block_table[0, 0] = step.block_table[1, 0]
        return attention(step, query)

    torch.manual_seed(0)
    assert wrong_outputs(DRAWN, CPU, wrong)[0] == 2


def test_other_survivors_are_counted_apart(monkeypatch):
    def sinks_alone(self, original=EvictionParameters.counts.fget):
        budget, sinks, _ = original(self)
        return budget, sinks, sinks

    # The kernels protect no large value ranges, the reference does.
    monkeypatch.setattr(EvictionParameters, "counts", property(sinks_alone))
    torch.manual_seed(0)
    assert wrong_outputs(DRAWN, CPU, attention) == (0, 4, 4)
