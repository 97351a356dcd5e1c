"""What GPUs can do, from NVIDIA's data sheets, and how much of it a step is assumed to reach."""

from dataclasses import dataclass

from vase_vllm.tools.plan.cost import Machine


@dataclass(frozen=True)
class Gpu:
    """A data sheet.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second.
        peak: dense bf16 operations per second, without sparsity.
        link_bandwidth: NVLink, bytes per second in each direction.
    """

    memory: float
    bandwidth: float
    peak: float
    link_bandwidth: float

    @property
    def intensity(self) -> float:
        """Operations per byte; a step with more of them is bound by arithmetic."""
        return self.peak / self.bandwidth

    def machine(
        self,
        bandwidth_reached: float = 0.8,
        peak_reached: float = 0.6,
        overhead: float = 2e-3,
        link_latency: float = 1e-5,
    ) -> Machine:
        """The data sheet, discounted. The four defaults are assumptions, not measurements.

        Args:
            bandwidth_reached: part of the bandwidth that kernels reach.
            peak_reached: part of the peak that they reach.
            overhead: seconds of a step for scheduling, sampling and launches.
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
