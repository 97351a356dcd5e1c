"""A Llama in plain float32 torch that reads a text under several eviction rules at once.

Decoding a text token by token gives the probabilities that reading it in chunks gives, as long as
chunks end where evictions fall. All rules hold the same number of tokens at every position, so
they are a batch: the matrix products of all of them are one.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, rms_norm, silu

from benchmarks.accuracy.slot_orders import SlotOrder, in_place
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import largest
from vase_vllm.policies.candidates import Candidates, DenseTokens
from vase_vllm.policies.draws import Draws

WINDOWS_OF_QUERIES = 4
"""Of how many windows the queries are kept for rules that want more than the last."""


@dataclass(frozen=True, kw_only=True)
class TextCandidates(Candidates):
    """Candidates of which more is known than an engine keeps.

    Attributes:
        positions: [H, n] int64, in the text.
        surprise: [read] fp32, of each token of the text its negative log-likelihood in nats.
        queries_of_text: [H, windows * W, G, D] fp32, of the newest windows, by position.
        depth: of the layer, from 0, the first, to 1, the last.
    """

    positions: Tensor
    surprise: Tensor
    queries_of_text: Tensor
    depth: float


Rule = Callable[[TextCandidates, Tensor | None], tuple[Tensor, Tensor | None]]
"""Ranks candidates as a policy's ``rank`` does."""


class Scores(NamedTuple):
    """What a reader says of tokens, each [rules, scored].

    Attributes:
        nll: the negative log-likelihood in nats.
        is_top: whether the token is the most probable one.
        top: which token is.
    """

    nll: Tensor
    is_top: Tensor
    top: Tensor


class Llama:
    """The weights of a Hugging Face checkpoint with tied embeddings.

    Args:
        directory: of the checkpoint.
    """

    def __init__(self, directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        self.layers = config["num_hidden_layers"]
        self.query_heads = config["num_attention_heads"]
        self.kv_heads = config["num_key_value_heads"]
        self.head_dim = config["head_dim"]
        self.epsilon = config["rms_norm_eps"]
        exponents = torch.arange(0, self.head_dim, 2) / self.head_dim
        self.frequencies = config["rope_parameters"]["rope_theta"] ** -exponents
        weights = load_file(directory / "model.safetensors")
        self.weights = {name: weight.float() for name, weight in weights.items()}

    def of_layer(self, layer: int, name: str) -> Tensor:
        """A weight of one layer."""
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def normalised(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """RMS norm."""
        return rms_norm(hidden, hidden.shape[-1:], weight, self.epsilon)

    def rotated(self, heads: Tensor, start: int) -> Tensor:
        """RoPE at the positions from ``start``: [B, heads, tokens, D]."""
        positions = torch.arange(start, start + heads.shape[-2])
        angles = positions[:, None] * self.frequencies
        cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
        first, second = heads.chunk(2, dim=-1)
        return heads * cos + torch.cat([-second, first], dim=-1) * sin

    def queries_keys_values(
        self, layer: int, hidden: Tensor, start: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of a chunk: [B, heads, tokens, D] each, queries and keys after RoPE."""
        x = self.normalised(hidden, self.of_layer(layer, "input_layernorm"))
        q, k, v = (
            linear(x, self.of_layer(layer, f"self_attn.{name}_proj"))
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for name in "qkv"
        )
        return self.rotated(q, start), self.rotated(k, start), v

    def after_attention(self, layer: int, hidden: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer: [B, tokens, hidden size]."""
        hidden = hidden + linear(attended, self.of_layer(layer, "self_attn.o_proj"))
        x = self.normalised(hidden, self.of_layer(layer, "post_attention_layernorm"))
        gate = silu(linear(x, self.of_layer(layer, "mlp.gate_proj")))
        up = linear(x, self.of_layer(layer, "mlp.up_proj"))
        return hidden + linear(gate * up, self.of_layer(layer, "mlp.down_proj"))

    def logprobs(self, hidden: Tensor) -> Tensor:
        """Of the next token: [..., vocabulary]."""
        x = self.normalised(hidden, self.weights["model.norm.weight"])
        return linear(x, self.weights["model.embed_tokens.weight"]).log_softmax(dim=-1)


class Reader:
    """Reads one text under several rules, whose caches are rows of one batch.

    Args:
        model: the model.
        rules: of the rows; None never evicts.
        limits: of every eviction; None never evicts.
        key: of the draws: the number of the text.
        orders: of the survivors, one for each rule; in place, if there are none.
    """

    def __init__(
        self,
        model: Llama,
        rules: Sequence[Rule],
        limits: EvictionLimits | None,
        key: int = 0,
        orders: Sequence[SlotOrder] = (),
    ) -> None:
        self.model, self.rules, self.limits, self.key = model, rules, limits, key
        self.orders = orders or [in_place] * len(rules)
        self.keys: list[Tensor] = [torch.empty(0)] * model.layers
        self.values: list[Tensor] = [torch.empty(0)] * model.layers
        self.queries: list[Tensor] = [torch.empty(0)] * model.layers
        self.queries_before: list[list[Tensor]] = [[]] * model.layers
        self.positions: list[Tensor] = [torch.empty(0)] * model.layers
        # Before the first token nothing is known, so all are equally probable.
        self.last_hidden = torch.zeros(1, 1, model.weights["model.norm.weight"].shape[0])
        self.surprise = torch.empty(1, 0)
        self.numbers: list[list[Tensor | None]] = [[None] * len(rules)] * model.layers
        self.read = self.evictions = 0

    @torch.inference_mode()
    def nll(self, token_ids: Sequence[int], scored: Sequence[int] = ()) -> Scores:
        """Read a text; every call but the last reads whole chunks.

        Args:
            token_ids: what comes next.
            scored: indices in it of the tokens whose probability is wanted; 0 cannot be.
        """
        ids = torch.tensor(token_ids)
        chunk = self.limits.window if self.limits else 512
        empty = torch.empty(max(1, len(self.rules)), 0)
        found = [Scores(empty, empty.bool(), empty.long())]
        for start in range(0, len(ids), chunk):
            part = ids[start : start + chunk]
            scores = self._read(part)
            wanted = [p - start for p in scored if start <= p < start + len(part)]
            found.append(Scores(*(of[:, wanted] for of in scores)))
            if self.limits and self.keys[0].shape[-2] == self.limits.budget + self.limits.window:
                self._evict()
        return Scores(*(torch.cat(parts, dim=-1) for parts in zip(*found, strict=True)))

    @torch.inference_mode()
    def ask(self, token_ids: Sequence[int], scored: Sequence[int]) -> Scores:
        """What :meth:`nll` would return for one chunk, which is forgotten afterwards."""
        before = list(self.keys), list(self.values), list(self.queries), self.read
        ids, index = torch.tensor(token_ids), torch.tensor(scored)
        found = self._scores(self._forward(ids)[:, index - 1], ids[index])
        self.keys, self.values, self.queries, self.read = before
        return found

    def _read(self, ids: Tensor) -> Scores:
        """Of a chunk's tokens, and what the rules want to know of them."""
        if self.read:
            of_layers = zip(self.queries_before, self.queries, strict=True)
            self.queries_before = [
                [*before, last][1 - WINDOWS_OF_QUERIES :] for before, last in of_layers
            ]
        hidden = self._forward(ids)
        before = self.last_hidden.expand(len(hidden), -1, -1)
        scores = self._scores(torch.cat([before, hidden[:, :-1]], dim=1), ids)
        self.last_hidden = hidden[:, -1:]
        known = self.surprise.expand(len(scores.nll), -1)
        self.surprise = torch.cat([known, scores.nll], dim=-1)
        return scores

    def _scores(self, hidden: Tensor, ids: Tensor) -> Scores:
        """Of tokens, from the hidden states before each: [B, tokens, hidden size]."""
        logprobs = self.model.logprobs(hidden)
        own = logprobs.gather(-1, ids.expand(len(hidden), -1)[..., None])[..., 0]
        most, top = logprobs.max(dim=-1)
        rows = max(1, len(self.rules))
        return Scores(*(of.expand(rows, -1) for of in (-own, own == most, top)))

    def _forward(self, ids: Tensor) -> Tensor:
        model, start = self.model, self.read
        group = model.query_heads // model.kv_heads
        rows = len(self.keys[0]) if start else 1
        hidden = model.weights["model.embed_tokens.weight"][ids].expand(rows, -1, -1)
        mask = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
        for layer in range(model.layers):
            q, k, v = model.queries_keys_values(layer, hidden, start)
            self.queries[layer] = q
            if start:
                k = torch.cat([self.keys[layer], k], dim=-2)
                v = torch.cat([self.values[layer], v], dim=-2)
            self.keys[layer], self.values[layer] = k, v
            # [B, H, G * tokens, n]
            grouped = q.reshape(rows, model.kv_heads, group * len(ids), model.head_dim)
            logits = (grouped @ k.transpose(-1, -2)).mul_(model.head_dim**-0.5)
            logits[..., -len(ids) :].masked_fill_(mask.repeat(group, 1), -torch.inf)
            attended = (logits.softmax(dim=-1) @ v).view(rows, model.query_heads, len(ids), -1)
            attended = attended.transpose(1, 2).flatten(2)
            hidden = model.after_attention(layer, hidden, attended)
        self.read += len(ids)
        return hidden

    def _evict(self) -> None:
        limits, model = self.limits, self.model
        assert limits is not None
        rows, num = len(self.rules), limits.budget
        draws = Draws(
            limits,
            self.key,
            self.evictions,
            num,
            layers=list(range(model.layers)),
            kv_heads=torch.arange(model.kv_heads),
        )
        newest = torch.arange(self.read - limits.window, self.read)
        newest = newest.expand(rows, model.kv_heads, -1)
        for layer in range(model.layers):
            k, v = (x[layer].expand(rows, -1, -1, -1) for x in (self.keys, self.values))
            old = self.positions[layer] if self.evictions else torch.arange(num)
            positions = torch.cat([old.expand(rows, model.kv_heads, -1), newest], dim=-1)
            of_windows = [*self.queries_before[layer], self.queries[layer]]
            of_windows = [q.expand(rows, -1, -1, -1) for q in of_windows]
            # As in the ring: by position, and those of the query heads of a position together.
            queries = torch.cat(of_windows, dim=2)
            queries = queries.unflatten(1, (model.kv_heads, -1)).transpose(2, 3)
            before, self.numbers[layer] = self.numbers[layer], []
            index = torch.empty(rows, model.kv_heads, limits.budget, dtype=torch.int64)
            for row, (rule, order) in enumerate(zip(self.rules, self.orders, strict=True)):
                (keys, window_keys), (values, window_values) = (
                    x[row].split([num, limits.window], dim=1) for x in (k, v)
                )
                candidates = TextCandidates(
                    num=num,
                    queries=queries[row, :, -limits.window :].flatten(1, 2),
                    tokens=DenseTokens(keys, values, window_keys, window_values),
                    scale=model.head_dim**-0.5,
                    limits=limits,
                    first=limits.budget + limits.window,
                    eviction_index=self.evictions,
                    draws=draws.of_layers([layer]),
                    positions=positions[row, :, :num],
                    surprise=self.surprise.expand(rows, -1)[row],
                    queries_of_text=queries[row],
                    depth=layer / max(1, model.layers - 1),
                )
                priority, numbers = rule(candidates, before[row])
                priority[:, : limits.sinks] = torch.inf
                keep = largest(priority, limits.budget - limits.window)
                index[row] = order(candidates, priority, keep)
                if numbers is not None:
                    to = index[row][:, None].expand(-1, numbers.shape[1], -1)
                    numbers = numbers.gather(2, to)
                self.numbers[layer].append(numbers)
            self.positions[layer] = positions.gather(2, index)
            gather = index[..., None].expand(-1, -1, -1, model.head_dim)
            self.keys[layer], self.values[layer] = k.gather(2, gather), v.gather(2, gather)
        self.evictions += 1
