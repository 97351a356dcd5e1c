"""Starting a ``vllm serve`` and asking it what is needed to judge a run."""

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import requests
from vllm.config import CUDAGraphMode
from vllm.platforms import current_platform

from vase_vllm.tools.server import Server

ERROR = re.compile(
    r"^(?!(?:\(.*?\) )?WARNING ).*(?:\bERROR\b|\bCRITICAL\b|Traceback \(most recent|CUDA error).*$",
    re.M,
)
"""A line of a server's output. vLLM logs tracebacks of optional modules as warnings."""


@contextmanager
def running_server(
    model: Path | str,
    arguments: Sequence[str],
    timeout: float = 600,
    failure_log: Path | None = None,
) -> Iterator[Server]:
    """A server that accepts requests; it is stopped at the end of the block.

    Args:
        timeout: seconds until it has to be ready.
        failure_log: where its output is kept if it does not start.

    Raises:
        RuntimeError: it does not start; the message has the end of its output.
    """
    with Server(model, arguments) as server:
        try:
            server.wait_until("Application startup complete", timeout)
        except RuntimeError:
            if failure_log is not None:
                failure_log.parent.mkdir(parents=True, exist_ok=True)
                failure_log.write_text(server.log())
            raise
        yield server


def evictions_so_far(server: Server) -> int | None:
    """The server's own count; None if it has none, as a vLLM without eviction must."""
    try:
        return server.eviction_stats()["evictions"]
    except (requests.RequestException, KeyError, TypeError):
        return None


def blocks_left(server: Server, seconds: float = 10) -> int:
    """KV cache blocks that are still in use after all requests; 0 as soon as none is.

    Args:
        seconds: that the server has to give them back.
    """
    deadline = time.monotonic() + seconds
    while (left := server.num_used_blocks()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return left


def settings_in_effect(server: Server) -> dict[str, str]:
    """What vLLM made of its defaults.

    Returns:
        ``enforce_eager``, ``cuda_graphs``, ``prefix_caching``, ``chunked_prefill`` and
        ``async_scheduling`` of its configuration, ``attention_backend`` of its log if it names one,
        and the kind of ``device`` of this machine.
    """
    url = server.url + "/server_info?config_format=json"
    config = requests.get(url, timeout=60).json()["vllm_config"]
    graphs = config["compilation_config"]["cudagraph_mode"]
    # JSON has the value of the enum's member: a number, or a list of two.
    mode = CUDAGraphMode(tuple(graphs) if isinstance(graphs, list) else graphs)
    settings = {
        "device": current_platform.device_type,
        "enforce_eager": str(config["model_config"]["enforce_eager"]),
        "cuda_graphs": mode.name,
        "prefix_caching": str(config["cache_config"]["enable_prefix_caching"]),
        "chunked_prefill": str(config["scheduler_config"]["enable_chunked_prefill"]),
        "async_scheduling": str(config["scheduler_config"]["async_scheduling"]),
    }
    if backend := re.search(r"Using (\w+) (?:attention )?backend", server.log()):
        settings["attention_backend"] = backend[1]
    return settings
