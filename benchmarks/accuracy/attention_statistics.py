"""Could the log-sum-exp of decode attention replace the first pass of an eviction?

    python -m benchmarks.accuracy.attention_statistics build/demo-model --output DIR

The first pass sums ``exp`` of each window query's logits over the candidates. The attention of the
step that computed the query has summed them too, over the candidates and those tokens of the window
that were there, which would have to be subtracted. A model reads texts in float32 and evicts as
VaSE does; at every eviction the denominators are computed in three ways, from queries and keys as
they are and rounded to bfloat16. ``docs/attention_statistics.md`` says what came out.
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d
from transformers import AutoTokenizer

from benchmarks.accuracy.teacher_forcing import Llama, Reader
from benchmarks.common.provenance import provenance
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.kernels.torch_eviction import largest, value_range, vase_priority
from vase_vllm.policies.candidates import Candidates
from vase_vllm.policies.vase import VasePolicy
from vase_vllm.tools.evaluation.texts import own_texts
from vase_vllm.tools.markdown import table

UNIT_ROUNDOFF = 2.0**-24
"""Of float32."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WAYS = ("two passes", "subtracted", "as it was paid")
SHARES = (1e-1, 1e-2, 1e-3, 1e-4)
QUANTILES = (0.0, 0.001, 0.01, 0.1, 0.5)
HEADINGS = (
    "denominators",
    *("error, median", "99 %", "most"),
    *("others survive, mean", "most", "heads with others"),
)


def products(queries: Tensor, keys: Tensor, reordered: bool) -> Tensor:
    """``queries @ keys``, added up in the order of the dimensions or in another one.

    Args:
        queries: [H, rows, D].
        keys: [H, D, n].

    Returns:
        [H, rows, n] in their dtype.
    """
    if not reordered:
        return queries @ keys
    # As tensor cores do: sums over 16 dimensions, added to what is there, here from the last.
    parts = zip(queries.flip(-1).split(16, dim=-1), keys.flip(1).split(16, dim=1), strict=True)
    return torch.stack([query @ key for query, key in parts]).sum(dim=0)


@dataclass(frozen=True)
class Logits:
    """Logits of the window's queries: of the candidates [H, W * G, n], of the window [H, W * G, W].

    Those of the window are -inf where the token comes after the query.
    """

    candidates: Tensor
    window: Tensor

    @classmethod
    def of(cls, c: Candidates, dtype: torch.dtype, exact: bool, reordered: bool) -> "Logits":
        """From queries and keys rounded to a dtype, in float64 if ``exact``, else in float32."""

        def rounded(vectors: Tensor) -> Tensor:
            return vectors.to(dtype).to(torch.float64 if exact else torch.float32)

        queries = rounded(c.queries)
        window = products(queries, rounded(c.window_keys), reordered) * c.scale
        group = queries.shape[1] // c.limits.window
        position = torch.arange(queries.shape[1]) // group
        later = torch.arange(c.limits.window) > position[:, None]
        return cls(
            products(queries, rounded(c.keys), reordered) * c.scale,
            window.masked_fill(later, -torch.inf),
        )

    def all(self) -> Tensor:
        """[H, W * G, n + W], what the attention of each query's step has seen."""
        return torch.cat([self.candidates, self.window], dim=-1)


def candidates_share(logits: Logits) -> Tensor:
    """Of each query's attention, what the candidates receive: [H, W * G]."""
    return (logits.candidates.logsumexp(dim=-1) - logits.all().logsumexp(dim=-1)).exp()


def subtracted_share(logits: Logits, lse: Tensor) -> Tensor:
    """The same by subtraction: 1 less the window's share.

    A difference that is rounded to nothing, or below, counts as one unit roundoff.

    Args:
        lse: [H, W * G], log-sum-exp of all that each query has seen, as attention has computed it.
    """
    return (1 - (logits.window - lse[..., None]).exp().sum(dim=-1)).clamp_min(UNIT_ROUNDOFF)


@dataclass
class Found:
    """What the evictions of one dtype gave.

    Attributes:
        shares: by layer, of every query.
        roundoffs: of every query, by how many unit roundoffs the subtracted share is off.
        errors: by way, of every KV head, ``sum_j |a_j - exact a_j|`` of the mean attention a.
        changed: by way, of every KV head, how many of those that survive are others.
    """

    shares: dict[int, list[Tensor]] = field(default_factory=dict)
    roundoffs: list[Tensor] = field(default_factory=list)
    errors: dict[str, list[Tensor]] = field(default_factory=lambda: {way: [] for way in WAYS})
    changed: dict[str, list[Tensor]] = field(default_factory=lambda: {way: [] for way in WAYS})


class Observer:
    """A rule: VaSE's, which computes at each eviction what else could have been computed."""

    def __init__(self) -> None:
        self.policy = VasePolicy()
        self.found = {name: Found() for name in DTYPES}

    def __call__(self, c: Candidates, _numbers: Tensor | None) -> tuple[Tensor, None]:
        for name, dtype in DTYPES.items():
            self._observe(c, dtype, self.found[name])
        return self.policy.rank(c, None)

    def _observe(self, c: Candidates, dtype: torch.dtype, found: Found) -> None:
        exact = Logits.of(c, dtype, exact=True, reordered=False)
        share = candidates_share(exact)
        (layer,) = c.draws.layers
        found.shares.setdefault(layer, []).append(share.flatten())
        ours = Logits.of(c, dtype, exact=False, reordered=False)
        lse = Logits.of(c, dtype, exact=False, reordered=True).all().logsumexp(dim=-1)
        by_subtraction = subtracted_share(ours, lse)
        found.roundoffs.append(((by_subtraction - share).abs() / UNIT_ROUNDOFF).flatten())
        paid = (ours.candidates - lse[..., None]).exp()
        attention = {
            "two passes": ours.candidates.softmax(dim=-1),
            "subtracted": paid / by_subtraction[..., None],
            "as it was paid": paid,
        }
        right = exact.candidates.softmax(dim=-1).mean(dim=1)
        kept = self._survivors(c, right.float())
        for way, weights in attention.items():
            mean = weights.mean(dim=1)
            found.errors[way].append((mean.double() - right).abs().sum(dim=-1))
            found.changed[way].append((kept & ~self._survivors(c, mean)).sum(dim=-1))

    def _survivors(self, c: Candidates, attention: Tensor) -> Tensor:
        """[H, n] bool, by VaSE with its default settings."""
        width = self.policy.smoothing
        priority = vase_priority(
            avg_pool1d(attention, width, stride=1, padding=width // 2),
            c.of_values(value_range),
            c.draws.gumbel(),
            c.limits.fixed,
            self.policy.num_protected(c.limits),
        )
        return largest(priority, c.limits.budget - c.limits.window)


def significant(number: Tensor | float) -> float:
    """Rounded to three digits."""
    return float(f"{float(number):.3g}")


def summary(found: Found) -> dict[str, Any]:
    """The numbers of one dtype."""
    of_layers = {layer: torch.cat(shares) for layer, shares in sorted(found.shares.items())}
    every = torch.cat(list(of_layers.values()))
    roundoffs = torch.cat(found.roundoffs).sort().values
    result: dict[str, Any] = {
        "queries": len(every),
        "share": {str(q): significant(at(every.sort().values, q)) for q in QUANTILES},
        "queries_below": {
            str(share): significant((every < share).double().mean()) for share in SHARES
        },
        "layers": {
            str(layer): [significant(at(shares.sort().values, q)) for q in QUANTILES]
            for layer, shares in of_layers.items()
        },
        "roundoffs": {str(q): significant(at(roundoffs, q)) for q in (0.5, 0.99, 1.0)},
        "ways": {},
    }
    for way in WAYS:
        errors = torch.cat(found.errors[way]).sort().values
        changed = torch.cat(found.changed[way]).double()
        result["ways"][way] = {
            "heads": len(errors),
            "error": {str(q): significant(at(errors, q)) for q in (0.5, 0.99, 1.0)},
            "changed_mean": significant(changed.mean()),
            "changed_most": int(changed.max()),
            "heads_changed": significant((changed > 0).double().mean()),
        }
    return result


def at(ordered: Tensor, quantile: float) -> Tensor:
    """A quantile of sorted numbers, one of them; torch's own takes no more than 16 million."""
    return ordered[round(quantile * (len(ordered) - 1))]


def page(results: dict[str, Any]) -> str:
    """The results in Markdown."""
    lines = [
        "# Denominators from decode attention",
        "",
        f"- command: `{results['command']}`",
        f"- date: {results['date']}",
        f"- model: {results['model']}; budget {results['budget']}, window {results['window']}",
        f"- texts: {', '.join(results['texts'])}; the first {results['max_tokens']} tokens of each",
        "",
        "[docs/attention_statistics.md](../../../../docs/attention_statistics.md) says what is",
        "compared, and what follows.",
    ]
    for name, of_dtype in results["dtypes"].items():
        lines += [
            "",
            f"## Queries and keys in {name}",
            "",
            f"The candidates' share of the attention, of {of_dtype['queries']:,} queries:",
            "",
            *table(
                ["quantile", *(f"{float(q):.1%}" for q in of_dtype["share"])],
                [["share", *(f"{share:.3g}" for share in of_dtype["share"].values())]],
            ),
            "",
            *table(
                ["share below", *of_dtype["queries_below"]],
                [["of the queries", *(f"{x:.3%}" for x in of_dtype["queries_below"].values())]],
            ),
            "",
            "The subtracted share is off by so many unit roundoffs (2^-24): "
            + ", ".join(f"{q} quantile {x:.3g}" for q, x in of_dtype["roundoffs"].items())
            + ".",
            "",
            *table(
                HEADINGS,
                [
                    [
                        way,
                        *(f"{error:.1e}" for error in row["error"].values()),
                        f"{row['changed_mean']:.3g}",
                        str(row["changed_most"]),
                        f"{row['heads_changed']:.1%}",
                    ]
                    for way, row in of_dtype["ways"].items()
                ],
            ),
        ]
    return "\n".join(lines) + "\n"


def read(model: Llama, texts: Iterable[Sequence[int]], limits: EvictionLimits) -> Observer:
    """What the evictions of some texts, in token ids, give."""
    observer = Observer()
    for key, token_ids in enumerate(texts):
        Reader(model, [observer], limits, key).nll(token_ids)
    return observer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a Llama, as of vase-vllm demo-model")
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--texts", type=int, default=4, help="so many of vase-vllm evaluate's")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--output", type=Path, required=True, help="a directory")
    args = parser.parse_args()
    if args.budget % args.window or args.budget + args.window > args.max_tokens:
        parser.error("--budget must be windows, and at least one below --max-tokens")
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    texts = own_texts(args.texts)
    token_ids = [
        tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
        for text in texts
    ]
    limits = EvictionLimits(budget=args.budget, window=args.window)
    observer = read(Llama(args.model), [ids[: args.max_tokens] for ids in token_ids], limits)
    results = {
        **provenance(("torch", "vase-vllm")),
        "model": args.model.name,
        "texts": {text.name: text.sha256 for text in texts},
        "max_tokens": args.max_tokens,
        "budget": args.budget,
        "window": args.window,
        "dtypes": {name: summary(found) for name, found in observer.found.items()},
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "attention_statistics.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
