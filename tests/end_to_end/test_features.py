"""What vLLM can be asked for, under eviction: it works, and a batch of all of it changes nobody."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.config import KVEventsConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import StructuredOutputsParams

from tests.support.engines import engine, eviction_stats, greedy, num_used_blocks, random_prompt
from vase_vllm.tools.tiny_model import make_tiny_model

pytestmark = pytest.mark.slow

EVICTION = {"budget": 48, "window": 16}
NUM_TOKENS = 90
"""Evictions at 64, 80, ... of whatever begins shorter than that."""


def sampling(**changes: Any) -> SamplingParams:
    settings = {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True}
    return SamplingParams(**settings | changes)


def structured(**constraint: Any) -> SamplingParams:
    # It ends where its grammar does.
    outputs = StructuredOutputsParams(**constraint)
    return sampling(structured_outputs=outputs, ignore_eos=False, max_tokens=300)


REQUESTS = {
    "plain": sampling(),
    "seeded": sampling(temperature=1.0, seed=5),
    "four samples, seeded": sampling(temperature=1.0, seed=7, n=4),
    "log-probabilities": sampling(logprobs=3, prompt_logprobs=2),
    "choice": structured(choice=["an apple " * 9, "a pear " * 12]),
    "regex": structured(regex="[a-f]{80}"),
    "json": structured(
        json={
            "type": "object",
            "properties": {"name": {"type": "string", "minLength": 70, "maxLength": 75}},
            "required": ["name"],
            "additionalProperties": False,
        }
    ),
    "bad words": sampling(bad_words=["e", "a"]),
    "logit bias": sampling(logit_bias={ord("q"): 100.0}),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a tokenizer, whose tokens are bytes."""
    return make_tiny_model(tmp_path_factory.mktemp("features") / "m", layers=2, dtype="float32")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> LoRARequest:
    """Random weights beside the queries' and the values' projections."""
    directory = tmp_path_factory.mktemp("adapter")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for layer in range(2):
        for name, width in (("q_proj", 512), ("v_proj", 128)):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{prefix}.lora_A.weight"] = torch.randn(8, 256, generator=generator)
            weights[f"{prefix}.lora_B.weight"] = torch.randn(width, 8, generator=generator)
    save_file(weights, directory / "adapter_model.safetensors")
    return LoRARequest("random", 1, str(directory))


def test_everything_in_one_batch_is_as_it_is_alone(model):
    prompts = [f"Request {index}: {name}. " for index, name in enumerate(REQUESTS)]
    # Random weights would write the white space that JSON allows for ever.
    grammars = {"backend": "xgrammar", "disable_any_whitespace": True}
    options = {"skip_tokenizer_init": False, "structured_outputs_config": grammars}
    with engine(model, EVICTION, **options) as llm:
        together = llm.generate(prompts, list(REQUESTS.values()), use_tqdm=False)
        alone = [
            llm.generate([prompt], params, use_tqdm=False)[0]
            for prompt, params in zip(prompts, REQUESTS.values(), strict=True)
        ]
        unseeded = llm.generate(["Four samples. "], sampling(temperature=1.0, n=4), use_tqdm=False)
        # Only the draws of the evictions can tell these samples apart.
        certain = sampling(temperature=1.0, top_k=1, n=4)
        drawn = [
            [
                tuple(o.token_ids)
                for o in llm.generate(["Drawn. "], certain, use_tqdm=False)[0].outputs
            ]
            for _ in range(2)
        ]
        stopped = llm.generate(["A stop string. "], sampling(max_tokens=400), use_tqdm=False)
        text = stopped[0].outputs[0].text
        stop = text[200:206]
        stopping = sampling(max_tokens=400, stop=[stop])
        (again,) = llm.generate(["A stop string. "], stopping, use_tqdm=False)
        assert num_used_blocks(llm) == 0
        assert eviction_stats(llm)["evictions"] > 2 * len(REQUESTS)
    for got, wanted in zip(together, alone, strict=True):
        assert [o.token_ids for o in got.outputs] == [o.token_ids for o in wanted.outputs]
    outputs = {name: output for name, output in zip(REQUESTS, together, strict=True)}
    texts = {name: output.outputs[0].text for name, output in outputs.items()}
    assert len({tuple(o.token_ids) for o in outputs["four samples, seeded"].outputs}) == 4
    assert [len(o.token_ids) for o in unseeded[0].outputs] == [NUM_TOKENS] * 4
    assert len(set(drawn[0])) == 4
    assert drawn[0] == drawn[1]
    scored = outputs["log-probabilities"]
    assert len(scored.outputs[0].logprobs) == NUM_TOKENS
    assert len(scored.prompt_logprobs) == len(scored.prompt_token_ids)
    assert texts["choice"] in ("an apple " * 9, "a pear " * 12)
    assert re.fullmatch("[a-f]{80}", texts["regex"])
    assert 70 <= len(json.loads(texts["json"])["name"]) <= 75
    assert not set("ea") & set(texts["bad words"])
    assert texts["logit bias"] == "q" * NUM_TOKENS
    assert again.outputs[0].text == text[: text.index(stop)]


def test_adapters(model, adapter):
    """In a batch of their own: on CPUs, vLLM applies an adapter to the whole batch."""
    prompts = [f"With an adapter, {index}. " * index for index in range(1, 5)]
    options = {"skip_tokenizer_init": False, "enable_lora": True, "max_lora_rank": 8}
    with engine(model, EVICTION, **options) as llm:
        together = llm.generate(prompts, sampling(), lora_request=adapter, use_tqdm=False)
        alone = [
            llm.generate([prompt], sampling(), lora_request=adapter, use_tqdm=False)[0]
            for prompt in prompts
        ]
        assert eviction_stats(llm)["evictions"] >= 8
        (without,) = llm.generate(prompts[:1], sampling(), use_tqdm=False)
    texts = [output.outputs[0].text for output in together]
    assert texts == [output.outputs[0].text for output in alone]
    assert texts[0] != without.outputs[0].text


PROMPTS = [{"prompt_token_ids": random_prompt(5 + 7 * index, index)} for index in range(17)]


def conversation(llm: LLM) -> list[list[int]]:
    """The outputs of three turns, whose prompts are all that was said before and a new question."""
    said: list[int] = []
    outputs = []
    for turn in range(3):
        said += random_prompt(30, 100 + turn)
        (output,) = llm.generate([{"prompt_token_ids": said}], greedy(50), use_tqdm=False)
        outputs.append(list(output.outputs[0].token_ids))
        said += outputs[-1]
    return outputs


@pytest.fixture(scope="module")
def alone(models) -> tuple[list[list[int]], list[list[int]]]:
    """Outputs of requests one by one, and of a conversation."""
    with engine(models.qwen3(), EVICTION) as llm:
        outputs = [llm.generate([p], greedy(40), use_tqdm=False)[0] for p in PROMPTS[::4]]
        return [output.outputs[0].token_ids for output in outputs], conversation(llm)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 8, "max_num_seqs": 8, "enable_prefix_caching": False},
        {
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": 2048,
            "watermark": 0.05,
            "kv_events_config": KVEventsConfig(enable_kv_cache_events=True, publisher="null"),
        },
    ],
    ids=["steps below the window, no prefix caching", "no chunked prefill, watermark, events"],
)
def test_settings_of_the_engine_change_no_token(models, alone, options):
    with engine(models.qwen3(), EVICTION, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy(40), use_tqdm=False)
        said = conversation(llm)
        assert num_used_blocks(llm) == 0
    assert ([output.outputs[0].token_ids for output in outputs[::4]], said) == alone
