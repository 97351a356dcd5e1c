"""`vase-vllm calibrate`: its numbers against transformers', and what is refused."""

import pytest
import torch

from tests.support.engines import engine, generate, greedy, random_prompt, release
from tests.tools.calibration.test_authors_file import write_authors_file
from vase_vllm.config import EvictionConfig
from vase_vllm.errors import EvictionError
from vase_vllm.policies.query_statistics import read_statistics, rotation_pairs
from vase_vllm.tools import cli
from vase_vllm.tools.calibration.collector import QueryCollector
from vase_vllm.tools.tiny_model import make_tiny_model

MAX_TOKENS = 200


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("calibrate") / "tiny"
    return make_tiny_model(directory, layers=2, query_heads=4, kv_heads=2, dtype="float32")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Longer than a step of the engine, longer than --max-tokens, and short."""
    directory = tmp_path_factory.mktemp("texts")
    files = [directory / name for name in ("a.txt", "b.txt", "c.txt")]
    for file, repetitions in zip(files, (12, 40, 1), strict=True):
        file.write_text(f"{file.name} has its own words. " * repetitions)
    return files


def calibrate(model, *arguments) -> int:
    return cli.main(["calibrate", str(model), *map(str, arguments), "--dtype", "float32"])


def by_transformers(model, texts) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of the pairs of the queries, that of their lengths, and the model's frequencies."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    queries = {index: [] for index in range(len(theirs.model.layers))}
    for index, layer in enumerate(theirs.model.layers):
        # The norm is the last that happens to a query before RoPE: [1, tokens, heads, D].
        layer.self_attn.q_norm.register_forward_hook(
            lambda _module, _args, output, index=index: queries[index].append(output[0])
        )
    with torch.inference_mode():
        for text in texts:
            ids = tokenizer(text.read_text())["input_ids"][:MAX_TOKENS]
            theirs(torch.tensor([ids]))
    halves = [torch.cat(found).double().chunk(2, dim=-1) for found in queries.values()]
    pairs = [torch.complex(*half) for half in halves]  # [tokens, heads, D / 2]
    return (
        torch.stack([found.mean(dim=0) for found in pairs]),
        torch.stack([found.abs().mean(dim=0) for found in pairs]),
        theirs.model.rotary_emb.inv_freq,
    )


@pytest.mark.slow
def test_the_statistics_are_those_of_transformers(model, texts, tmp_path, capsys):
    mean, length, frequencies = by_transformers(model, texts)
    output = tmp_path / "statistics"
    arguments = ["--output", output, "--kv-cache-memory-bytes", "64M", "--block-size", "32"]
    try:
        assert (
            calibrate(
                *[model, "--texts", *texts, "--max-tokens", MAX_TOKENS],
                *[*arguments, "--max-num-batched-tokens", "128"],
            )
            == 0
        )
    finally:
        release()
    assert "mean resultant length of the queries: " in capsys.readouterr().out
    found = read_statistics(str(output))
    torch.testing.assert_close(found.mean, mean.to(torch.complex64), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.mean_length, length.float(), atol=1e-4, rtol=1e-3)
    assert (found.mean_length > found.mean.abs()).all()
    torch.testing.assert_close(
        found.frequencies, frequencies.double().repeat(2, 1), rtol=1e-6, atol=0
    )
    assert torch.equal(found.pairs, rotation_pairs(64, 64, is_neox_style=True))
    assert found.origin["tokens"] == str(2 * MAX_TOKENS + len(texts[2].read_text()))
    assert found.origin["model"] == str(model)
    config = EvictionConfig.parse({"policy": "triattention", "statistics": str(output)})
    config.policy.check_model(found.shape)

    # The same from a file of the authors, and weights that are not read.
    write_authors_file(tmp_path / "stats.pt", found.mean, found.mean_length)
    try:
        assert (
            calibrate(
                *[model, "--convert", tmp_path / "stats.pt", "--output", tmp_path / "converted"],
                *arguments[2:],
            )
            == 0
        )
    finally:
        release()
    converted = read_statistics(str(tmp_path / "converted"))
    for name in ("mean", "mean_length", "frequencies", "pairs"):
        torch.testing.assert_close(getattr(converted, name), getattr(found, name))
    assert converted.shape == found.shape


@pytest.mark.slow
def test_a_scaled_rope_beside_sliding_windows_is_seen_in_the_layers_that_evict(models):
    with engine(models.gpt_oss(), None) as llm:
        collector = QueryCollector(llm)
        generate(llm, [random_prompt(100, 1), random_prompt(300, 2)], greedy(1))
        sums = collector.sums(400)
        with pytest.raises(EvictionError, match=r"^layer 1: 400 of 401 queries were seen before"):
            collector.sums(401)
    assert list(sums) == [1]
    assert (sums[1].rotation.scale > 1).all()
    assert (sums[1].lengths > sums[1].queries.abs()).all()


@pytest.mark.slow
def test_queries_that_are_not_turned_by_rope_are_refused(models):
    with engine(models.bloom(), None) as llm:
        collector = QueryCollector(llm)
        generate(llm, [random_prompt(20, 1)], greedy(1))
        with pytest.raises(
            EvictionError, match=r"^layer 0: 0 of 20 queries .* calibrate on a CPU$"
        ):
            collector.sums(20)


@pytest.mark.slow
def test_queries_that_change_after_rope_are_refused(models):
    """As where a model normalises them then, or turns them in another way than it says."""
    with engine(models.qwen3(), None) as llm:
        collector = QueryCollector(llm)
        (layers,) = llm.apply_model(lambda model: list(model.model.layers))
        layers[1].self_attn.rotary_emb.register_forward_hook(
            lambda _module, _args, output: (output[0].flip(-1), output[1])
        )
        generate(llm, [random_prompt(20, 1)], greedy(1))
        with pytest.raises(EvictionError, match=r"^layer 0: 0 of 20 queries were seen"):
            collector.sums(20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "1"], "--max-tokens (1) must be at least 2"),
        (["--max-tokens", "100000"], "--max-tokens (100000) must be below the model's context of"),
        (["--output", "no/such/directory/file"], "--output no/such/directory/file: it must be"),
        (["--output", "."], "--output .: it must be a file"),
        (["--texts", "absent.txt"], "--texts absent.txt: "),
        (["--texts", __file__, "--half", "report"], "--half report: there is no such text"),
        (["--max-model-len", "512"], "--max-model-len 512: calibrate sets it from --max-tokens"),
        (["--kv-eviction", "vase"], "--kv-eviction: calibrate runs without eviction; remove it"),
        (["--enable-prefix-caching"], "--enable-prefix-caching: calibrate computes every token"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size 2: calibrate sees the queries"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_calibrated_is_refused_in_one_line(
    model, arguments, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    output = [] if "--output" in arguments else ["--output", "statistics"]
    try:
        status = calibrate(model, *output, *arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.strip().count("\n") == 0
    assert not (tmp_path / "statistics").exists()
