"""vLLM's server, seen from this command: the same calls as those of a peer."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import requests

from benchmarks.common import checks
from benchmarks.common.load import RunFailedError
from benchmarks.common.monitor import Monitor
from benchmarks.common.policy import Policy
from benchmarks.common.server import blocks_left, evictions_so_far, running_server
from benchmarks.peers.setting import Setting, System
from benchmarks.serving.measure import kv_memory_bytes
from vase_vllm.layout.arithmetic import cdiv
from vase_vllm.layout.query_ring import RingLayout
from vase_vllm.tools.provenance import versions
from vase_vllm.tools.server import Server

BLOCK_SIZE = 32
SAMPLE_SECONDS = 0.5
Tokens = list[list[int]]


def max_model_len(setting: Setting) -> int:
    """Of the server: a sequence, and the token that vLLM computes after a text it scores."""
    return setting.length + 1


def num_blocks(setting: Setting, policy: Policy) -> int:
    """Blocks that all requests of the largest run need at once."""
    if policy.schedule is None:
        each = cdiv(max_model_len(setting), BLOCK_SIZE)
    else:
        group_size = setting.shard().group_size
        ring = RingLayout(setting.window, group_size, BLOCK_SIZE).num_blocks
        each = checks.most_blocks(policy.schedule, ring, setting.prompt_len, BLOCK_SIZE)
    return max(setting.requests) * each


def serve_arguments(setting: Setting, policy: Policy) -> list[str]:
    """Arguments of ``vllm serve``; what is not here is vLLM's default."""
    memory = kv_memory_bytes(num_blocks(setting, policy) * BLOCK_SIZE, setting.shard(), BLOCK_SIZE)
    return [
        *("--dtype", setting.dtype, "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", str(max_model_len(setting))),
        *("--kv-cache-memory-bytes", str(memory)),
        *policy.serve_arguments(),
        *setting.serve_arguments,
    ]


class VllmServer:
    """A server that accepts requests; :func:`running_vllm` starts it.

    Attributes:
        versions: of the libraries that it runs on.
    """

    def __init__(self, server: Server, policy: Policy, setting: Setting, timeout: float) -> None:
        self.versions = versions(("vllm", "vase-vllm", "torch"))
        self._server, self._policy, self._setting = server, policy, setting
        self._timeout = timeout

    def processes(self) -> list[psutil.Process]:
        return self._server.processes()

    def generate(self, prompts: Tokens, num_tokens: int) -> tuple[Tokens, list[str]]:
        """The outputs, and what is wrong with the run that they came from.

        Raises:
            RunFailedError: the server rejected the requests, or died.
        """
        before = self._evictions()
        with Monitor(self._server, SAMPLE_SECONDS) as monitor:
            choices = self._complete(
                prompt=prompts, max_tokens=num_tokens, ignore_eos=True, return_token_ids=True
            )
        after = self._evictions()
        outputs = [choice["token_ids"] for choice in choices]
        observed = checks.Observed(
            load={
                "completed": len(outputs),
                "input_lens": [len(prompt) for prompt in prompts],
                "output_lens": [len(output) for output in outputs],
            },
            requested=[num_tokens] * len(prompts),
            stops=(),
            evictions=None if after is None or before is None else after - before,
            series=monitor.series,
            blocks_left=blocks_left(self._server),
            log=self._server.log(),
        )
        group_size = self._setting.shard().group_size
        found = checks.problems(observed, self._policy, BLOCK_SIZE, group_size)
        if (most := max(monitor.series["running"])) < len(prompts):
            found.append(f"{most:.0f} of {len(prompts)} requests ran at a time")
        return outputs, found

    def nll(self, texts: Tokens) -> list[list[float]]:
        """Negative log-likelihood in nats of the tokens after the prompt's length.

        Raises:
            RunFailedError: the server rejected the requests, or died.
        """
        start = self._setting.prompt_len
        found = []
        for text in texts:
            (choice,) = self._complete(prompt=text, max_tokens=1, prompt_logprobs=0)
            entries = zip(text[start:], choice["prompt_logprobs"][start:], strict=True)
            found.append([-entry[str(token)]["logprob"] for token, entry in entries])
        return found

    def _complete(self, **body: Any) -> list[dict[str, Any]]:
        """The choices of one call with any number of prompts, in their order."""
        body = {"model": str(self._setting.model), "temperature": 0, **body}
        url = f"{self._server.url}/v1/completions"
        try:
            response = requests.post(url, json=body, timeout=self._timeout)
            response.raise_for_status()
        except requests.RequestException as error:
            raise RunFailedError(f"{error}: {self._server.log()[-1500:]}") from None
        choices: list[dict[str, Any]] = response.json()["choices"]
        return sorted(choices, key=lambda choice: int(choice["index"]))

    def _evictions(self) -> int | None:
        """Evictions so far. The full cache's server would log an error if it were asked."""
        return None if self._policy.budget is None else evictions_so_far(self._server)


@contextmanager
def running_vllm(
    system: System, setting: Setting, timeout: float, failure_log: Path
) -> Iterator[VllmServer]:
    """Start the server, which ends with the block.

    Args:
        timeout: seconds that a call may take.
        failure_log: where its output is kept if it does not start.

    Raises:
        RunFailedError: it does not start.
    """
    policy = system.policy(setting)
    arguments = serve_arguments(setting, policy)
    with ExitStack() as stack:
        try:
            starting = running_server(setting.model, arguments, failure_log=failure_log)
            server = stack.enter_context(starting)
        except RuntimeError:
            reason = f"vllm serve did not start: {failure_log} has its log"
            raise RunFailedError(reason) from None
        yield VllmServer(server, policy, setting, timeout)
