"""What is said of scores: intervals, the rows of the suites, their tables and the plot."""

import numpy as np
import pytest

from vase_vllm.tools.evaluation.likelihood import compare, likelihood_rows
from vase_vllm.tools.evaluation.methods import choose_methods
from vase_vllm.tools.evaluation.plots import binned, draw_rises
from vase_vllm.tools.evaluation.recall import RecallCase
from vase_vllm.tools.evaluation.recall_results import grade, recall_rows
from vase_vllm.tools.evaluation.samples import Sample
from vase_vllm.tools.evaluation.scores import Scores
from vase_vllm.tools.evaluation.statistics import Estimate, mean_estimate, share_estimate
from vase_vllm.tools.evaluation.tables import likelihood_tables, not_counted, recall_tables

FULL, VASE, RKV = choose_methods(["vase", "rkv:smoothing=1"], [16], 4)
FIRST = 20


def test_the_interval_of_a_mean_is_students():
    # 2.776 is the 97.5 % point of Student's t with four degrees of freedom.
    values = [1.0, 2.0, 3.0, 4.0, 5.0]
    found = mean_estimate(values)
    margin = 2.776445 * np.std(values, ddof=1) / 5**0.5
    assert (found.low, found.high) == pytest.approx((3 - margin, 3 + margin), rel=1e-5)
    assert mean_estimate([2.5]) == Estimate(2.5)
    assert mean_estimate([2.5, 2.5]) == Estimate(2.5, 2.5, 2.5)


def test_the_interval_of_a_share_is_wilsons():
    # Wilson's interval of 0 of 10, to four digits, as in Brown, Cai and DasGupta (2001).
    found = share_estimate([False] * 10)
    assert (found.mean, found.low, found.high) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert share_estimate([True] * 10).low == pytest.approx(0.7225, abs=1e-4)


def scores(nll: np.ndarray, top: int) -> Scores:
    """Of a sequence of zeros, whose most probable token is ``top`` everywhere."""
    token_ids = np.stack([np.zeros(len(nll)), np.full(len(nll), top)], axis=1)
    logprobs = np.stack([-nll, np.full(len(nll), -0.1)], axis=1)
    ranks = np.where(nll < 0.5, 1, 2)
    return Scores(token_ids.astype(np.int32), logprobs.astype(np.float32), ranks.astype(np.int32))


@pytest.fixture
def comparisons():
    """Two texts, on which vase costs 0.1 and 0.3, and rkv 0.05 less, after the first eviction."""
    found = {VASE: [], RKV: []}
    for index, half in enumerate(("choice", "report")):
        sample = Sample(f"text {index}", half, (0,) * 41, 1)
        full = np.linspace(1, 2, 40)
        for method, less in ((VASE, 0), (RKV, 0.05)):
            rise = np.where(np.arange(40) < FIRST, 7.0, 0.1 + 0.2 * index - less)
            evicted = scores(full + rise, 1 + index)
            found[method].append(compare(sample, method, scores(full, 1), evicted))
    return found


def test_the_likelihood_rows_are_means_after_the_first_eviction(comparisons):
    rows = {(row.group, row.method): row for row in likelihood_rows(comparisons)}
    assert len(rows) == 6
    for group, mean in (("choice", 0.1), ("report", 0.3), ("all", 0.2)):
        vase, rkv = rows[group, "vase"], rows[group, "rkv:smoothing=1"]
        assert vase.rise.mean == pytest.approx(mean, abs=1e-6)
        assert rkv.rise.mean == pytest.approx(mean - 0.05, abs=1e-6)
        assert vase.full_nll == pytest.approx(np.linspace(1, 2, 40)[FIRST:].mean())
        assert vase.minus_first is None
        assert rkv.minus_first is not None
        assert rkv.minus_first.mean == pytest.approx(-0.05, abs=1e-6)
    assert rows["choice", "vase"].same_top.mean == 1
    assert rows["report", "vase"].same_top.mean == 0
    both = rows["all", "vase"]
    assert both.rise.low is not None
    assert both.rise.low < 0.1
    # The difference is paired by text, and here the same in both.
    paired = rows["all", "rkv:smoothing=1"].minus_first
    assert paired is not None
    assert paired.high - paired.low < 1e-6


def test_the_likelihood_tables_name_their_half(comparisons):
    choice, report, both = likelihood_tables(likelihood_rows(comparisons))
    assert choice.title == (
        "Likelihood, budget 16, choice half (texts: 1; full cache: 1.756 nats per token)"
    )
    assert "report half" in report.title
    assert "both halves (texts: 2" in both.title
    lines = choice.markdown()
    assert lines[2].startswith("| policy | rise of the NLL | minus vase | KL")
    assert lines[4].startswith("| vase | +0.100 | - | ")
    assert lines[5].startswith("| rkv:smoothing=1 | +0.050 | -0.050 | ")
    assert [column.header for column in choice.rich().columns] == list(choice.header)


def test_the_plot_shows_means_over_texts(comparisons, tmp_path):
    middles, means = binned([c.rises for c in comparisons[VASE]], 10)
    assert middles.tolist() == [1.5 + 4 * i for i in range(10)]
    assert means == pytest.approx([7.0] * 5 + [0.2] * 5, abs=1e-6)
    files = draw_rises(comparisons, "a title", tmp_path / "evaluation.json")
    assert [file.name for file in files] == ["evaluation.png", "evaluation.svg"]
    first = [file.read_bytes() for file in files]
    draw_rises(comparisons, "a title", tmp_path / "evaluation.json")
    assert [file.read_bytes() for file in files] == first


@pytest.fixture
def grades():
    """Of five cases of two kinds, the full cache recalls four and three, and vase one each."""
    found = {FULL: [], VASE: []}
    for kind, solved in (("passcode", 4), ("constant", 3)):
        for index in range(5):
            half = "choice" if index % 2 == 0 else "report"
            case = RecallCase(f"{kind} {index}", half, (0,) * 9, 0, kind, 512, (6, 7))
            for method, right in ((FULL, solved), (VASE, 1)):
                nll = np.full(8, 9.0)  # row i is about token i + 1
                nll[5:7] = 0.1
                nll[6] = 0.3 if index < right else 2.1
                found[method].append(grade(case, scores(nll, 1)))
    return found


def test_a_value_is_recalled_if_all_of_its_tokens_are(grades):
    first, *_, last = grades[FULL][:5]
    assert (first.is_recalled, last.is_recalled) == (True, False)
    assert (first.nll, last.nll) == pytest.approx((0.2, 1.1))


def test_what_the_full_cache_does_not_recall_does_not_count(grades):
    rows = list(recall_rows(grades))
    table = {(row.group, row.kind, row.method): row for row in rows}
    assert table["all", "passcode", "full"].recalled.mean == 0.8
    assert table["all", "passcode", "vase"].recalled.mean == 0.2
    assert table["choice", "passcode", "vase"].recalled.mean == pytest.approx(1 / 3)
    assert table["report", "passcode", "vase"].nll.mean == pytest.approx(1.1)
    assert {row.kind for row in rows if row.counts} == {"passcode"}
    (only,) = recall_tables(rows)
    assert only.title == (
        "Recall, passcode at distance 512 (choice half: 3 cases, report half: 2 cases)"
    )
    assert [row[:2] for row in only.rows] == [["full", "-"], ["vase", "16"]]
    assert only.rows[1][4].startswith("0 (0 to ")
    assert not_counted(rows) == [
        "Recall, constant at distance 512 does not count: the full cache recalls 60% of 5 cases, "
        "which is below 80%."
    ]
