"""The tables of an evaluation, for a terminal and for Markdown."""

from collections.abc import Callable, Iterator, Sequence
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
                    "rise of the NLL, nats",
                    f"rise minus {own[0].method}'s",
                    "KL divergence, at least, nats",
                    "same top token, %",
                ],
                [
                    [
                        row.method,
                        _text(row.rise, _signed),
                        "-" if row.minus_first is None else _text(row.minus_first, _signed),
                        _text(row.divergence, _plain),
                        _text(row.same_top, _percent),
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
    return [_text(row.recalled, _percent), _text(row.nll, _plain)]


def not_counted(rows: Sequence[RecallRow]) -> list[str]:
    """A sentence for each kind and distance that the full cache does not recall well enough."""
    return [
        f"Recall, {row.kind} at distance {row.distance} does not count: the full cache recalls "
        f"{row.recalled.mean:.0%} of {row.cases} cases, which is below {LEAST_SOLVED:.0%}."
        for row in rows
        if row.group == ALL and row.budget is None and not row.counts
    ]


def _text(estimate: Estimate, number: Callable[[float], str]) -> str:
    if estimate.low is None or estimate.high is None:
        return number(estimate.mean)
    return f"{number(estimate.mean)} ({number(estimate.low)} to {number(estimate.high)})"


def _plain(value: float) -> str:
    return f"{value:.3f}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"
