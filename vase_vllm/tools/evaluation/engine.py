"""Scores sequences with the real engine, in this process."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vase_vllm import ADDITIONAL_CONFIG_KEY
from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.methods import Method
from vase_vllm.tools.evaluation.scores import Scores
from vase_vllm.tools.in_process_engine import parse_vllm_arguments, running_engine

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

OURS = {
    "max_model_len": "evaluate sets it from the lengths of the sequences",
    "max_logprobs": "evaluate sets it from --top-logprobs",
}
"""Engine arguments that a user cannot set, and why."""


def parse_engine_arguments(arguments: Sequence[str], model: str | None) -> "EngineArgs":
    """Parse vLLM's own arguments, for engines in this process.

    Args:
        arguments: those of ``vllm serve``.
        model: the model, if it is not among them.

    Raises:
        ValueError: an argument is missing, or is one that `evaluate` sets itself.
    """
    # The logits of a step's tokens are all kept for their log-probabilities: few tokens a step.
    parsed = parse_vllm_arguments(
        "evaluate",
        arguments,
        model,
        enable_prefix_caching=False,
        max_num_batched_tokens=512,
        max_num_seqs=1,
        use_tqdm_on_load=False,
        **dict.fromkeys(OURS),
    )
    # Now that vLLM's environment is set, which it reads when it is imported.
    from vllm.engine.arg_utils import EngineArgs

    for name, reason in OURS.items():
        if (value := getattr(parsed, name)) is not None:
            raise EvictionError(f"--{name.replace('_', '-')} {value}: {reason}; remove it")
    parsed.max_logprobs = EngineArgs.max_logprobs
    engine_args = EngineArgs.from_cli_args(parsed)
    if EvictionConfig.from_additional(engine_args.additional_config) is not None:
        raise EvictionError("--kv-eviction: evaluate compares --policies; remove it")
    return engine_args


class ScoringEngine:
    """An engine that scores one sequence at a time; :func:`scoring_engine` starts it."""

    def __init__(self, llm: "LLM", method: Method) -> None:
        self._llm = llm
        self._method = method

    def score(self, token_ids: Sequence[int], top_logprobs: int) -> Scores:
        """Compute a sequence as its prompt, evicting as in an output.

        Args:
            top_logprobs: how many of the most probable tokens to report beside the true one.

        Raises:
            RuntimeError: the engine did not evict as often as the schedule says.
        """
        from vllm import SamplingParams, TokensPrompt

        # prompt_logprobs must be known to the constructor: it keeps vLLM from reading a cached
        # prefix, of which there would be no log-probabilities.
        params = SamplingParams(
            temperature=0,
            max_tokens=1,
            detokenize=False,
            prompt_logprobs=top_logprobs,
            flat_logprobs=True,
        )
        before = self._num_evictions()
        prompt = TokensPrompt(prompt_token_ids=list(token_ids))
        (request,) = self._llm.generate([prompt], params, use_tqdm=False)
        if self._method.config is not None:
            due, _ = self._method.config.schedule.evictions(len(token_ids), 1)
            if (evictions := self._num_evictions() - before) != due:
                raise RuntimeError(
                    f"{self._method.name}: {evictions} evictions in a sequence of "
                    f"{len(token_ids)} tokens, which are not the {due} that were due"
                )
        return _to_scores(request.prompt_logprobs, top_logprobs)

    def _num_evictions(self) -> int:
        if self._method.config is None:
            return 0
        return self._llm.collective_rpc("get_kv_eviction_stats")[0]["evictions"]


def _to_scores(flat: Any, top_logprobs: int) -> Scores:
    """Arrays of vLLM's FlatLogprobs.

    Position 0 has none. The others have the true token first, then the top ones; where the true
    token is one of these, it is there twice.
    """
    shape = (len(flat) - 1, 1 + top_logprobs)
    token_ids = np.array(flat.token_ids, dtype=np.int32).reshape(shape)
    logprobs = np.array(flat.logprobs, dtype=np.float32).reshape(shape)
    ranks = np.array(flat.ranks, dtype=np.int32).reshape(shape)[:, 0]
    return Scores(token_ids, logprobs, ranks)


@contextmanager
def scoring_engine(
    engine_args: "EngineArgs", method: Method, max_model_len: int, top_logprobs: int
) -> Iterator[ScoringEngine]:
    """Start an engine with this method, and end it.

    Raises:
        EvictionError: the engine rejects its arguments.
    """
    additional = dict(engine_args.additional_config or {})
    if method.eviction is not None:
        additional[ADDITIONAL_CONFIG_KEY] = method.eviction
    own_args = replace(
        engine_args,
        additional_config=additional,
        max_model_len=max_model_len,
        max_logprobs=top_logprobs,
    )
    with running_engine(own_args, f"{method.name}: ") as llm:
        yield ScoringEngine(llm, method)
