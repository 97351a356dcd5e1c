"""How good a completion is: from the strictest mark, every token right, down to single look-ups.

The strict marks say whether a method leaves a model unharmed. Where it does not, one wrong token
in 633 makes them 0 for every method alike; the graded ones then say how much of it is left.
"""

from __future__ import annotations

from benchmarks.accuracy.tasks import END_OF_PATH, EOS, Problem, walk

Facts = tuple[dict[str, str], dict[str, str]]


def read_prompt(prompt: str) -> tuple[Facts, list[str]]:
    """What a prompt says: what follows each node, its mark, and the nodes asked about, in order."""
    words = prompt.split()
    ask = words.index("ask")
    following, marks = {}, {}
    for i in range(1, ask, 4):
        node, marks[node], following[node] = words[i], *words[i + 1 : i + 3]
    return (following, marks), words[ask + 1 : words.index(".", ask)]


def final_answer(completion: str) -> str:
    """The part of a completion that is marked: from the first "answer" on, or nothing."""
    words = completion.replace(EOS, "").split()
    return " ".join(words[words.index("answer") :]) if "answer" in words else ""


def in_a_loop(completion: str, longest_period: int = 128, times: int = 3) -> bool:
    """Whether a completion ends in the same words over and over, at least `times` times."""
    words = completion.split()
    return any(
        words[-period * times :] == words[-period:] * times
        for period in range(1, min(longest_period, len(words) // times) + 1)
    )


def chain_lines(words: list[str]) -> list[list[str]]:
    """The lines of a chain of thought, one for each question, without the "?" that ends them.

    A node's later lines are left out: who writes the same line over and over gets nothing for it.
    """
    chain = words[: words.index("answer")] if "answer" in words else words
    lines = [line.split() for line in " ".join(chain).split("?")]
    first: dict[str, list[str]] = {}
    for line in lines:
        if line and line != ["."]:
            first.setdefault(line[0], line)
    return list(first.values())


def questions_right(lines: list[list[str]], facts: Facts, asked: list[str]) -> float:
    """Share of the nodes asked about whose line ends in the right count, however it got there."""
    conclusions = {line[0]: line[-4:] for line in lines}
    right = (["so", node, "=", walk(node, *facts)[1]] == conclusions.get(node) for node in asked)
    return sum(right) / len(asked)


def look_ups_right(lines: list[list[str]], facts: Facts) -> float:
    """Share of the steps written that are right given the step before them; 0 without a step.

    So an error counts once: what follows from it is judged as if it were true.
    """
    following, marks = facts
    right = written = 0
    for line in lines:
        body = line[2 : line.index("so")] if "so" in line else line[2:]
        expected, count = line[0], line[1] if len(line) > 1 else ""
        for step in (body[i : i + 4] for i in range(0, len(body), 4)):
            written += 1
            if expected in marks and count.isdigit():
                now = str(int(count) + (marks[expected] == "+"))
                right += step == [expected, marks[expected], following[expected], now]
            if len(step) == 4:
                expected, count = step[2:]
        # who stops before the end of the path has left out a step
        written += expected != END_OF_PATH
    return right / written if written else 0.0


def right_prefix(words: list[str], reference: list[str]) -> float:
    """Share of the reference completion that is there before the first wrong word."""
    pairs = enumerate(zip(words, reference, strict=False))
    shorter = min(len(words), len(reference))
    return next((i for i, (a, b) in pairs if a != b), shorter) / len(reference)


def questions_within(problem: Problem, tokens: int) -> float:
    """Share of the questions whose count is among the first ``tokens`` of the completion."""
    words = problem.chain.split()
    counts = [i + 3 for i, word in enumerate(words) if word == "so"]
    return sum(i < tokens for i in counts) / len(counts)


def grade(problem: Problem, completion: str) -> dict[str, float]:
    """All marks of a completion, each from 0 to 1.

    exact_match: the final answer, all of it. whole_chain: every token. questions_right,
    look_ups_right, right_prefix: see the functions. in_a_loop: ends in the same words over and
    over, the one mark that is better lower.
    """
    words = completion.replace(EOS, "").split()
    facts, asked = read_prompt(problem.prompt)
    lines = chain_lines(words)
    reference = problem.completion.split()
    return {
        "questions_right": questions_right(lines, facts, asked),
        "look_ups_right": look_ups_right(lines, facts),
        "right_prefix": right_prefix(words, reference),
        "exact_match": float(final_answer(completion) == problem.answer),
        "whole_chain": float(words == reference),
        "in_a_loop": float(in_a_loop(completion)),
    }
