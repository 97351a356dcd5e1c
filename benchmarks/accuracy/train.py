"""Train the testbed model: a small Qwen3 that solves the walks of tasks.py by chains of thought.

    python -m benchmarks.accuracy.train        under 90 minutes on a CPU; a GPU if there is one

Problems grow as the model masters them, from 3 facts to the size of the held-out set: it moves on
when MASTERY of the whole chains of the present size are right. Every problem is drawn anew, and
the loss is on what follows the prompt only, all of which is determined. When the last size is
mastered, the learning rate goes to zero, and the checkpoint, its tokenizer, the log and its plot
are written. Interrupted, the command goes on from training_state.pt, which it saves every minute;
--restart forgets it.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.accuracy.tasks import (
    BOS,
    EOS,
    HELD_OUT,
    NODES,
    PAD,
    VOCABULARY,
    Shape,
    make_problem,
)
from vase_vllm.layout.arithmetic import cdiv

HERE = Path(__file__).parent
SIZES = (3, 4, 5, 6, 8, 10, 13, HELD_OUT.nodes)
MASTERY = 0.6  # share of whole chains right that ends a size
FINAL_MASTERY = 0.9  # the same for the last size: the learning rate then decays
AT_SIZE = 0.75  # share of batches of the present size; the rest are of smaller ones
LEARNING_RATE = 3e-3  # for the first size; goes with 1 / sqrt(facts)
WARMUP_STEPS = 100
DECAY = 0.25  # of the time spent when the decay begins, or what is left of --minutes
POSITIONS = 2048
IDS = {word: i for i, word in enumerate(VOCABULARY)}
IGNORED = -100
RARE_WEIGHT = (
    5.0  # of the few tokens that take the longest look-ups: the next question, the answers
)
# a chat is one problem: its text, as in a completion
CHAT_TEMPLATE = "{{ bos_token }}{% for message in messages %} {{ message.content }}{% endfor %}"


def make_config() -> Qwen3Config:
    return Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
        vocab_size=cdiv(len(VOCABULARY), 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        bos_token_id=IDS[BOS],
        eos_token_id=IDS[EOS],
        pad_token_id=IDS[PAD],
    )


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; `<bos>` is put in front; decoding joins the words with spaces."""
    backend = Tokenizer(models.WordLevel(vocab=IDS, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, IDS[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=POSITIONS,
    )


def make_batch(
    shape: Shape, tokens: int, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Problems of one shape, about `tokens` tokens in all.

    Returns
    -------
    inputs : [problems, length], int64, padded on the right
    labels : [problems, length], int64, IGNORED except where the next token is determined
    weights : [problems, length], float32, of the labels in the loss
    """
    rows: list[tuple[list[int], int]] = []
    while sum(len(row) for row, _ in rows) < tokens:
        problem = make_problem(shape, rng)
        prompt = [IDS[word] for word in (BOS, *problem.prompt.split())]
        completion = [IDS[word] for word in (*problem.completion.split(), EOS)]
        rows.append((prompt + completion, len(prompt)))
    length = max(len(row) for row, _ in rows)
    length = cdiv(length, 32) * 32  # odd lengths halve the speed of bf16 attention on a CPU
    inputs = torch.full((len(rows), length), IDS[PAD])
    labels = torch.full((len(rows), length), IGNORED)
    for i, (row, prompt_length) in enumerate(rows):
        inputs[i, : len(row)] = torch.tensor(row)
        labels[i, prompt_length - 1 : len(row) - 1] = torch.tensor(row[prompt_length:])
    in_answer = (inputs == IDS["answer"]).cumsum(1) > 0
    weights = torch.where(in_answer | (inputs == IDS["?"]), RARE_WEIGHT, 1.0)
    return inputs, labels, weights


def make_optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between the layers, Adam for the embedding and the norms."""
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        torch.optim.Muon(
            matrices, lr=LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class Progress:
    """Where the training stands; saved and restored with the weights."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    size: int = 0  # index into SIZES
    whole_chains: float = 0.0  # moving averages, of batches of the present size
    token_accuracy: float = 0.0
    decay_from: float | None = None  # seconds
    log: list[dict[str, float]] = field(default_factory=list)

    def learning_rate(self, limit: float) -> float:
        rate = LEARNING_RATE * (SIZES[0] / SIZES[self.size]) ** 0.5
        if self.decay_from is None:
            return rate * min(1.0, (self.step + 1) / WARMUP_STEPS)
        return rate * max(0.0, 1 - (self.seconds - self.decay_from) / self.decay(limit))

    def decay(self, limit: float) -> float:
        """How many seconds the decay takes."""
        assert self.decay_from is not None
        return max(1.0, min(DECAY * self.decay_from, limit - self.decay_from))

    def finished(self, limit: float) -> bool:
        if self.decay_from is None:
            return False
        return self.seconds >= self.decay_from + self.decay(limit)

    def update(self, whole_chains: float, token_accuracy: float) -> None:
        self.whole_chains += 0.1 * (whole_chains - self.whole_chains)
        self.token_accuracy += 0.1 * (token_accuracy - self.token_accuracy)

    def promote(self, limit: float) -> None:
        """Go on to the next size, or to the decay, when this one is mastered or time runs out."""
        last = self.size == len(SIZES) - 1
        if not last and self.whole_chains > MASTERY:
            self.size += 1
            self.whole_chains *= 0.5  # the average has to be earned again
        elif self.decay_from is None and (
            (last and self.whole_chains > FINAL_MASTERY) or self.seconds > limit / (1 + DECAY)
        ):
            self.decay_from = self.seconds


def train(args: argparse.Namespace) -> Progress:
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = Qwen3ForCausalLM(make_config()).float().to(device)
    optimizers = make_optimizers(model)
    progress = Progress()
    state_file = args.state
    if args.restart:
        state_file.unlink(missing_ok=True)
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
    rng = random.Random(f"{args.seed}, {progress.step}")

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "progress": vars(progress),
        }
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters on {device}; at most {args.minutes:g} minutes")
    limit = 60 * args.minutes
    bar = tqdm(total=round(limit), initial=round(progress.seconds), unit="s", smoothing=0)
    saved_at, clock = progress.seconds, time.perf_counter()
    while not progress.finished(limit):
        newest = rng.random() < AT_SIZE
        nodes = SIZES[progress.size] if newest else SIZES[rng.randrange(progress.size + 1)]
        questions = nodes if rng.random() < 0.5 else rng.randint(1, nodes)
        tokens = args.batch_scale * (3000 + 250 * nodes)
        batch = make_batch(Shape(nodes, questions), tokens, rng)
        inputs, labels, weights = (tensor.to(device) for tensor in batch)

        learning_rate = progress.learning_rate(limit)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
        with torch.autocast(device.type, torch.bfloat16):
            logits = model(input_ids=inputs, use_cache=False).logits
        counted = labels != IGNORED
        logits, targets, weights = logits[counted].float(), labels[counted], weights[counted]
        loss = F.cross_entropy(logits, targets, reduction="none") @ weights / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

        right = logits.argmax(-1) == targets
        wrong_tokens = torch.zeros_like(counted).masked_scatter(counted, ~right)
        if newest and questions == nodes:
            whole = 1 - wrong_tokens.any(1).float().mean().item()
            progress.update(whole, right.float().mean().item())
            progress.promote(limit)
        now = time.perf_counter()
        bar.update(round(progress.seconds + now - clock) - bar.n)
        progress.seconds, clock = progress.seconds + now - clock, now
        progress.step += 1
        progress.tokens += inputs.numel()
        if progress.seconds > limit and progress.decay_from is None:
            progress.decay_from = limit
        if progress.step % 20 == 0:
            progress.log.append(
                {
                    "step": progress.step,
                    "minutes": round(progress.seconds / 60, 3),
                    "tokens": progress.tokens,
                    "nodes": SIZES[progress.size],
                    "loss": round(loss.item(), 6),
                    "token_accuracy": round(progress.token_accuracy, 5),
                    "whole_chains": round(progress.whole_chains, 4),
                    "learning_rate": round(learning_rate, 7),
                }
            )
            bar.set_postfix_str(
                f"{SIZES[progress.size]} facts, loss {loss.item():.4f}, "
                f"whole chains {progress.whole_chains:.0%}"
            )
        if progress.seconds > saved_at + 60:
            saved_at = progress.seconds
            save()
    bar.close()
    save()
    save_checkpoint(model, args.out)
    return progress


def save_checkpoint(model: Qwen3ForCausalLM, directory: Path) -> None:
    """What transformers and `vllm serve` load; bfloat16, so that vLLM runs it as it is."""
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=IDS[BOS], eos_token_id=IDS[EOS], pad_token_id=IDS[PAD], do_sample=False
    )
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)


def plot(log: list[dict[str, float]], path: Path) -> None:
    """Loss and accuracies over time; a step of the grey line is a larger problem size."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    matplotlib.rcParams["svg.hashsalt"] = "testbed"
    minutes = [row["minutes"] for row in log]
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
    top.semilogy(minutes, [row["loss"] for row in log], linewidth=0.8)
    top.set_ylabel("loss (nats a token)")
    sizes = top.twinx()
    sizes.step(minutes, [row["nodes"] for row in log], color="0.6", where="post")
    sizes.set_ylabel("facts in the prompt", color="0.4")
    sizes.set_ylim(0, max(len(NODES), 1) + 1)
    for key, label in (("token_accuracy", "tokens right"), ("whole_chains", "whole chains right")):
        bottom.plot(minutes, [row[key] for row in log], label=label, linewidth=1)
    bottom.set_ylim(0, 1.02)
    bottom.set_ylabel("accuracy at the present size")
    bottom.set_xlabel("minutes")
    bottom.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "testbed_model")
    parser.add_argument("--minutes", type=float, default=85, help="at most, decay included")
    parser.add_argument("--device", help="default: cuda if there is a GPU, else cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; default: torch's")
    parser.add_argument("--batch-scale", type=int, default=1, help="larger batches, for a GPU")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=HERE / "training_state.pt")
    parser.add_argument("--restart", action="store_true", help="forget an interrupted training")
    parser.add_argument("--log", type=Path, default=HERE / "training.jsonl")
    args = parser.parse_args()
    progress = train(args)
    args.log.write_text("".join(json.dumps(row) + "\n" for row in progress.log), encoding="utf-8")
    plot(progress.log, args.log.with_suffix(".svg"))
    args.state.unlink()
    print(f"{args.out}: whole chains right {progress.whole_chains:.1%} (last batches)")


if __name__ == "__main__":
    main()
