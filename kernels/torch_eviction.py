"""One eviction in plain fp32 torch, vectorised over KV heads.

The CPU path runs it, the tests of the Triton kernels compare with it, and their benchmark times it.
It works on dense tensors per head in slot order; the caller reads these from the pages and writes
the moves back.

Shapes: H KV heads, G query heads per KV head, W window, n candidates, D head size.
"""

import torch
from torch.nn.functional import pad

from vase_vllm.kernels.parameters import EvictionParameters
from vase_vllm.kernels.philox import gumbel

_LOGITS_TOGETHER = {"cpu": 1 << 17, "cuda": 1 << 24}
"""Numbers in the logits that are computed at once, by device."""


def attention_scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, smoothing: int
) -> torch.Tensor:
    """Mean attention that the window's queries pay to each candidate.

    ``a[g, j] = mean_w softmax_j(q_wg . k_j * scale)``, the softmax over the candidates only, then
    average pooling over slots (stride 1, zero padding), then the mean over the G query heads.

    >>> queries = torch.tensor([[[1.0, 0.0]]])
    >>> keys = torch.tensor([[[0.0, 1.0, 2.0], [5.0, 5.0, 5.0]]])  # three keys, in columns
    >>> attention_scores(queries, keys, scale=1.0, smoothing=1)
    tensor([[0.0900, 0.2447, 0.6652]])

    Args:
        queries: [H, W * G, D] fp32; the order of the queries does not matter.
        keys: [H, D, n] fp32, the candidates' keys with the head dimension first.
        scale: factor on the logits: ``1 / (sqrt(D) * temperature)``.
        smoothing: odd pooling width; 1 is off.

    Returns:
        [H, n] fp32.
    """
    num_kv_heads, num_queries, _ = queries.shape
    num_logits = num_queries * keys.shape[-1]
    # Always in one buffer: on a CPU as many heads at once as let it stay in the processor's cache,
    # on a GPU as many as keep it busy.
    num_together = max(1, _LOGITS_TOGETHER[queries.device.type] // num_logits)
    scores = queries.new_empty(num_kv_heads, keys.shape[-1])
    buffer = queries.new_empty(min(num_together, num_kv_heads), num_queries, keys.shape[-1])
    for start in range(0, num_kv_heads, num_together):
        heads = slice(start, start + num_together)
        logits = buffer[: len(scores[heads])]
        torch.baddbmm(logits, queries[heads], keys[heads], beta=0, alpha=scale, out=logits)
        torch.mean(torch.softmax(logits, dim=-1, out=logits), dim=1, out=scores[heads])
    # Pooling and means are linear: the mean over query heads may come before the pooling. A third
    # of the time of avg_pool1d on a CPU, and the same numbers.
    if smoothing > 1:
        padding = smoothing // 2
        scores = pad(scores, (padding, padding)).unfold(-1, smoothing, 1).sum(-1).div_(smoothing)
    return scores


def value_range(values: torch.Tensor) -> torch.Tensor:
    """``max_d v - min_d v`` of each token: [..., n, D] -> [..., n], fp32.

    >>> value_range(torch.tensor([[1.0, -2.0, 0.5], [3.0, 3.0, 3.0]]))
    tensor([3., 0.])
    """
    # In fp32, for the difference of two bf16 numbers need not be one. Two reductions take less
    # than half the time of torch.aminmax.
    values = values.float()
    return values.amax(dim=-1) - values.amin(dim=-1)


def sampling_noise(
    seed: int,
    num_candidates: int,
    eviction_index: int,
    layer_index: int,
    kv_heads: torch.Tensor,
    content_key: int,
) -> torch.Tensor:
    """Gumbel noise of one eviction of one layer: [H, n] fp32.

    The counter is (slot, eviction index, layer * 65536 + KV head, content key of the request):
    nothing in it depends on the batch, the rank or the row that the request happens to have.

    >>> noise = sampling_noise(0, 5, 0, layer_index=3, kv_heads=torch.arange(8), content_key=99)
    >>> noise.shape
    torch.Size([8, 5])
    >>> of_a_rank = sampling_noise(0, 5, 0, 3, kv_heads=torch.tensor([6, 7]), content_key=99)
    >>> torch.equal(of_a_rank, noise[6:])
    True

    Args:
        seed: 64-bit key of the generator.
        num_candidates: n.
        eviction_index: evictions that the sequence has had before.
        layer_index: in the whole model.
        kv_heads: [H] int64, indices of the KV heads in the whole, unsharded model; the noise is
            drawn where they lie.
        content_key: hash of the request's content.
    """
    device = kv_heads.device
    return gumbel(
        seed,
        torch.arange(num_candidates, device=device)[None, :],
        torch.full((), eviction_index, device=device),
        (layer_index * 65536 + kv_heads)[:, None],
        torch.full((), content_key, device=device),
    )


def vase_priority(
    scores: torch.Tensor,
    magnitudes: torch.Tensor,
    noise: torch.Tensor | None,
    sinks: int,
    protected: int,
) -> torch.Tensor:
    """Rank the candidates as VaSE does.

    The sinks and then the largest magnitudes are protected; the rest go by ``log a + noise``. With
    Gumbel noise, keeping the largest of these draws without replacement in proportion to ``a``
    (Gumbel-top-k: Kool et al., arXiv 1903.06059).

    The sink in slot 0 and the large value in slot 2 are protected:

    >>> scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    >>> magnitudes = torch.tensor([[1.0, 1.0, 9.0, 2.0]])
    >>> vase_priority(scores, magnitudes, noise=None, sinks=1, protected=2)
    tensor([[   inf, 0.2000,    inf, 0.4000]])

    Args:
        scores: [H, n] fp32, non-negative.
        magnitudes: [H, n] fp32, of the values.
        noise: [H, n] fp32, or None for the deterministic top-k.
        sinks: first slots, always protected.
        protected: candidates to protect, the sinks included.

    Returns:
        [H, n] fp32, +inf where protected.
    """
    magnitudes = magnitudes.clone()
    magnitudes[:, :sinks] = torch.inf
    priority = scores if noise is None else scores.log() + noise
    return priority.masked_fill(largest(magnitudes, protected), torch.inf)


def select_survivors(
    parameters: EvictionParameters,
    scores: torch.Tensor,
    ranges: torch.Tensor,
    noise: torch.Tensor | None,
) -> torch.Tensor:
    """Choose which candidates stay: those that :func:`vase_priority` ranks highest.

    Ties go to the lower slot.

    >>> parameters = EvictionParameters(budget=4, window=1, protected=2, sinks=1)
    >>> scores = torch.tensor([[0.1, 0.2, 0.3, 0.4]])
    >>> ranges = torch.tensor([[1.0, 1.0, 9.0, 2.0]])
    >>> select_survivors(parameters, scores, ranges, noise=None)
    tensor([[ True, False,  True,  True]])

    Args:
        parameters: of the eviction.
        scores: [H, n] fp32, non-negative.
        ranges: [H, n] fp32.
        noise: [H, n] fp32, or None for the deterministic top-k.

    Returns:
        [H, n] bool with exactly ``budget - window`` true per head.
    """
    priority = vase_priority(scores, ranges, noise, parameters.sinks, parameters.protected)
    return largest(priority, parameters.budget - parameters.window)


def largest(values: torch.Tensor, count: int) -> torch.Tensor:
    """Mask of the ``count`` largest values of each row; ties go to the lower index.

    NaN counts as -inf, so that the mask has its size whatever the numbers are. A threshold and a
    count of the ties at it take a fifth of the time of a stable sort.

    >>> largest(torch.tensor([[3, 1, 3, 3]]), count=2)
    tensor([[ True, False,  True, False]])

    Args:
        values: [H, n].
        count: at most n.

    Returns:
        [H, n] bool with exactly ``count`` true per row.
    """
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    values = values.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    threshold = values.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above, ties = values > threshold, values == threshold
    num_ties = count - above.sum(dim=-1, keepdim=True)
    return above | (ties & (ties.cumsum(dim=-1) <= num_ties))


def plan_moves(
    budget: int, window: int, keep: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which survivors fill which freed slots.

    Survivors below the budget stay where they are. The i-th survivor at or above it, the window
    included, is copied into the i-th freed slot below it, head by head: a head frees exactly as
    many slots as it needs, because ``budget`` tokens survive in all. A token at or above the budget
    that does not survive stays as well: the number of moves depends on shapes alone, and a GPU
    need not be asked for it.

    Of six candidates 0 and 5 survive, and the window, 6 and 7:

    >>> keep = torch.tensor([[True, False, False, False, False, True]])
    >>> head, source, destination = plan_moves(budget=4, window=2, keep=keep)
    >>> source, destination
    (tensor([4, 5, 6, 7]), tensor([4, 1, 2, 3]))

    Args:
        budget: tokens that survive in all.
        window: the newest of them.
        keep: [H, n] bool, the candidates that survive.

    Returns:
        (head, source slot, destination slot), each [moves] int64, sorted by head, with
        ``n + window - budget`` moves for each head.
    """
    num_heads, num_candidates = keep.shape
    slots = torch.arange(num_candidates + window, device=keep.device)
    num_moves = len(slots) - budget
    is_freed = ~keep[:, :budget]
    # Behind the freed slots there is room for all others, which nobody reads.
    place = torch.where(is_freed, is_freed.cumsum(dim=-1) - 1, num_moves)
    freed = slots.new_zeros(num_heads, num_moves + 1)
    freed.scatter_(1, place, slots[:budget].expand(num_heads, -1))
    moves = torch.cat([keep[:, budget:], keep.new_ones(num_heads, window)], dim=-1)[:, -num_moves:]
    source = slots[budget:].expand(num_heads, -1)
    target = freed.gather(1, (moves.cumsum(dim=-1) - 1).clamp_min(0))
    destination = torch.where(moves, target, source)
    head = torch.arange(num_heads, device=keep.device).repeat_interleave(num_moves)
    return head, source.flatten(), destination.flatten()
