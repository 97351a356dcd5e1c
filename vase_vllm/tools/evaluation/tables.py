"""The tables of an evaluation, for a terminal and for Markdown."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vase_vllm.tools.evaluation.likelihood import ALL, GROUPS, LikelihoodRow
from vase_vllm.tools.evaluation.recall_results import LEAST_SOLVED, RecallRow
from vase_vllm.tools.evaluation.statistics import Estimate
from vase_vllm.tools.evaluation.texts import HALVES
from vase_vllm.tools.markdown import table as markdown_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

NUM_TEXT_COLUMNS = 1
RECALL_COLUMNS = ("recalled, %", "NLL of a value's token")
TITLES = {"choice": "choice half", "report": "report half", ALL: "both halves"}


@dataclass(frozen=True)
class Table:
    """A table; the first column is text, the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> list[str]:
        """Its lines, with the title as a heading."""
        lines = markdown_table(self.header, self.rows, NUM_TEXT_COLUMNS)
        return [f"### {self.title}", "", *lines, ""]

    def rich(self) -> "RichTable":
        """For a terminal."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as RichTable

        table = RichTable(box=SIMPLE_HEAD, pad_edge=False, title=self.title, title_justify="left")
        for index, name in enumerate(self.header):
            if index < NUM_TEXT_COLUMNS:
                table.add_column(name, no_wrap=True)
            else:
                table.add_column(name, justify="right")
        for row in self.rows:
            table.add_row(*row)
        return table


def likelihood_tables(rows: Sequence[LikelihoodRow]) -> Iterator[Table]:
    """A table for each budget and group of texts."""
    for budget in dict.fromkeys(row.budget for row in rows):
        for group in GROUPS:
            own = [row for row in rows if (row.budget, row.group) == (budget, group)]
            if not own:
                continue
            yield Table(
                f"Likelihood, budget {budget}, {TITLES[group]} (texts: {own[0].texts}; full cache: "
                f"{own[0].full_nll:.3f} nats per token)",
                [
                    "policy",
                    "rise of the NLL",
                    f"minus {own[0].method}",
                    "KL, at least",
                    "same top token, %",
                ],
                [
                    [
                        row.method,
                        _mean(row.rise, "+"),
                        "-" if row.minus_first is None else _mean(row.minus_first, "+"),
                        _mean(row.divergence),
                        _mean(row.same_top, digits=1, scale=100),
                    ]
                    for row in own
                ],
            )


def recall_tables(rows: Sequence[RecallRow]) -> Iterator[Table]:
    """A table for each kind and distance that counts, with columns for each half."""
    for kind, distance in dict.fromkeys((row.kind, row.distance) for row in rows if row.counts):
        own = {
            (row.group, row.method, row.budget): row
            for row in rows
            if (row.kind, row.distance) == (kind, distance) and row.group in HALVES
        }
        sizes = {group: row.cases for (group, _, _), row in own.items()}
        titles = ", ".join(f"{TITLES[group]}: {count} cases" for group, count in sizes.items())
        yield Table(
            f"Recall, {kind} at distance {distance} ({titles})",
            [
                "policy",
                "budget",
                *(f"{group}: {column}" for group in sizes for column in RECALL_COLUMNS),
            ],
            [
                [
                    method,
                    "-" if budget is None else str(budget),
                    *(
                        cell
                        for group in sizes
                        for cell in _recall_cells(own[group, method, budget])
                    ),
                ]
                for method, budget in dict.fromkeys(key[1:] for key in own)
            ],
        )


def _recall_cells(row: RecallRow) -> list[str]:
    return [_share(row.recalled), _mean(row.nll)]


def not_counted(rows: Sequence[RecallRow]) -> list[str]:
    """A sentence for each kind and distance that the full cache does not recall well enough."""
    return [
        f"Recall, {row.kind} at distance {row.distance} does not count: the full cache recalls "
        f"{row.recalled.mean:.0%} of {row.cases} cases, which is below {LEAST_SOLVED:.0%}."
        for row in rows
        if row.group == ALL and row.budget is None and not row.counts
    ]


def _mean(estimate: Estimate, sign: str = "", digits: int = 3, scale: float = 1) -> str:
    """A mean and half the width of its interval, which is symmetric."""
    mean = f"{scale * estimate.mean:{sign}.{digits}f}"
    if estimate.high is None:
        return mean
    return f"{mean} \N{PLUS-MINUS SIGN} {scale * (estimate.high - estimate.mean):.{digits}f}"


def _share(estimate: Estimate) -> str:
    """A share in percent and the ends of its interval, which is not symmetric."""
    assert estimate.low is not None
    assert estimate.high is not None
    return f"{100 * estimate.mean:.0f} ({100 * estimate.low:.0f} to {100 * estimate.high:.0f})"
