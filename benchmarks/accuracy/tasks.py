"""Walks: reasoning problems whose early facts are needed late and in an unpredictable order.

A problem gives one fact a node, "node mark next", for a forest whose nodes have random names, and
then a random order in which to ask about nodes. To answer for a node, walk from it to the end of
its path and count the nodes marked "+" on the way. Every step is written out, and every answer is
needed again at the end:

    facts c + a ; a - $ ; b + c ; ask a b . go      the prompt
    a 0 a - $ 0 so a = 0 ?                          the chain of thought, one question a line
    b 0 b + c 1 c + a 2 a - $ 2 so b = 2 ? .
    answer a is 0 b is 2 .                          the answers, in the order asked

A step is "node mark next count". All that follows "go" is determined by the prompt, token by
token: look up a fact by the node just named, copy, or add one. Single spaces separate the tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import string
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

PAD, BOS, EOS = SPECIAL = ("<pad>", "<bos>", "<eos>")
END_OF_PATH = "$"
WORDS = ("facts", ";", "ask", ".", "go", "?", END_OF_PATH, "so", "=", "answer", "is", "+", "-")
NODES = tuple(string.ascii_lowercase)
COUNTS = tuple(str(n) for n in range(len(NODES) + 1))
VOCABULARY = (*SPECIAL, *WORDS, *NODES, *COUNTS)


@dataclass(frozen=True)
class Shape:
    """How large a problem is.

    nodes: facts in the prompt; questions: how many of them are asked; branching: the probability
    that a node joins an older path instead of making the newest one longer.
    """

    nodes: int
    questions: int
    branching: float = 0.1


@dataclass(frozen=True)
class Problem:
    """Three texts, to be joined by single spaces; the end-of-sequence token follows the answer."""

    prompt: str
    chain: str
    answer: str

    @property
    def completion(self) -> str:
        """What a perfect solver writes after the prompt."""
        return f"{self.chain} {self.answer}"


def make_problem(shape: Shape, rng: random.Random) -> Problem:
    """Draw one problem; `rng` decides everything."""
    names = rng.sample(NODES, shape.nodes)
    following = forest(names, shape.branching, rng)
    density = rng.choice((0.3, 0.5, 0.7))
    marks = {name: "+" if rng.random() < density else "-" for name in names}
    facts = rng.sample(names, len(names))
    asked = rng.sample(names, shape.questions)

    prompt = ["facts"]
    for name in facts:
        prompt += [name, marks[name], following[name], ";"]
    prompt += ["ask", *asked, ".", "go"]

    chain: list[str] = []
    answer = ["answer"]
    for start in asked:
        steps, count = walk(start, following, marks)
        chain += [start, "0", *steps, "so", start, "=", count, "?"]
        answer += [start, "is", count]
    chain += ["."]
    return Problem(" ".join(prompt), " ".join(chain), " ".join([*answer, "."]))


def forest(names: list[str], branching: float, rng: random.Random) -> dict[str, str]:
    """What follows each node: mostly the name before it in `names`, so that paths are long."""
    following = {names[0]: END_OF_PATH}
    for i, name in enumerate(names[1:], start=1):
        fork = rng.random() < branching
        following[name] = rng.choice([*names[:i], END_OF_PATH]) if fork else names[i - 1]
    return following


def walk(start: str, following: dict[str, str], marks: dict[str, str]) -> tuple[list[str], str]:
    """The steps from `start` to the end of its path, as tokens, and the count of "+" among them."""
    steps: list[str] = []
    node, count = start, 0
    while node != END_OF_PATH:
        count += marks[node] == "+"
        steps += [node, marks[node], following[node], str(count)]
        node = following[node]
    return steps, str(count)


# What the testbed is evaluated on. The chain alone is at least eight times a budget of 64 tokens.
HELD_OUT = Shape(nodes=16, questions=16)
SHORTEST_COMPLETION = 512
HELD_OUT_SEED = 2606
HELD_OUT_PROBLEMS = 256
HELD_OUT_FILE = Path(__file__).parent / "held_out.jsonl"


def held_out(problems: int = HELD_OUT_PROBLEMS, seed: int = HELD_OUT_SEED) -> Iterator[Problem]:
    """The evaluation set: problems of the HELD_OUT shape that take a long enough completion."""
    rng = random.Random(seed)
    while problems:
        problem = make_problem(HELD_OUT, rng)
        if len(problem.completion.split()) >= SHORTEST_COMPLETION:
            problems -= 1
            yield problem


def read_jsonl(path: Path) -> list[Problem]:
    with path.open(encoding="utf-8") as lines:
        return [Problem(**json.loads(line)) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the held-out problems as JSON lines.")
    parser.add_argument("--out", type=Path, default=HELD_OUT_FILE)
    parser.add_argument("--problems", type=int, default=HELD_OUT_PROBLEMS)
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED)
    parser.add_argument(
        "--texts", type=Path, help="a directory for each problem as a text, in place of --out"
    )
    args = parser.parse_args()
    problems = held_out(args.problems, args.seed)
    if args.texts:
        args.texts.mkdir(parents=True, exist_ok=True)
        for number, problem in enumerate(problems):
            text = f"{problem.prompt} {problem.completion}"
            (args.texts / f"{number}.txt").write_text(text, encoding="utf-8")
        return
    with args.out.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem)) + "\n")


if __name__ == "__main__":
    main()
