"""The texts, and the sequences that are made of them."""

import subprocess
import sys

import pytest

from vase_vllm.errors import EvictionError
from vase_vllm.tools.evaluation.recall import KINDS, PASSCODES, PLACES, recall_cases
from vase_vllm.tools.evaluation.samples import text_samples
from vase_vllm.tools.evaluation.texts import HALVES, own_texts, read_texts

HASHES = """
from vase_vllm.tools.evaluation.texts import own_texts
print(*(text.sha256 for text in own_texts()))
"""


@pytest.fixture(scope="module")
def texts():
    return own_texts()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    from vase_vllm.tools.tiny_model import make_tiny_model

    directory = make_tiny_model(tmp_path_factory.mktemp("evaluate") / "tiny", layers=1)
    return AutoTokenizer.from_pretrained(directory)


def test_our_texts_are_the_same_in_every_process(texts):
    process = subprocess.run([sys.executable, "-c", HASHES], capture_output=True, text=True)
    assert process.stdout.split() == [text.sha256 for text in texts], process.stderr


def test_our_texts_are_eight_long_ones_in_two_halves_without_a_common_passage(texts):
    assert len({text.name for text in texts}) == 8
    assert own_texts(3) == texts[:3]
    assert [text.half for text in texts] == list(HALVES) * 4
    assert min(len(text.content) for text in texts) > 50_000
    passages = {
        half: {
            text.content[start : start + 200]
            for text in texts
            if text.half == half
            for start in range(0, len(text.content) - 200, 100)
        }
        for half in HALVES
    }
    assert not passages["choice"] & passages["report"]


def test_files_are_alternately_of_one_half_and_the_other(tmp_path):
    files = [tmp_path / name for name in ("a.txt", "b.txt", "c.txt")]
    for file in files:
        file.write_text(f"{file.name} é", encoding="utf-8")
    texts = read_texts([str(file) for file in files])
    assert [(text.name, text.half) for text in texts] == [
        ("a.txt", "choice"),
        ("b.txt", "report"),
        ("c.txt", "choice"),
    ]
    assert texts[1].content == "b.txt é"
    with pytest.raises(EvictionError, match="two files have this name"):
        read_texts([str(files[0]), str(files[0])])
    with pytest.raises(EvictionError, match=r"--texts \S*absent: "):
        read_texts([str(tmp_path / "absent")])


def test_a_sample_is_the_beginning_of_its_text(texts, tokenizer):
    samples = text_samples(texts[:2], tokenizer, max_tokens=300, least=100, top_logprobs=7)
    for sample, text in zip(samples, texts, strict=False):
        assert tokenizer.decode(sample.token_ids) == text.content[:300]
        assert (sample.name, sample.half, sample.top_logprobs) == (text.name, text.half, 7)
    assert samples[0].sha256 != samples[1].sha256
    with pytest.raises(EvictionError, match="has 101 tokens, and nothing is scored"):
        text_samples(texts[:1], tokenizer, max_tokens=101, least=100, top_logprobs=7)


def test_recall_cases_state_a_fact_and_ask_for_it_at_the_distance(texts, tokenizer):
    cases = recall_cases(texts, tokenizer, distances=[300, 500], instances=9, fact_at=20)
    assert len({case.name for case in cases}) == len(cases) == 2 * len(KINDS) * 9
    # A character for each token, for the texts have some that are several tokens.
    contents = ["".join(map(chr, tokenizer(text.content)["input_ids"])) for text in texts]
    for index, case in enumerate(cases):
        ids, words = case.token_ids, tokenizer.decode(case.token_ids)
        tokens, text = "".join(map(chr, ids)), texts[index % 9 % len(texts)]
        (length,) = (
            length
            for length in range(20, 200)
            if tokens[:20] + tokens[20 + length :][: case.distance]
            in contents[index % 9 % len(texts)]
        )
        statement = tokenizer.decode(ids[20 : 20 + length])
        asked = tokenizer.decode(ids[20 + length + case.distance :])
        values = "".join(tokenizer.decode([ids[position]]) for position in case.value_positions)
        assert values.replace(".", "").isdigit()
        assert len(values) == {"passcode": 4, "constant": 5, "two facts": 8}[case.kind]
        for value in {values[:4], values[-4:]}:
            assert words.count(value) == 2
            assert value in statement
            assert value in asked
        assert case.value_positions[0] > len(ids) - len(asked)
        assert asked.strip() not in statement
        assert statement not in text.content
        assert case.half == text.half
    assert cases == recall_cases(texts, tokenizer, [300, 500], 9, 20)
    with pytest.raises(EvictionError, match="give longer --texts"):
        recall_cases(texts, tokenizer, [10**6], 1, 20)


def test_every_wording_of_a_passcode_is_in_both_halves(texts, tokenizer):
    instances = len(HALVES) * len(PASSCODES)
    cases = recall_cases(texts, tokenizer, distances=[100], instances=instances, fact_at=20)
    found = {
        (case.half, question)
        for case in cases
        for _, question in PASSCODES
        for place in PLACES
        if tokenizer.decode(case.token_ids)[:-5].endswith(f"\n\n{question.format(name=place)} ")
    }
    assert found == {(half, question) for half in HALVES for _, question in PASSCODES}
