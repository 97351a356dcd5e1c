"""The serving report: what servers say of themselves, and whose number each one is."""

import json

import pytest
from transformers import AutoTokenizer

from benchmarks.common import published
from benchmarks.common.dummy_weights import write_dummy_model
from benchmarks.common.paths import MODELS
from benchmarks.serving import offline, report
from benchmarks.serving.suites import SUITES, TINY
from vase_vllm.tools.plan.model_shape import read_model_shape


def result(accelerator, *runs, output_len=16384, concurrency=16, server=None):
    return {
        "suite": "suite",
        "workload": {
            "name": f"c{concurrency}",
            "question": "why",
            "kv_tokens": 1,
            "num_requests": 1,
            "concurrency": concurrency,
            "input_len": 1,
            "output_len": output_len,
            "spread": 0.0,
            "prefix_len": 0,
            "rounds": 3,
        },
        "model": "qwen3-14b",
        "block_size": 16,
        "date": "2026-01-01T00:00",
        "machine": {"processor": "p", "cores": 2, "accelerator": accelerator},
        "versions": {"vllm": "0"},
        "environment": {},
        "runs": [
            {
                "policy": policy,
                "round": number,
                "status": "ok" if speed else "failed",
                "reason": "it crashed",
                "load": {
                    "output_throughput": speed,
                    "median_tpot_ms": 1.0,
                    "median_ttft_ms": 1.0,
                },
                "tokens_per_engine_cpu_second": speed,
                "time_per_token": {"position": []},
                "server": server or {"prefix_caching": "False"},
            }
            | dict.fromkeys(("peak_running", "preemptions", "evictions"), 1)
            | dict.fromkeys(("peak_blocks", "peak_rss_mib"), 1)
            for policy, number, speed in runs
        ],
    }


def test_settings_of_results_that_did_not_record_all():
    on_cpu = report.settings([result(None, ("full", 1, 5.0))])
    assert on_cpu[2] == "| full | off | not recorded | off | none | not recorded | not recorded |"
    on_gpu = report.settings([result("a GPU", ("full", 1, 5.0))])
    assert on_gpu[2].count("not recorded") == 5


def test_settings_that_differ_between_servers():
    results = [
        result("a GPU", ("full", 1, 5.0), server={"async_scheduling": state})
        for state in ("True", "False", "True")
    ]
    assert "| on or off |" in report.settings(results)[2]


def test_published_numbers_are_marked_and_in_the_table_of_ours():
    results = [
        result("a GPU", ("full", 1, 100.0), ("vase-2048", 1, 150.0), concurrency=16),
        result("a GPU", ("full", 1, 90.0), ("vase-2048", 1, 220.0), concurrency=32),
        result("a GPU", ("vase-2048", 1, 900.0), ("vase-2048", 2, 0.0), concurrency=64),
    ]
    lines = report.against_published(results)
    rows = [line for line in lines if line.startswith("| ")][2:]
    ours, others = rows[:2], rows[2:]
    # The best of each policy; one with a run that failed is none.
    assert ours == [
        "| full | qwen3-14b | 16384 | 16 | 100.0 | measured here, a GPU |",
        "| vase-2048 | qwen3-14b | 16384 | 32 | 220.0 | measured here, a GPU |",
    ]
    assert len(others) == len(published.load())
    assert all(f"{published.MARK}: [" in row and "](https://" in row for row in others)
    assert report.AFTER_LEGEND in report.markdown(results)
    assert published.MARK in report.markdown(results)


def test_a_cpu_page_has_no_gpu_numbers():
    page = report.markdown([result(None, ("full", 1, 5.0), ("full", 2, 7.0))])
    assert published.MARK not in page
    assert "; 2 rounds." in page
    assert "| full | 6.0 (5.0 to 7.0) |" in page
    assert "; 1 round." in report.markdown([result(None, ("full", 1, 5.0))])


def test_published_results_say_what_came_out():
    results = published.load()
    assert all(other.throughput for other in results)
    out_of_memory = [other for other in results if other.tokens_per_second is None]
    assert [other.throughput for other in out_of_memory] == ["out of memory"]
    assert len(published.notes()) == len({other.source for other in results})


@pytest.mark.parametrize(
    ("name", "num_params"), [("qwen3-8b", 8_190_735_360), ("qwen3-14b", 14_768_307_200)]
)
def test_gpu_suites_fill_the_memory_of_one_gpu(name, num_params):
    suite = SUITES[name]
    shape, longest = read_model_shape(str(suite.model))
    assert shape.num_params == num_params
    token_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_size * shape.element_size
    for workload in suite.workloads:
        kv_bytes = workload.kv_tokens * token_bytes
        # vLLM leaves 8 % of a GPU alone; graphs and activations take a few GB more.
        assert kv_bytes + shape.weight_bytes < 0.92 * 80e9 - 4e9
        assert workload.max_model_len <= longest
    assert suite.needs_gpu
    fewest = min(policy.budget + policy.window for policy in suite.policies if policy.budget)
    most = max(workload.concurrency for workload in suite.workloads)
    assert most * fewest > suite.workloads[0].kv_tokens
    assert {workload.output_len for workload in suite.workloads} == {16384, 32768}


@pytest.mark.parametrize("suite", SUITES.values(), ids=SUITES)
def test_workloads_name_policies_of_their_suite(suite):
    known = {policy.name for policy in suite.policies}
    for workload in suite.workloads:
        assert set(workload.policies) <= known
        assert "full" in (workload.policies or known)


def test_offline_tools_whose_work_is_not_complete_have_no_speed():
    result = {"num_requests": 2}
    printed = "Total num output tokens:  {}\n"
    assert offline.tokens_missing(result, printed.format(2 * offline.OUTPUT_LEN)) == ""
    assert "7 output tokens" in offline.tokens_missing(result, printed.format(7))
    assert "no output tokens" in offline.tokens_missing(result, "")
    assert offline.iterations_missing({"latencies": [1.0] * offline.ITERATIONS}, "") == ""
    assert "1 iterations" in offline.iterations_missing({"latencies": [1.0]}, "")


IN_EFFECT = {"cuda_graphs": "FULL", "async_scheduling": "True"}


def swept(smoke):
    """A sweep of two policies; three rounds of the full cache at 32."""
    loads = [
        {
            "output_throughput": 10.0 * n,
            "median_tpot_ms": 10.0 * n,
            "p99_itl_ms": 10.0 * n,
            "median_ttft_ms": 1e4 * n,
        }
        for n in (1, 2, 4)
    ]
    run = dict(status="ok", policy="full", concurrency=32, preemptions=1.0, peak_running=32.0)
    run |= dict(evictions=None, peak_blocks=3, pool_blocks=9)
    run |= dict(server=IN_EFFECT | {"prefix_caching": "True"})
    runs = [run | dict(round=n + 1, load=load, preemptions=n) for n, load in enumerate(loads)]
    runs.append(run | dict(round=1, concurrency=16, load=loads[0]))
    evicting = IN_EFFECT | {"prefix_caching": "False"}
    runs.append(runs[-1] | dict(policy="vase-64", evictions=5, server=evicting))
    whole = result("a GPU")
    workload = whole["workload"] | {"name": "s", "max_concurrency": 64, "concurrency": 16}
    ends = {"full": "memory was full"}
    return whole | {"workload": workload, "smoke": smoke, "runs": runs, "ends": ends}


def test_a_sweep_has_medians_over_the_rounds_at_each_concurrency(tmp_path):
    (tmp_path / "suite-s.json").write_text(json.dumps(swept(smoke=False)))
    text = report.write(tmp_path, "suite")
    assert text == (tmp_path / "suite.md").read_text()
    table = text[text.index("## s") :].splitlines()
    first, second, third = [line for line in table if line.startswith("| ")][2:]
    assert first.startswith("| full | 16 | 10.0 | 10.00 | 10.00 | 10.00 | 32 | 1 | 0 | 3 | 9 | 1 |")
    assert second == (
        "| full | 32 | 20.0 (10.0 to 40.0) | 20.00 | 20.00 | 20.00 | 32 | 1 | 0 | 3 | 9 | 3 |"
    )
    assert third.startswith("| vase-64 | 16 |")
    assert "| full | on | not recorded | on | FULL |" in text
    assert "| vase-64 | off | not recorded | on | FULL |" in text
    assert "- full: the sweep ended, memory was full." in text
    assert (tmp_path / "suite-s.png").stat().st_size > 10_000


def test_published_numbers_are_beside_a_sweep_and_marked():
    lines = report.markdown([swept(smoke=False)]).splitlines()
    start = lines.index(next(line for line in lines if line.startswith("| cache |")))
    rows = lines[start : lines.index("", start)]
    assert len({row.count("|") for row in rows}) == 1
    assert sum("measured here" in row for row in rows) == 2
    marked = [row for row in rows if published.MARK in row]
    assert len(marked) == len(published.load()) == len(rows) - 2 - 2


def test_a_smoke_run_has_no_numbers():
    text = report.markdown([swept(smoke=True)])
    assert "| full | 16 | - | - | - | - | - | - | - | - | - | 1 |" in text
    assert "no numbers" in text
    assert "| full | qwen3-14b | 16384 | 32 | - | measured here" in text


def test_every_id_of_a_model_with_dummy_weights_is_a_token(tmp_path):
    config = write_dummy_model(tmp_path, MODELS / "qwen3-14b", TINY)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == config["vocab_size"] == 512
    assert tokenizer.decode([72, 105, 300]) == "Hiw300;"
    assert tokenizer.encode("Hi w300;") == list(b"Hi w300;")
