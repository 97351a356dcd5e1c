"""One page of every policy: likelihood, facts, questions of the testbed, time; and what others say.

    python -m benchmarks.accuracy.table        # writes results/accuracy/policies.md

It only reads results that other commands have measured; the page names them.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.common import paths
from vase_vllm.policies.registry import find_policy, policy_names
from vase_vllm.tools.markdown import table
from vase_vllm.tools.policy_label import parse_policy_label

RESULTS = paths.RESULTS / "accuracy"
RULES = RESULTS / "smollm2-135m-instruct" / "policies.json"
TESTBED = RESULTS / "accuracy.json"
TIMES = paths.RESULTS / "decode_step" / "policies.json"
PUBLISHED = Path(__file__).with_name("published.json")

VARIANTS = {
    "vase:smoothing=1": "`vase`, smoothing 1",
    "rkv:smoothing=1": "`rkv`, smoothing 1",
    "h2o:recent=0.125": "`h2o`, recent 0.125",
    "distinct:memory=0.9": "`distinct`, memory 0.9",
    "distinct:strata=4": "`distinct`, strata 4",
    "distinct:memory=0.9,strata=4": "`distinct`, memory 0.9, strata 4",
    "distinct:protected=0.375": "`distinct`, protected 0.375",
    "distinct:protected=0.375,memory=0.9": "`distinct`, protected 0.375, memory 0.9",
    "distinct:protected=0.25,memory=0.9": "`distinct`, protected 0.25, memory 0.9",
}
ON_THE_TESTBED = {
    "cur": "cur-redrawn",
    "distinct:memory=0.9": "distinct-remembering",
    "distinct:strata=4": "distinct-strata",
    "distinct:memory=0.9,strata=4": "distinct-remembering-strata",
    "distinct:protected=0.375": "distinct-less",
    "distinct:protected=0.375,memory=0.9": "distinct-less-remembering",
}
"""Names of the testbed's methods where they are not the policy's."""
NONE = "–"


def likelihood(rules: dict[str, Any]) -> str:
    """The rise of the NLL and the facts that are recalled, at each budget."""
    found = {(row["rule"], row["budget"]): row for row in rules["results"]}
    budgets = sorted({budget for _, budget in found})
    names = [name for name in dict.fromkeys(rule for rule, _ in found) if _label(name)]
    heads = ["policy"]
    for budget in budgets:
        times = f"{rules['length'] // budget}x"
        heads += [
            f"{times}: rise of the NLL",
            f"{times}: same top token, %",
            f"{times}: facts recalled, at 640 and at the end",
            f"{times}: NLL of a digit",
        ]
    last = rules["length"]
    rows = []
    for name in sorted(names, key=lambda name: found[name, budgets[0]]["rise"]):
        cells = [_label(name)]
        for budget in budgets:
            row = found[name, budget]
            each = row["rise of each passage"]
            cells += [
                f"{row['rise']:+.3f} ({min(each):+.3f} to {max(each):+.3f})",
                f"{100 * row['same top token']:.1f}" if "same top token" in row else NONE,
                f"{row['recalled at 640']} and {row[f'recalled at {last}']} "
                f"of {row[f'facts at {last}']}",
                f"{row['NLL at 640']:.2f} and {row[f'NLL at {last}']:.2f}",
            ]
        rows.append(cells)
    return "\n".join(table(heads, rows))


def _label(rule: str) -> str:
    """How a rule is shown: policies, and what is said of theirs; nothing for other rules."""
    policy, _, settings = rule.partition(":")
    if settings and not settings.startswith("statistics="):
        return VARIANTS.get(rule, "")
    return f"`{policy}`" if policy in policy_names() else ""


def testbed(results: dict[str, Any]) -> dict[tuple[str, float], float]:
    """Questions right in percent, by method and compression."""
    marks: dict[tuple[str, float], list[float]] = {}
    for run in results["runs"]:
        if run["status"] == "ok" and run["compression"] is not None:
            key = run["method"], run["compression"]
            marks.setdefault(key, []).append(100 * statistics.mean(run["marks"]["questions_right"]))
    return {key: statistics.mean(values) for key, values in marks.items()}


def questions_and_times(questions: dict[tuple[str, float], float], times: dict[str, Any]) -> str:
    """Of each policy: the testbed, the prompt evicted and kept; milliseconds of an eviction."""
    milliseconds = times["milliseconds_per_layer"]
    compressions = sorted({compression for _, compression in questions})
    heads = ["policy", "bytes of state"]
    heads += [f"{c:g}x: questions right, the prompt evicted / kept" for c in compressions]
    heads += [f"eviction at budget {budget}: ms a layer" for budget in milliseconds]
    rows = []
    for name in sorted({*policy_names(), *ON_THE_TESTBED}):
        cells = [_label(name), str(state_bytes(name))]
        for compression in compressions:
            method = ON_THE_TESTBED.get(name, name)
            pair = [questions.get((of, compression)) for of in (method, f"{method}-prompt-kept")]
            cells.append(" / ".join(NONE if x is None else f"{x:.0f}" for x in pair))
        cells += [str(of_budget.get(name, NONE)) for of_budget in milliseconds.values()]
        rows.append(cells)
    return "\n".join(table(heads, rows))


def state_bytes(label: str) -> int:
    """Bytes that a policy carries with each token, for each layer and KV head."""
    name, settings = parse_policy_label(label)
    policy = find_policy(name)
    # triattention cannot be made without its file, which a default has not.
    made = policy(**settings) if settings else policy.model_construct()
    return 4 * made.num_numbers


def published() -> str:
    """What others have published, marked as that."""
    parts = []
    for entry in json.loads(PUBLISHED.read_text()):
        rows = [
            [name, *(NONE if number is None else f"{number}" for number in numbers)]
            for name, numbers in entry["rows"].items()
        ]
        parts.append(
            f"**Published, not measured by us**: {entry['source']} ({entry['url']}), "
            f"{entry['what']}.\n\n" + "\n".join(table(["", *entry["columns"]], rows))
        )
    return "\n\n".join(parts)


def page() -> str:
    """The whole page."""
    rules, results = json.loads(RULES.read_text()), json.loads(TESTBED.read_text())
    times = json.loads(TIMES.read_text())
    return f"""# Every policy in one page

## Likelihood and facts on a small real model

SmolLM2-135M-Instruct; passages of {rules["length"]} tokens, which no choice of a policy or of its
settings has seen; `triattention` was calibrated on other texts. The rise of the negative
log-likelihood over the full cache is in nats per token; in brackets the passages with the smallest
and the largest rise. The same top token: the share of positions at which the most probable token
is the full cache's. Three facts are stated in each passage, and asked for at token 640 and at its
end; counted are those that the full cache recalls.
`{rules["command"]}`, {rules["date"][:10]}.

{likelihood(rules)}

## Questions of the testbed, and time

Percent of questions right ([testbed](accuracy.md)); with a kept prompt at equal total memory. Times
are those of one layer of one sequence with 8 KV heads of size 128 and 4 query heads each, in plain
torch on one core of {times["machine"]["processor"]} (`{times["command"]}`, {times["date"][:10]}).
The bytes of state are those that a policy carries with each token of the budget, for each layer
and KV head. `triattention` has a file of statistics beside them, random numbers where times were
measured.

{questions_and_times(testbed(results), times)}

## Large models

{published()}
"""


if __name__ == "__main__":
    (RESULTS / "policies.md").write_text(page())
    print(page())
