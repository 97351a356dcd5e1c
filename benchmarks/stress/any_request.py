"""Whatever its routes are sent, a server answers: no HTTP 500, no request that hangs.

    python -m benchmarks.stress.any_request --cases 2000

See README.md in this folder.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from rich.console import Console
from schemathesis import Case, GenerationMode

from benchmarks.common import paths
from benchmarks.common.provenance import provenance
from benchmarks.common.server import blocks_left, running_server
from vase_vllm.request_settings import BUDGET, KEYS, POLICY, PROMPT, REPORT
from vase_vllm.tools.markdown import table
from vase_vllm.tools.server import Server
from vase_vllm.tools.tiny_model import make_tiny_model

MODEL = "tiny"
ARGUMENTS = [
    *["--enforce-eager", "--max-model-len", "1024", "--block-size", "32", "--dtype", "float32"],
    *["--served-model-name", MODEL, "--kv-cache-memory-bytes", "4M"],
]
EVICTION = [
    *["--kv-eviction", "vase", "--kv-eviction-config.budget", "48"],
    *["--kv-eviction-config.window", "16"],
]
ROUTES = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/responses/{response_id}",
    "/v1/responses/{response_id}/cancel",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/chat/completions/batch",
    "/v1/systemone",
    "/generative_scoring",
    "/tokenize",
    "/detokenize",
)
"""Those that take a request of a user; the others belong to whoever runs the server."""
SAY = [{"role": "user", "content": "What is kept, and what is not?"}]
RIGHT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "What is kept, and what is not? " * 4},
    "/v1/chat/completions": {"messages": SAY},
    "/v1/responses": {"input": "What is kept, and what is not?"},
    "/v1/messages": {"messages": SAY},
    "/v1/messages/count_tokens": {"messages": SAY},
    "/v1/chat/completions/batch": {"messages": [SAY, SAY]},
    "/generative_scoring": {"query": "Is it?", "items": ["yes", "no"], "label_token_ids": [65, 66]},
    "/tokenize": {"prompt": "What is kept?"},
    "/detokenize": {"tokens": [65, 66]},
}
"""A body that is right, by route."""
LONGEST = {"max_tokens": 60, "max_completion_tokens": 60, "max_output_tokens": 60, "n": 3}
"""A request's own limits, above which its outputs would take minutes of a CPU."""
TIMEOUT = 120
"""Seconds without a word after which a request is taken to hang."""

_OWN_VALUES = (
    st.sampled_from(["vase", "none", "keep", "evict", "snapkv", ""])
    | st.integers(-5, 200)
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
)
OWN_SETTINGS = st.one_of(
    st.just({}),
    st.fixed_dictionaries(
        {},
        optional={
            POLICY: st.sampled_from(["vase", "none"]),
            BUDGET: st.integers(17, 48),
            PROMPT: st.sampled_from(["keep", "evict"]),
            REPORT: st.booleans(),
        },
    ),
    st.dictionaries(st.sampled_from([*KEYS, "kv_evictions"]), _OWN_VALUES, max_size=3),
)
"""``vllm_xargs`` about eviction: none, right ones, and others."""


@dataclass
class Outcome:
    """What became of the cases that one route was sent.

    Attributes:
        statuses: HTTP status to how often it came.
        failures: what was sent and what came back, of cases with HTTP 500 or no answer.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    unanswered: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    failures: list[str] = field(default_factory=list)


def operations(server: Server, routes: Sequence[str]) -> Iterator[Any]:
    """The operations of a server's own description that are tested."""
    # The server describes itself when it is asked for the first time, which may take a while.
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json", timeout=TIMEOUT)
    found = {}
    for result in schema.get_all_operations():
        operation = result.ok()
        if operation.path in routes:
            found[operation.path] = operation
    if missing := set(routes) - set(found):
        raise ValueError(f"the server has no route {', '.join(sorted(missing))}")
    yield from (found[route] for route in routes)


def fitted(body: Any, right: dict[str, Any] | None, chosen: list[int], own: dict[str, Any]) -> Any:
    """A generated body for the model that is there, not too long, with settings of eviction.

    Hardly any body that fits its description is right as a whole. So most cases are a right body
    in which a few fields are generated.

    Args:
        right: a right body; None: the generated one is sent as a whole.
        chosen: which of the generated fields it gets, as numbers of any size.
    """
    if not isinstance(body, dict):
        return body
    if right is not None:
        keys = [key for key in sorted(body) if key.isidentifier() and key.isascii()]
        body = right | {key: body[key] for key in (keys[n % len(keys)] for n in chosen if keys)}
    changed = body | {"model": MODEL}
    for key, most in LONGEST.items():
        value = changed.get(key)
        if key == "n" and value is None:
            continue
        if not isinstance(value, (int, float)) or value > most:
            changed[key] = most
    if own:
        changed["vllm_xargs"] = own
    return changed


def press(server: Server, route: Any, num_cases: int, number: int) -> Outcome:
    """Send a route three cases that fit its description for each one that does not.

    Args:
        route: an operation of :func:`operations`.
        number: seed of the cases.
    """
    outcome = Outcome()
    num_wrong = num_cases // 4 if len(route.body) else 0
    for mode, count in (
        (GenerationMode.POSITIVE, num_cases - num_wrong),
        (GenerationMode.NEGATIVE, num_wrong),
    ):
        if not count:
            continue

        @seed(number)
        @settings(
            max_examples=count,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(
            case=route.as_strategy(generation_mode=mode),
            right=st.sampled_from([None, *[RIGHT.get(route.path)] * 4]),
            chosen=st.lists(st.integers(0, 1000), max_size=3),
            own=OWN_SETTINGS,
        )
        def send(case: Case, right: Any, chosen: list[int], own: dict[str, Any]) -> None:
            if case.meta is not None and case.meta.generation.mode.is_positive:
                case.body = fitted(case.body, right, chosen, own)
            _judge(server, case, outcome)

        send()
    return outcome


def _judge(server: Server, case: Case, outcome: Outcome) -> None:
    """Send one case and take note of what comes back."""
    start = time.monotonic()
    try:
        response = case.call(base_url=server.url, timeout=TIMEOUT)
    except requests.RequestException as error:
        outcome.unanswered += 1
        outcome.failures.append(f"{error}: {case.as_curl_command()}")
        return
    elapsed = time.monotonic() - start
    outcome.seconds += elapsed
    outcome.longest = max(outcome.longest, elapsed)
    outcome.statuses[response.status_code] += 1
    text = response.content.decode(errors="replace")
    # A stream has its status already when its request fails.
    if response.status_code == 500 or re.search(r'"code": ?500\b', text):
        outcome.failures.append(f"{text[:500]}: {case.as_curl_command()}")


def measure(server: Server, routes: Sequence[str], num_cases: int, number: int) -> dict[str, Any]:
    """Send every route as many cases, and ask the server afterwards what is left.

    Args:
        num_cases: of each route.
        number: seed of the cases.
    """
    start = time.monotonic()
    outcomes = {
        operation.path: press(server, operation, num_cases, number)
        for operation in operations(server, routes)
    }
    return {
        "seconds": round(time.monotonic() - start, 1),
        "blocks_left": blocks_left(server),
        "healthy": requests.get(server.url + "/health", timeout=TIMEOUT).ok,
        "routes": {
            path: asdict(outcome) | {"statuses": dict(sorted(outcome.statuses.items()))}
            for path, outcome in outcomes.items()
        },
    }


def is_good(result: dict[str, Any]) -> bool:
    """Whether every case was answered, none with HTTP 500, and nothing is left behind."""
    failures = sum(len(route["failures"]) for route in result["routes"].values())
    return result["healthy"] and failures == result["blocks_left"] == 0


def page(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows, total = [], 0
    for path, route in result["routes"].items():
        sent = sum(route["statuses"].values()) + route["unanswered"]
        total += sent
        statuses = ", ".join(f"{status}: {count}" for status, count in route["statuses"].items())
        mean = f"{route['seconds'] / max(sent, 1):.2f}"
        numbers = [str(sent), mean, f"{route['longest']:.1f}"]
        rows.append([f"`{path}`", statuses, *numbers, str(len(route["failures"]))])
    heads = ["route", "HTTP statuses", "cases", "mean s", "longest s", "failures"]
    machine = result["machine"]
    return "\n".join(
        [
            "# Whatever the routes are sent",
            "",
            f"{result['date'][:10]}, {machine['processor']}, {machine['cores']} cores; "
            f"`{result['command']}`. {total} cases in {result['seconds'] / 60:.1f} minutes: "
            + ("**all answered, no HTTP 500**" if is_good(result) else "**NOT as it must be**")
            + f". {result['evictions']} evictions meanwhile; afterwards {result['blocks_left']} "
            "blocks in use.",
            "",
            *table(heads, rows, num_left=2),
            "",
        ]
    )


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="of all routes together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--full-cache", action="store_true", help="serve without eviction, to tell whose a fault is"
    )
    parser.add_argument("--output", type=Path, default=paths.RESULTS / "stress", metavar="DIR")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    serve_arguments = [*ARGUMENTS, *([] if args.full_cache else EVICTION)]
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(Path(folder) / "model", layers=2, dtype="float32")
        with running_server(model, serve_arguments) as server:
            result = {
                **provenance(("vllm", "torch", "vase-vllm", "schemathesis", "hypothesis")),
                "serve_arguments": serve_arguments,
                **measure(server, ROUTES, -(-args.cases // len(ROUTES)), args.seed),
                "evictions": 0 if args.full_cache else server.eviction_stats()["evictions"],
            }
    args.output.mkdir(parents=True, exist_ok=True)
    name = "any-request-full-cache" if args.full_cache else "any-request"
    (args.output / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / f"{name}.md").write_text(page(result))
    Console(soft_wrap=True).print(page(result), markup=False)
    return int(not is_good(result))


if __name__ == "__main__":
    sys.exit(main())
