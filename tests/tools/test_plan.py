"""The planner: its arithmetic against counting, and its blocks against a real engine's."""

import json
from pathlib import Path
from typing import Any

import pytest

from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools import cli
from vase_vllm.tools.plan.capacity import MEMORY_UTILIZATION, Workload, make_plan, parse_size
from vase_vllm.tools.plan.command import DEFAULT_WINDOW
from vase_vllm.tools.plan.cost import (
    Machine,
    ModelShape,
    Shard,
    evicting_fraction,
    mean_cached,
    num_blocks_held,
)
from vase_vllm.tools.plan.gpus import GPUS
from vase_vllm.tools.plan.model_shape import read_model_shape
from vase_vllm.tools.policy_label import parse_policy_label
from vase_vllm.tools.tiny_model import make_tiny_model

QWEN3_8B = str(Path(__file__).parents[2] / "benchmarks" / "models" / "qwen3-8b")
SHAPE = ModelShape(
    num_layers=36,
    num_query_heads=32,
    num_kv_heads=8,
    head_size=128,
    hidden_size=4096,
    element_size=2,
    num_params=8_190_735_360,
    weight_bytes=16_381_470_720,
    lookup_fraction=622_329_856 / 8_190_735_360,
)


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("80GiB", 80 * 2**30),
        ("80G", 80 * 2**30),
        ("80g", 80 * 10**9),
        ("80GB", 80 * 10**9),
        ("1.5GiB", 3 * 2**29),
        ("256M", 2**28),
        ("32k", 32_000),
        ("32K", 32_768),
        ("4096", 4096),
    ],
)
def test_sizes_are_read_as_vllm_reads_them(text: str, num_bytes: int):
    from vllm.utils.argparse_utils import human_readable_int

    assert parse_size(text) == num_bytes
    if "B" not in text:
        assert human_readable_int(text) == num_bytes


@pytest.mark.parametrize("text", ["", "GiB", "-1", "80GiX", "1e9", "80 80"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


def test_shape_of_qwen3_8b():
    shape, longest = read_model_shape(QWEN3_8B)
    assert shape == SHAPE
    assert longest == 40960
    assert Shard(shape).kv_bytes_per_token == 144 * 1024


@pytest.mark.parametrize(
    ("dtype", "serve", "size"),
    [("float32", "auto", 2), ("float32", "float32", 4), ("bfloat16", "auto", 2)],
)
def test_weights_take_the_bytes_of_the_served_dtype(
    tmp_path: Path, dtype: str, serve: str, size: int
):
    shape = read_model_shape(str(make_tiny_model(tmp_path, layers=1, dtype=dtype)), serve)[0]
    assert shape.element_size == size
    # The file has a header beside its tensors.
    assert shape.weight_bytes == pytest.approx(size * shape.num_params, rel=0.01)


def test_experts_are_counted_apart(tmp_path: Path):
    from transformers import Qwen3MoeConfig

    Qwen3MoeConfig(
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        vocab_size=128,
        dtype="bfloat16",
    ).save_pretrained(tmp_path)
    shape = read_model_shape(str(tmp_path))[0]
    assert (shape.num_experts, shape.num_experts_per_token) == (8, 2)
    assert shape.expert_fraction * shape.num_params == pytest.approx(2 * 8 * 3 * 64 * 32)
    dense = 1 - shape.lookup_fraction - shape.expert_fraction
    one, many = (Shard(shape).weight_bytes_read(batch) / shape.weight_bytes for batch in (1, 1000))
    assert one == pytest.approx(dense + shape.expert_fraction / 4)
    assert many == pytest.approx(dense + shape.expert_fraction)


@pytest.mark.parametrize("prompt", [1, 100, 512, 513, 1000])
@pytest.mark.parametrize("output", [1, 63, 500, 4097])
def test_closed_forms_equal_counting(prompt: int, output: int):
    schedule = EvictionSchedule(512, 64)
    first = schedule.first_eviction(prompt)
    steps = range(prompt, prompt + output)
    slots = [p if p < first else 512 + (p - first) % 64 for p in steps]
    assert mean_cached(prompt, output, schedule) == pytest.approx(
        sum(slot + 1 for slot in slots) / output
    )
    assert mean_cached(prompt, output) == pytest.approx(sum(p + 1 for p in steps) / output)
    assert evicting_fraction(prompt, output, schedule) == sum(p >= first for p in steps) / output


@pytest.mark.parametrize(
    ("num_tokens", "blocks"),
    [(1, 1), (16, 1), (17, 2), (512, 32), (513, 44), (577, 44), (40960, 44)],
)
def test_blocks_of_a_sequence_are_bounded(num_tokens: int, blocks: int):
    assert num_blocks_held(num_tokens, 16, EvictionSchedule(512, 64), 8) == blocks


@pytest.mark.parametrize(
    ("tp", "heads"), [(1, (8, 32)), (2, (4, 16)), (8, (1, 4)), (16, (1, 2)), (32, (1, 1))]
)
def test_heads_are_split_over_gpus(tp: int, heads: tuple[int, int]):
    shard = Shard(SHAPE, tp)
    assert (shard.num_kv_heads, shard.num_query_heads) == heads


@pytest.mark.parametrize("tp", [0, 3, 12, 64])
def test_a_split_of_heads_that_vllm_refuses_is_refused(tp: int):
    with pytest.raises(ValueError, match="--tensor-parallel-size"):
        Shard(SHAPE, tp)


def test_eviction_costs_what_the_kernel_reads():
    """One head of T = 4096, W = 64, G = 4, D = 128: twice 268 MFLOP, and about 3 MB."""
    head = ModelShape(1, 4, 1, 128, 512, 2, 1, 2)
    part = Shard(head).eviction(EvictionSchedule(4096, 64))
    assert part.operations == 2 * 268_435_456
    assert part.num_bytes == (3 * 4096 * 128 + 64 * 4 * 128 + 64 * 4 * 128) * 2


def test_an_eviction_takes_its_bytes_and_its_operations_and_attention_the_longer():
    shard, schedule = Shard(ModelShape(1, 4, 1, 128, 512, 2, 1, 2)), EvictionSchedule(4096, 64)
    step, machine = shard.step(8, 4096, schedule), Machine(bandwidth=2.0, peak=1024.0)
    for part in (shard.eviction(schedule), step.eviction):
        assert part.seconds(machine) == part.num_bytes / 2 + part.operations / 1024
    assert step.attention.seconds(machine) == step.attention.num_bytes / 2


def test_a_step_is_the_sum_of_its_parts():
    machine = Machine(bandwidth=1e12, peak=1e15, overhead=1e-3, link_latency=1e-5)
    step = Shard(SHAPE, 2).step(batch=8, num_cached=1000)
    weights = (SHAPE.weight_bytes - 2 * 622_329_856) / 2
    kv_bytes = 8 * 1001 * 72 * 1024
    assert step.num_bytes == pytest.approx(weights + kv_bytes)
    assert step.seconds(machine) == pytest.approx(1e-3 + (weights + kv_bytes) / 1e12 + 72 * 1e-5)


def test_plan_of_qwen3_8b():
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=512, mean_output_len=16384)
    plan = make_plan(SHAPE, 1, workload, [EvictionSchedule(4096, 64)])
    assert plan.bytes_per_block == 16 * 144 * 1024
    assert plan.num_blocks == 22755
    assert plan.full.blocks_per_sequence == 2560
    assert plan.full.max_concurrency == pytest.approx(22755 / 2560)
    assert plan.full.max_sequences == 22754 // 2560
    assert (plan.full.speedup, plan.full.speedup_equal_batch) == (1, 1)
    evicting = plan.evicting[0]
    assert (evicting.state_blocks, evicting.blocks_per_sequence) == (8, 268)
    assert evicting.max_concurrency == pytest.approx(22755 / 268)
    assert evicting.speedup > evicting.speedup_equal_batch > 1


@pytest.mark.parametrize(("prompt", "reserved"), [(512, 268), (4096, 268), (8192, 8 + 516)])
def test_the_batch_is_what_reserve_admits(prompt: int, reserved: int):
    """Outputs of 8 tokens hold little, and yet the most that they could is kept for them."""
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=prompt, mean_output_len=8)
    evicting = make_plan(SHAPE, 1, workload, [EvictionSchedule(4096, 64)]).evicting[0]
    assert evicting.batch == 22754 // reserved < 22754 / evicting.mean_blocks


def test_a_request_gives_back_what_a_long_prompt_held():
    """It holds 520 token blocks up to its first eviction at 8256, and 260 from then on."""
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=8192, mean_output_len=192)
    evicting = make_plan(SHAPE, 1, workload, [EvictionSchedule(4096, 64)]).evicting[0]
    assert evicting.batch == int(22754 / (8 + 516 / 3 + 260 * 2 / 3))


def test_a_kept_prompt_is_held_beside_the_budget():
    """8192 + 4096 + 64 tokens at every bound: 772 token blocks, and 8 of the ring."""
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=8192, mean_output_len=16384)
    schedule = EvictionSchedule(4096, 64, keeps_prompt=True)
    kept = make_plan(SHAPE, 1, workload, [schedule]).evicting[0]
    assert (kept.budget, kept.blocks_per_sequence) == (4096, 780)
    assert 8192 + 4096 * 0.8 < kept.mean_cached < 8192 + 4096 + 64


def test_a_budget_that_does_not_fit_serves_nobody():
    workload = Workload(40960, 16, 700 * 2**20, mean_prompt_len=512, mean_output_len=16384)
    schedules = [EvictionSchedule(budget, 64) for budget in (2048, 4096, 6144)]
    plan = make_plan(SHAPE, 1, workload, schedules, GPUS["h100"].machine)
    assert [item.batch for item in plan.evicting] == [2, 1, 0]
    assert plan.evicting[2].tokens_per_second == plan.evicting[2].speedup == 0


def test_a_machine_turns_steps_into_tokens_per_second():
    machine = GPUS["h100"].machine
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=512, mean_output_len=16384)
    schedule = EvictionSchedule(4096, 64)
    plan = make_plan(SHAPE, 1, workload, [schedule], machine)
    for item, cached, own in (
        (plan.full, mean_cached(512, 16384), ()),
        (
            plan.evicting[0],
            mean_cached(512, 16384, schedule),
            (schedule, evicting_fraction(512, 16384, schedule)),
        ),
    ):
        seconds = Shard(SHAPE).step(item.batch, cached, *own).seconds(machine)
        assert item.tokens_per_second == pytest.approx(item.batch / seconds)
        ratio = item.tokens_per_second / plan.full.tokens_per_second
        assert item.speedup == pytest.approx(ratio)
    assert make_plan(SHAPE, 1, workload, [schedule]).full.tokens_per_second is None


def test_short_outputs_gain_nothing():
    workload = Workload(40960, 16, 50 * 2**30, mean_prompt_len=512, mean_output_len=500)
    evicting = make_plan(SHAPE, 1, workload, [EvictionSchedule(4096, 64)]).evicting[0]
    assert evicting.speedup < 0.98 < evicting.speedup_equal_batch < 1


def plan_arguments(*more: str) -> list[str]:
    return ["plan", QWEN3_8B, *more]


@pytest.mark.parametrize(
    "budgets",
    [["--budget", "2k", "4096"], ["--budget", "2k", "--budget", "4096"]],
    ids=["one flag", "repeated"],
)
def test_json_holds_the_plan(capsys: pytest.CaptureFixture[str], budgets: list[str]):
    arguments = plan_arguments("--kv-cache-memory", "12GiB", *budgets, "--json")
    assert cli.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["num_blocks"] == 12 * 2**30 // (16 * 144 * 1024)
    assert [item["budget"] for item in plan["evicting"]] == [2000, 4096]


@pytest.mark.parametrize("memory", [["--gpu-memory", "80GiB"], ["--gpu", "h100"]])
def test_table_has_no_colour_when_piped(memory: list[str], capsys: pytest.CaptureFixture[str]):
    assert cli.main(plan_arguments(*memory)) == 0
    out = capsys.readouterr().out
    assert "budget 4096" in out
    assert "\x1b" not in out
    table, _, _ = out.partition("The maximum concurrency is")
    assert max(map(len, table.splitlines()[1:])) <= 80  # the first line has the model's name
    assert ("tokens/s (predicted)" in out) == ("--gpu" in memory)
    assert ("not a measurement" in out) == ("--gpu" in memory)


def test_a_gpu_brings_its_memory(capsys: pytest.CaptureFixture[str]):
    def plan(*arguments: str) -> dict[str, Any]:
        assert cli.main(plan_arguments(*arguments, "--json")) == 0
        return json.loads(capsys.readouterr().out)

    named, sized = plan("--gpu", "H100"), plan("--gpu-memory", "80GB")
    assert named["num_blocks"] == sized["num_blocks"]
    assert named["gpu"] == "h100"
    assert named["full"]["tokens_per_second"] > 0
    assert sized["full"]["tokens_per_second"] is None
    assert plan("--gpu", "h100", "--gpu-memory", "40GB")["num_blocks"] < sized["num_blocks"] / 2


@pytest.mark.parametrize(
    ("label", "numbers"), [("vase", 0), ("h2o", 2), ("distinct", 0), ("distinct:memory=0.9", 2)]
)
def test_a_policy_s_numbers_of_each_token_are_counted_as_the_engine_counts_them(
    label: str, numbers: int, capsys: pytest.CaptureFixture[str]
):
    import torch

    from vase_vllm.config import EvictionConfig

    name, settings = parse_policy_label(label)
    config = EvictionConfig.parse({"policy": name, "budget": 4096, **settings})
    assert config.policy.num_numbers == numbers
    arguments = ["--kv-cache-memory", "12GiB", "--budget", "4096", "--policy", label, "--json"]
    assert cli.main(plan_arguments(*arguments)) == 0
    (evicting,) = json.loads(capsys.readouterr().out)["evicting"]
    # Two numbers of 4096 tokens take 32 KiB, and a block 8 KiB for each layer and KV head.
    assert evicting["state_blocks"] == 8 + 2 * numbers
    assert evicting["state_blocks"] == config.num_state_blocks(4, 16, 128, torch.bfloat16)


def test_defaults_are_those_of_vllm_and_of_the_settings():
    from vllm.engine.arg_utils import EngineArgs

    from vase_vllm.config import EvictionConfig

    assert EngineArgs.gpu_memory_utilization == MEMORY_UTILIZATION
    assert EvictionConfig.model_fields["window"].default == DEFAULT_WINDOW


@pytest.mark.parametrize(
    "arguments",
    [
        [QWEN3_8B, "--kv-cache-memory", "12GiB", "--max-model-len", "8192"],
        ["--kv-cache-memory", "12GiB", QWEN3_8B, "--max-model-len", "8192"],
        ["--kv-cache-memory", "12GiB", "--max-model-len", "8192", QWEN3_8B],
        ["--model", QWEN3_8B, "--kv-cache-memory", "12GiB", "--max-model-len", "8192"],
        [QWEN3_8B, "--kv_cache_memory=12GiB", "--max_model_len", "8192"],
    ],
    ids=["first", "between", "last", "as a flag", "underscores"],
)
def test_the_model_and_the_flags_are_written_as_for_vllm_serve(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["plan", *arguments, "--json"]) == 0
    workload = json.loads(capsys.readouterr().out)["workload"]
    assert (workload["kv_cache_memory"], workload["max_model_len"]) == (12 * 2**30, 8192)


def test_a_missing_model_is_asked_for(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["plan", "--gpu", "h100"]) == 2
    assert "the model is missing: give a directory or a" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the memory is missing: give --gpu, such as --gpu h100, or --gpu-memory"),
        (["--gpu-memory", "80G", "--kv-cache-memory", "9G"], "give one of --gpu-memory and"),
        (["--gpu-memory", "80"], "--gpu-memory 80 has no unit: write --gpu-memory 80GiB"),
        (["--kv_cache_memory", "50"], "--kv-cache-memory 50 has no unit: write --kv-cache-memory"),
        (["--gpu-memory", "80G", "--other-memory", "3"], "write --other-memory 3GiB"),
        (["--gpu-memory", "80G", "--window", "0"], "--window (0) must be at least 1"),
        (
            ["--gpu-memory", "80G", "--window", "5000", "--budget", "4096"],
            "--budget (4096) must be larger than --window (5000): raise --budget or lower --window",
        ),
        (["--gpu-memory", "80G", "--model", "other"], "give the model once"),
        (["--kv-cache-memory", "4G", "--mean-prompt-len", "32K"], "of 32768 tokens does not fit"),
        (["--gpu-memory", "80X"], "'80X' is not a size"),
        (["--gpu-memory", "80G", "--policy", "lru"], "--policy lru: --kv-eviction lru: unknown"),
        (["--gpu-memory", "80G", "--policy", "h2o:recent=two"], "--policy h2o:recent=two: "),
        (["--gpu-memory", "80G", "--policy", "h2o:budget=9"], "remove budget, which has a flag"),
        (["--gpu-memory", "8GiB"], "the weights do not fit"),
        (["--kv-cache-memory", "1M"], "hold no block"),
        (["--kv-cache-memory", "64M"], "not one sequence"),
        (["--gpu-memory", "80G", "--budget", "64"], "must be larger than --window (64)"),
        (["--gpu-memory", "80G", "--budget", "x"], "--budget: 'x' is not a size"),
        (["--gpu-memory", "80G", "--max-model-len", "4096"], "no sequence would ever evict"),
        (["--gpu-memory", "80G", "--max-model-len", "1M"], "above the config's 40960"),
        (["--gpu-memory", "80G", "-tp", "3"], "cannot be split over 3 GPUs"),
        (["--gpu-memory", "80G", "--block-size", "0"], "must be at least 1"),
        (["--gpu-memory", "80G", "--gpu-memory-utilization", "90"], "up to 1"),
        (["--gpu-memory", "80G", "--mean-output-len", "64K"], "must be at most"),
    ],
)
def test_wrong_input_is_refused_in_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(plan_arguments(*arguments)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan", "--model", "m", "--block-size", "x"],
        ["plan", "m", "--gpu", "b300"],
        ["plan", "m", "n"],
        ["plan", "m", "--no-such-flag", "3"],
        ["no-such-command"],
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("evicts", [False, True], ids=["full", "vase"])
def test_plan_says_what_the_engine_reports(
    tmp_path: Path, evicts: bool, capsys: pytest.CaptureFixture[str]
):
    from tests.support.engines import engine

    model = make_tiny_model(tmp_path, layers=2, query_heads=8, kv_heads=2, head_dim=64)
    budget, window = 512, 32
    settings = {"budget": budget, "window": window} if evicts else None
    # The model's dtype is half as wide as that of the other tests' engines.
    options = {"kv_cache_memory_bytes": 48_000_000, "max_model_len": 5000, "dtype": "auto"}
    with engine(model, settings, block_size=32, **options) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        reported = cache.num_gpu_blocks, cache.kv_cache_max_concurrency
    arguments = [
        *("plan", "--model", str(model), "--kv-cache-memory", "48MB", "--block-size", "32"),
        *("--max-model-len", "5000", "--budget", str(budget), "--window", str(window), "--json"),
    ]
    assert cli.main(arguments) == 0
    plan = json.loads(capsys.readouterr().out)
    capacity = plan["evicting"][0] if evicts else plan["full"]
    assert reported == (plan["num_blocks"], pytest.approx(capacity["max_concurrency"], rel=1e-9))
