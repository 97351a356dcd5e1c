"""The paper's table (arXiv 2606.03928): accuracy in per cent, as published, 4x compression."""

from __future__ import annotations

from benchmarks.common.policy import Policy
from benchmarks.reasoning.suite import TASKS

COLUMNS = ("AIME25", "AIME26", "HMMT25", "GPQA-D", "MATH", "LiveCodeBench")
MODELS = ("Qwen3-4B", "Qwen3-14B")
# A cell is Qwen3-4B / Qwen3-14B. SeerAttention-R selects and keeps the full cache: no policy here.
ROWS = {
    "full": "66.41/70.21 62.71/76.04 45.94/54.79 56.19/65.25 93.93/95.22 80.22/-",
    "vase": "59.17/63.96 62.08/72.29 44.38/50.00 47.98/57.39 81.82/85.42 63.45/-",
    "cur": "57.29/63.33 61.88/68.75 39.58/49.38 43.94/56.76 84.72/86.47 61.85/-",
    "rkv": "49.58/54.58 54.58/60.21 36.98/44.58 49.05/59.09 83.28/86.05 62.60/-",
    "snapkv": "47.92/- 53.33/- 35.31/- 36.87/- 72.30/- -/-",
}


def published(task: str, policy: Policy) -> str:
    """The cell of a task and a policy at the paper's budget, else a dash."""
    known = TASKS.get(task)
    if known is None or known.paper is None or policy.name not in ROWS:
        return "–"
    if policy.budget not in (None, known.budget):
        return "–"
    return ROWS[policy.name].split()[COLUMNS.index(known.paper)].replace("/", " / ")
