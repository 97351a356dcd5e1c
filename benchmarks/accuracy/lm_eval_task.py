"""The functions that walks.yaml names: they load the held-out problems and mark a completion."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

# lm-eval loads this file by its path, so the repository need not be on the path yet.
sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.accuracy.grading import grade
from benchmarks.accuracy.tasks import HELD_OUT_FILE, Problem, read_jsonl


def load(**_: Any) -> Any:
    from datasets import Dataset, DatasetDict

    problems = read_jsonl(HELD_OUT_FILE)
    return DatasetDict({"test": Dataset.from_list([asdict(problem) for problem in problems])})


def process_results(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    return grade(Problem(**doc), results[0])
