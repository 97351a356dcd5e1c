"""The schedule of VaSE's authors, with a counter: what the closed form must equal."""

from collections.abc import Iterator


def play(
    budget: int, window: int, num_prompt: int, num_tokens: int
) -> Iterator[tuple[int, int, int | None]]:
    """Evict after each decode step that makes the cached length T + k * W.

    Yields:
        A position, its slot, and the tokens cached before an eviction that precedes it, or None.
    """
    cached = 0
    for position in range(num_tokens):
        evicted_at = None
        decoded = position > num_prompt
        if decoded and cached > budget and (cached - budget) % window == 0:
            evicted_at, cached = cached, budget
        yield position, cached, evicted_at
        cached += 1
