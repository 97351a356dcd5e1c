"""The attention that tokens have received, of which some policies remember what came before."""

import torch

from vase_vllm.policies.candidates import Candidates


def received_attention(candidates: Candidates, temperature: float = 1.0) -> torch.Tensor:
    """Attention that the window's queries have paid to each token, summed.

    ``a[j] = sum over w, g of softmax_j(q_wg . k_j * scale / temperature)`` over all tokens that the
    sequence held then: the candidates, and those of the window up to the query's own.

    Returns:
        [H, n + W] fp32: of the candidates in slot order, and of the window in order of position.
    """
    window, device = candidates.limits.window, candidates.queries.device
    keys = torch.cat([candidates.keys, candidates.window_keys], dim=-1)
    # The query at position p is ring entry p mod W: rolled, they come in order of position.
    queries = candidates.queries.unflatten(1, (window, -1)).roll(-candidates.position % window, 1)
    age = torch.arange(window, device=device)
    is_later = (age[None, :] > age[:, None])[:, None]
    scale = candidates.scale / temperature
    received = queries.new_empty(len(keys), keys.shape[-1])
    # Head by head in one buffer, which is written in place; all queries see all candidates.
    logits = queries.new_empty(*queries.shape[1:3], keys.shape[-1])
    by_query = logits.flatten(0, 1)
    for of_head, to, total in zip(queries.flatten(1, 2), keys, received, strict=True):
        torch.addmm(by_query, of_head, to, beta=0, alpha=scale, out=by_query)
        logits[..., -window:].masked_fill_(is_later, -torch.inf)
        torch.sum(torch.softmax(by_query, dim=-1, out=by_query), dim=0, out=total)
    return received


def mean_received_attention(
    candidates: Candidates, before: torch.Tensor | None, memory: float, temperature: float = 1.0
) -> torch.Tensor:
    """Attention received since a token came, as a sum that fades, and the queries that it is of.

    At every eviction ``memory`` is left of both. Their quotient is a mean over queries, in which
    those of the last window count most.

    Args:
        before: [H, 2, n] fp32, what this returned at the last eviction; None at the first.
        memory: from 0, the last window alone, to 1, all queries alike.

    Returns:
        [H, 2, n + W] fp32, the sum and the number of queries.
    """
    window, num = candidates.limits.window, candidates.num
    received = received_attention(candidates, temperature)
    asked = torch.full_like(received, window)
    # The first token of the window has been seen by all its queries, the last one by its own.
    asked[:, num:] = torch.arange(window, 0, -1, device=asked.device)
    after = torch.stack([received, asked], dim=1)
    if before is not None:
        after[..., :num] += memory * before
    return after
