"""Are the value magnitudes of a model heavy-tailed, and which tokens have large ones?

    python -m benchmarks.accuracy.magnitudes                            # the testbed's model
    python -m benchmarks.accuracy.magnitudes --model build/demo-model --output DIR

VaSE protects the tokens whose value vectors have an abnormally large range, max_d v - min_d v. In
large reasoning models the ranges have a heavy tail; here it is measured whether a model's have one.
The testbed's model reads held-out problems with their solutions, another the texts that
`vase-vllm evaluate` brings, by transformers, in float32; the values are rounded to the dtype of the
model, as a server caches them. Beside each KV head stands a Gaussian: values drawn independently
with the mean and the standard deviation of each dimension.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.stats import kurtosis
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.accuracy.check import MODEL
from benchmarks.accuracy.run import RESULTS
from benchmarks.accuracy.tasks import EOS, HELD_OUT_FILE, read_jsonl
from benchmarks.common.figures import pyplot, save
from benchmarks.common.provenance import provenance
from vase_vllm.tools.evaluation.texts import own_texts

QUANTILES = 64
TOP_SHARE = 0.25  # of the tokens: as many as vase protects by default
MIN_TOKENS = 8  # of a word that is listed
MAX_WORDS = 12  # that are listed of a head
MAX_PANELS = 5  # layers of the plot, evenly spaced
Values = NDArray[np.float32]


def read_values(
    directory: Path, texts: list[str], max_tokens: int | None = None
) -> tuple[Values, list[str]]:
    """The values of all tokens, or of the first of each text.

    Returns
    -------
    values : float32 [layers, tokens, KV heads, head size]
    words : the text of each token
    """
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    cached = model.dtype
    model.float()  # a CPU may take ten times as long with bfloat16
    shape = (-1, model.config.num_key_value_heads, model.config.head_dim)
    layers: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, kept in zip(model.model.layers, layers, strict=True):
        layer.self_attn.v_proj.register_forward_hook(
            lambda _module, _inputs, output, kept=kept: kept.append(
                output[0].to(cached).float().view(shape)
            )
        )
    words: list[str] = []
    for text in track(texts, "reading", transient=True):
        ids = tokenizer(text, return_tensors="pt", verbose=False).input_ids[:, :max_tokens]
        words += tokenizer.convert_ids_to_tokens(ids[0])
        with torch.inference_mode():
            model(ids)
    return torch.stack([torch.cat(kept) for kept in layers]).numpy(), words


def ranges(values: Values) -> Values:
    """``max_d v - min_d v``, over the last dimension."""
    return values.max(-1) - values.min(-1)


def tail(found: Values) -> dict[str, float]:
    """How heavy the upper tail of magnitudes is, float32 [tokens]."""
    low, median, high, top = np.quantile(found, (0.01, 0.5, 0.99, 1.0))
    return {
        "median": round(float(median), 4),
        "p1_over_median": round(float(low / median), 4),
        "p99_over_median": round(float(high / median), 4),
        "largest_over_median": round(float(top / median), 4),
        "excess_kurtosis": round(float(kurtosis(found.astype(np.float64), axis=None)), 3),
    }


def gaussian(values: Values, rng: np.random.Generator) -> Values:
    """As many values, [tokens, head size], with each dimension's mean and standard deviation."""
    noise = rng.standard_normal(values.shape, dtype=np.float32)
    return values.mean(0) + values.std(0) * noise


def by_word(found: Values, words: NDArray[np.str_]) -> list[dict[str, Any]]:
    """For each word: mean range over the median of all, and its share of the largest TOP_SHARE.

    Rare words are left out, and those with the largest ranges come first.
    """
    threshold = np.quantile(found, 1 - TOP_SHARE)
    rows = []
    spelled, counts = np.unique(words, return_counts=True)
    for word in spelled[counts >= min(MIN_TOKENS, counts.max())]:
        own = found[words == word]
        rows.append(
            {
                "word": str(word),
                "tokens": len(own),
                "mean_over_median": round(float(own.mean() / np.median(found)), 3),
                "in_the_largest": round(float((own >= threshold).mean()), 3),
            }
        )
    return sorted(rows, key=lambda row: -row["mean_over_median"])[:MAX_WORDS]


def measure(values: Values, words: list[str]) -> list[dict[str, Any]]:
    """One entry for each layer and KV head."""
    rng = np.random.default_rng(0)
    spelled = np.array(words)
    grid = np.linspace(0, 1, QUANTILES)
    heads = []
    for layer, head in np.ndindex(values.shape[0], values.shape[2]):
        own = values[layer, :, head]
        found, drawn = ranges(own), ranges(gaussian(own, rng))
        heads.append(
            {
                "layer": layer,
                "head": head,
                "range": tail(found),
                "gaussian": tail(drawn),
                "entries_excess_kurtosis": round(
                    float(kurtosis(own.astype(np.float64), axis=None)), 3
                ),
                "range_explained_by_word": round(explained(found, spelled), 4),
                "quantiles": np.quantile(found, grid).round(4).tolist(),
                "gaussian_quantiles": np.quantile(drawn, grid).round(4).tolist(),
                "words": by_word(found, spelled),
            }
        )
    return heads


def explained(found: Values, words: NDArray[np.str_]) -> float:
    """Share of the variance of the range that the word alone accounts for (eta squared)."""
    _, index, counts = np.unique(words, return_inverse=True, return_counts=True)
    means = np.bincount(index, weights=found) / counts
    return float(np.var(means[index]) / np.var(found))


def plot(heads: list[dict[str, Any]], path: Path) -> None:
    """Quantiles of the range over its median for each KV head, beside the Gaussian's."""
    every = sorted({head["layer"] for head in heads})
    shown = np.linspace(0, len(every) - 1, min(MAX_PANELS, len(every))).round().astype(int)
    layers = [every[index] for index in shown]
    figure, axes = pyplot.subplots(
        1, len(layers), figsize=(4.2 * len(layers), 3.8), sharey=True, layout="constrained"
    )
    grid = np.linspace(0, 1, QUANTILES)
    for axis, layer in zip(axes, layers, strict=True):
        for head in (head for head in heads if head["layer"] == layer):
            color = f"C{head['head']}"
            for key, style, label in (
                ("quantiles", "-", f"KV head {head['head']}"),
                ("gaussian_quantiles", ":", f"Gaussian, head {head['head']}"),
            ):
                curve = np.array(head[key])
                axis.plot(grid, curve / np.median(curve), style, color=color, label=label)
        axis.axvline(1 - TOP_SHARE, color="0.7", linewidth=0.8)
        axis.set(title=f"layer {layer}", xlabel="quantile of the tokens")
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("value range / its median")
    axes[0].legend(frameon=False, fontsize="small")
    save(figure, path, "magnitudes")


def show(heads: list[dict[str, Any]]) -> Table:
    """What there is to see at a glance."""
    table = Table(title="Value range of each KV head, and that of a Gaussian")
    for name in ("layer", "head", "p99 / median", "Gaussian", "kurtosis", "Gaussian", "largest"):
        table.add_column(name)
    for head in heads:
        own, drawn = head["range"], head["gaussian"]
        table.add_row(
            str(head["layer"]),
            str(head["head"]),
            f"{own['p99_over_median']:.2f}",
            f"{drawn['p99_over_median']:.2f}",
            f"{own['excess_kurtosis']:+.2f}",
            f"{drawn['excess_kurtosis']:+.2f}",
            ", ".join(f"{row['word']} {row['mean_over_median']:.2f}" for row in head["words"][:5]),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=MODEL, help="a directory")
    parser.add_argument("--problems", type=int, default=64, help="so many held-out ones")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of each text")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.model == MODEL:
        problems = read_jsonl(HELD_OUT_FILE)[: args.problems]
        texts = [f"{problem.prompt} {problem.completion} {EOS}" for problem in problems]
        sources = {"problems": len(problems)}
        values, words = read_values(MODEL, texts)
    else:
        brought = own_texts()
        sources = {"texts": {text.name: text.sha256 for text in brought}}
        values, words = read_values(args.model, [text.content for text in brought], args.max_tokens)
    heads = measure(values, words)
    result = {
        "model": args.model.name,
        **sources,
        "tokens": len(words),
        **provenance(("torch", "transformers")),
        "heads": heads,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "magnitudes.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    plot(heads, path)
    console = Console()
    console.print(show(heads))
    console.print(f"All of it is in {path}, the plot beside it", markup=False)


if __name__ == "__main__":
    main()
