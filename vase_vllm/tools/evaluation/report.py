"""What an evaluation found: as JSON, as Markdown, as pictures and at a terminal."""

import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from vase_vllm.tools.evaluation.cells import CellStore
from vase_vllm.tools.evaluation.likelihood import (
    Comparison,
    LikelihoodRow,
    compare,
    likelihood_rows,
)
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.recall import RecallCase
from vase_vllm.tools.evaluation.recall_results import Grade, RecallRow, grade, recall_rows
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.scores import Scores
from vase_vllm.tools.evaluation.statistics import LEVEL
from vase_vllm.tools.evaluation.tables import (
    Table,
    likelihood_tables,
    not_counted,
    recall_tables,
)
from vase_vllm.tools.evaluation.texts import Text
from vase_vllm.tools.markdown import table as markdown_table
from vase_vllm.tools.provenance import machine, versions

LIKELIHOOD_NOTE = (
    "The rise of the negative log-likelihood (NLL) over the full cache's, less that of the first "
    "policy, the KL divergence from the full cache's distribution, all in nats per token, and the "
    "share of positions with the same most probable token: means over the positions that are "
    "computed after the first eviction (position budget + window), and over texts. The divergence "
    "is computed of the most probable tokens that both runs report and one event for all others, "
    "which makes it a lower bound."
)
RECALL_NOTE = (
    "A value is recalled if greedy decoding writes it: each of its tokens is the most probable one "
    "after the right tokens before it. The NLL of its tokens is in nats."
)
INTERVAL_NOTE = (
    f"The confidence intervals are of {LEVEL:.0%}: Student's t over texts (or cases), and Wilson's "
    "for shares of cases. Choose a method by the texts of one half, and report what the "
    "other half says of it."
)


@dataclass(frozen=True)
class Evaluation:
    """The numbers and where they come from.

    Attributes:
        source: what the numbers belong to, as JSON can hold it.
        comparisons: of the likelihood suite, by method.
        likelihood: its rows; empty if it was not asked for.
        recall: rows of the recall suite; empty if it was not asked for.
    """

    source: dict[str, Any]
    comparisons: dict[Method, list[Comparison]]
    likelihood: list[LikelihoodRow]
    recall: list[RecallRow]

    @classmethod
    def collect(
        cls,
        model: dict[str, str],
        note: str | None,
        methods: Sequence[Method],
        texts: Sequence[Text],
        samples: Sequence[Sample],
        store: CellStore,
    ) -> "Evaluation":
        """Read the scores of all methods and samples, which must be in the store.

        Args:
            model: name and fingerprint.
            note: what the user says of the results.
        """
        full = methods[0]
        comparisons: dict[Method, list[Comparison]] = {method: [] for method in methods[1:]}
        grades: dict[Method, list[Grade]] = {method: [] for method in methods}
        for sample in samples:
            full_scores = _stored(store, full, sample)
            for method in methods:
                scores = full_scores if method is full else _stored(store, method, sample)
                if isinstance(sample, RecallCase):
                    grades[method].append(grade(sample, scores))
                elif method is not full:
                    comparisons[method].append(compare(sample, method, full_scores, scores))
        lengths = {s.name: len(s.token_ids) for s in samples if not isinstance(s, RecallCase)}
        return cls(
            source={
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": shlex.join(["vase-vllm", *sys.argv[1:]]),
                "machine": machine(),
                "versions": {"python": platform.python_version()}
                | versions(["vllm", "torch", "transformers", "vase-vllm"]),
                "note": note,
                "model": model,
                "texts": [
                    {
                        "name": text.name,
                        "half": text.half,
                        "tokens": lengths.get(text.name),
                        "sha256": text.sha256,
                    }
                    for text in texts
                ],
            },
            comparisons={method: found for method, found in comparisons.items() if found},
            likelihood=likelihood_rows({m: found for m, found in comparisons.items() if found}),
            recall=list(recall_rows(grades)) if grades[full] else [],
        )

    @property
    def tables(self) -> list[Table]:
        """All tables."""
        return [*likelihood_tables(self.likelihood), *recall_tables(self.recall)]

    @property
    def notes(self) -> list[str]:
        """What must be said beside the tables."""
        return [
            *([LIKELIHOOD_NOTE] if self.likelihood else []),
            *([RECALL_NOTE, *not_counted(self.recall)] if self.recall else []),
            INTERVAL_NOTE,
        ]

    def write(self, directory: Path) -> None:
        """Write evaluation.json and .md, and evaluation.png and .svg of the likelihood suite."""
        found = {
            **self.source,
            "likelihood": [asdict(row) for row in self.likelihood],
            "by_text": [
                {"method": method.label, "budget": method.budget, **_without_rises(comparison)}
                for method, own in self.comparisons.items()
                for comparison in own
            ],
            "recall": [asdict(row) for row in self.recall],
        }
        path = directory / "evaluation.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        path.with_suffix(".md").write_text(self.markdown(), encoding="utf-8")
        if self.comparisons:
            from vase_vllm.tools.evaluation.plots import draw_rises

            title = f"{Path(self.source['model']['name']).name}: what eviction adds to the NLL"
            draw_rises(self.comparisons, title, path)

    def markdown(self) -> str:
        """The page."""
        source = self.source
        device = source["machine"]["accelerator"] or (
            f"{source['machine']['processor']}, {source['machine']['cores']} cores"
        )
        texts = [
            [text["name"], text["half"], str(text["tokens"] or "-"), text["sha256"][:12]]
            for text in source["texts"]
        ]
        lines = [
            "# What eviction costs a model",
            "",
            f"- model: `{source['model']['name']}`, fingerprint "
            f"`{source['model']['fingerprint'][:12]}`",
            f"- command: `{source['command']}`",
            f"- machine: {device}",
            f"- versions: {', '.join(f'{k} {v}' for k, v in source['versions'].items())}",
            f"- date: {source['date'][:10]}",
            *([f"- {source['note']}"] if source["note"] else []),
            "",
            *[line for note in self.notes for line in (note, "")],
            *(["![rise of the NLL](evaluation.svg)", ""] if self.comparisons else []),
            *[line for table in self.tables for line in table.markdown()],
            "### Texts",
            "",
            *markdown_table(["text", "half", "tokens", "SHA-256"], texts, 2),
        ]
        return "\n".join(lines) + "\n"

    def print(self, directory: Path) -> None:
        """Print the tables and where the files are."""
        from rich.console import Console

        console = Console(highlight=False, soft_wrap=True)
        for table in self.tables:
            console.print(table.rich())
        for note in self.notes:
            console.print(note, style="dim", markup=False)
        console.print(f"Results are in {directory}", markup=False)


def _stored(store: CellStore, method: Method, sample: Sample) -> Scores:
    scores = store.load(method, sample)
    assert scores is not None, f"{method.name}, {sample.name} is not measured"
    return scores


def _without_rises(comparison: Comparison) -> dict[str, Any]:
    return {key: value for key, value in vars(comparison).items() if key != "rises"}
