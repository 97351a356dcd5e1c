"""Where tokens stand in the text, which some policies carry from one eviction to the next."""

import torch

from vase_vllm.policies.candidates import Candidates


def token_positions(candidates: Candidates, before: torch.Tensor | None) -> torch.Tensor:
    """Position of each token: [H, n + W] fp32, of the candidates and of the window.

    Whole numbers up to 2^24 are exact in fp32.

    Args:
        before: [H, n], what this returned for the candidates at the last eviction; None at the
            first, when slots are positions.
    """
    window, num = candidates.limits.window, candidates.num
    device = candidates.queries.device
    first = candidates.position - window - num
    positions = torch.arange(first, candidates.position, dtype=torch.float32, device=device)
    positions = positions.repeat(len(candidates.queries), 1)
    if before is not None:
        positions[:, :num] = before
    return positions
