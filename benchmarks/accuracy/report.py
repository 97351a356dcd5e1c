"""The results as one Markdown page: a table for each compression."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.accuracy.grading import questions_within
from benchmarks.accuracy.intervals import LEVEL, RESAMPLES, interval
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.plots import plot
from benchmarks.accuracy.tasks import HELD_OUT_FILE, read_jsonl
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.markdown import table as markdown_table

MAIN = "questions_right"
COLUMNS = {
    "questions_right": "questions right",
    "look_ups_right": "look-ups right",
    "right_prefix": "right prefix",
    "exact_match": "whole answers right",
    "in_a_loop": "in a loop",
}
INTERVALS = ("questions_right", "look_ups_right")
REFERENCE = "vase"
Run = dict[str, Any]


def mean(run: Run, mark: str) -> float:
    """One run's mean of a mark over the problems."""
    return float(np.mean(run["marks"][mark]))


def good_runs(result: dict[str, Any], method: str, compression: int | None) -> list[Run]:
    """The runs that count, one for each seed."""
    runs = (r for r in result["runs"] if (r["method"], r["compression"]) == (method, compression))
    return [run for run in runs if run["status"] == "ok"]


def per_problem(runs: Iterable[Run], mark: str) -> NDArray[np.float64]:
    """The mean over the seeds for each problem, float64 [problems]."""
    return np.mean([run["marks"][mark] for run in runs], axis=0)


def before_eviction(result: dict[str, Any], budget: int) -> float:
    """Share of the questions that are answered before the first eviction of the full chain.

    Any method answers them as the full cache does: what it has to show lies above.
    """
    problems = read_jsonl(HELD_OUT_FILE)[: result["problems"]]
    schedule = EvictionSchedule(budget, result["window"])
    shares = []
    for problem in problems:
        prompt = 1 + len(problem.prompt.split())
        # The step of the position before the eviction still predicts one token more.
        shares.append(questions_within(problem, schedule.first_eviction(prompt) - prompt + 1))
    return float(np.mean(shares))


def percent(value: float, ends: tuple[float, float] | None = None, sign: str = "") -> str:
    """A share as text, with the ends of its interval."""
    text = f"{100 * value:{sign}.1f}"
    return text + (f" ({100 * ends[0]:{sign}.1f} to {100 * ends[1]:{sign}.1f})" if ends else "")


def row(result: dict[str, Any], method: str, compression: int | None) -> list[str]:
    """One method at one compression."""
    runs = good_runs(result, method, compression)
    cells = []
    for mark in COLUMNS:
        values = per_problem(runs, mark)
        ends = interval(values) if mark in INTERVALS else None
        cells.append(percent(float(values.mean()), ends))
    other = good_runs(result, REFERENCE, compression)
    difference = "-"
    if other and method != REFERENCE:
        values = per_problem(runs, MAIN) - per_problem(other, MAIN)
        difference = percent(float(values.mean()), interval(values), "+")
    cells.insert(1, difference)
    return [method, *cells, str(len(runs))]


def table(result: dict[str, Any], compression: int | None, budget: int | None) -> list[str]:
    """All methods at one compression, the ablations of vase after the others; failed ones named."""
    header = [*COLUMNS.values(), "seeds"]
    header.insert(1, f"minus {REFERENCE}")
    rows = [
        row(result, method.name, compression)
        for method in METHODS
        if good_runs(result, method.name, compression)
    ]
    if budget is not None:
        free = percent(before_eviction(result, budget))
        rows.append(["*before any eviction*", free, *["-"] * (len(header) - 1)])
    failed = [
        f"- {run['method']}, seed {run['seed']}: **{run['status']}**: "
        + " ".join(run["reason"].split())[-300:]
        for run in result["runs"]
        if run["compression"] == compression and run["status"] != "ok"
    ]
    return [*markdown_table(["", *header], rows), "", *failed, *([""] if failed else [])]


def markdown(result: dict[str, Any]) -> str:
    """The page."""
    sessions = result["sessions"]
    machines = {f"{s['machine']['processor']}, {s['machine']['cores']} cores" for s in sessions}
    versions = {", ".join(f"{k} {v}" for k, v in s["versions"].items()) for s in sessions}
    compressions = sorted({r["compression"] for r in result["runs"] if r["compression"]})
    budgets = {r["compression"]: r["budget"] for r in result["runs"]}
    lines = [
        "# Accuracy of eviction methods on the testbed",
        "",
        f"- task: `{result['task']}`, {result['problems']} held-out problems, greedy decoding, by "
        "lm-evaluation-harness from `vllm serve`",
        f"- model: `{result['model']}`; a solved sequence has {result['mean_length']:.0f} tokens "
        f"on average; window {result['window']}",
        f"- machine: {'; '.join(sorted(machines))}",
        f"- versions: {'; '.join(sorted(versions))}",
        f"- dates: {', '.join(sorted({s['date'][:10] for s in sessions}))}",
        "",
        "All numbers are percent. *Questions right*: the asked nodes whose count is right in the "
        "chain of thought. *Look-ups right*: the steps written that are right given the step "
        "before. *Right prefix*: the part of the completion before the first wrong token. *Whole "
        "answers right*: every count of the final answer (`exact_match`). *In a loop*: completions "
        "that end in the same words at least three times over. *Before any eviction*: the "
        "questions that the chain has answered by then, which any method has for free.",
        "",
        f"In brackets: {LEVEL:.0%} confidence intervals by a percentile bootstrap over the "
        f"problems ({RESAMPLES:,} resamples), of each problem's mean over the seeds. Every problem "
        "has draws of its own, so they cover the randomness of a method too. *Minus "
        f"{REFERENCE}* is the paired difference in questions right. Methods that draw nothing run "
        "once.",
        "",
        "![accuracy](accuracy.svg)",
        "",
        "## Full cache",
        "",
        *table(result, None, None),
    ]
    for compression in compressions:
        budget = budgets[compression]
        lines += [f"## {compression}x: a budget of {budget} tokens", ""]
        lines += table(result, compression, budget)
    return "\n".join(lines)


def write(directory: Path) -> str:
    """Write ``accuracy.md`` and the plot from the raw results there; returns the page."""
    result = json.loads((directory / "accuracy.json").read_text())
    page = markdown(result)
    (directory / "accuracy.md").write_text(page)
    budgets = {r["compression"]: r["budget"] for r in result["runs"] if r["budget"]}
    free = {c: before_eviction(result, budget) for c, budget in sorted(budgets.items())}
    plot(points(result), free, directory / "accuracy")
    return page


def points(result: dict[str, Any]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """For each of INTERVALS and method: (compression, mean, low, high); the full cache is 1x."""
    compressions = sorted({r["compression"] or 1 for r in result["runs"]})
    found: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for mark in INTERVALS:
        for method in METHODS:
            for compression in compressions:
                key = None if compression == 1 else compression
                if runs := good_runs(result, method.name, key):
                    values = per_problem(runs, mark)
                    point = (compression, float(values.mean()), *interval(values))
                    found.setdefault(mark, {}).setdefault(method.name, []).append(point)
    return found
