"""The reasoning testbed: its problems are what they say, and the committed model solves them."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.accuracy import tasks
from benchmarks.accuracy.check import MODEL
from benchmarks.accuracy.tasks import HELD_OUT_FILE, Problem, Shape, make_problem


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    nodes = draw(st.integers(1, len(tasks.NODES)))
    return Shape(nodes, draw(st.integers(1, nodes)), draw(st.floats(0, 1)))


def solve(prompt: str) -> str:
    """The completion, from the text of the prompt alone and by other code than the generator's."""
    facts, question = prompt.removeprefix("facts ").removesuffix(" . go").split(" ; ask ")
    table = {name: (mark, after) for name, mark, after in (f.split() for f in facts.split(" ; "))}
    lines, answers = [], []
    for start in question.split():
        node, count, line = start, 0, f"{start} 0"
        for _ in table:
            mark, after = table[node]
            count += mark == "+"
            line += f" {node} {mark} {after} {count}"
            node = after
            if node == "$":
                break
        assert node == "$", "a walk never ends"
        lines.append(f"{line} so {start} = {count} ?")
        answers.append(f"{start} is {count}")
    return f"{' '.join(lines)} . answer {' '.join(answers)} ."


@settings(deadline=None)
@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_problem_is_solved_by_its_prompt(shape: Shape, seed: int) -> None:
    problem = make_problem(shape, random.Random(seed))
    assert problem.completion == solve(problem.prompt)
    assert problem.prompt.count(";") == shape.nodes
    assert problem.answer.count(" is ") == shape.questions
    assert {*problem.prompt.split(), *problem.completion.split()} <= set(tasks.VOCABULARY)


@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_problem_depends_on_shape_and_seed_only(shape: Shape, seed: int) -> None:
    assert make_problem(shape, random.Random(seed)) == make_problem(shape, random.Random(seed))


def test_held_out_file_is_what_the_generator_writes() -> None:
    problems = tasks.read_jsonl(HELD_OUT_FILE)
    assert problems == list(tasks.held_out())
    assert len({problem.prompt for problem in problems}) == len(problems) == 256
    assert min(len(p.completion.split()) for p in problems) >= 8 * 64


def test_tokenizer_has_one_token_a_word() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    problem = make_problem(tasks.HELD_OUT, random.Random(0))
    ids = tokenizer(problem.prompt).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert len(ids) == 1 + len(problem.prompt.split())
    assert tokenizer.decode(ids, skip_special_tokens=True) == problem.prompt
    chat = [{"role": "user", "content": problem.prompt}]
    assert tokenizer.apply_chat_template(chat, return_dict=False) == ids


def test_model_solves_held_out_problems() -> None:
    """Every token the likeliest after the right ones before it: so greedy decoding is right too."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    problems = tasks.read_jsonl(HELD_OUT_FILE)[:32]
    solved = 0
    for problem in problems:
        prompt = tokenizer(problem.prompt).input_ids
        words = [*problem.completion.split(), tasks.EOS]
        completion = tokenizer.convert_tokens_to_ids(words)
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + completion])).logits[0]
        predicted = logits[len(prompt) - 1 : -1].argmax(-1)
        solved += predicted.tolist() == completion
    assert solved >= 0.95 * len(problems)


def test_model_solves_small_problems_by_greedy_decoding() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
    rng = random.Random(5)
    problems: list[Problem] = [make_problem(Shape(6, 6), rng) for _ in range(8)]
    batch = tokenizer([p.prompt for p in problems], return_tensors="pt", padding=True)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=256,
        do_sample=False,
    )
    new = output[:, batch["input_ids"].shape[1] :]
    completions = tokenizer.batch_decode(new, skip_special_tokens=True)
    assert completions == [problem.completion for problem in problems]
