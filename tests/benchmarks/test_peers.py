"""The comparison with other libraries: its settings, its checks and its page, without an engine."""

import json
import sys
from types import SimpleNamespace

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers import comparison, environment, peer, report, vllm_server
from benchmarks.peers.caches import Bound, FullCache, steps
from benchmarks.peers.prompts import Prompts, scored_texts
from benchmarks.peers.run import chosen, parse_arguments
from benchmarks.peers.setting import REFERENCE, SYSTEMS, choose
from vase_vllm.errors import EvictionError
from vase_vllm.tools.tiny_model import make_tiny_model

BY_NAME = {system.name: system for system in SYSTEMS}
VASE, RANDKV = BY_NAME["vLLM, vase"], BY_NAME["randkv"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make_tiny_model(directory, max_position_embeddings=2048)
    return directory


@pytest.fixture
def peers(tmp_path):
    for name in environment.PEERS:
        python = tmp_path / name / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.touch()
    return tmp_path


def setting_of(model, peers, *arguments):
    common = ["--model", str(model), "--peers", str(peers), "--output-len", "384"]
    return chosen(parse_arguments([*common, *arguments]))[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-len", "97"], "--prompt-len 97: randkv never evicts a prompt"),
        (["--budget", "70", "--window", "4"], "--budget 70: the first 8 tokens"),
        (["--output-len", "128"], "raise it to more than 128"),
        (["--output-len", "4000"], "--output-len 4000: the model takes 2048 tokens"),
        (["--model", "/nowhere"], "--model /nowhere: there is no config.json"),
        (["--requests", "8", "1"], "--requests: give different numbers"),
        (["--requests", "0"], "--requests: give different numbers"),
        (["--rounds", "0"], "--rounds: give a number of at least 1"),
        (["--systems", "kvpress"], "--systems 'kvpress': choose from 'transformers, full cache'"),
        (["--device", "cuda"], "--device cuda: vLLM runs on cpu here"),
        (["--peers", "/nowhere"], "benchmarks.peers.environment /nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_setting_that_compares_nothing_is_refused(model, peers, arguments, message):
    with pytest.raises(EvictionError) as caught:
        setting_of(model, peers, *arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_peers_that_run_need_an_environment(model, tmp_path):
    arguments = ["--model", str(model), "--peers", str(tmp_path), "--systems", "vLLM, vase"]
    _, systems = chosen(parse_arguments(arguments))
    assert systems == [REFERENCE, VASE]
    assert choose(None) == list(SYSTEMS)


def test_a_system_without_batches_runs_a_few_requests(model, peers):
    setting = setting_of(model, peers, "--serial-requests", "2")
    assert [RANDKV.num_run(count, setting) for count in setting.requests] == [1, 2, 2]
    assert [VASE.num_run(count, setting) for count in setting.requests] == [1, 8, 32]


def test_the_servers_have_room_for_the_largest_run_and_little_more(model, peers):
    setting = setting_of(model, peers, "--serve-arguments=--enforce-eager")
    full = vllm_server.num_blocks(setting, BY_NAME["vLLM, full cache"].policy(setting))
    # A sequence of 448 tokens and one more, in blocks of 32.
    assert full == 32 * 15
    policy = VASE.policy(setting)
    evicting = vllm_server.num_blocks(setting, policy)
    assert 32 * setting.bound // 32 < evicting < full
    arguments = vllm_server.serve_arguments(setting, policy)
    assert "--kv-eviction-config.prefill bounded" in " ".join(arguments)
    assert arguments[-1] == "--enforce-eager"
    per_token = setting.shard().kv_bytes_per_token
    expected = str((evicting + 1) * vllm_server.BLOCK_SIZE * per_token)
    assert arguments[arguments.index("--kv-cache-memory-bytes") + 1] == expected


def test_no_two_runs_share_a_prompt(model, peers):
    setting = setting_of(model, peers)
    texts = [list(range(start, start + 700)) for start in (0, 1000)]
    prompts = Prompts(texts, setting)
    taken = [prompts.take(count) for count in (4, 1, 8)]
    starts = [prompt[0] for group in taken for prompt in group]
    assert len(set(starts)) == 13
    assert all(len(prompt) == 64 for group in taken for prompt in group)
    with pytest.raises(EvictionError, match="--requests"):
        prompts.take(8)


def test_texts_that_are_too_short_are_not_scored(model, peers):
    setting = setting_of(model, peers, "--texts", "2")
    texts = [list(range(length)) for length in (448, 447, 1000)]
    assert [len(text) for text in scored_texts(texts, setting)] == [448, 448]
    with pytest.raises(EvictionError, match="only 1 texts"):
        scored_texts(texts[:2], setting)


@pytest.fixture(scope="module")
def full_cache():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    return FullCache(LlamaForCausalLM(config).eval(), Bound(8, 4))


def test_the_likelihood_is_that_of_one_pass_over_the_text(full_cache):
    texts = torch.randint(0, 64, (2, 12))
    with torch.inference_mode():
        logprobs = full_cache.model(texts).logits[:, :-1].log_softmax(dim=-1)
    expected = -logprobs.gather(2, texts[:, 1:, None])[:, 4:, 0]
    torch.testing.assert_close(full_cache.nll(texts, 5), expected, atol=1e-5, rtol=1e-5)
    assert list(steps(5, 8)) == [(0, 5), (5, 6), (6, 7)]


def test_a_generated_output_is_what_teacher_forcing_finds_most_probable(full_cache):
    prompts = torch.randint(0, 64, (2, 5))
    tokens, held = full_cache.generate(prompts, 6)
    assert held == 5 + 6 - 1
    with torch.inference_mode():
        logits = full_cache.model(torch.cat([prompts, tokens], dim=1)).logits
    assert torch.equal(logits[:, 4:-1].argmax(dim=-1), tokens)


@pytest.mark.parametrize(
    ("system", "held", "is_wrong"),
    [
        (REFERENCE, 447, False),
        (REFERENCE, 160, True),
        (RANDKV, 159, False),
        (RANDKV, 161, True),
        (RANDKV, 447, True),
    ],
)
def test_a_cache_that_is_not_as_long_as_it_must_be_is_wrong(
    model, peers, system, held, is_wrong, tmp_path
):
    """The worker is a stub that replies what a worker would."""
    replies = [{"versions": {"torch": "0"}}, {"tokens": [[1]], "held": held}]
    lines = "".join(f"input(); print('''{json.dumps(reply)}''', flush=True)\n" for reply in replies)
    process = peer.subprocess.Popen(
        [sys.executable, "-c", lines],
        stdin=peer.subprocess.PIPE,
        stdout=peer.subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "log"
    log.write_text("its last words")
    setting = setting_of(model, peers)
    worker = peer.Peer(system, setting, process, log)
    assert worker.versions == {"torch": "0"}
    _, problems = worker.generate([[0]], setting.output_len)
    assert problems == [f"{held} of 447 tokens were in the cache"] * is_wrong
    with pytest.raises(peer.RunFailedError, match="its last words"):
        worker.nll([[0]])
    process.communicate()


class Outputs:
    """A system whose outputs are known."""

    versions = SimpleNamespace()

    def __init__(self, token, length=None, problems=()):
        self.token, self.length, self.problems = token, length, problems

    def processes(self):
        return [psutil.Process()]

    def generate(self, prompts, num_tokens):
        row = [self.token] * (self.length or num_tokens)
        return [row] * len(prompts), list(self.problems)

    def nll(self, texts):
        return [[float(position) for position in range(384)] for _ in texts]


@pytest.fixture
def compared(model, peers, monkeypatch):
    texts = [list(range(start, start + 4000)) for start in (0, 5000)]
    monkeypatch.setattr(comparison, "tokenized_texts", lambda setting: texts)
    setting = setting_of(model, peers, "--texts", "2", "--requests", "1", "4")
    return comparison.Comparison(setting, [REFERENCE, VASE, RANDKV], peers, 1.0, peers)


def test_outputs_that_differ_from_the_full_caches_have_no_speed(compared):
    compared._check(REFERENCE, Outputs(1))
    compared._check(VASE, Outputs(1))
    with pytest.raises(comparison.RunFailedError, match="4 of 4 greedy outputs differ"):
        compared._check(VASE, Outputs(2))


def test_nothing_is_compared_without_the_reference(compared):
    with pytest.raises(comparison.RunFailedError, match="no outputs to compare with"):
        compared._check(VASE, Outputs(1))


def test_a_run_counts_the_requests_that_ran(compared):
    run = compared._measure(RANDKV, Outputs(1), 4)
    assert (run["status"], run["run"]) == ("ok", 1)
    assert compared._measure(VASE, Outputs(1), 4)["run"] == 4
    assert run["peak_rss_mib"] > 10


@pytest.mark.parametrize(
    ("outputs", "reason"),
    [
        (Outputs(1, length=9), "outputs are not as long as asked for"),
        (Outputs(1, problems=["3 evictions, 4 expected"]), "3 evictions, 4 expected"),
    ],
)
def test_a_run_that_went_wrong_has_no_speed(compared, outputs, reason):
    run = compared._measure(VASE, outputs, 4)
    assert (run["status"], run["reason"]) == ("wrong", reason)
    assert report.SPEED not in run


def test_the_likelihood_counts_from_the_first_eviction_on(compared):
    # Index 0 is the token at position 64; the token at position 161 is the first that is computed
    # after an eviction at 160 tokens.
    assert compared._likelihood(Outputs(1)) == [(97 + 383) / 2] * 2


def stored(**changes):
    run = {"status": "ok", "peak_device_mib": None, "warm_rss_mib": 700.0}
    setting = {
        "requests": [1, 8],
        "model": "m",
        "prompt_len": 64,
        "output_len": 384,
        "budget": 128,
        "window": 32,
        "serial_requests": 1,
        "texts": 2,
        "threads": 1,
        "dtype": "float32",
        "device": "cpu",
    }
    runs = [
        {"system": name, "requests": n, "run": ran, "round": number, report.SPEED: speed}
        | {"peak_rss_mib": 1000.0 + n}
        | run
        for name, n, ran, number, speed in (
            (VASE.name, 1, 1, 1, 10.0),
            (VASE.name, 1, 1, 2, 14.0),
            (VASE.name, 8, 8, 1, 110.0),
            (REFERENCE.name, 1, 1, 1, 9.0),
            (RANDKV.name, 8, 1, 1, 5.0),
        )
    ]
    failed = {"status": "failed", "reason": "it\ncrashed", "round": 1}
    runs.append({"system": REFERENCE.name, "requests": 8, **failed})
    result = {
        "date": "2026-01-01T00:00",
        "command": "python -m benchmarks.peers.run",
        "machine": {"processor": "p", "cores": 2, "accelerator": None},
        "setting": setting,
        "notes": ["a note"],
        "systems": {RANDKV.name: {"randkv": "0.1.0"}},
        "nll": {REFERENCE.name: [2.0, 3.0], VASE.name: [2.1, 3.3]},
        "runs": runs,
    }
    return result | changes


def test_the_table():
    lines = report.markdown(stored(), "cpu.svg").splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    cells = {row.split(" | ")[0].strip("| "): row.strip("| ").split(" | ")[1:] for row in rows}
    assert list(cells) == [REFERENCE.name, VASE.name, RANDKV.name]
    assert cells[VASE.name][:2] == ["12.0 (10.0 to 14.0)", "110"]
    assert cells[VASE.name][2:5] == ["700", "1001 (1001 to 1001)", "1008"]
    assert cells[VASE.name][5].startswith("+0.200 ± ")
    assert cells[REFERENCE.name][1] == "-"
    assert cells[RANDKV.name] == ["-", "5.0 *", "700", "-", "1008 *", "-"]
    assert f"- {REFERENCE.name}, 8 requests, round 1: **failed**: it crashed" in lines
    assert "- randkv: randkv 0.1.0" in lines


def test_a_page_and_a_picture_are_written(tmp_path):
    page = report.write(stored(), tmp_path / "cpu.json")
    assert (tmp_path / "cpu.md").read_text() == page
    assert "(cpu.svg)" in page
    assert (tmp_path / "cpu.svg").stat().st_size > 1000
    assert (tmp_path / "cpu.png").stat().st_size > 1000


def test_results_without_likelihoods_have_a_page(tmp_path):
    assert "| - |" in report.write(stored(nll={}), tmp_path / "cpu.json")
