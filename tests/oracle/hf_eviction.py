"""Greedy decoding of a Hugging Face model with eviction over a contiguous cache.

Slow and plain: float32, CPU, one sequence, the model's own modules called layer by layer. A layer's
keys are one tensor, [KV heads, length, D], in order of position, and so are its values. An eviction
gathers the survivors of every KV head; their keys keep the rotation of their true positions.

An eviction is due right after a decode step (never a dense prefill) that leaves the cached length
above the budget T by a multiple of the window W. It runs just before the next step, at whose
position it is logged; a step that never comes evicts nothing. A bounded prefill runs in chunks that
end where evictions are due.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from .cache import LayerCache
from .selection import (
    Candidates,
    Margins,
    Selector,
    Settings,
    attention_scores,
    sampling_selector,
    select_greedy,
    selection_margins,
    value_ranges,
)

MODEL_TYPES = ("llama", "qwen2", "qwen3")


@dataclass(frozen=True)
class HeadEviction:
    """One eviction of one KV head: true positions, ascending, and how clear the choice was.

    Attributes:
        before: Positions held before.
        after: Positions held after; as many as the budget.
        range_margin: Relative gap between the last protected value range and the next one.
        score_margin: Relative gap between the last score kept and the next one, were it greedy.
            Another policy than VaSE has its own magnitudes and scores, see `Margins`.
    """

    before: tuple[int, ...]
    after: tuple[int, ...]
    range_margin: float
    score_margin: float


@dataclass(frozen=True)
class Eviction:
    """One eviction of a sequence.

    Attributes:
        position: Position of the token whose step came next.
        heads: What happened, by (layer, KV head).
    """

    position: int
    heads: dict[tuple[int, int], HeadEviction]

    @property
    def margin(self) -> float:
        """The smallest margin of any cut of any head: 0 is a tie."""
        return min(min(h.range_margin, h.score_margin) for h in self.heads.values())


@dataclass(frozen=True)
class OracleResult:
    """What `generate_with_eviction` returns.

    Attributes:
        token_ids: The new tokens.
        runner_up_ids: At each step, the token with the second largest logit.
        top2_gaps: At each step, the largest logit less the second largest: small is a near-tie.
        evictions: All evictions, in order.
    """

    token_ids: list[int]
    runner_up_ids: list[int]
    top2_gaps: list[float]
    evictions: list[Eviction]

    @property
    def margin(self) -> float:
        """The smallest margin of all evictions, +inf if there was none.

        Compare with an implementation token for token only where this and `min(top2_gaps)` are well
        above rounding (1e-5, say): elsewhere a correct one may choose otherwise.
        """
        return min((eviction.margin for eviction in self.evictions), default=float("inf"))


class EvictingDecoder:
    """Step by step use: `prefill` once, then `step` with every next token, forced or sampled.

    Args:
        model: A causal LM of one of `MODEL_TYPES`, float32, on the CPU, full attention.
        settings: What the evictions are told.
        sampling: "greedy" keeps the largest scores, "gumbel" draws (sequentially, see
            `draw_without_replacement`); the draws go by layer, then by KV head. A callable chooses
            by itself, to replay or to judge the choices of another implementation.
        generator: Source of the draws of "gumbel"; torch's default one if None.
        margins: How clear a choice is, in the log; a policy's own goes with its selector.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: Settings,
        sampling: str | Selector = "greedy",
        generator: torch.Generator | None = None,
        margins: Margins = selection_margins,
    ) -> None:
        _check_model(model)
        selectors = {"greedy": select_greedy, "gumbel": sampling_selector(generator)}
        if isinstance(sampling, str) and sampling not in selectors:
            raise ValueError(f"sampling must be one of {list(selectors)}, got {sampling!r}")
        self.model = model
        self.settings = settings
        self.select = selectors[sampling] if isinstance(sampling, str) else sampling
        self.margins = margins
        self.evictions: list[Eviction] = []
        self.next_position = 0
        self._prompt_length = 0
        self._caches = [LayerCache.empty(layer.self_attn) for layer in model.model.layers]

    @property
    def cached_length(self) -> int:
        """Tokens that every KV head holds."""
        return self._caches[0].keys.shape[1]

    def positions(self, layer: int, kv_head: int) -> list[int]:
        """True positions that a KV head holds, ascending."""
        return self._caches[layer].positions[kv_head].tolist()

    def prefill(self, prompt_token_ids: Sequence[int]) -> torch.Tensor:
        """Read the whole prompt, densely. Returns the logits of its last token, [vocab] float32."""
        if self.next_position:
            raise ValueError("prefill comes first and only once")
        if not prompt_token_ids:
            raise ValueError("the prompt is empty")
        self._prompt_length = len(prompt_token_ids)
        return self._forward(prompt_token_ids)

    def prefill_bounded(self, prompt_token_ids: Sequence[int]) -> torch.Tensor:
        """Read the prompt with evictions on the way. Returns all logits, [prompt, vocab]."""
        if self.next_position:
            raise ValueError("prefill comes first and only once")
        chunk_logits = []
        while self.next_position < len(prompt_token_ids):
            if self._eviction_is_due():
                self._evict()
            room = self.settings.budget + self.settings.window - self.cached_length
            start = self.next_position
            chunk_logits.append(self._all_logits(prompt_token_ids[start : start + room]))
        return torch.cat(chunk_logits)

    def step(self, token_id: int) -> torch.Tensor:
        """Evict if it is due, then run one token. Returns its logits, [vocab] float32."""
        if not self.next_position:
            raise ValueError("prefill comes first and only once")
        if self._eviction_is_due():
            self._evict()
        return self._forward([token_id])

    def _eviction_is_due(self) -> bool:
        has_decoded = self.next_position > self._prompt_length
        excess = self.cached_length - self.settings.budget
        return has_decoded and excess > 0 and excess % self.settings.window == 0

    @torch.inference_mode()
    def _forward(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens. Returns the logits of the last one, [vocab]."""
        return self.model.lm_head(self._hidden(token_ids)[-1])

    @torch.inference_mode()
    def _all_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens. Returns the logits of all, [m, vocab]."""
        return self.model.lm_head(self._hidden(token_ids))

    def _hidden(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Run tokens through the layers and the last norm: [m, hidden]."""
        core = self.model.model
        positions = torch.arange(self.next_position, self.next_position + len(token_ids))
        hidden = core.embed_tokens(torch.tensor(token_ids))[None]  # [1, m, hidden]
        rotation = core.rotary_emb(hidden, positions[None])
        for layer, cache in zip(core.layers, self._caches, strict=True):
            normed = layer.input_layernorm(hidden)
            hidden = hidden + self._attention(layer.self_attn, normed, rotation, positions, cache)
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        self.next_position += len(token_ids)
        return core.norm(hidden[0])

    def _attention(
        self,
        module: nn.Module,
        hidden: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Attention of m new tokens to the cache that they are added to first: [1, m, hidden]."""
        new = hidden.shape[1]
        shape = (1, new, -1, module.head_dim)
        queries = module.q_proj(hidden).view(shape)
        keys = module.k_proj(hidden).view(shape)
        values = module.v_proj(hidden).view(shape).transpose(1, 2)
        if hasattr(module, "q_norm"):
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys = apply_rotary_pos_emb(
            queries.transpose(1, 2), keys.transpose(1, 2), *rotation
        )
        queries = queries[0]
        cache.append(queries, keys[0], values[0], positions, self.settings.window)

        group = queries.shape[0] // cache.keys.shape[0]
        all_keys = cache.keys.repeat_interleave(group, dim=0)  # [query heads, length, D]
        all_values = cache.values.repeat_interleave(group, dim=0)
        key_positions = cache.positions.repeat_interleave(group, dim=0)
        logits = queries @ all_keys.transpose(1, 2) * module.scaling  # [query heads, m, length]
        future = key_positions[:, None, :] > positions[:, None]
        attention = logits.masked_fill(future, float("-inf")).softmax(dim=-1)
        cache.attend(attention, self.settings.window)
        output = (attention @ all_values).transpose(0, 1)  # [m, query heads, D]
        return module.o_proj(output.reshape(1, new, -1))

    @torch.inference_mode()
    def _evict(self) -> None:
        heads: dict[tuple[int, int], HeadEviction] = {}
        for layer, cache in enumerate(self._caches):
            kept = [
                self._survivors(layer, kv_head, cache, heads)
                for kv_head in range(cache.keys.shape[0])
            ]
            cache.keep(torch.stack(kept))
        self.evictions.append(Eviction(self.next_position, heads))

    def _survivors(
        self,
        layer: int,
        kv_head: int,
        cache: LayerCache,
        log: dict[tuple[int, int], HeadEviction],
    ) -> torch.Tensor:
        """Indices of what one KV head keeps, window included: [T], int64, ascending."""
        settings, positions = self.settings, cache.positions[kv_head]
        length = len(positions)
        count = length - settings.window
        newest = torch.arange(self.next_position - settings.window, self.next_position)
        assert torch.equal(positions[count:], newest), "the window is not the newest positions"
        group = cache.queries.shape[0] // cache.keys.shape[0]
        candidates = Candidates(
            step=self.next_position,
            layer=layer,
            kv_head=kv_head,
            positions=positions[:count],
            scores=attention_scores(
                cache.queries[kv_head * group : (kv_head + 1) * group],
                cache.keys[kv_head, :count],
                smoothing=settings.smoothing,
                temperature=settings.temperature,
            ),
            ranges=value_ranges(cache.values[kv_head, :count], positions[:count], settings.sinks),
            protected=settings.protected,
            keep=settings.budget - settings.window,
            sinks=settings.sinks,
            eviction_index=len(self.evictions),
            keys=cache.keys[kv_head, :count],
            values=cache.values[kv_head, :count],
            queries=cache.queries[kv_head * group : (kv_head + 1) * group],
            window_keys=cache.keys[kv_head, count:],
            window_values=cache.values[kv_head, count:],
            received=cache.received_so_far()[kv_head, :count],
        )
        chosen = self.select(candidates).sort().values
        allowed = torch.isin(chosen, torch.arange(count)).all()
        if not allowed or not len(chosen) == len(chosen.unique()) == candidates.keep:
            raise ValueError(f"the selector must return {candidates.keep} distinct candidates")
        kept = torch.cat([chosen, torch.arange(count, length)])
        log[layer, kv_head] = HeadEviction(
            tuple(positions.tolist()),
            tuple(positions[kept].tolist()),
            *self.margins(candidates),
        )
        return kept


def generate_with_eviction(
    model: PreTrainedModel,
    prompt_token_ids: Sequence[int],
    max_new_tokens: int,
    *,
    budget: int,
    window: int,
    protected: int,
    sinks: int,
    smoothing: int = 1,
    temperature: float = 1.0,
    sampling: str | Selector = "greedy",
    generator: torch.Generator | None = None,
    margins: Margins = selection_margins,
    bounded_prefill: bool = False,
) -> OracleResult:
    """Decode exactly `max_new_tokens` tokens, always the one with the largest logit.

    No token ends it, an end-of-sequence token neither. The last token is not fed back: with a
    prompt of L tokens, steps run at positions L to L + max_new_tokens - 2. A sequence that was
    preempted and read anew is a call with all that was read anew as its prompt. `sampling` and
    `margins` are about the eviction, see `EvictingDecoder`; for the other arguments see `Settings`.
    """
    settings = Settings(budget, window, protected, sinks, smoothing, temperature)
    decoder = EvictingDecoder(model, settings, sampling, generator, margins)
    result = OracleResult([], [], [], decoder.evictions)
    if bounded_prefill:
        logits = decoder.prefill_bounded(prompt_token_ids)[-1]
    else:
        logits = decoder.prefill(prompt_token_ids)
    for index in range(max_new_tokens):
        if index:
            logits = decoder.step(result.token_ids[-1])
        (best, second), (token, runner_up) = (t.tolist() for t in logits.topk(2))
        result.token_ids.append(token)
        result.runner_up_ids.append(runner_up)
        result.top2_gaps.append(best - second)
    return result


def _check_model(model: PreTrainedModel) -> None:
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(f"model type {config.model_type!r} is not one of {MODEL_TYPES}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise ValueError("only full attention is supported")
    weight = model.lm_head.weight
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        raise ValueError(
            f"the model must be float32 on the CPU, got {weight.dtype}, {weight.device}"
        )
    if model.training:
        raise ValueError("the model must be in eval mode")
