"""One warning for each request whose priorities are NaN, whenever the device gets round to it."""

import numpy as np
import pytest
import torch

from vase_vllm.worker import nan_warnings
from vase_vllm.worker.nan_warnings import NOT_NAN, NaNWarnings


@pytest.fixture
def logged(monkeypatch):
    lines: list[str] = []
    monkeypatch.setattr(
        nan_warnings.logger, "warning", lambda text, *args: lines.append(text % args)
    )
    return lines


def test_a_launch_that_has_run_is_warned_of_at_the_next_step(logged):
    warnings = NaNWarnings("vase")
    nan_keys = torch.full((3,), NOT_NAN, dtype=torch.int32)
    warnings.watch(nan_keys, np.array([112, 128, 144]))
    nan_keys[1] = 77
    assert not logged
    warnings.poll()
    (line,) = logged
    assert "(content key 77, first eviction at position 128)" in line
    assert "policy vase" in line
    warnings.poll()
    assert len(logged) == 1


def test_a_request_is_warned_of_once(logged):
    warnings = NaNWarnings("vase")
    for keys in ([5, NOT_NAN], [5, 6], [6, 5]):
        warnings.watch(torch.tensor(keys, dtype=torch.int32), np.array([64, 64]))
        warnings.poll()
    assert len(logged) == 2


def test_nobody_waits_for_a_launch_that_still_runs(logged):
    class Event:
        done = False

        def query(self):
            return self.done

    warnings, event = NaNWarnings("vase"), Event()
    warnings._launched.append((torch.tensor([5], dtype=torch.int32), np.array([64]), event))
    warnings.watch(torch.tensor([6], dtype=torch.int32), np.array([64]))
    warnings.poll()
    assert not logged
    event.done = True
    warnings.poll()
    assert ["key 5" in logged[0], "key 6" in logged[1]] == [True, True]
