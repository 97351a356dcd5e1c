"""The accuracy benchmark: its marks, its intervals, its table, and when a run does not count."""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.accuracy import magnitudes, report
from benchmarks.accuracy.evaluation import Configuration, problems_with
from benchmarks.accuracy.grading import (
    final_answer,
    grade,
    in_a_loop,
    questions_within,
    read_prompt,
)
from benchmarks.accuracy.intervals import interval
from benchmarks.accuracy.methods import (
    COMPRESSIONS,
    METHODS,
    PROMPT,
    WINDOW,
    budget_for,
    mean_length,
)
from benchmarks.accuracy.run import configurations
from benchmarks.accuracy.tasks import (
    HELD_OUT_FILE,
    NODES,
    Problem,
    Shape,
    make_problem,
    read_jsonl,
)

# c -> a -> the end, b -> the end
PROBLEM = Problem(
    "facts c - a ; a + $ ; b - $ ; ask c b a . go",
    "c 0 c - a 0 a + $ 1 so c = 1 ? b 0 b - $ 0 so b = 0 ? a 0 a + $ 1 so a = 1 ? .",
    "answer c is 1 b is 0 a is 1 .",
)
BY_NAME = {method.name: method for method in METHODS}


def test_read_prompt() -> None:
    following, marks = {"c": "a", "a": "$", "b": "$"}, {"c": "-", "a": "+", "b": "-"}
    assert read_prompt(PROBLEM.prompt) == ((following, marks), ["c", "b", "a"])


@settings(deadline=None)
@given(nodes=st.integers(1, len(NODES)), branching=st.floats(0, 1), seed=st.integers(0, 2**32))
def test_a_perfect_completion_has_full_marks(nodes: int, branching: float, seed: int) -> None:
    problem = make_problem(Shape(nodes, nodes, branching), random.Random(seed))
    marks = grade(problem, problem.completion + " <eos>")
    assert marks.pop("in_a_loop") == 0
    assert set(marks.values()) == {1.0}


@pytest.mark.parametrize(
    ("completion", "questions", "look_ups"),
    [
        # The mark of a is wrong once: one look-up and, through the count, one question.
        ("c 0 c - a 0 a - $ 0 so c = 0 ? b 0 b - $ 0 so b = 0 ? a 0 a + $ 1 so a = 1 ?", 2, 3 / 4),
        # c leads to b: what follows from that is judged as if it were true.
        ("c 0 c - b 0 b - $ 0 so c = 0 ?", 0, 1 / 2),
        # A line again and again earns nothing, and takes nothing away.
        ("b 0 b - $ 0 so b = 0 ? " * 5, 1, 1),
        ("b 0 b - $ 0 so b = 0 ? b 0 b + $ 1 so b = 1 ?", 1, 1),
        # Stopping before the end of a path leaves a step out.
        ("c 0 c - a 0 so c = 0 ?", 0, 1 / 2),
        # Going on after it is a wrong step.
        ("b 0 b - $ 0 a + $ 1 so b = 1 ?", 0, 1 / 2),
        ("c 0 c - a 0 a +", 0, 1 / 3),
        ("$ $ $ $", 0, 0),
        ("", 0, 0),
    ],
    ids=[
        "wrong mark",
        "wrong next node",
        "loop",
        "first line counts",
        "stops early",
        "goes on",
        "cut off",
        "no chain",
        "nothing",
    ],
)
def test_graded_marks(completion: str, questions: int, look_ups: float) -> None:
    marks = grade(PROBLEM, completion)
    assert marks["questions_right"] == pytest.approx(questions / 3)
    assert marks["look_ups_right"] == pytest.approx(look_ups)
    assert marks["exact_match"] == marks["whole_chain"] == 0


def test_right_prefix_ends_at_the_first_wrong_word() -> None:
    words = PROBLEM.completion.split()
    wrong = [*words[:7], "?", *words[8:]]
    assert grade(PROBLEM, " ".join(wrong))["right_prefix"] == 7 / len(words)
    assert grade(PROBLEM, " ".join(words[:10]))["right_prefix"] == 10 / len(words)


@pytest.mark.parametrize(
    ("tokens", "questions"), [(0, 0), (13, 0), (14, 1), (24, 1), (25, 2), (99, 3)]
)
def test_questions_within(tokens: int, questions: int) -> None:
    # The counts are the words 13, 24 and 35 of the chain, from 0 on.
    assert questions_within(PROBLEM, tokens) == pytest.approx(questions / 3)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("a 0 a - $ 0 so a = 0 ? . answer a is 0 .", "answer a is 0 ."),
        ("a 0 ? . answer a is 0 .<eos>", "answer a is 0 ."),
        ("a 0 a - b 0 b - b", ""),
    ],
    ids=["complete", "end-of-sequence", "no-answer"],
)
def test_final_answer(completion: str, answer: str) -> None:
    assert final_answer(completion) == answer


@pytest.mark.parametrize(
    ("completion", "loops"),
    [
        ("a b c a b c a b c", True),
        ("x y c c c", True),
        ("a b c a b c a b", False),
        ("a b b", False),
        ("", False),
    ],
)
def test_in_a_loop(completion: str, loops: bool) -> None:
    assert in_a_loop(completion) is loops


def test_no_held_out_completion_looks_like_a_loop() -> None:
    problems = read_jsonl(HELD_OUT_FILE)
    assert not any(in_a_loop(problem.completion) for problem in problems)


def test_budgets_are_what_the_compressions_say() -> None:
    length = mean_length(read_jsonl(HELD_OUT_FILE))
    for compression in COMPRESSIONS:
        budget = budget_for(compression, length)
        assert budget % 8 == 0
        assert length / compression - 8 < budget <= length / compression
        assert budget >= 4 * WINDOW, "a method decides about most of the budget"


def test_only_methods_that_draw_run_with_several_seeds() -> None:
    args = argparse.Namespace(policies=list(BY_NAME), compressions=[2, 8], seeds=3)
    chosen = configurations(args, length=718)
    keys = [configuration.key for configuration in chosen]
    assert len(set(keys)) == len(keys)
    assert [key for key in keys if key[0] == "full"] == [("full", None, 0)]
    assert len([key for key in keys if key[0] == "snapkv"]) == 2
    assert [key for key in keys if key[0] == "random"] == [
        ("random", compression, seed) for compression in (2, 8) for seed in range(3)
    ]


def test_a_kept_prompt_takes_its_tokens_of_the_budget() -> None:
    assert {1 + len(p.prompt.split()) for p in read_jsonl(HELD_OUT_FILE)} == {PROMPT}
    policy = BY_NAME["vase-prompt-kept"].at(176, 0)
    assert policy.schedule.first_eviction(PROMPT) == 176 + WINDOW
    args = argparse.Namespace(policies=["vase-prompt-kept"], compressions=[2, 4, 8], seeds=1)
    assert [c.compression for c in configurations(args, length=718)] == [2, 4]


def test_serve_arguments() -> None:
    assert BY_NAME["full"].at(None, 0).serve_arguments() == []
    arguments = BY_NAME["cur-fixed"].at(88, 2).serve_arguments()
    assert arguments[:2] == ["--kv-eviction", "cur"]
    pairs = dict(zip(arguments[2::2], arguments[3::2], strict=True))
    assert pairs == {
        "--kv-eviction-config.budget": "88",
        "--kv-eviction-config.window": str(WINDOW),
        "--kv-eviction-config.seed": "2",
        "--kv-eviction-config.gaussian": "fixed",
    }


def test_interval_of_a_share_is_that_of_the_normal_approximation() -> None:
    values = np.repeat([0.0, 1.0], [600, 400])
    low, high = interval(values)
    half = 1.96 * (0.4 * 0.6 / 1000) ** 0.5
    assert (low, high) == pytest.approx((0.4 - half, 0.4 + half), abs=0.003)


def test_interval_without_variation_has_no_width() -> None:
    assert interval(np.full(20, 0.25)) == pytest.approx((0.25, 0.25))


def make_run(method: str, compression: int | None, seed: int, values: list[float]) -> Any:
    return {
        "session": 0,
        "method": method,
        "compression": compression,
        "budget": None if compression is None else 700 // compression,
        "seed": seed,
        "status": "ok",
        "seconds": 1.0,
        "marks": {mark: values for mark in report.COLUMNS},
    }


@pytest.fixture
def result() -> dict[str, Any]:
    return {
        "task": "vase_walks",
        "model": "testbed_model",
        "problems": 4,
        "mean_length": 718.0,
        "window": 16,
        "sessions": [
            {
                "date": "2026-01-01T00:00:00+00:00",
                "machine": {"processor": "P", "cores": 2},
                "versions": {"vllm": "0.32.0"},
            }
        ],
        "runs": [
            make_run("full", None, 0, [1.0, 1.0, 1.0, 1.0]),
            make_run("vase", 2, 0, [1.0, 0.0, 0.0, 0.0]),
            make_run("vase", 2, 1, [1.0, 1.0, 0.0, 0.0]),
            make_run("snapkv", 2, 0, [0.75, 0.25, -0.25, -0.25]),
            make_run("random", 2, 0, [1.0, 0.5, 0.0, 0.0]),
            {
                "session": 0,
                "method": "streaming",
                "compression": 2,
                "budget": 350,
                "seed": 0,
                "status": "wrong",
                "reason": "3 evictions, 4 expected",
            },
        ],
    }


def cells(page: str, method: str) -> list[str]:
    (line,) = (line for line in page.splitlines() if line.startswith(f"| {method} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_report_has_means_over_seeds_and_paired_differences(result: dict[str, Any]) -> None:
    page = report.markdown(result)
    vase, snapkv, random_ = (cells(page, name) for name in ("vase", "snapkv", "random"))
    assert vase[1].startswith("37.5 (")
    assert vase[2] == "-"
    assert vase[-1] == "2"
    # Lower by a quarter on every problem: the pairing leaves no uncertainty.
    assert snapkv[2] == "-25.0 (-25.0 to -25.0)"
    assert random_[2] == "+0.0 (+0.0 to +0.0)"


def test_a_run_that_does_not_count_has_no_numbers(result: dict[str, Any]) -> None:
    page = report.markdown(result)
    assert not [line for line in page.splitlines() if line.startswith("| streaming |")]
    assert "- streaming, seed 0: **wrong**: 3 evictions, 4 expected" in page
    assert "streaming" not in report.points(result)[report.MAIN]


def test_what_is_answered_before_any_eviction(result: dict[str, Any]) -> None:
    problems = read_jsonl(HELD_OUT_FILE)[: result["problems"]]
    # 85 prompt tokens with <bos>; the first eviction is at 366 cached tokens.
    assert {1 + len(problem.prompt.split()) for problem in problems} == {85}
    answered = [questions_within(problem, 366 - 85 + 1) for problem in problems]
    assert report.before_eviction(result, 350) == pytest.approx(sum(answered) / 4)
    assert report.before_eviction(result, 2000) == 1
    assert f"| *before any eviction* | {25 * sum(answered):.1f} |" in report.markdown(result)


def test_report_writes_page_and_plots(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "accuracy.json").write_text(json.dumps(result))
    page = report.write(tmp_path)
    assert (tmp_path / "accuracy.md").read_text() == page
    assert (tmp_path / "accuracy.png").stat().st_size > 1000
    svg = (tmp_path / "accuracy.svg").read_text()
    report.write(tmp_path)
    assert (tmp_path / "accuracy.svg").read_text() == svg, "a plot of the same numbers changed"


@pytest.mark.parametrize(
    ("method", "asked", "evictions", "complaint"),
    [
        ("full", 1, None, None),
        ("full", 1, 3, "the full cache's server counts evictions"),
        ("vase", 1, 3, None),
        ("vase", 1, 2, "2 evictions, 3 expected"),
        ("vase", 1, None, "None evictions, 3 expected"),
        ("vase", 2, 3, "1 of 2 problems answered"),
    ],
)
def test_runs_are_checked(
    method: str, asked: int, evictions: int | None, complaint: str | None
) -> None:
    budget = None if method == "full" else 32
    configuration = Configuration(BY_NAME[method], budget and 2, budget, 0)
    # 20 prompt tokens with <bos>; cached lengths of 48, 64 and 80 are each followed by a step.
    sample = {"prompt": "a " * 19, "completion": "a " * 61}
    found = problems_with(configuration, [sample], asked, 1024, evictions)
    assert found == ([complaint] if complaint else [])


def test_magnitudes_find_the_large_token() -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((1, 1000, 2, 32), dtype=np.float32)
    words = ["a"] * 990 + ["sink"] * 10
    values[0, 990:, 1] *= 20
    plain, heavy = magnitudes.measure(values, words)
    assert heavy["words"][0]["word"] == "sink"
    assert heavy["words"][0]["in_the_largest"] == 1.0
    assert heavy["range"]["largest_over_median"] > 10 > heavy["gaussian"]["largest_over_median"]
    assert heavy["range_explained_by_word"] > 0.9 > 0.1 > plain["range_explained_by_word"]
    assert plain["range"]["p99_over_median"] == pytest.approx(
        plain["gaussian"]["p99_over_median"], abs=0.15
    )
