"""The start-up line about the kernels, with real compilations for a GPU that is not there."""

import pytest
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from vllm.config import CUDAGraphMode

from benchmarks.kernels.shipped import ARCHITECTURES, QWEN3_8B, shipped_launches, source_of
from vase_vllm.kernels.checks import interpreted
from vase_vllm.kernels.remap import remap_sequences
from vase_vllm.worker import warm_up
from vase_vllm.worker.warm_up import KernelWarmUp


def of_others(number):
    """A kernel that is not ours."""


class Runner:
    """Compiles in its dummy step."""

    def __init__(self, *sources):
        self.sources = sources

    def _dummy_run(self, num_tokens, **options):
        self.called_with = num_tokens, options
        for source, given in self.sources:
            triton.compile(source, target=GPUTarget("cuda", 90, 32), options=given)


@pytest.fixture
def remapping(tmp_path, monkeypatch):
    """What compiles our smallest kernel, and an empty cache."""
    if interpreted():
        pytest.skip(
            "tests/kernels has chosen the interpreter for this process: run this file alone"
        )
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launches = shipped_launches(QWEN3_8B, ARCHITECTURES[90])
    (launch,) = (launch for launch in launches if launch.kernel is remap_sequences)
    return source_of(launch)


def test_ours_are_counted_and_timed_and_others_are_not(remapping, monkeypatch):
    lines, heard = [], []
    monkeypatch.setattr(warm_up.logger, "info", lambda line, *values: lines.append(line % values))
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: heard.append(event))
    before = knobs.compilation.listener
    other = ASTSource(JITFunction(of_others), {"number": "i32"}), {}
    kernels = KernelWarmUp()
    kernels.run(runner := Runner(remapping, other, remapping))
    assert runner.called_with[0] == 1
    assert runner.called_with[1]["force_attention"]
    assert runner.called_with[1]["cudagraph_runtime_mode"] is CUDAGraphMode.NONE
    assert (kernels.num_compiled, kernels.num_loaded) == (1, 1)
    compiled = next(event["times"] for event in heard if not event["cache_hit"])
    assert 0 < kernels.seconds == pytest.approx(compiled.total * 1e-6)
    (line,) = lines
    assert line.startswith(f"KV eviction: 1 kernels compiled in {kernels.seconds:.2f} s, and 1 fou")
    assert knobs.compilation.listener is before
    assert len(heard) == 3, "whoever listened before hears all"


def test_what_vllm_compiles_before_counts_and_what_it_compiles_after_does_not(remapping):
    kernels = KernelWarmUp()
    vllm = Runner(remapping)
    vllm._dummy_run(8)
    kernels.run(Runner())
    vllm._dummy_run(8)
    assert (kernels.num_compiled, kernels.num_loaded) == (1, 0)
