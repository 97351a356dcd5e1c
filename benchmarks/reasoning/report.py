"""Results of all runs as JSON and as a Markdown table with the paper's numbers beside."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import sem

from benchmarks.common.policy import Policy
from benchmarks.reasoning.paper import MODELS, published
from benchmarks.reasoning.suite import FULL, read_policy
from vase_vllm.tools.markdown import table

HEADER = (
    *("task", "policy", "budget", "problems x samples", "accuracy %", "minus full cache"),
    *("no answer %", "output tokens", "evictions"),
    f"paper, as published: {' / '.join(MODELS)}",
)
NOTES = """\
± is one standard error over the problems (of the difference: over the problems' differences), with
the samples of a problem averaged first. The paper's numbers are for its own models, prompts and
samples, at 4x compression: they say what size of effect to expect, not what this run must give.
The server counts an eviction once for all layers of a sequence; 0 means that the answers fitted the
budget, and that the row is the full cache under another name."""


@dataclass(frozen=True)
class Row:
    """A task under a policy, over all of its seeds.

    Attributes:
        scores: [problems], the share of right answers of each problem.
        no_answer: share of answers without one; tokens: mean length of an answer.
        evictions: of the server; None where it was not ours to ask, or a run was resumed.
    """

    task: str
    policy: Policy
    seeds: int
    scores: np.ndarray
    no_answer: float | None
    tokens: float
    evictions: int | None

    @property
    def accuracy(self) -> tuple[float, float]:
        """Mean and standard error."""
        return mean_and_error(self.scores)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean of independent values, and its standard error (NaN of a single one)."""
    return float(values.mean()), float(sem(values)) if len(values) > 1 else math.nan


def read_rows(output: Path) -> list[Row]:
    """The finished runs under ``output``, one row for each task and policy."""
    groups: dict[tuple[str, Policy], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(output.glob("*/*/run.json")):
        run = json.loads(path.read_text())
        groups[run["task"], read_policy(run["policy"], run["budget"])].append(run)
    rows = [make_row(task, policy, runs) for (task, policy), runs in groups.items()]
    return sorted(rows, key=lambda row: (row.task, row.policy.budget or 0, row.policy.name))


def make_row(task: str, policy: Policy, runs: list[dict[str, Any]]) -> Row:
    answers = [answer for run in runs for answer in run["answers"]]
    by_problem: dict[int, list[float]] = defaultdict(list)
    for answer in answers:
        by_problem[answer["problem"]].append(answer["exact_match"])
    empty = [answer["no_answer"] for answer in answers]
    evictions = [run["evictions"] for run in runs]
    return Row(
        task=task,
        policy=policy,
        seeds=len(runs),
        scores=np.array([np.mean(by_problem[problem]) for problem in sorted(by_problem)]),
        no_answer=None if None in empty else float(np.mean(empty)),
        tokens=float(np.mean([answer["tokens"] for answer in answers])),
        evictions=None if None in evictions else sum(evictions),
    )


def percent(mean: float, error: float, sign: str = "") -> str:
    return f"{100 * mean:{sign}.1f} ± {100 * error:.1f}"


def markdown(rows: list[Row], settings: dict[str, Any]) -> str:
    """The whole report."""
    full = {row.task: row for row in rows if row.policy.name == FULL}
    table_rows = []
    for row in rows:
        base = full.get(row.task)
        difference = "–"
        if base is not None and base is not row:
            difference = percent(*mean_and_error(row.scores - base.scores), sign="+")
        cells = [
            row.task,
            row.policy.name,
            "–" if row.policy.budget is None else row.policy.budget,
            f"{len(row.scores)} x {row.seeds}",
            percent(*row.accuracy),
            difference,
            "–" if row.no_answer is None else f"{100 * row.no_answer:.1f}",
            f"{row.tokens:,.0f}",
            "–" if row.evictions is None else f"{row.evictions:,}",
            published(row.task, row.policy),
        ]
        table_rows.append(list(map(str, cells)))
    stated = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in settings.items())
    lines = "\n".join(table(HEADER, table_rows, num_left=len(HEADER)))
    return "\n\n".join([f"# Accuracy of {settings['model']}", stated, lines, NOTES, ""])


def write(output: Path, settings: dict[str, Any]) -> str:
    """Write ``summary.json`` and ``summary.md``; returns the latter."""
    rows = read_rows(output)
    summary = [
        {
            "task": row.task,
            "policy": row.policy.name,
            "budget": row.policy.budget,
            "problems": len(row.scores),
            "seeds": row.seeds,
            "accuracy": row.accuracy[0],
            "no_answer": row.no_answer,
            "tokens": row.tokens,
            "evictions": row.evictions,
        }
        for row in rows
    ]
    (output / "summary.json").write_text(
        json.dumps({"settings": settings, "rows": summary}, indent=1)
    )
    text = markdown(rows, settings)
    (output / "summary.md").write_text(text)
    return text
