"""The command, with a stub in the engine's place: what is measured again, written and refused."""

import hashlib
import json
import shutil
from contextlib import contextmanager

import numpy as np
import pytest

from vase_vllm.tools import cli, requirements
from vase_vllm.tools.evaluation import measurement
from vase_vllm.tools.evaluation.scores import Scores
from vase_vllm.tools.tiny_model import make_tiny_model


class StubEngine:
    """Gives every token a log-probability that depends on the method and the tokens so far."""

    def __init__(self, method, scored):
        self.method, self.scored = method, scored

    def score(self, token_ids, top_logprobs):
        self.scored.append((self.method.label, self.method.budget, len(token_ids)))
        seed = hashlib.sha256(repr((self.method.name, token_ids)).encode()).digest()
        rng = np.random.default_rng(list(seed))
        shape = (len(token_ids) - 1, 1 + top_logprobs)
        logprobs = np.sort(-rng.gamma(2.0, size=shape))[:, ::-1] - 5.0
        ids = np.tile(np.arange(shape[1]), (shape[0], 1))
        return Scores(
            ids.astype(np.int32), logprobs.astype(np.float32), np.ones(shape[0], np.int32)
        )


@pytest.fixture
def scored(monkeypatch):
    """What the stub was asked to score, in order."""
    found = []

    @contextmanager
    def start(engine_args, method, max_model_len, top_logprobs):
        assert engine_args.dtype == "float32"
        assert (max_model_len, top_logprobs) == (201, 5)
        yield StubEngine(method, found)

    monkeypatch.setattr(measurement, "scoring_engine", start)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("evaluate") / "tiny", layers=1)


@pytest.fixture
def run(model, tmp_path):
    """Runs the command on two texts of 200 tokens."""

    def evaluate(*arguments, policies=("vase", "rkv:smoothing=1"), at=model):
        return cli.main(
            [
                *["evaluate", str(at), "--policies", *policies, "--budgets", "64"],
                *["--window", "16", "--num-texts", "2", "--max-tokens", "200"],
                *["--top-logprobs", "5", "--output", str(tmp_path / "out"), *arguments],
                *["--dtype", "float32"],
            ]
        )

    return evaluate


EVERYTHING = [
    *[("full", None, 200)] * 2,
    *[("vase", 64, 200)] * 2,
    *[("rkv:smoothing=1", 64, 200)] * 2,
]


def test_what_is_finished_is_not_measured_again(run, scored, tmp_path, capsys):
    assert run() == 0
    assert scored == EVERYTHING
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    scored.clear()
    assert run() == 0
    assert scored == []
    again = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert again["likelihood"] == result["likelihood"]
    # Another policy needs its own cells only; a cell that an interruption cut is measured again.
    assert run(policies=["vase", "random"]) == 0
    assert scored == [("random", 64, 200)] * 2
    scored.clear()
    (cell, _) = sorted((tmp_path / "out" / "cells" / "vase-64").iterdir())
    cell.write_bytes(cell.read_bytes()[:100])
    assert run(policies=["vase"]) == 0
    assert scored == [("vase", 64, 200)]
    assert "Results are in" in capsys.readouterr().out


def test_another_model_text_or_setting_is_measured_again(run, model, scored, tmp_path, capsys):
    texts = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for index, text in enumerate(texts):
        text.write_text(f"{index} a text of some length. " * 50)
    files = ["--texts", *map(str, texts)]
    run(*files)
    scored.clear()
    texts[1].write_text("another text of some length. " * 50)
    run(*files)
    assert scored == EVERYTHING[::2]
    assert "3 results in" in " ".join(capsys.readouterr().err.split())
    scored.clear()
    run(*files, "--window", "32")
    assert scored == EVERYTHING[2:]
    scored.clear()
    shutil.copytree(model, tmp_path / "model")
    run(*files, "--window", "32", at=tmp_path / "model")
    assert scored == []
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    run(*files, "--window", "32", at=tmp_path / "model")
    assert scored == EVERYTHING


def test_the_results_say_where_they_come_from(run, scored, tmp_path, capsys):
    run("--note", "Nothing else ran.")
    out = tmp_path / "out"
    result = json.loads((out / "evaluation.json").read_text())
    assert {text["half"] for text in result["texts"]} == {"choice", "report"}
    assert all(len(text["sha256"]) == 64 and text["tokens"] == 200 for text in result["texts"])
    assert {"python", "vllm", "torch", "vase-vllm"} <= set(result["versions"])
    assert len(result["model"]["fingerprint"]) == 64
    assert len(result["by_text"]) == 4
    rises = [row["rise"] for row in result["by_text"] if row["method"] == "vase"]
    (both,) = (r for r in result["likelihood"] if (r["group"], r["method"]) == ("all", "vase"))
    assert both["rise"]["mean"] == pytest.approx(np.mean(rises))
    page = (out / "evaluation.md").read_text()
    margin = both["rise"]["high"] - both["rise"]["mean"]
    assert f"| vase | {both['rise']['mean']:+.3f} ± {margin:.3f} | - |" in page
    assert "which makes it a lower bound" in page
    assert "- Nothing else ran.\n" in page
    assert result["texts"][0]["sha256"][:12] in page
    assert (out / "evaluation.png").read_bytes()[:4] == b"\x89PNG"
    assert "rkv:smoothing=1" in capsys.readouterr().out


def test_the_recall_suite_runs_through_the_same_cells(run, monkeypatch, tmp_path):
    found = []

    @contextmanager
    def start(_engine_args, method, _max_model_len, _top_logprobs):
        yield StubEngine(method, found)

    monkeypatch.setattr(measurement, "scoring_engine", start)
    recall = ["--suite", "recall", "--distances", "100", "--instances", "2"]
    assert run(*recall, policies=["vase"]) == 0
    assert len(found) == 2 * 3 * 2
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert result["likelihood"] == []
    assert {row["kind"] for row in result["recall"]} == {"passcode", "constant", "two facts"}
    assert all(row["counts"] and row["recalled"]["mean"] == 1 for row in result["recall"])
    assert "Recall, two facts at distance 100" in (tmp_path / "out" / "evaluation.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens (0) must be at least 1"),
        (["--max-tokens", "81"], "has 81 tokens, and nothing is scored under eviction before 82"),
        (["--max-tokens", "40000"], "lower --max-tokens and --distances"),
        (["--budgets", "8"], "--policies vase --budgets 8: --kv-eviction-config: budget (8) must"),
        (["--policies", "lru"], "--policies lru --budgets 64: --kv-eviction lru: unknown policy"),
        (["--policies", "vase:smoothing"], "write NAME or NAME:KEY=VALUE"),
        (["--policies", "vase:window=8"], "--policies vase:window=8: remove window, which all"),
        (["--policies", "full"], "--policies: name a policy besides full"),
        (["--texts", "absent.txt"], "--texts absent.txt: "),
        (
            ["--suite", "recall", "--distances", "15"],
            "--distances 15 and --fact-at 64 are together",
        ),
        (["--max-model-len", "512"], "--max-model-len 512: evaluate sets it"),
        (["--kv-eviction", "vase"], "--kv-eviction: evaluate compares --policies; remove it"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_in_one_line(
    run, scored, arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    try:
        status = run(*arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.strip().count("\n") == 0
    assert not scored
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["matplotlib", "scipy", "vllm"])
def test_what_is_not_installed_is_named_with_the_remedy(module, run, capsys, monkeypatch):
    find = requirements.find_spec
    monkeypatch.setattr(
        requirements, "find_spec", lambda name: None if name == module else find(name)
    )
    assert run() == 2
    assert f"vase-vllm: evaluate needs {module}: run pip install '.[" in capsys.readouterr().err


def test_the_output_is_checked_before_an_engine_starts(run, scored, tmp_path, capsys):
    (tmp_path / "out").write_text("a file")
    assert run() == 2
    assert "--output" in capsys.readouterr().err
    assert not scored
