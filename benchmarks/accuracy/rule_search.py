"""Compares rules of eviction on a real model without an engine: ``--help`` has the arguments.

Every passage states three facts. Reading it gives the rise of the NLL; at 640 tokens and at its end
the facts are asked for, and the questions forgotten again.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from benchmarks.accuracy.rules import RULES, find_rules, order_of
from benchmarks.accuracy.teacher_forcing import Llama, Reader, Rule
from benchmarks.common.provenance import provenance
from vase_vllm.kernels.parameters import EvictionLimits
from vase_vllm.tools.evaluation.recall import PLACES
from vase_vllm.tools.evaluation.texts import HALVES, own_texts
from vase_vllm.tools.markdown import table

FACTS_AT, ASKED_AT = (64, 230, 400), 640
WINDOW = 64
WORDINGS = (
    (
        "\n\nThe passcode of the {place} is {value}.\n\n",
        "\n\nQuestion: What is the passcode of the {place}?\nAnswer: The passcode is {value}",
    ),
    (
        "\n\nRemember that {value} is the telephone number of the {place}.\n\n",
        "\n\nThe telephone number of the {place} is {value}",
    ),
    (
        " Whoever enters the {place} has to type the number {value} twice.",
        "\n\nTo enter the {place}, type the number {value}",
    ),
)
VALUE_TOKENS = 4


@dataclass(frozen=True)
class Passage:
    """Token ids of a text with facts in it, and of the questions with their values."""

    token_ids: list[int]
    questions: list[list[int]]


@dataclass(frozen=True)
class Measured:
    """What reading one passage gave: NLL and most probable token, [rules, positions]; of the facts,
    at both times, the mean NLL of a digit and whether all digits are the most probable:
    [times * facts, rules]."""

    nll: torch.Tensor
    top: torch.Tensor
    fact_nll: torch.Tensor
    recalled: torch.Tensor


def passages(tokenizer: PreTrainedTokenizerBase, half: str, length: int) -> list[Passage]:
    """One of each text of a half."""

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    found = []
    for index, text in enumerate(text for text in own_texts() if text.half == half):
        rng = random.Random(f"{half}{index}")
        tokens = encode(text.content)
        start = rng.randrange(len(tokens) - length)
        filler = iter(tokens[start : start + length])
        ids: list[int] = []
        questions = []
        for number, at in enumerate(FACTS_AT):
            statement, question = WORDINGS[(index + number) % len(WORDINGS)]
            fact = {"place": rng.choice(PLACES), "value": str(rng.randrange(1000, 10_000))}
            ids += [next(filler) for _ in range(at - len(ids))]
            ids += encode(statement.format(**fact))
            questions.append(encode(question.format(**fact)))
        ids += [next(filler) for _ in range(length - len(ids))]
        found.append(Passage(ids, questions))
    return found


def measure(reader: Reader, passage: Passage, first_scored: int) -> Measured:
    """Read a passage and ask for its facts."""
    read, fact_nll, recalled = [], [], []
    done = 0
    for until in (ASKED_AT, len(passage.token_ids)):
        scored = [p - done for p in range(max(done, first_scored) + 1, until)]
        read.append(reader.nll(passage.token_ids[done:until], scored))
        done = until
        for question in passage.questions:
            digits = range(len(question) - VALUE_TOKENS, len(question))
            of_digits = reader.ask(question, digits)
            fact_nll.append(of_digits.nll.mean(dim=-1))
            recalled.append(of_digits.is_top.all(dim=-1))
    nll, _, top = (torch.cat(parts, dim=-1) for parts in zip(*read, strict=True))
    return Measured(nll, top, torch.stack(fact_nll), torch.stack(recalled))


def compare(
    model: Llama,
    rules: dict[str, Rule],
    found: Sequence[Passage],
    of_full_cache: Sequence[Measured],
    budget: int,
) -> list[dict[str, Any]]:
    """A row of results for each rule.

    A fact counts if the full cache recalls it.
    """
    limits = EvictionLimits(budget=budget, window=WINDOW)
    times = (ASKED_AT, len(found[0].token_ids))
    rises, same_top, fact_nll, recalled = [], [], [], []
    for index, (passage, full) in enumerate(zip(found, of_full_cache, strict=True)):
        reader = Reader(model, list(rules.values()), limits, index, [order_of(n) for n in rules])
        own = measure(reader, passage, budget + WINDOW)
        after = slice(full.nll.shape[1] - own.nll.shape[1], None)
        rises.append((own.nll - full.nll[:, after]).mean(dim=-1))
        same_top.append((own.top == full.top[:, after]).float().mean(dim=-1))
        counts = full.recalled[:, 0].view(len(times), -1)
        for kept, of in ((fact_nll, own.fact_nll), (recalled, own.recalled.float())):
            rows = of.view(*counts.shape, -1)
            kept.append([rows[time][counts[time]] for time in range(len(times))])
    result = []
    for column, name in enumerate(rules):
        row: dict[str, object] = {"rule": name, "budget": budget}
        row["rise"] = round(float(torch.stack(rises)[:, column].mean()), 4)
        row["rise of each passage"] = [round(float(rise[column]), 4) for rise in rises]
        row["same top token"] = round(float(torch.stack(same_top)[:, column].mean()), 4)
        for time, at in enumerate(times):
            nlls, oks = (
                torch.cat([x[time] for x in kept])[:, column] for kept in (fact_nll, recalled)
            )
            row[f"facts at {at}"] = len(oks)
            row[f"recalled at {at}"] = int(oks.sum())
            row[f"NLL at {at}"] = round(float(nlls.mean()), 3)
        result.append(row)
        print(json.dumps(row), flush=True)
    return result


def of_rows(rows: Sequence[dict[str, Any]]) -> set[tuple[str, int]]:
    """Rules and budgets that rows are about."""
    return {(row["rule"], row["budget"]) for row in rows}


def page(results: dict[str, Any]) -> str:
    """The results in Markdown, for each budget the smallest rise first."""
    times = (ASKED_AT, results["length"])
    lines = [
        f"# Rules of eviction, {results['half']} half",
        "",
        f"- command: `{results['command']}`",
        f"- date: {results['date']}",
        "",
        "The rise of the NLL over the full cache in nats per token, over all passages and in each",
        f"of them; of the facts that the full cache recalls at {times[0]} and {times[1]}",
        "tokens, how many are recalled, and the NLL of a digit. `rule_search.py` says what a",
        "passage is, `rules.py` what the names mean.",
    ]
    columns = [f"{name} {at}" for at in times for name in ("recalled at", "NLL at")]
    for budget in dict.fromkeys(row["budget"] for row in results["results"]):
        rows = [row for row in results["results"] if row["budget"] == budget]
        cells = [
            [
                row["rule"],
                f"{row['rise']:+.4f}",
                f"{row['same top token']:.1%}" if "same top token" in row else "–",
                ", ".join(f"{rise:.3f}" for rise in row["rise of each passage"]),
                *(
                    cell
                    for at in times
                    for cell in (
                        f"{row[f'recalled at {at}']} of {row[f'facts at {at}']}",
                        f"{row[f'NLL at {at}']:.2f}",
                    )
                ),
            ]
            for row in sorted(rows, key=lambda row: float(row["rise"]))
        ]
        lines += [
            "",
            f"## Budget {budget}",
            "",
            *table(["rule", "rise", "same top token", "each", *columns], cells),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="directory of a Llama, as of vase-vllm demo-model")
    parser.add_argument("--half", choices=HALVES, default="choice")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a passage")
    parser.add_argument("--budgets", type=int, nargs="+", default=[256])
    parser.add_argument(
        "--rules",
        nargs="+",
        default=sorted(RULES),
        help="of rules.py, its groups, or policies with settings, as in rkv:lambda=0.3",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="JSON file; its page lies beside it"
    )
    parser.add_argument(
        "--append", action="store_true", help="put the rules' rows into the file, keep the others"
    )
    args = parser.parse_args()
    try:
        rules = find_rules(args.rules)
    except ValueError as error:
        parser.error(str(error))
    if max(args.budgets) + WINDOW >= args.length:
        parser.error(f"--budgets must be below --length less {WINDOW}, or nothing is evicted")
    torch.set_num_threads(1)
    model = Llama(args.model)
    found = passages(AutoTokenizer.from_pretrained(args.model), args.half, args.length)
    first = min(args.budgets) + WINDOW
    full = [measure(Reader(model, [], None), passage, first) for passage in found]
    of = {"half": args.half, "length": args.length}
    results = {**provenance(("torch", "vase-vllm")), **of, "results": []}
    if args.append:
        known = json.loads(args.output.read_text())
        if {name: known[name] for name in of} != of:
            parser.error(f"--append: {args.output} has results of another half or length")
        results |= {"command": f"{known['command']}; then {results['command']}"}
        results |= {"results": known["results"]}
    for budget in args.budgets:
        rows = compare(model, rules, found, full, budget)
        others = [r for r in results["results"] if (r["rule"], r["budget"]) not in of_rows(rows)]
        results["results"] = sorted(others + rows, key=lambda row: row["budget"])
        args.output.write_text(json.dumps(results, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(page(results))


if __name__ == "__main__":
    main()
