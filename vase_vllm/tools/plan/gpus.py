"""NVIDIA's data sheets of GPUs, and the share of them that a step is assumed to reach."""

from dataclasses import dataclass

from vase_vllm.tools.plan.cost import Machine

BANDWIDTH_REACHED = 0.8
"""Share of the bandwidths that kernels are assumed to reach; as the next three, not measured."""
PEAK_REACHED = 0.6
"""Share of the peak that kernels are assumed to reach."""
OVERHEAD = 2e-3
"""Seconds of a step for scheduling, sampling and kernel launches."""
LINK_LATENCY = 1e-5
"""Seconds of a small all-reduce."""


@dataclass(frozen=True)
class Gpu:
    """The data sheet of a GPU.

    Attributes:
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        peak: dense bf16 operations per second, without sparsity.
        link_bandwidth: of NVLink, bytes per second in each direction.
    """

    memory: float
    bandwidth: float
    peak: float
    link_bandwidth: float

    @property
    def intensity(self) -> float:
        """Operations per byte; a step that needs more of them is bound by arithmetic."""
        return self.peak / self.bandwidth

    @property
    def machine(self) -> Machine:
        """What a step is assumed to reach of the data sheet."""
        return Machine(
            bandwidth=self.bandwidth * BANDWIDTH_REACHED,
            peak=self.peak * PEAK_REACHED,
            overhead=OVERHEAD,
            link_bandwidth=self.link_bandwidth * BANDWIDTH_REACHED,
            link_latency=LINK_LATENCY,
        )


GPUS = {
    "a100-80gb": Gpu(80e9, 2.039e12, 312e12, 300e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, 450e9),
}
