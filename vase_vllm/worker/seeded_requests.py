"""Generators of seeded requests on a CPU, where vLLM cannot take a draw back.

Model runner V1 samples a token for every row of a step, also for a request whose prompt, or whose
recomputed output, goes on in the next step. There it drops the token and takes the draw back: it
sets the generator's offset back by 4, which is how far a CUDA generator has come. A CPU generator
has no offset, and the worker dies. Under eviction a preempted request recomputes its output in many
steps, so this would happen to every seeded request that is preempted.
"""

from typing import Any

import numpy as np
import torch


class RewindableGenerator(torch.Generator):
    """A CPU generator whose last draws can be taken back."""

    def remember(self) -> None:
        """Note where it is, before a token is drawn."""
        self._before = self.get_state()

    def get_offset(self) -> int:
        """For vLLM to subtract from; a CPU generator does not count."""
        return 0

    def set_offset(self, offset: int) -> torch.Generator:
        """Go back to where it was before the token was drawn."""
        return self.set_state(self._before)


def prepare_to_rewind(model_runner: Any) -> None:
    """Before a step's tokens are sampled: let the generators of dropped tokens go back to here.

    Args:
        model_runner: vLLM's V1, on a CPU.
    """
    batch = model_runner.input_batch
    if not batch.generators:
        # As in nearly every step.
        return
    dropped = np.flatnonzero(model_runner.discard_request_mask.np[: batch.num_reqs])
    for index in dropped.tolist():
        generator = batch.generators.get(index)
        if generator is None:
            continue
        if not isinstance(generator, RewindableGenerator):
            own = RewindableGenerator()
            own.set_state(generator.get_state())
            # The request is in the batch only while it runs, and keeps its generator beside it.
            model_runner.requests[batch.req_ids[index]].generator = own
            batch.generators[index] = generator = own
        generator.remember()
