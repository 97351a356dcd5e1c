"""A server that is started here is ended here, with every process that it has started."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from vase_vllm.tools.server import Server

STUBBORN = """
import signal, subprocess, sys, time
# As an engine core that its API server has left behind: it ignores SIGTERM and outlives its parent.
child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", child])
print("started", flush=True)
time.sleep(600)
"""


def stubborn_server() -> Server:
    server = Server("a-model", [])
    server.command = [sys.executable, "-c", STUBBORN]
    return server


def survivors(pids: list[int]) -> list[int]:
    return [pid for pid in pids if psutil.pid_exists(pid) and not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_nothing_survives_the_with_block():
    with stubborn_server() as server:
        server.wait_until("started")
        pids = [process.pid for process in server.processes()]
    assert len(pids) == 2
    assert not survivors(pids)


def test_a_server_shares_the_processors_with_its_clients():
    # Linux schedules by session: see where the server is started.
    with stubborn_server() as server:
        assert os.getsid(server._process.pid) == os.getsid(0)
        assert os.getpgid(server._process.pid) != os.getpgid(0)


def test_nothing_survives_a_server_that_is_stopped_while_it_starts():
    with stubborn_server() as server:
        time.sleep(0.2)
        group = server._process.pid
    assert not [p for p in psutil.process_iter() if process_group(p) == group]


def process_group(process: psutil.Process) -> int | None:
    try:
        return None if is_zombie(process.pid) else os.getpgid(process.pid)
    except ProcessLookupError:
        return None


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_survives_an_exception(error):
    pids: list[int] = []

    def fail_while_it_runs() -> None:
        with stubborn_server() as server:
            server.wait_until("started")
            pids.extend(process.pid for process in server.processes())
            raise error

    with pytest.raises(error):
        fail_while_it_runs()
    assert not survivors(pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_nothing_survives_a_signal_to_the_parent(number):
    program = f"""
        import signal, sys, time
        # Whoever runs the tests in the background has it ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        from vase_vllm.tools.server import Server
        server = Server("a-model", [])
        server.command = [sys.executable, "-c", {STUBBORN!r}]
        with server:
            server.wait_until("started")
            print(*(process.pid for process in server.processes()), flush=True)
            time.sleep(600)
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as parent:
        pids = [int(word) for word in parent.stdout.readline().split()]
        assert len(pids) == 2
        parent.send_signal(number)
        try:
            assert parent.wait(60) != 0
        finally:
            parent.kill()
    assert not survivors(pids)


def test_a_handler_of_the_caller_stays():
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    own = signal.getsignal(signal.SIGTERM)
    try:
        with stubborn_server():
            assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, handler)
    with stubborn_server():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is handler
