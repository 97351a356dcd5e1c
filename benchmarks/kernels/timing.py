"""How long something takes on the device: a CUDA graph is timed, not the launches from Python."""

from collections.abc import Callable
from typing import Any

import torch
import triton

from benchmarks.kernels import baselines
from benchmarks.kernels.workload import Shape
from vase_vllm.kernels.checks import interpreted

MEMORY_SHARE = 0.85
"""Share of the free memory that a measurement may fill."""
BASELINES = ("authors", "authors, compiled", "R-KV's rule")


def milliseconds(function: Callable[[], Any]) -> float:
    """Median time of a call with a cold L2, replayed from a CUDA graph.

    The host of a small kernel takes longer to launch it than the device to run it. Under the
    interpreter it is one call and no number.

    Args:
        function: asks the device for nothing, so that it can be captured.
    """
    function()  # compiles
    if interpreted():
        return float("nan")
    torch.cuda.synchronize()
    # What the call has freed; the graph has memory of its own.
    torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return triton.testing.do_bench(graph.replay, warmup=50, rep=300, return_mode="median")


def machine_rates(device: torch.device) -> dict[str, float]:
    """Bytes per second of a copy, read and written, and FLOP per second of a bf16 matmul.

    The copy is an elementwise kernel that adds to each number: ``copy_`` in a CUDA graph is a node
    that the driver carries out, and reached less of an H200's bandwidth than kernels do.
    """
    num_elements, order = (2**10, 64) if interpreted() else (2**28, 8192)
    source = torch.zeros(num_elements, device=device)
    target = torch.empty_like(source)
    num_bytes = source.nbytes + target.nbytes
    copied = num_bytes / milliseconds(lambda: torch.add(source, 1, out=target)) * 1e3
    matrix = torch.randn(order, order, device=device, dtype=torch.bfloat16)
    multiplied = 2 * order**3 / milliseconds(lambda: matrix @ matrix) * 1e3
    return {"copy bytes/s": copied, "matmul flop/s": multiplied}


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether so many more bytes fit on the device."""
    if interpreted():
        return True
    torch.cuda.empty_cache()
    return num_bytes <= MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]


def time_baselines(
    shape: Shape, device: torch.device, compiled: bool
) -> dict[str, float | str | None]:
    """Milliseconds of each baseline over all layers.

    Args:
        compiled: whether the method that torch compiles, which takes a while, is timed as well.

    Returns:
        None where memory does not suffice, and the reason where a baseline fails: its failure must
        not cost the numbers of the others.
    """
    names = [name for name in BASELINES if compiled or name != "authors, compiled"]
    batch, heads, rows = shape.num_due, shape.num_kv_heads, shape.num_query_rows
    per_layer = shape.cache_bytes // shape.num_layers
    logits = batch * heads * rows * shape.num_candidates * 4
    # Enough layers that none is found in L2 again; each is then used for several.
    num_buffers = max(1, min(shape.num_layers, 2**28 // per_layer))
    if not fits(num_buffers * per_layer + 2 * per_layer + 4 * logits, device):
        return dict.fromkeys(names)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(size, device=device, dtype=shape.dtype)

    sizes = (batch, heads, shape.num_cached, shape.head_size)
    buffers = [(randn(*sizes), randn(*sizes)) for _ in range(num_buffers)]
    queries = randn(batch, heads, rows, shape.head_size)
    authors = baselines.authors_eviction(shape.parameters)
    # Shapes before this one would count towards the most that torch compiles a function for.
    torch._dynamo.reset()
    methods = {
        "authors": authors,
        "authors, compiled": torch.compile(
            authors, backend="eager" if interpreted() else "inductor"
        ),
        "R-KV's rule": baselines.rkv_eviction(shape.parameters),
    }

    def all_layers(evict: baselines.Eviction) -> None:
        for layer in range(shape.num_layers):
            evict(*buffers[layer % num_buffers], queries)

    times: dict[str, float | str | None] = {}
    for name in names:
        try:
            times[name] = milliseconds(lambda evict=methods[name]: all_layers(evict))
        except Exception as error:
            times[name] = str(error).splitlines()[0][:120]
    return times
