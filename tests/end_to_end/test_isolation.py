"""A request reads and writes its own blocks, and nobody else's."""

import pytest
import torch

from tests.support.engines import add_request, engine, greedy, random_prompt, scheduler
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("isolation") / "model", layers=2)


def run(llm, poisoned=()):
    """Token ids of one request; at some steps all pages but its own are overwritten.

    With large numbers, not with NaN: attention multiplies what it masks by 0, and a block that the
    request is given later has cells that nothing was written to.
    """
    add_request(llm, "own", random_prompt(150, 1, vocab_size=256), greedy(200))
    caches = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
    step, tokens = 0, []
    while llm.llm_engine.has_unfinished_requests():
        if step in poisoned:
            (request_id,) = scheduler(llm).requests
            (own,) = scheduler(llm).kv_cache_manager.get_block_ids(request_id)
            for cache in caches.model_runner.kv_caches:
                # Of the row's header no number is a block; those that look like one are spared.
                foreign = torch.ones(len(cache), dtype=torch.bool)
                foreign[[block for block in own if block < len(cache)]] = False
                cache[foreign] = 1e4
        for output in llm.llm_engine.step():
            tokens = list(output.outputs[0].token_ids)
        step += 1
    return tokens


@pytest.mark.parametrize("settings", [{}, {"prompt": "keep"}, {"policy": "distinct"}])
def test_foreign_pages_are_never_read(model, settings):
    eviction = {"budget": 96, "window": 16, "protected": 7} | settings
    with engine(model, eviction, enable_prefix_caching=False) as llm:
        untouched = run(llm)
        assert run(llm, poisoned=range(1, 200, 7)) == untouched
    assert len(untouched) == 200
