"""NVIDIA's data sheets of GPUs, and the share of them that a step is assumed to reach."""

from dataclasses import dataclass

from vase_vllm.tools.plan.cost import Machine


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

    def machine(
        self,
        bandwidth_reached: float = 0.8,
        peak_reached: float = 0.6,
        overhead: float = 2e-3,
        link_latency: float = 1e-5,
    ) -> Machine:
        """What a step reaches of the data sheet.

        The four defaults are assumptions, not measurements.

        Args:
            bandwidth_reached: share of the bandwidths that kernels reach.
            peak_reached: share of the peak that kernels reach.
            overhead: seconds of a step for scheduling, sampling and kernel launches.
            link_latency: seconds of a small all-reduce.
        """
        return Machine(
            bandwidth=self.bandwidth * bandwidth_reached,
            peak=self.peak * peak_reached,
            overhead=overhead,
            link_bandwidth=self.link_bandwidth * bandwidth_reached,
            link_latency=link_latency,
        )


GPUS = {
    "a100-80gb": Gpu(80e9, 2.039e12, 312e12, 300e9),
    "h100": Gpu(80e9, 3.35e12, 989e12, 450e9),
    "h200": Gpu(141e9, 4.8e12, 989e12, 450e9),
}
