"""The flags, in every way that vLLM takes its arguments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.cli import main as cli
from vllm.utils.argparse_utils import FlexibleArgumentParser

from vase_vllm.errors import EvictionError

VLLM = [sys.executable, "-m", "vllm.entrypoints.cli.main"]


@pytest.fixture
def parser():
    return AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())


def settings_of(parser, arguments):
    # Any folder will do for a model: it is not looked into.
    args = parser.parse_args(["--model", str(Path(__file__).parent), *arguments])
    return AsyncEngineArgs.from_cli_args(args).additional_config


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ([], {}),
        (["--kv-eviction", "none"], {}),
        (["--kv-eviction", "vase"], {"policy": "vase"}),
        (
            ["--kv-eviction", "vase", "--kv-eviction-config", '{"budget": 512, "seed": 3}'],
            {"policy": "vase", "budget": 512, "seed": 3},
        ),
        (
            [
                "--kv-eviction=vase",
                "--kv-eviction-config.budget=512",
                "--kv-eviction-config.protected",
                "0.5",
                "--kv-eviction-config.sampling",
                "greedy",
            ],
            {"policy": "vase", "budget": 512, "protected": 0.5, "sampling": "greedy"},
        ),
    ],
    ids=["absent", "none", "vase", "json", "dotted"],
)
def test_flags_become_additional_config(parser, arguments, settings):
    expected = {"kv_eviction": settings} if settings else {}
    assert settings_of(parser, arguments) == expected


def test_other_additional_config_is_kept(parser):
    config = settings_of(parser, ["--additional-config", '{"x": 1}', "--kv-eviction", "vase"])
    assert config == {"x": 1, "kv_eviction": {"policy": "vase"}}


def test_yaml_file(parser, tmp_path):
    path = tmp_path / "engine.yaml"
    path.write_text("kv-eviction: vase\nkv-eviction-config:\n  budget: 512\n  window: 32\n")
    config = settings_of(parser, ["--config", str(path)])
    assert config == {"kv_eviction": {"policy": "vase", "budget": 512, "window": 32}}


def test_settings_without_the_policy_are_refused(parser):
    with pytest.raises(EvictionError, match="has no effect without --kv-eviction"):
        settings_of(parser, ["--kv-eviction-config.budget", "512"])


def test_settings_that_are_no_object_are_refused(parser):
    with pytest.raises(EvictionError, match="must be a JSON object"):
        settings_of(parser, ["--kv-eviction", "vase", "--kv-eviction-config", "[4]"])


def test_a_second_policy_among_the_settings_is_refused(parser):
    with pytest.raises(EvictionError, match="remove the key"):
        settings_of(parser, ["--kv-eviction", "vase", "--kv-eviction-config.policy", "rkv"])


def test_unknown_policy_is_refused(parser, capsys):
    with pytest.raises(SystemExit):
        settings_of(parser, ["--kv-eviction", "lru"])
    assert "invalid choice: 'lru' (choose from" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [["serve"], ["bench", "throughput"], ["bench", "latency"]],
    ids=lambda command: "-".join(command),
)
def test_help_shows_the_flags(command, monkeypatch, capsys):
    # vLLM's command line sets it for the processes to come.
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "argv", ["vllm", *command, "--help=KVEvictionConfig"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    text = capsys.readouterr().out
    assert "--kv-eviction {none,vase,cur,distinct," in text
    assert "`budget` (4096)" in " ".join(text.split())


@pytest.mark.slow
def test_bench_latency_runs_under_eviction(models):
    """`vllm bench` takes the flag, and the engine that it makes evicts."""
    result = subprocess.run(
        [
            *VLLM,
            *["bench", "latency", "--model", str(models.qwen3()), "--load-format", "dummy"],
            *["--skip-tokenizer-init", "--enforce-eager", "--kv-cache-memory-bytes", "16M"],
            *["--max-model-len", "512", "--block-size", "32", "--input-len", "40"],
            *["--output-len", "40", "--batch-size", "2", "--num-iters", "1"],
            *["--num-iters-warmup", "0", "--kv-eviction", "vase"],
            *["--kv-eviction-config.budget", "48", "--kv-eviction-config.window", "16"],
            *["--dtype", "float32"],
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "Avg latency" in result.stdout


@pytest.mark.slow
def test_a_wrong_setting_stops_the_server_with_one_line(models):
    result = subprocess.run(
        [
            *VLLM,
            *["serve", str(models.qwen3()), "--kv-eviction", "vase"],
            *["--kv-eviction-config", json.dumps({"budget": 32})],
        ],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == (
        "vllm: error: --kv-eviction-config: budget (32) must be larger than window (64): "
        "raise budget or lower window"
    )
    assert "Traceback" not in result.stderr
