"""Hybrid models: full-attention layers evict, sliding-window layers stay as they are."""

import pytest

from tests.support.engines import (
    BLOCK_SIZE,
    add_request,
    drain,
    engine,
    eviction_stats,
    generate,
    greedy,
    num_used_blocks,
    random_prompt,
    scheduler,
)
from vase_vllm.engine.block_manager import EvictionManager
from vase_vllm.layout.block_table_row import BlockTableRow

pytestmark = pytest.mark.slow

EVICTION = {"budget": 128, "window": 16}
BOUND = -(-(128 + 16) // BLOCK_SIZE) + 1


def test_only_the_full_attention_group_evicts(models):
    prompts = [random_prompt(length, length) for length in (30, 300, 77)]
    with engine(models.gemma3(), EVICTION) as llm:
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        ours = [m for m in managers if isinstance(m, EvictionManager)]
        assert [m.kv_cache_group_id for m in ours] == [2]
        for index, prompt in enumerate(prompts):
            add_request(llm, str(index), prompt, greedy(200))
        for _ in range(150):
            llm.llm_engine.step()
        for row in ours[0].req_to_blocks.values():
            blocks = row[BlockTableRow.NUM_HEADER :]
            assert sum(not block.is_null for block in blocks) == BOUND
        together = drain(llm)
        assert eviction_stats(llm)["evictions"] >= 15
        alone = [generate(llm, [prompt], greedy(200))[0] for prompt in prompts]
        assert num_used_blocks(llm) == 0
    assert [together[str(index)] for index in range(3)] == alone
    with engine(models.gemma3(), None) as llm:
        full = generate(llm, prompts, greedy(200))
    # 30 + 114 tokens are cached when the first prompt evicts first; the next token may differ.
    assert full[0][:115] == alone[0][:115]
    assert full != alone


def test_a_pool_too_small_for_the_longest_prompt_is_refused(models):
    with (
        pytest.raises(ValueError, match="lower --max-model-len"),
        engine(models.gemma3(), EVICTION, kv_cache_memory_bytes=2 << 20),
    ):
        pass
