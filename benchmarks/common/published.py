"""Other people's throughput numbers, as they published them; this project has measured none.

``published.json`` holds them, each group with its source and with what keeps it from being compared
with a measurement of ours. Reports print them in the table of the measurements, marked as such.
"""

import json
from dataclasses import dataclass
from pathlib import Path

DATA = Path(__file__).with_name("published.json")
MARK = "published, not measured by us"


@dataclass(frozen=True)
class Published:
    """One published result.

    Attributes:
        source, url: where it stands.
        system: the engine that ran it.
        cache: what kept the KV cache small, and how small.
        concurrency: sequences at a time; None where the source does not say.
        output_len: tokens of an output; None where the source does not say.
        tokens_per_second: output tokens of all sequences together; None where it did not run.
        outcome: what happened where it did not run.
        peak_gb: peak GPU memory in GB, where the source says it.
    """

    source: str
    url: str
    system: str
    model: str
    cache: str
    concurrency: int | None = None
    output_len: int | None = None
    tokens_per_second: float | None = None
    outcome: str = ""
    peak_gb: float | None = None

    @property
    def throughput(self) -> str:
        """Output tokens/s and, where it is known, peak memory; or what happened instead."""
        if self.tokens_per_second is None:
            return self.outcome
        memory = f" (peak {self.peak_gb:g} GB)" if self.peak_gb is not None else ""
        return f"{self.tokens_per_second:g}{memory}"

    @property
    def output_tokens(self) -> str:
        return "not stated" if self.output_len is None else str(self.output_len)

    @property
    def at_a_time(self) -> str:
        return "not stated" if self.concurrency is None else str(self.concurrency)

    @property
    def measured_by(self) -> str:
        """The cell that marks the row."""
        return f"{MARK}: [{self.source}]({self.url})"


def load() -> list[Published]:
    """All published results, in the order of the file."""
    return [
        Published(group["source"], group["url"], group["system"], group["model"], **result)
        for group in json.loads(DATA.read_text())
        for result in group["results"]
    ]


def notes() -> list[str]:
    """A Markdown item for each source: its GPU, and why its numbers are not comparable."""
    return [
        f"- [{group['source']}]({group['url']})"
        + (f", {group['paper']}" if group["paper"] else "")
        + f": {group['system']}, {group['model']}, GPU: {group['gpu']}. "
        f"Not comparable as it stands: {group['comparability']}."
        for group in json.loads(DATA.read_text())
    ]
