"""The serving command: what it refuses, and what its options change of a suite."""

import pytest

from benchmarks.serving.run import chosen_suite, parse_arguments
from benchmarks.serving.suites import SUITES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "sweep-qwen3-8b"], "no GPU: --suite smoke"),
        (["--workloads", "none"], "--workloads: none is none of pressure, "),
        (["--policies", "vase-7"], "--policies: vase-7 is none of full, "),
        (["--minutes", "9"], "--minutes is for the suites that sweep"),
        (["--output-len", "9"], "--output-len is for the suites sweep-*"),
        (["--suite", "smoke", "--waves", "2"], "--waves is for the suites sweep-*"),
        (["--budgets", "64", "--policies", "full"], "give --budgets or --policies"),
        (["--window", "8"], "--window is of --budgets"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_refuses(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(arguments)
    assert message in capsys.readouterr().err


def test_options_of_a_sweep():
    arguments = ["--suite", "sweep-qwen3-8b", "--report-only", "--concurrency", "4"]
    arguments += ["--output-len", "8192", "--waves", "3", "--budgets", "128", "--window", "32"]
    suite = chosen_suite(parse_arguments([*arguments, "--serve-arguments=--enforce-eager"]))
    (workload,) = suite.workloads
    assert (workload.concurrency, workload.num_requests) == (4, 12)
    assert (workload.output_len, workload.max_concurrency) == (8192, 1024)
    assert workload.max_model_len == 1536 + 8192 + 64
    assert [policy.name for policy in suite.policies] == ["full", "vase-128-window-32"]
    assert suite.policies[1].schedule.window == 32
    assert suite.arguments == ("--enforce-eager",)


def test_options_of_a_sweep_leave_the_rest_of_its_workload():
    name = "sweep-qwen3-8b-small"
    (small,) = SUITES[name].workloads
    assert (small.concurrency, small.max_concurrency, small.output_len) == (128, 256, 4096)
    assert [policy.name for policy in SUITES[name].policies] == ["full", "vase-1024"]
    arguments = ["--suite", name, "--report-only", "--concurrency", "32", "--waves", "2"]
    (workload,) = chosen_suite(parse_arguments(arguments)).workloads
    assert (workload.concurrency, workload.num_requests) == (32, 64)
    same = ("max_concurrency", "input_len", "output_len", "kv_tokens", "rounds", "max_model_len")
    assert all(getattr(workload, field) == getattr(small, field) for field in same)
    # The full cache's memory is full at the first concurrency, that of eviction at no one.
    assert 128 * (512 + 4096) > small.kv_tokens > 256 * (1024 + 64 + 128)


def test_a_suite_without_options_is_that_of_the_table():
    assert chosen_suite(parse_arguments([])) == SUITES["cpu"]
