"""The simulation of a fleet: its rules, and what must hold whatever the numbers are."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.common.paths import RESULTS
from benchmarks.predictions.fleet import fleet
from benchmarks.predictions.fleet.load import Lengths, Load
from benchmarks.predictions.fleet.replica import Replica, Request, Settings, prefill
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.cost import Machine, ModelShape, Shard, num_blocks_held

FLEETS = RESULTS / "predictions" / "fleet"
SHARD = Shard(ModelShape(2, 4, 2, 32, 128, 2, 1_000_000, 2_000_000))
MACHINE = Machine(bandwidth=1e10, peak=1e13, overhead=1e-3)
SCHEDULE = EvictionSchedule(budget=128, window=32)


def settings(evicts: bool, num_blocks: int = 400, **changes: object):
    policy = {"schedule": SCHEDULE, "state_blocks": 4} if evicts else {}
    return Settings(SHARD, MACHINE, num_blocks, **policy, **changes)


def load(rate: float):
    return Load(rate, Lengths(20, 0.5, 60), Lengths(600, 0.8, 2000))


def run(evicts: bool, num_replicas: int = 2, rate: float = 15, **changes):
    clock = fleet.Clock(warmup=5, measured=20, drain=15)
    arguments = settings(evicts, **changes), load(rate), num_replicas, clock
    return fleet.simulate(*arguments, seed=3)


@pytest.mark.parametrize("evicts", [False, True], ids=["full", "vase"])
def test_same_seed_same_numbers(evicts: bool):
    assert run(evicts) == run(evicts)


@pytest.mark.parametrize("evicts", [False, True], ids=["full", "vase"])
def test_blocks_are_counted_as_the_planner_does(evicts: bool):
    replica = settings(evicts)
    prompts = np.array([1, 100, 128, 129, 700])
    first = np.array([replica.first_eviction(int(prompt)) for prompt in prompts])
    for ahead in (1, 63, 160, 161, 1000):
        ends = prompts + ahead
        expected = [
            num_blocks_held(int(end), 16, replica.schedule, replica.state_blocks, int(at))
            for end, at in zip(ends, first, strict=True)
        ]
        assert replica.blocks(ends, first).tolist() == expected


@pytest.mark.parametrize("evicts", [False, True], ids=["full", "vase"])
def test_a_lonely_request_takes_the_time_of_its_steps(evicts: bool):
    import simpy

    one = settings(evicts, quantum=1)
    environment = simpy.Environment()
    replica = Replica(environment, one)
    request = Request(arrival=0, prompt=10, output=300)
    replica.submit(request)
    environment.run()
    first = one.first_eviction(10)
    seconds = prefill(SHARD, 10).seconds(MACHINE)
    for position in range(10, 310):
        evicting = position >= first
        cached = 128 + 33 / 2 if evicting else position + 1
        seconds += SHARD.step(1, cached, one.schedule, float(evicting)).seconds(MACHINE)
    assert request.finish == pytest.approx(seconds)


def test_eviction_needs_no_preemption_where_the_full_cache_does():
    full, vase = run(evicts=False), run(evicts=True)
    assert full.num_requests == vase.num_requests
    assert full.preemptions_per_request > 0
    assert vase.preemptions_per_request == 0
    assert vase.p95 < full.p95


def test_short_answers_run_alike():
    short = Load(5, Lengths(20, 0.5, 60), Lengths(50, 0.1, 60))
    clock = fleet.Clock(warmup=5, measured=20, drain=15)
    full, vase = (
        fleet.simulate(settings(evicts), short, 1, clock, seed=0) for evicts in (False, True)
    )
    assert vase.p95 == pytest.approx(full.p95, rel=0.03)


def test_a_request_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        run(evicts=False, num_blocks=2)


@pytest.mark.parametrize("start", [1, 5, 40])
@pytest.mark.parametrize("needed", [1, 2, 7, 33])
def test_the_smallest_fleet_is_found(needed: int, start: int):
    def outcome(number: int) -> SimpleNamespace:
        return SimpleNamespace(num_replicas=number, p95=0.01 if number >= needed else 1.0)

    assert fleet.smallest_fleet(outcome, 0.05, start)[-1].num_replicas == needed


def test_a_target_below_a_step_is_refused():
    with pytest.raises(ValueError, match="target"):
        fleet.smallest_fleet(lambda number: SimpleNamespace(p95=1.0), 0.05, largest=8)


def test_lengths_have_a_long_tail():
    drawn = Lengths(1000, 0.8, 30000).draw(np.random.default_rng(0), 20000)
    assert np.median(drawn) == pytest.approx(1000, rel=0.03)
    assert drawn.mean() == pytest.approx(1000 * np.exp(0.32), rel=0.03)
    assert np.quantile(drawn, 0.99) > 6000


def test_committed_results_say_that_they_are_predictions():
    files = list(FLEETS.glob("*.json"))
    assert files
    for file in files:
        assert json.loads(file.read_text())["kind"] == "prediction"
        assert "not measured" in file.with_suffix(".md").read_text().splitlines()[0]
