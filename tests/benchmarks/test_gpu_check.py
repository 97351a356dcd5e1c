"""The first checks on a GPU: order, verdicts, limits, going on, and no GPU; with harmless items."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.common.clock import Clock
from benchmarks.common.exit_codes import OUT_OF_TIME, SKIPPED
from benchmarks.common.paths import ROOT
from benchmarks.common.results import Rows
from benchmarks.gpu_check import items, run, runner
from benchmarks.gpu_check.items import ITEMS, Item
from benchmarks.gpu_check.runner import FAILED, LEFT_OUT, PASSED, Outcome, reason_of, run_all

ENDLESS = Clock(None, 0.0)
HEADER = {"device": "a GPU", "python": "3", "versions": {"torch": "2"}}


def python(text):
    """A command that runs some Python."""
    return lambda minutes, output: [sys.executable, "-c", text]


def item(name, text, most_minutes=1.0, **more):
    return Item(name, python(text), most_minutes, least_minutes=0.0, **more)


@pytest.fixture
def results(tmp_path):
    return Rows(tmp_path / "check.json", HEADER)


def test_items_run_in_order_and_each_has_a_verdict(results, tmp_path):
    log = tmp_path / "order"
    note = f"open({str(log)!r}, 'a').write"
    chosen = [
        item("good", f"{note}('1')"),
        item("bad", f"{note}('2'); raise ValueError('the reason')"),
        item("absent", f"{note}('3'); print('not for this GPU'); raise SystemExit({SKIPPED})"),
        item("missing", f"{note}('!')", modules=("os", "no_such_module")),
        item("last", f"{note}('4'); print('OUT OF TIME (x)'); raise SystemExit({OUT_OF_TIME})"),
    ]
    said = []
    outcomes = run_all(chosen, results, ENDLESS, "sources", said.append)
    assert log.read_text() == "1234"
    assert [(name, outcome.verdict, outcome.reason) for name, outcome in outcomes.items()] == [
        ("good", PASSED, ""),
        ("bad", FAILED, "ValueError: the reason"),
        ("absent", LEFT_OUT, "not for this GPU"),
        ("missing", LEFT_OUT, "no_such_module is not installed"),
        ("last", FAILED, "OUT OF TIME (x)"),
    ]
    stored = json.loads(results.path.read_text())
    assert [(row["name"], row["verdict"]) for row in stored["rows"]] == [
        (name, outcome.verdict) for name, outcome in outcomes.items()
    ]
    assert all(row["date"] and row["source"] == "sources" for row in stored["rows"])
    assert sys.executable in stored["rows"][0]["command"]
    assert "the reason" in (tmp_path / "logs" / "bad.log").read_text()
    assert any(re.match("bad: failed after .*: ValueError: the reason", line) for line in said)


def test_what_has_passed_with_the_same_sources_is_not_run_again(results, tmp_path):
    log = tmp_path / "runs"
    broken = tmp_path / "broken"
    broken.touch()
    one = item("one", f"open({str(log)!r}, 'a').write('1')")
    note = f"open({str(log)!r}, 'a').write('2')"
    two = item("two", f"import os; {note}; raise SystemExit(os.path.exists({str(broken)!r}))")
    assert run_all([one, two], results, ENDLESS, "sources")["two"].verdict == FAILED
    broken.unlink()
    again = Rows(results.path, HEADER)
    outcomes = run_all([one, two], again, ENDLESS, "sources")
    assert [outcome.verdict for outcome in outcomes.values()] == [PASSED, PASSED]
    assert log.read_text() == "122"
    assert len(again.content["rows"]) == 2
    run_all([one, two], again, ENDLESS, "changed")
    assert log.read_text() == "12212"


def test_an_item_that_takes_too_long_is_ended_with_what_it_started(results, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "GRACE_SECONDS", 1)
    child = tmp_path / "child"
    text = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open({str(child)!r}, "w").write(str(started.pid))
time.sleep(600)
"""
    begin = time.monotonic()
    (outcome,) = run_all([item("slow", text, 0.05)], results, ENDLESS, "sources").values()
    assert time.monotonic() - begin < 30
    assert (outcome.verdict, outcome.reason) == (FAILED, "not done after 3 s")
    deadline = time.monotonic() + 10
    while runs(int(child.read_text())) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not runs(int(child.read_text()))


def runs(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_an_item_that_is_told_to_end_may_end_what_it_has(results, tmp_path):
    ended = tmp_path / "ended"
    text = f"""
import signal, sys, time
def end(*_):
    open({str(ended)!r}, "w").write("yes")
    sys.exit(1)
signal.signal(signal.SIGTERM, end)
time.sleep(600)
"""
    (outcome,) = run_all([item("slow", text, 0.03)], results, ENDLESS, "sources").values()
    assert outcome.verdict == FAILED
    assert ended.read_text() == "yes"


def test_the_total_limit_leaves_out_what_does_not_fit(results):
    chosen = [item("short", "pass"), Item("long", python("pass"), 8, least_minutes=3)]
    # Two minutes, of which an item may need the grace to end.
    outcomes = run_all(chosen, results, Clock(2, time.monotonic()), "sources")
    assert outcomes["short"].verdict == PASSED
    assert outcomes["long"].verdict == LEFT_OUT
    assert re.fullmatch(r"no time: 1\d\d s are left, 225 s are needed", outcomes["long"].reason)
    # With more time it is run.
    outcomes = run_all(chosen, results, ENDLESS, "sources")
    assert outcomes["long"].verdict == PASSED


def test_checks_run_side_by_side_and_what_times_something_runs_alone(results, tmp_path):
    def meets(name, *others):
        """Passes once all the others have begun as well."""
        return item(
            name,
            f"""
import pathlib, time
here = pathlib.Path({str(tmp_path)!r})
(here / {name!r}).touch()
while not all((here / other).exists() for other in {others!r}):
    time.sleep(0.01)
""",
            most_minutes=0.5,
        )

    def sees(name, expected):
        """Passes if exactly these have begun, and ended."""
        seen = f"set(os.listdir({str(tmp_path)!r}))"
        return item(name, f"import os; raise SystemExit({seen} != {expected!r})", alone=True)

    known = {"logs", "check.json"}
    chosen = [
        meets("a", "b"),
        meets("b", "a"),
        sees("timing", {"a", "b", *known}),
        meets("c"),
        sees("last", {"a", "b", "c", *known}),
    ]
    outcomes = run_all(chosen, results, ENDLESS, "sources", jobs=2)
    assert {name: outcome.verdict for name, outcome in outcomes.items()} == dict.fromkeys(
        ("a", "b", "timing", "c", "last"), PASSED
    )
    assert list(outcomes) == ["a", "b", "timing", "c", "last"]


def test_an_item_with_a_clock_of_its_own_ends_before_the_limit(results):
    given = []

    def command(minutes, output):
        given.append(minutes)
        return [sys.executable, "-c", "pass"]

    chosen = [Item("resumed", items.resumed(command), 8, 1)]
    run_all(chosen, results, Clock(5, time.monotonic()), "sources")
    (minutes,) = given
    in_all = 5 - (runner.GRACE_SECONDS + runner.SIGN_OFF_SECONDS) / 60
    assert in_all - 0.1 < minutes <= in_all
    assert (
        f"--minutes {minutes:.2f} --output {results.path.parent}"
        in (results.content["rows"][0]["command"])
    )


def test_the_reason_is_the_last_error_or_the_last_line():
    output = "Traceback\nvllm.Error: wrong\n  [W123] destroy_process_group() was not called\n\n"
    assert reason_of(output, FAILED) == "vllm.Error: wrong"
    assert reason_of("one\ntwo\n", FAILED) == "two"
    assert reason_of("FAILED: x\nnot here\n", LEFT_OUT) == "not here"
    assert reason_of("", FAILED) == "it printed nothing"
    assert len(reason_of("x" * 10_000, FAILED)) == runner.MOST_REASON


def test_the_commands_of_all_items_exist():
    names = [entry.name for entry in ITEMS]
    assert len(set(names)) == len(names)
    assert names[:3] == ["device", "kernels-compile", "kernels-exact"]
    for entry in ITEMS:
        command = entry.command(1.0, Path("results"))
        path = f"{command[2].replace('.', '/')}.py" if command[1] == "-m" else command[1]
        assert (ROOT / path).is_file()
        assert entry.least_minutes < entry.most_minutes


def test_the_page_has_the_verdicts_of_these_sources(results):
    results.put({"name": "one", "source": "old"}, {"verdict": PASSED})
    outcome = Outcome(FAILED, "a | b", 12.3, "python")
    row = {"date": "2026-01-01", **vars(outcome)}
    results.put({"name": "two", "source": "new"}, row)
    page = run.page({**results.content, "command": "python -m x"}, "new")
    assert "| two | failed | a / b | 2026-01-01 | 12 |" in page
    assert "one" not in page
    assert "Python 3, torch 2" in page


def test_without_a_gpu_it_says_so_in_one_line():
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_check.run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("no GPU: torch")


@pytest.mark.parametrize(("verdict", "code"), [(PASSED, 0), (LEFT_OUT, 0), (FAILED, 1)])
def test_the_exit_code_says_whether_an_item_failed(verdict, code, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "device_name", lambda: "A GPU")
    code_of = {PASSED: 0, LEFT_OUT: SKIPPED, FAILED: 1}[verdict]
    chosen = item("device", f"print('why'); raise SystemExit({code_of})")
    monkeypatch.setattr(run, "ITEMS", (chosen,))
    monkeypatch.setattr(sys, "argv", ["run", "--items", "device", "--output", str(tmp_path)])
    assert run.main() == code
    reason = "" if verdict == PASSED else "why"
    assert f"| device | {verdict} | {reason} |" in (tmp_path / "check-a-gpu.md").read_text()
    # A file of other versions is not gone on with.
    path = tmp_path / "check-a-gpu.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"python": "2.7"}))
    assert run.main() == 1
    assert "choose another --output" in capsys.readouterr().out


def test_agreement_ends_at_a_request_s_first_difference():
    # It imports vLLM, which the other tests here do without.
    from benchmarks.gpu_check.engine import agreement

    assert agreement([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]]) == 6 / 8
    assert agreement([[1, 2]], [[3, 2]]) == 0
