"""The demo says only what happened: what makes it fail, and how it shows what it shows."""

import os
from dataclasses import replace

import pytest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from rich.console import Console

from vase_vllm.tools.demo import __main__ as demo
from vase_vllm.tools.demo import race, view
from vase_vllm.tools.demo.race import NUM_TOKENS, TOPICS, Output, Sample, Side


class FinishedServer:
    """What the report asks a server for."""

    def __init__(self, concurrency: float, evictions: int = 0) -> None:
        self.concurrency, self.evictions = concurrency, evictions

    def metrics(self):
        counters = {"vllm:kv_eviction_evictions": self.evictions, "vllm:num_preemptions": 0}
        return {
            name: CounterMetricFamily(name, "a counter", value=value)
            for name, value in counters.items()
        }

    def max_concurrency(self) -> tuple[str, float]:
        return f"Maximum concurrency: {self.concurrency}x", self.concurrency


def finished_side(name: str, server: FinishedServer, is_evicting: bool, held: int) -> Side:
    outputs = [Output("A fact.", NUM_TOKENS, NUM_TOKENS + 40, is_done=True) for _ in TOPICS]
    samples = [Sample(6.0, 300, 4, 20, held, 8 if is_evicting else None)]
    return Side(name, server, "model", is_evicting, outputs, samples, seconds=10.0)


def finished_sides() -> list[Side]:
    bound = len(TOPICS) * (demo.BUDGET + demo.WINDOW)
    return [
        finished_side("full cache", FinishedServer(2.0), False, 500),
        finished_side("vase", FinishedServer(4.0, evictions=40), True, bound),
    ]


def report(sides: list[Side], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    return demo.report(sides, Console(width=100)), capsys.readouterr().out


def test_the_report_has_what_was_measured(capsys):
    code, text = report(finished_sides(), capsys)
    assert code == 0
    assert "40 evictions, counted by /metrics" in text
    assert f"{NUM_TOKENS * len(TOPICS)} tokens in 10 s" in text
    assert f"{NUM_TOKENS * len(TOPICS) / 10:.1f} tokens per second" in text
    assert "2.0 times the full cache's maximum concurrency" in text
    assert "NO" not in text


def no_evictions(full: Side, evicting: Side) -> None:
    evicting.server.evictions = 0


def too_many_held(full: Side, evicting: Side) -> None:
    sample = evicting.samples[0]
    evicting.samples.append(replace(sample, tokens_held=sample.tokens_held + 1))


def cut_short(full: Side, evicting: Side) -> None:
    evicting.outputs[-1].num_generated -= 1


def unfinished(full: Side, evicting: Side) -> None:
    full.outputs[0].is_done = False


def same_concurrency(full: Side, evicting: Side) -> None:
    full.server.concurrency = evicting.server.concurrency


@pytest.mark.parametrize(
    "spoil", [no_evictions, too_many_held, cut_short, unfinished, same_concurrency]
)
def test_what_did_not_happen_is_said_and_fails(spoil, capsys, monkeypatch):
    monkeypatch.setattr(race, "METRICS_SECONDS", 0.0)
    sides = finished_sides()
    spoil(*sides)
    code, text = report(sides, capsys)
    assert code == 1
    assert text.count("NO ") == 1


def rendered(excerpt: view.Excerpt) -> list[str]:
    console = Console(width=40)
    with console.capture() as capture:
        console.print(excerpt)
    return capture.get().splitlines()


def test_a_long_text_is_shown_by_its_beginning_and_end():
    text = "\n".join(f"fact {number}" for number in range(100))
    assert rendered(view.Excerpt(text, head=2, tail=1)) == [
        "fact 0",
        "fact 1",
        "... (97 lines are left out here) ...",
        "fact 99",
    ]
    assert rendered(view.Excerpt("a word " * 12, head=2, tail=1)) == [
        "a word a word a word a word a word a ",
        "word a word a word a word a word a word ",
        "a word ",
    ]


def test_the_table_has_moments_of_the_whole_time():
    sides = finished_sides()
    for side in sides:
        (sample,) = side.samples
        side.samples = [replace(sample, seconds=float(second)) for second in range(100)]
    table = view.held_over_time(sides)
    assert table.row_count == view.MOST_ROWS
    assert list(table.columns[0].cells)[-1] == "90"


class RunningServer:
    """What a sample asks a server for: two requests run, and its worker counts."""

    num_running = 2

    def metrics(self):
        labels = ["num_gpu_blocks"]
        info = GaugeMetricFamily("vllm:cache_config_info", "info", labels=labels)
        info.add_metric(["29"], 1)
        gauges = {"vllm:num_requests_running": self.num_running, "vllm:kv_cache_usage_perc": 0.5}
        families = {name: GaugeMetricFamily(name, "a", value=n) for name, n in gauges.items()}
        return {**families, "vllm:cache_config_info": info}

    def eviction_stats(self):
        return {"evictions": 7, "cached_tokens": 300}


def test_a_sample_counts_what_running_requests_hold():
    lengths = (100, 400, 300, 200)
    outputs = [Output("a", length - 40, length, is_done=length == 400) for length in lengths]
    full = Side("full cache", RunningServer(), "model", False, outputs)
    evicting = Side("vase", RunningServer(), "model", True, outputs)
    for side in (full, evicting):
        side.take_sample()
    # The request of 400 tokens is done, that of 100 is preempted.
    (sample,) = full.samples
    assert (sample.tokens_held, sample.num_evictions) == (300 + 200, None)
    (sample,) = evicting.samples
    assert (sample.tokens_held, sample.num_evictions, sample.num_blocks) == (300, 7, 14)
    for side in (full, evicting):
        side.server.num_running = 0
        side.take_sample()
        assert side.samples[-1].tokens_held == 0


def test_without_a_registry_the_demo_names_what_needs_none(capfd, monkeypatch, tmp_path):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    monkeypatch.chdir(tmp_path)
    assert demo.main([]) == 1
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "demo:" in line]
    assert "cannot be fetched" in line
    assert "vase-vllm tiny-model DIR" in line
    assert line.endswith("and make demo MODEL=DIR serves it")
