"""CUDA graphs on a CPU: what a capture records runs again, with the very same arguments.

A CUDA graph keeps the kernels that were launched while it was captured, with the addresses and
numbers that they were given; a replay runs no Python. Here the kernels are torch's operators and
Triton's launches. An operator's results stay where they were at the capture, as in a graph's own
pool. vLLM's own code captures, chooses a graph for a step, pads the step and replays.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

_launch = InterpretedFunction.run


class RecordedGraph:
    """In the place of ``torch.cuda.CUDAGraph``.

    Attributes:
        kernels: names of the Triton kernels that it holds, in order.
        num_replays: how often it ran.
    """

    capturing: RecordedGraph | None = None

    def __init__(self) -> None:
        self.kernels: list[str] = []
        self.num_replays = 0
        self._calls: list[Callable[[], None]] = []
        self._operators = _Operators(self._calls)

    def capture_begin(self, *_: Any, **__: Any) -> None:
        assert RecordedGraph.capturing is None
        RecordedGraph.capturing = self
        self._operators.__enter__()

    def capture_end(self) -> None:
        self._operators.__exit__(None, None, None)
        RecordedGraph.capturing = None

    def replay(self) -> None:
        self.num_replays += 1
        for call in self._calls:
            call()

    def launched(self, kernel: InterpretedFunction, run: Callable[[], None]) -> None:
        """A Triton kernel is launched during the capture."""
        self.kernels.append(kernel.__name__)
        self._calls.append(run)


class _Operators(TorchDispatchMode):
    """Records torch's operators."""

    def __init__(self, calls: list[Callable[[], None]]) -> None:
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        # A graph that is captured cannot wait for a number; of an operator in Python it would
        # hold the kernels and not the Python.
        assert operator is not torch.ops.aten._local_scalar_dense.default, "waits for the device"
        assert operator.namespace != "vllm", f"{operator} is written in Python"
        call = partial(operator, *args, **(kwargs or {}))
        results = call()
        self._calls.append(partial(_run_again, call, tree_leaves(results)))
        return results


def _run_again(call: Callable[[], Any], results: list[Any]) -> None:
    """Run an operator, and put its results where they were at the capture."""
    for result, again in zip(results, tree_leaves(call()), strict=True):
        # A view, and a tensor that was changed in place, is there already.
        if isinstance(result, torch.Tensor) and result.data_ptr() != again.data_ptr():
            result.copy_(again)


def _recorded_launch(self: InterpretedFunction, *args: Any, **kwargs: Any) -> None:
    graph = RecordedGraph.capturing
    if graph is not None:
        graph.launched(self, partial(_launch, self, *args, **kwargs))
    # What the interpreter does with torch is no operator of the model.
    with _disable_current_modes():
        _launch(self, *args, **kwargs)


@contextmanager
def _captured(graph: RecordedGraph, *_: Any, **__: Any):
    """In the place of ``torch.cuda.graph``."""
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


def install() -> None:
    """Let vLLM's model runner V2 capture and replay graphs in this process, on a CPU.

    Needs VLLM_USE_BREAKABLE_CUDAGRAPH=1 for piecewise graphs: vLLM's others come from its compiler.
    """
    from vllm.compilation import breakable_cudagraph
    from vllm.platforms.cpu import CpuPlatform
    from vllm.v1.worker.cpu_worker import CPUWorker
    from vllm.v1.worker.workspace import init_workspace_manager

    InterpretedFunction.run = _recorded_launch
    torch.cuda.CUDAGraph = RecordedGraph
    torch.cuda.graph = _captured
    # Its operator is not in a CPU's build, and there is no pool to give back memory to.
    breakable_cudagraph.weak_ref_tensor = lambda tensor: tensor
    breakable_cudagraph.weak_ref_tensors = lambda tensors: tensors
    CpuPlatform.graph_pool_handle = classmethod(lambda cls: (0, 0))
    CpuPlatform.support_static_graph_mode = classmethod(lambda cls: True)
    # Attention as plain Python inside of the model, whose kernels a graph can hold one by one.
    CpuPlatform.opaque_attention_op = classmethod(lambda cls: False)

    update_config, warm_up = CpuPlatform.check_and_update_config, CPUWorker.compile_or_warm_up_model

    def keep_capture_sizes(cls: Any, vllm_config: Any) -> None:
        sizes = vllm_config.compilation_config.cudagraph_capture_sizes
        update_config(vllm_config)
        vllm_config.compilation_config.cudagraph_capture_sizes = sizes

    def warm_up_and_capture(self: Any) -> Any:
        times = warm_up(self)
        # As the GPU's worker does, which a capture asks for.
        init_workspace_manager(self.device)
        self.model_runner.capture_model()
        return times

    CpuPlatform.check_and_update_config = classmethod(keep_capture_sizes)
    CPUWorker.compile_or_warm_up_model = warm_up_and_capture
