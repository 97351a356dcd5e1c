"""docs/scaling.md says what the code computes, and the fit of the experiment is right."""

import pytest

from benchmarks.predictions.scaling import predict, run
from vase_vllm.layout.schedule import EvictionSchedule
from vase_vllm.tools.plan.cost import Machine, ModelShape, Shard

SHARD = Shard(ModelShape(4, 8, 4, 64, 256, 4, 3_300_000, 13_200_000))


def test_the_document_has_the_tables_that_the_formulas_give():
    text = predict.DOCUMENT.read_text()
    assert text == predict.fill(text), "run benchmarks.predictions.scaling.predict --write"


@pytest.mark.parametrize("peak", [5e10, 1e12], ids=["some parts compute", "all parts stream"])
def test_the_fit_recovers_the_machine(peak: float):
    machine = Machine(bandwidth=1.5e10, peak=peak, overhead=8e-4)
    steps = [SHARD.step(b, n) for b in (1, 2, 4, 8) for n in (256, 1024, 4096)]
    fitted = run.fit(steps, [step.seconds(machine) for step in steps], peak)
    assert fitted.bandwidth == pytest.approx(machine.bandwidth)
    assert fitted.overhead == pytest.approx(machine.overhead)


@pytest.mark.parametrize("num_cached", [4230, 4400])
def test_break_even_is_where_the_document_says(num_cached: int):
    model = ModelShape(36, 32, 8, 128, 4096, 2, 8_190_735_360, 16_381_470_720)
    evicting = Shard(model).step(32, 4096 + 65 / 2, EvictionSchedule(4096, 64))
    full = Shard(model).step(32, num_cached)
    assert (evicting.num_bytes < full.num_bytes) == (num_cached > 4231)
