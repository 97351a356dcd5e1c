"""What can be run: the tasks with their recommended budgets, and policies by name."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common.policy import Policy
from vase_vllm.tools.policy_label import parse_policy_label

TASKS_DIRECTORY = Path(__file__).parent / "tasks"
FULL = "full"


@dataclass(frozen=True)
class Task:
    """A dataset.

    Attributes:
        name: here; lm-evaluation-harness knows it as ``vase_`` and this name.
        budget: what the paper gives it.
        paper: its column of the paper's table, if it has one.
    """

    name: str
    budget: int
    paper: str | None = None


TASKS = {
    task.name: task
    for task in (
        Task("aime24", 4096),
        Task("aime25", 4096, "AIME25"),
        Task("aime26", 4096, "AIME26"),
        Task("hmmt25", 4096, "HMMT25"),
        Task("gpqa_diamond", 2048, "GPQA-D"),
        Task("math500", 1024, "MATH"),
    )
}


def read_policy(label: str, budget: int | None) -> Policy:
    """The policy that the command line names: ``full``, ``vase``, ``vase:sampling=greedy``.

    Args:
        budget: tokens that a sequence keeps; None for the full cache.

    Raises:
        ValueError: the label is not NAME or NAME:KEY=VALUE,...
    """
    if budget is None:
        return Policy(label)
    name, settings = parse_policy_label(label)
    return Policy(label, budget, name, tuple(settings.items()))


def directory_name(policy: Policy) -> str:
    """The name of the directory of a policy's results."""
    name = re.sub(r"[^\w.=-]+", "-", policy.name)
    return name if policy.budget is None else f"{name}-{policy.budget}"


def plan(
    labels: list[str], budgets: list[int] | None, tasks: list[str]
) -> list[tuple[Policy, list[str]]]:
    """The servers to start, each with the tasks to run on it.

    Args:
        labels: of the policies.
        budgets: every task gets every one; None gives each the budget that is recommended for it.
        tasks: names from :data:`TASKS`, or lm-evaluation-harness's own.

    Raises:
        ValueError: there is no recommended budget for a task, or a label cannot be read.
    """
    unknown = [name for name in tasks if name not in TASKS]
    if unknown and budgets is None and labels != [FULL]:
        raise ValueError(f"no recommended budget for {', '.join(unknown)}: give --budgets")
    servers = []
    for label in labels:
        if label == FULL:
            servers.append((read_policy(FULL, None), tasks))
            continue
        for budget in budgets or sorted({TASKS[name].budget for name in tasks}):
            own = [name for name in tasks if budgets or TASKS[name].budget == budget]
            servers.append((read_policy(label, budget), own))
    return servers
