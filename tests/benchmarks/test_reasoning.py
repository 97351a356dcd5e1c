"""The reasoning benchmarks: marking, the table, and lm-evaluation-harness against a server.

A stand-in of a few additions takes the place of the datasets, through the same task file. What runs
lm-evaluation-harness fails where it is missing: pip install ".[accuracy]".
"""

import json
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.common.paths import ROOT
from benchmarks.common.policy import Policy
from benchmarks.reasoning import harness, report, run
from benchmarks.reasoning.paper import COLUMNS, ROWS, published
from benchmarks.reasoning.suite import (
    FULL,
    TASKS,
    TASKS_DIRECTORY,
    directory_name,
    plan,
    read_policy,
)
from benchmarks.reasoning.tasks import marking
from vase_vllm.tools.tiny_model import byte_tokenizer, make_tiny_model

ADDITIONS = [(1, 2), (10, 5), (7, 0), (123, 456), (8, 8), (40, 2)]


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{3}", r"\boxed{3}"),
        (r"\boxed{1}, no: \boxed{2}", r"\boxed{2}"),
        (r"<think>\boxed{1}</think> It is \boxed{2}.", r"\boxed{2}."),
        (r"<think>\boxed{1}</think> I do not know.", None),
        (r"<think>so far \boxed{1}, but", r"\boxed{1}, but"),
        ("", None),
    ],
)
def test_final_box(text: str, box: str | None) -> None:
    assert marking.final_box(text) == box


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (r"\boxed{B}", True),
        (r"\boxed{(B)}", True),
        (r"\boxed{\text{B}}", True),
        (r"\boxed{B: it is blue}", True),
        (r"\boxed{A}", False),
        (r"\boxed{Both}", False),
        ("B", False),
    ],
)
def test_mark_choice(text: str, right: bool) -> None:
    marks = marking.mark_choice({"answer": "B"}, [text])
    assert marks == {"exact_match": right, "no_answer": "boxed" not in text}


@pytest.mark.parametrize(
    ("answer", "text", "right"),
    [
        ("204", r"The answer is $\boxed{204}$.", True),
        (33, r"\boxed{033}", True),
        (r"\frac{1}{2}", r"\[\boxed{0.5}\]", True),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", True),
        (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        ("2, 3", r"\boxed{3, 2}", True),
        ("204", r"the answer is $204$, \boxed{205}", False),
        ("204", r"the answer is $204$", False),
    ],
)
def test_mark_mathematics(answer: str | int, text: str, right: bool) -> None:
    marks = marking.mark_mathematics({"answer": answer}, [text])
    assert marks == {"exact_match": right, "no_answer": "boxed" not in text}


def test_choices_are_shuffled_by_the_question_alone() -> None:
    questions = [
        {"Question": f"Q{n}", "Correct Answer": " yes "}
        | {f"Incorrect Answer {k}": f"no{k}" for k in (1, 2, 3)}
        for n in range(40)
    ]
    dataset = SimpleNamespace(map=lambda function: [function(doc) for doc in questions])
    docs = marking.shuffle_choices(dataset)
    assert docs == marking.shuffle_choices(dataset)
    assert {doc["answer"] for doc in docs} == set("ABCD")
    for doc in docs:
        assert f"\n({doc['answer']}) yes" in doc["problem"]
        assert all(f" no{k}" in doc["problem"] for k in (1, 2, 3))


def test_plan_gives_each_task_its_recommended_budget() -> None:
    tasks = ["aime25", "math500", "hmmt25"]
    assert plan([FULL, "vase"], None, tasks) == [
        (read_policy(FULL, None), tasks),
        (read_policy("vase", 1024), ["math500"]),
        (read_policy("vase", 4096), ["aime25", "hmmt25"]),
    ]
    assert plan(["rkv"], [64, 128], tasks) == [
        (read_policy("rkv", 64), tasks),
        (read_policy("rkv", 128), tasks),
    ]


def test_plan_refuses_what_it_cannot_know() -> None:
    with pytest.raises(ValueError, match="no recommended budget for gsm8k: give --budgets"):
        plan(["vase"], None, ["gsm8k"])
    with pytest.raises(ValueError, match="write NAME or NAME:KEY=VALUE"):
        plan(["vase:greedy"], [64], ["gsm8k"])


def test_policy_options_reach_the_server() -> None:
    policy = read_policy("vase:sampling=greedy,window=32", 512)
    assert policy.serve_arguments() == [
        *["--kv-eviction", "vase", "--kv-eviction-config.budget", "512"],
        *["--kv-eviction-config.sampling", "greedy", "--kv-eviction-config.window", "32"],
    ]
    assert directory_name(policy) == "vase-sampling=greedy-window=32-512"
    assert read_policy(FULL, None).serve_arguments() == []


def test_every_task_has_its_file() -> None:
    for name in TASKS:
        assert f"task: vase_{name}\n" in (TASKS_DIRECTORY / f"{name}.yaml").read_text()


def test_paper_is_shown_at_its_budget_only() -> None:
    assert all(len(cells.split()) == len(COLUMNS) for cells in ROWS.values())
    assert published("aime25", read_policy("vase", 4096)) == "59.17 / 63.96"
    assert published("math500", read_policy(FULL, None)) == "93.93 / 95.22"
    assert published("aime25", read_policy("vase", 2048)) == "–"
    assert published("aime24", read_policy("vase", 4096)) == "–"
    assert published("aime25", read_policy("vase:sampling=greedy", 4096)) == "–"


def save_run(output: Path, policy: Policy, seed: int, scores: list[int], evictions: Any) -> None:
    directory = output / directory_name(policy) / f"aime25-seed{seed}"
    directory.mkdir(parents=True)
    answers = [
        {"problem": n, "exact_match": score, "no_answer": 1 - score, "tokens": 100 * n}
        for n, score in enumerate(scores)
    ]
    result = {"task": "aime25", "policy": policy.name, "budget": policy.budget}
    result |= {"answers": answers, "evictions": evictions}
    (directory / "run.json").write_text(json.dumps(result))


def test_report_pairs_problems_and_counts_them_once(tmp_path: Path) -> None:
    save_run(tmp_path, read_policy(FULL, None), 0, [1, 1, 1, 0], None)
    save_run(tmp_path, read_policy(FULL, None), 1, [1, 1, 0, 0], None)
    save_run(tmp_path, read_policy("vase", 4096), 0, [1, 0, 1, 0], 7)
    save_run(tmp_path, read_policy("vase", 4096), 1, [1, 0, 0, 0], 8)
    full, vase = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in report.write(tmp_path, {"model": "m"}).splitlines()
        if line.startswith("| aime25")
    )
    error = np.std([1, 1, 0.5, 0], ddof=1) / 2
    assert full == [
        *["aime25", "full", "–", "4 x 2", f"62.5 ± {100 * error:.1f}", "–", "37.5", "150", "–"],
        "66.41 / 70.21",
    ]
    # Only one of four problems differs, by 1: the error is that of [0, -1, 0, 0].
    assert vase[3:] == [
        *["4 x 2", "37.5 ± 23.9", "-25.0 ± 25.0", "62.5", "150", "15", "59.17 / 63.96"],
    ]
    assert len(json.loads((tmp_path / "summary.json").read_text())["rows"]) == 2


def test_results_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    run.check_settings(tmp_path, {"model": "m", "max_tokens": 10})
    run.check_settings(tmp_path, {"model": "m", "max_tokens": 10})
    with pytest.raises(ValueError, match="another max_tokens: give --output"):
        run.check_settings(tmp_path, {"model": "m", "max_tokens": 11})


def test_progress_is_read_from_lm_eval() -> None:
    bar = "Requesting API:   0%|  | 0/6 [00:00<?, ?it/s]\rRequesting API:  50%|█ | 3/6 [00:01<"
    assert harness.answered(bar) == (3, 6)
    assert harness.answered("Checking cached requests: 100%|██| 6/6") is None


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "marked by exact_match"),
        ([{"doc_id": 0, "acc": 1}], "marked by exact_match"),
        ([{"doc_id": 0, "exact_match": 1}, {"doc_id": 0, "exact_match": 0}], "in one way"),
    ],
    ids=["none", "other-metric", "two-filters"],
)
def test_samples_without_one_mark_each_are_refused(
    tmp_path: Path, samples: list[dict[str, int]], message: str
) -> None:
    (tmp_path / "samples_task.jsonl").write_text("\n".join(map(json.dumps, samples)))
    with pytest.raises(harness.RunFailedError, match=message):
        harness.read_answers(tmp_path)


@pytest.fixture
def additions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with the stand-in task, the only one that lm-evaluation-harness reads."""
    only_own = ROOT / "tests" / "support" / "lm_eval_own_tasks"
    monkeypatch.setenv("PYTHONPATH", str(only_own), prepend=os.pathsep)
    directory = tmp_path / "tasks"
    directory.mkdir()
    data = directory / "additions.jsonl"
    docs = ({"problem": f"What is {a} + {b}?", "answer": str(a + b)} for a, b in ADDITIONS)
    data.write_text("".join(f"{json.dumps(doc)}\n" for doc in docs))
    (directory / "additions.yaml").write_text(
        f"include: {TASKS_DIRECTORY / '_boxed_yaml'}\n"
        "task: additions\n"
        "dataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {data}}}}}\n"
        "test_split: test\n"
    )
    return directory


class Solver(ThreadingHTTPServer):
    """Adds, but for seed 1 it gets what is above 40 wrong, and it never answers about 8 + 8."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), SolverHandler)
        self.asked: list[dict[str, Any]] = []
        self.broken_above = np.inf


class SolverHandler(BaseHTTPRequestHandler):
    server: Solver

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        a, b = map(int, re.findall(r"\d+", body["messages"][0]["content"]))
        broken = a + b > self.server.broken_above
        self.server.asked.append(body)
        total = a + b + (body["seed"] == 1 and a + b > 40)
        text = f"<think>\\boxed{{0}}?</think> The sum is $\\boxed{{{total}}}$."
        message = {"role": "assistant", "content": "<think>so" if (a, b) == (8, 8) else text}
        answer = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
        self.send_response(500 if broken else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def solver() -> Iterator[Solver]:
    with Solver() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def run_benchmark(model: Path, additions: Path, *arguments: str) -> int:
    task = ["--tasks", "additions", "--include-path", str(additions)]
    output = ["--output", str(additions / "results")]
    return run.main(["--model", str(model), *task, *output, *arguments])


def test_answers_are_sampled_as_in_the_paper(tmp_path: Path) -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95}
    (tmp_path / "generation_config.json").write_text(json.dumps(config))
    off = {"top_k": -1, "min_p": 0.0}
    assert run.papers_sampling(str(tmp_path)) == {"temperature": 0.6, "top_p": 0.95} | off
    (tmp_path / "generation_config.json").write_text("{}")
    assert run.papers_sampling(str(tmp_path)) == {"temperature": 1.0, "top_p": 1.0} | off
    (tmp_path / "generation_config.json").unlink()
    with pytest.raises(ValueError, match="give --sampling"):
        run.papers_sampling(str(tmp_path))


@pytest.mark.slow
def test_known_answers_give_the_known_accuracy(
    tmp_path: Path, additions: Path, solver: Solver, capsys: pytest.CaptureFixture
) -> None:
    """Interrupted by a broken server at first; what was answered is not asked again."""
    model = tmp_path / "model"
    byte_tokenizer(4096).save_pretrained(model)
    arguments = ["--base-url", f"http://127.0.0.1:{solver.server_port}", "--policies", "full"]
    arguments += ["--sampling", '{"temperature": 0.6, "top_p": 0.95}']
    arguments += ["--max-model-len", "1000", "--concurrency", "2"]

    solver.broken_above = 500
    assert run_benchmark(model, additions, *arguments, "--seeds", "1") == 1
    assert "error: full additions seed 0: lm_eval failed (see " in capsys.readouterr().out
    prompts = {body["messages"][0]["content"] for body in solver.asked}
    answered_before = {(0, prompt) for prompt in prompts if "123" not in prompt}
    assert answered_before

    solver.broken_above = np.inf
    solver.asked.clear()
    assert run_benchmark(model, additions, *arguments, "--seeds", "2") == 0
    asked = [(body["seed"], body["messages"][0]["content"]) for body in solver.asked]
    assert len(asked) == len(set(asked)) == 2 * len(ADDITIONS) - len(answered_before)
    assert not answered_before & set(asked)
    for body in solver.asked:
        assert body["messages"][0]["content"].endswith(r"put your final answer within \boxed{}.")
        assert (body["temperature"], body["top_p"]) == (0.6, 0.95)
        assert (body["max_tokens"], body["stop"]) == (1000, [])

    (row,) = json.loads((additions / "results" / "summary.json").read_text())["rows"]
    assert (row["problems"], row["seeds"]) == (6, 2)
    assert row["accuracy"] == pytest.approx((5 + 3) / 12)
    assert row["no_answer"] == pytest.approx(2 / 12)

    solver.asked.clear()
    assert run_benchmark(model, additions, *arguments, "--seeds", "2") == 0
    assert not solver.asked
    assert run_benchmark(model, additions, *arguments, "--limit", "3") == 2
    assert "another limit: give --output" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.slow
def test_real_servers_with_and_without_eviction(tmp_path: Path, additions: Path) -> None:
    model = make_tiny_model(tmp_path / "model", layers=1, max_position_embeddings=1024)
    arguments = ["--policies", "full", "vase:window=16", "--budgets", "128", "--seeds", "1"]
    arguments += ["--sampling", '{"temperature": 0.6}', "--max-model-len", "430", "--limit", "2"]
    serving = "--enforce-eager --kv-cache-memory-bytes 16M --distributed-executor-backend uni"
    arguments += [f"--serve-arguments={serving}"]
    assert run_benchmark(model, additions, *arguments) == 0
    rows = json.loads((additions / "results" / "summary.json").read_text())["rows"]
    full, vase = rows
    assert (full["policy"], vase["policy"]) == ("full", "vase:window=16")
    assert full["accuracy"] == vase["accuracy"] == 0
    assert full["evictions"] is None
    # A prompt of about 120 bytes, and an answer up to 430: first at 144, then after every 16.
    assert vase["evictions"] >= 2 * 15
    assert 250 < full["tokens"] < 350
