"""The parameters of the policies that the fused kernel knows, as they are checked and timed."""

from dataclasses import replace

from vase_vllm.kernels.parameters import EvictionParameters


def parameters_of(budget: int) -> EvictionParameters:
    """The paper's parameters: a window of 64, a quarter of the budget protected."""
    return EvictionParameters(budget, 64, budget // 4)


def snapkv(parameters: EvictionParameters) -> EvictionParameters:
    """The policy ``snapkv``, with the same budget, window and sinks."""
    return replace(parameters, protected=parameters.sinks, sampling="greedy")


def distinct(parameters: EvictionParameters) -> EvictionParameters:
    """The policy ``distinct``, with the same budget, window and sinks."""
    return replace(
        parameters,
        protected=int(0.5 * parameters.budget),
        smoothing=1,
        sampling="greedy",
        protect_by="distinctness",
    )


def remembering(parameters: EvictionParameters) -> EvictionParameters:
    """The policy ``distinct`` with memory, with the same budget, window and sinks."""
    return replace(distinct(parameters), memory=0.9)


def divided(parameters: EvictionParameters) -> EvictionParameters:
    """The policy ``distinct`` with strata, with the same budget, window and sinks."""
    return replace(distinct(parameters), strata=4)


def unscored(parameters: EvictionParameters) -> dict[str, EvictionParameters]:
    """The policies that score no attention, with the same budget, window and sinks."""
    sinks = parameters.sinks
    return {
        "random": replace(parameters, protected=sinks, sampling="gumbel", scoring="uniform"),
        "streaming": replace(parameters, protected=sinks, sampling="greedy", scoring="age"),
    }
