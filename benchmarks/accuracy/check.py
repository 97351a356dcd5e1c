"""How many held-out problems the full cache solves, in transformers or in vLLM, by greedy decoding.

python -m benchmarks.accuracy.check --engine hf
python -m benchmarks.accuracy.check --engine vllm
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

from tqdm import tqdm

from benchmarks.accuracy.grading import final_answer
from benchmarks.accuracy.tasks import EOS, HELD_OUT_FILE, Problem, read_jsonl

MODEL = Path(__file__).parent / "testbed_model"
MAX_NEW_TOKENS = 1024


def generate_hf(model_directory: Path, prompts: list[str], batch_size: int = 64) -> list[str]:
    """Greedy completions by transformers, in batches padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype="auto").to(device)
    completions: list[str] = []
    for i in tqdm(range(0, len(prompts), batch_size), unit="batch"):
        batch = tokenizer(prompts[i : i + batch_size], return_tensors="pt", padding=True)
        batch = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        new = output[:, batch["input_ids"].shape[1] :]
        completions += tokenizer.batch_decode(new, skip_special_tokens=True)
    return completions


def generate_vllm(model_directory: Path, prompts: list[str]) -> list[str]:
    """Greedy completions by vLLM, in this process."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model_directory),
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        max_num_seqs=64,
        seed=0,
    )
    parameters = SamplingParams(temperature=0, max_tokens=MAX_NEW_TOKENS)
    return [output.outputs[0].text for output in llm.generate(prompts, parameters)]


def score(problems: list[Problem], completions: list[str]) -> dict[str, float]:
    """Shares of problems whose answer is right, and whose every token is."""
    pairs = [
        (problem, " ".join(completion.replace(EOS, "").split()))
        for problem, completion in zip(problems, completions, strict=True)
    ]
    return {
        "problems": len(pairs),
        "answers_right": sum(p.answer == final_answer(c) for p, c in pairs) / len(pairs),
        "whole_chains_right": sum(p.completion == c for p, c in pairs) / len(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engine", choices=["hf", "vllm"], default="hf")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--problems", type=Path, default=HELD_OUT_FILE)
    parser.add_argument("--limit", type=int, help="only the first so many")
    args = parser.parse_args()
    problems = read_jsonl(args.problems)[: args.limit]
    generate = {"hf": generate_hf, "vllm": generate_vllm}[args.engine]
    completions = generate(args.model, [problem.prompt for problem in problems])
    print(json.dumps({"engine": args.engine, **score(problems, completions)}))


if __name__ == "__main__":
    main()
