"""Compiles the kernels before the first request, and says how long that took.

Triton compiles a kernel at its first launch, and again for arguments of another kind: another
dtype or constant, an address or a number that is divisible by 16 where it was not before, a number
that is 1. A step of one dummy token launches every kernel with the tensors that requests will use.
What varies between steps beside those is not specialised (``do_not_specialize`` in ``kernels/``).
"""

from typing import Any

from triton import knobs
from vllm.config import CUDAGraphMode
from vllm.logger import init_logger

logger = init_logger("vllm.vase_vllm")

_KERNELS = "vase_vllm.kernels."


class KernelWarmUp:
    """Counts what Triton compiles of our kernels from now on until :meth:`run` has compiled all.

    Steps of vLLM's own, such as those that measure memory, may compile some of them before.
    """

    def __init__(self) -> None:
        self.num_compiled, self.num_loaded, self.seconds = 0, 0, 0.0
        self._others = knobs.compilation.listener
        knobs.compilation.listener = self._listen

    def run(self, runner: Any) -> None:
        """Compile whatever is not compiled yet, in a step that evicts nothing and stores nothing.

        vLLM captures CUDA graphs and begins to complain of compilations after this.

        Args:
            runner: vLLM's model runner, V1 or V2, with its KV cache.
        """
        try:
            runner._dummy_run(
                1, cudagraph_runtime_mode=CUDAGraphMode.NONE, force_attention=True, skip_eplb=True
            )
        finally:
            knobs.compilation.listener = self._others
        logger.info(
            "KV eviction: %d kernels compiled in %.2f s, and %d found in Triton's cache.",
            self.num_compiled,
            self.seconds,
            self.num_loaded,
        )

    def _listen(self, *, src: Any, times: Any, cache_hit: bool, **others: Any) -> None:
        """Triton has compiled a kernel, or found it in its cache on the disk."""
        if self._others is not None:
            self._others(src=src, times=times, cache_hit=cache_hit, **others)
        if not getattr(getattr(src, "fn", None), "__module__", "").startswith(_KERNELS):
            return
        if cache_hit:
            self.num_loaded += 1
        else:
            self.num_compiled += 1
            self.seconds += times.total * 1e-6
