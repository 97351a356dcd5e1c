"""The throughput report: what servers say of themselves, and whose number each one is."""

import pytest

from benchmarks.common import published
from benchmarks.serving import offline, report
from benchmarks.serving.run import facts
from benchmarks.serving.suites import SUITES
from vase_vllm.tools.plan.model_shape import read_model_shape

ENGINE = (
    "INFO [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: enforce_eager=False, "
    "device_config={device}, enable_prefix_caching=True, enable_chunked_prefill=True, "
    "compilation_config={{'mode': <CompilationMode.VLLM_COMPILE: 3>, "
    "'cudagraph_mode': <CUDAGraphMode.{graphs}: 0>}}\n"
)
CPU = ENGINE.format(device="cpu", graphs="NONE")
CUDA = ENGINE.format(device="cuda", graphs="FULL_AND_PIECEWISE")


@pytest.mark.parametrize(
    ("log", "state"),
    [
        (CPU, "False"),
        (CUDA, "True"),
        (CUDA + "non-default args: {'async_scheduling': False}\n", "False"),
        (CUDA + "non-default args: {'async_scheduling': True}\n", "True"),
        (CUDA + "Async scheduling will be disabled because it is not supported with\n", "False"),
        (CUDA + "Async scheduling is disabled because the V1 model runner\n", "False"),
        (CUDA + "Async scheduling not supported with ngram-based and will be disabled.", "False"),
        ("no engine here", None),
    ],
    ids=["cpu", "cuda", "argument", "argument-on", "executor", "runner", "speculative", "nothing"],
)
def test_async_scheduling_as_the_log_has_it(log, state):
    assert facts(log).get("async_scheduling") == state


def test_facts_of_a_log():
    assert facts(CUDA + "Using FLASH_ATTN attention backend out of potential backends: []") == {
        "attention_backend": "FLASH_ATTN",
        "enforce_eager": "False",
        "cuda_graphs": "FULL_AND_PIECEWISE",
        "prefix_caching": "True",
        "chunked_prefill": "True",
        "device": "cuda",
        "async_scheduling": "True",
    }


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
    assert report.LEGEND in report.markdown(results)
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
