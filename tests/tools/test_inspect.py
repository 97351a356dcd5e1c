"""`vase-vllm inspect`: what it says is kept, against the pages and against the oracle."""

import itertools
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.oracle.selection import select_greedy
from tests.support.engines import release
from vase_vllm.config import EvictionConfig
from vase_vllm.engine.spec import EvictionSpec
from vase_vllm.layout.block_table_row import BlockTableRow, RowHeader
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools import cli, requirements
from vase_vllm.tools.inspection import command
from vase_vllm.tools.inspection.kept_positions import KeptPositions, LayerHistory, Status
from vase_vllm.tools.inspection.summary import summarise
from vase_vllm.tools.tiny_model import make_tiny_model
from vase_vllm.worker.evictor import TorchEvictor
from vase_vllm.worker.pages import PlainPages

BLOCK_SIZE, NUM_HEADS, HEAD_SIZE, LAYER = 16, 2, 4, 5
BUDGET, WINDOW, SINKS = 40, 8, 4


def spec_of(config: EvictionConfig, ring: RingLayout) -> EvictionSpec:
    return EvictionSpec(
        block_size=BLOCK_SIZE,
        num_kv_heads=NUM_HEADS,
        head_size=HEAD_SIZE,
        dtype=torch.float32,
        schedule=EvictionSchedule(config.budget, config.window),
        num_state_blocks=ring.num_blocks,
    )


@pytest.mark.parametrize("prompt_len", [10, 90], ids=["short-prompt", "long-prompt"])
@pytest.mark.parametrize("policy", ["vase", "random", "streaming"])
def test_what_is_kept_is_what_lies_in_the_pages(policy, prompt_len):
    """Every token's value says its position, so that the pages tell what they hold."""
    torch.manual_seed(0)
    own = {"protected": 12} if policy == "vase" else {}
    config = EvictionConfig.parse({"policy": policy, "budget": BUDGET, "window": WINDOW, **own})
    ring = RingLayout(WINDOW, 1, BLOCK_SIZE)
    spec = spec_of(config, ring)
    first = spec.schedule.first_eviction(prompt_len)
    num_tokens = first + 12 * WINDOW + 3
    num_blocks = ring.num_blocks + -(-first // BLOCK_SIZE)
    cache = torch.randn(num_blocks, NUM_HEADS, BLOCK_SIZE, 2 * HEAD_SIZE)
    header = RowHeader(first, 99, config.budget, kept=0)
    row = torch.tensor([*header, *torch.randperm(num_blocks).tolist()], dtype=torch.int32)
    blocks = row[BlockTableRow.NUM_HEADER :].long()
    evictor = TorchEvictor(config, spec, ring, PlainPages(), 0.5, torch.arange(NUM_HEADS))
    sizes = 1000 + torch.rand(NUM_HEADS, num_tokens)
    kept = KeptPositions([LAYER])
    evictions = 0
    for position in range(num_tokens):
        if position >= first and (position - first) % WINDOW == 0:
            caches = {LAYER: cache, LAYER + 1: cache.clone()}
            evictor.evict(caches, row, header, position, kept)
            evictions += 1
            slots = torch.arange(BUDGET)
            held = cache[blocks[slots // BLOCK_SIZE], :, slots % BLOCK_SIZE, HEAD_SIZE].int()
            status = kept.history(LAYER).status[-1]
            assert status.shape == (NUM_HEADS, position)
            for head in range(NUM_HEADS):
                assert sorted(held[:, head].tolist()) == np.flatnonzero(status[head]).tolist()
        slot = int(spec.schedule.slots(torch.tensor(position), torch.tensor(first)))
        token = cache[blocks[slot // BLOCK_SIZE], :, slot % BLOCK_SIZE]
        token[:, HEAD_SIZE:] = torch.tensor([position, 0.0, 0.0, 0.0])
        token[:, HEAD_SIZE + 1] = sizes[:, position]

    history = kept.history(LAYER)
    assert kept.history(LAYER + 1) is None
    assert history.positions.tolist() == [first + i * WINDOW for i in range(evictions)]
    last = history.positions[-1]
    assert np.isnan(history.value_range[:, last - WINDOW :]).all()
    assert (history.value_range == sizes.numpy()[:, :last])[:, : last - WINDOW].all()
    check_statuses(history, num_protected=8 if policy == "vase" else 0)


def check_statuses(history: LayerHistory, num_protected: int) -> None:
    """The budget is kept, what is gone stays gone, and each has the status that it should have."""
    for index, position in enumerate(history.positions):
        for head, status in enumerate(history.status[index]):
            assert np.count_nonzero(status) == BUDGET
            assert (status[:SINKS] == Status.SINK).all()
            assert (status[position - WINDOW : position] == Status.WINDOW).all()
            assert (status[position:] == Status.ABSENT).all()
            before = status[:position] != Status.ABSENT
            if index:
                before = history.status[index - 1, head, :position] != Status.ABSENT
                # The window's tokens have come since.
                before[history.positions[index - 1] :] = True
                assert not (status[:position].astype(bool) & ~before).any()
            else:
                before[:] = True
            old = (
                before & (np.arange(position) >= SINKS) & (np.arange(position) < position - WINDOW)
            )
            ranges = np.where(old, history.value_range[head, :position], -np.inf)
            largest = np.sort(np.argsort(-ranges, kind="stable")[:num_protected])
            assert np.flatnonzero(status == Status.PROTECTED).tolist() == largest.tolist()


def test_a_gpu_evicts_in_plain_torch_while_somebody_looks():
    from vase_vllm.worker.triton_path import TritonPath

    config = EvictionConfig.parse({"budget": BUDGET, "window": WINDOW})
    context = SimpleNamespace(
        config=config,
        observer=KeptPositions([LAYER]),
        kv_heads=torch.arange,
        device=torch.device("cpu"),
        vllm_config=SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=4)),
    )
    layer = SimpleNamespace(num_heads=2, num_kv_heads=2, impl=SimpleNamespace(scale=0.5))
    path = TritonPath(context, spec_of(config, RingLayout(WINDOW, 1, BLOCK_SIZE)), {LAYER: layer})
    assert not path._is_fused
    context.observer = None
    assert path._is_fused


def test_summary():
    """Two heads, eight older tokens of which each keeps four, half of them the same."""
    keep = np.array([[1, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]])
    status = np.zeros((1, 2, 12), dtype=np.uint8)
    status[..., :2], status[..., 10:] = Status.SINK, Status.WINDOW
    status[0, :, 2:10] = np.where(keep, Status.RANKED, Status.ABSENT)
    status[0, 0, 3] = Status.PROTECTED
    ranges = np.full((2, 12), 1.0)
    # The largest of the older tokens: held by head 0, not by head 1. The sinks do not count.
    ranges[:, 0], ranges[0, 3], ranges[1, 2] = 9, 5, 5
    ranges[:, 10:] = np.nan
    summary = summarise(LayerHistory(np.array([12]), status, ranges))
    assert (summary.sinks, summary.window) == (2, 2)
    assert (summary.protected, summary.ranked) == (0.5, 3.5)
    # Ages of the positions 0, 1, 10, 11 are 12, 11, 2, 1; of 2..5: 10..7; of 4..7: 8..5.
    assert summary.mean_age == pytest.approx((26 + 34 + 26 + 26) / 16)
    assert summary.overlap == pytest.approx(2 / 6)
    assert summary.overlap_by_chance == pytest.approx(4 / 12)
    assert (summary.held, summary.large_held) == (0.5, 0.5)


def test_a_single_head_overlaps_with_none():
    status = np.full((1, 1, 6), Status.RANKED, dtype=np.uint8)
    history = LayerHistory(np.array([6]), status, np.ones((1, 6), dtype=np.float32))
    assert summarise(history).overlap is None


# The command

HELLO = ["--prompt", "hello"]
MODEL = ["."]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MODEL, "one of the arguments --prompt --prompt-file is required"),
        ([*MODEL, *HELLO, "--max-tokens", "0"], "--max-tokens (0) must be at least 1"),
        (HELLO, "the model is missing: give a directory or a Hugging Face id"),
        ([*MODEL, *HELLO, "--model", "other"], ". and --model other: give the model once"),
        ([*MODEL, "--prompt-file", "absent.txt"], "--prompt-file absent.txt: "),
        ([*MODEL, *HELLO, "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        ([*MODEL, *HELLO, "--kv-eviction", "none"], "--kv-eviction none: there is nothing"),
        ([*MODEL, *HELLO, "--kv-eviction", "lru"], "invalid choice: 'lru'"),
        ([*MODEL, *HELLO, "-tp", "2"], "--tensor-parallel-size (2): inspect follows"),
        (
            [*MODEL, *HELLO, "--kv-eviction-config.budget", "8"],
            "--kv-eviction-config: budget (8) must be larger than window (64)",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_cannot_be_inspected_is_refused_in_one_line(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["inspect", *arguments])
    except SystemExit as error:
        status = error.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_what_is_not_installed_is_named_with_the_remedy(capsys, monkeypatch):
    find = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    assert cli.main(["inspect", *MODEL, *HELLO]) == 2
    errors = capsys.readouterr().err
    assert "vase-vllm: inspect needs matplotlib: run pip install '.[inspect]' in a" in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", ".", "--max-model-len", "512", *HELLO],
        [".", *HELLO, "--max_model_len", "512"],
        [*HELLO, ".", "--max-model-len=512"],
    ],
    ids=["as a flag", "first", "after its own flags"],
)
def test_the_model_and_the_flags_are_written_as_for_vllm_serve(arguments, monkeypatch, tmp_path):
    seen = []

    def no_replay(engine_args, *_):
        seen.append(engine_args)
        raise ValueError("no engine is started")

    monkeypatch.setattr(command, "replay", no_replay)
    assert cli.main(["inspect", "--output", str(tmp_path / "new"), *arguments]) == 2
    assert (seen[0].model, seen[0].max_model_len) == (".", 512)
    assert not (tmp_path / "new").exists()


def test_other_commands_take_no_engine_arguments(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["tiny-model", "somewhere", "--max-model-len", "512"])
    assert error.value.code == 2
    assert "unrecognized arguments: --max-model-len 512" in capsys.readouterr().err


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("inspect") / "tiny", layers=2))


def inspect_arguments(model, output, *arguments):
    return [
        *["inspect", model, "--output", str(output), "--kv-eviction-config.budget", "48"],
        *["--kv-eviction-config.window", "16", "--max-model-len", "512"],
        *["--kv-cache-memory-bytes", "16M", "--block-size", "32", *arguments],
    ]


@pytest.mark.slow
def test_inspect_end_to_end(tiny_model, tmp_path):
    arguments = inspect_arguments(
        tiny_model,
        tmp_path,
        *["--prompt", "Say it again.", "--chat", "--max-tokens", "160", "--temperature", "0"],
        *["--layers", "1", "--kv-heads", "1", "--kv-eviction-config.protected", "12"],
    )
    command = [sys.executable, "-m", "vase_vllm.tools.cli", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("layer-1.png", "layer-1.svg", "kept.npz", "summary.json"):
        assert str(tmp_path / name) in result.stdout
        assert (tmp_path / name).stat().st_size > 1000
    assert not (tmp_path / "layer-0.png").exists()
    assert (tmp_path / "layer-1.png").read_bytes()[:4] == b"\x89PNG"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["kv_eviction"] == "vase"
    assert summary["kv_eviction_config"]["budget"] == 48
    length = summary["prompt_tokens"] + 160
    assert "".join(summary["tokens"]).startswith("<|im_start|>user\nSay it again.<|im_end|>")
    assert list(summary["layers"]) == ["1"]
    assert summary["layers"]["1"]["protected"] == 8
    with np.load(tmp_path / "kept.npz") as arrays:
        assert arrays["token_ids"].shape == (len(summary["tokens"]),) == (length,)
        positions = arrays["eviction_positions"]
        first = EvictionSchedule(48, 16).first_eviction(summary["prompt_tokens"])
        assert positions.tolist() == list(range(first, length, 16))
        assert arrays["layer_1_status"].shape == (len(positions), 2, positions[-1])
        assert (np.count_nonzero(arrays["layer_1_status"], axis=-1) == 48).all()
        assert arrays["layer_1_value_range"].shape == (2, positions[-1])
    table = {line[:29].strip(): line[29:].strip() for line in result.stdout.splitlines()}
    assert table["sinks, of the tokens held"] == "8.3%"
    assert table["drawn at random"] == "41.7%"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (
            None,
            ["--max-tokens", "5"],
            "nothing was evicted: the sequence ended with 10 tokens",
        ),
        (
            None,
            ["--layers", "2"],
            "--layers 2: this layer does not evict; the layers that do are",
        ),
        ("/no/such/model", [], "/no/such/model"),
    ],
    ids=["nothing to evict", "no such layer", "no such model"],
)
def test_what_only_the_engine_knows_is_refused_in_one_line(
    tiny_model, tmp_path, capsys, model, arguments, message
):
    output = tmp_path / "pictures"
    try:
        code = cli.main(inspect_arguments(model or tiny_model, output, *HELLO, *arguments))
    finally:
        release()
    assert code != 0
    stderr = capsys.readouterr().err
    assert message in stderr.strip().splitlines()[-1]
    assert "Traceback" not in stderr
    assert not (tmp_path / "pictures").exists()


@pytest.mark.slow
def test_what_is_kept_is_what_the_oracle_keeps(models):
    from transformers import AutoModelForCausalLM

    from tests.oracle.hf_eviction import generate_with_eviction
    from tests.support.engines import engine, generate, greedy, random_prompt

    prompt = random_prompt(160, 1160)
    settings = {"budget": 128, "window": 16, "protected": 0.25, "sinks": 4}
    with engine(models.qwen3(), {**settings, "sampling": "greedy", "smoothing": 1}) as llm:
        kept = KeptPositions([0, 1])
        llm.collective_rpc("observe_evictions", args=(kept,))
        generate(llm, [prompt], greedy(230))
    ranges = {}

    def select_and_look(candidates):
        found = ranges.setdefault((candidates.layer, candidates.kv_head), {})
        found |= zip(candidates.positions.tolist(), candidates.ranges.tolist(), strict=True)
        return select_greedy(candidates)

    oracle = AutoModelForCausalLM.from_pretrained(models.qwen3(), dtype=torch.float32).eval()
    with torch.inference_mode():
        want = generate_with_eviction(
            *[oracle, prompt, 230],
            **{**settings, "protected": 32},
            sampling=select_and_look,
        )
    clear = list(itertools.takewhile(lambda e: e.margin > 1e-6, want.evictions))
    assert len(clear) >= 5, "choose another seed: this prompt has ties too early"
    for layer in (0, 1):
        history = kept.history(layer)
        assert history.positions.tolist() == [e.position for e in want.evictions]
        for index, eviction in enumerate(clear):
            for head in range(2):
                held = np.flatnonzero(history.status[index, head])
                assert tuple(held.tolist()) == eviction.heads[layer, head].after
                assert held[:4].tolist() == [0, 1, 2, 3]
        old = range(4, clear[-1].position - 16)
        for head in range(2):
            expected = [ranges[layer, head][position] for position in old]
            found = history.value_range[head, old.start : old.stop]
            assert found == pytest.approx(expected, rel=1e-4)
