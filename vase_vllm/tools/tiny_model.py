"""Writes a small Qwen3 model with random weights, for trials and tests without download or GPU.

Tokens are bytes, and a token's id is the byte's value. The weights are random, so the generated
text has no meaning. Attention is peaked enough that the output depends on what is in the KV cache.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vase_vllm.layout.arithmetic import cdiv

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

START, END, END_OF_TEXT = SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
BYTES = 256
PRINTABLE = [ord("\n"), *range(0x20, 0x7F)]
DTYPES = ("bfloat16", "float16", "float32")

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""

ATTENTION_LOGITS_STD = 2.0
OUTPUT_LOGITS_STD = 2.0
CONSTANT_CHANNEL = 4.0
SUPPRESSION = 100.0


def make_tiny_model(
    directory: str | Path,
    *,
    layers: int = 4,
    hidden_size: int = 256,
    query_heads: int = 8,
    kv_heads: int = 2,
    head_dim: int = 64,
    intermediate_size: int = 512,
    max_position_embeddings: int = 32768,
    dtype: str = "bfloat16",
    seed: int = 0,
    printable: bool = True,
) -> Path:
    """Write a model and its tokenizer to a directory that vLLM and transformers can load.

    Args:
        directory: is created if it does not exist; files of an earlier model are overwritten.
        layers, hidden_size, query_heads, kv_heads, head_dim, intermediate_size: the shape of the
            model, in Qwen3's terms.
        max_position_embeddings: longest sequence that vLLM accepts, in tokens.
        dtype: ``bfloat16``, ``float16`` or ``float32``. vLLM runs a float32 model in float32 only
            with ``--dtype float32``.
        seed: the weights are a function of the seed and the shape.
        printable: whether the model generates printable ASCII only, or any byte. In either case it
            never generates an end-of-sequence token.

    Returns:
        ``directory``.

    Raises:
        ValueError: the dtype is unknown, or the query heads are not a multiple of the KV heads.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}, must be one of {', '.join(DTYPES)}")
    sizes = {
        "layers": layers,
        "hidden_size": hidden_size,
        "query_heads": query_heads,
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": max_position_embeddings,
    }
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} ({size}) must be at least 1")
    if query_heads % kv_heads:
        raise ValueError(f"query_heads ({query_heads}) must be a multiple of kv_heads ({kv_heads})")

    import torch
    from safetensors.torch import save_file
    from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = byte_tokenizer(max_position_embeddings)
    end_ids = tokenizer.convert_tokens_to_ids([END, END_OF_TEXT])
    config = Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        dtype=dtype,
        vocab_size=cdiv(len(tokenizer), 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=max_position_embeddings,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=end_ids[0],
        pad_token_id=tokenizer.pad_token_id,
    )
    generation_config = GenerationConfig(
        do_sample=True, eos_token_id=end_ids, pad_token_id=tokenizer.pad_token_id
    )
    model = Qwen3ForCausalLM(config)
    fill_weights(model, seed=seed, allowed=PRINTABLE if printable else list(range(BYTES)))
    model.to(getattr(torch, dtype))

    # model.save_pretrained would print a progress bar.
    config.save_pretrained(directory)
    generation_config.save_pretrained(directory)
    weights = directory / "model.safetensors"
    save_file(model.state_dict(), weights, metadata={"format": "pt"})
    tokenizer.save_pretrained(directory)
    return directory


def byte_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer without merges: ids below 256 are bytes, special tokens follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(byte_characters())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=END_OF_TEXT,
        extra_special_tokens=[START],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


def byte_characters() -> list[str]:
    """Return the character of each byte in a byte-level vocabulary, as GPT-2 defines it."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    shifted = iter(range(BYTES, 2 * BYTES))
    return [chr(byte if byte in plain else next(shifted)) for byte in range(BYTES)]


def fill_weights(model: Qwen3ForCausalLM, *, seed: int, allowed: list[int]) -> None:
    """Draw the weights such that activations have a scale of about 1 at any width.

    The weights themselves rule out the tokens that are not ``allowed``, so that this holds in every
    engine. The first channel of the residual stream has the same positive value at every position,
    because no layer writes to it, and the output head uses it as a bias.

    Args:
        model: the model whose weights are overwritten.
        seed: seed of the draws.
        allowed: ids of the tokens that the model may generate.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 1:  # RMSNorm
                weight.fill_(1.0)
            else:  # [out_features, in_features]; the embedding, [vocab, hidden], is scaled below
                weight.normal_(0.0, weight.shape[1] ** -0.5, generator=generator)

        # [vocab, hidden]: a row is the vector of one token, not a sum over inputs.
        embedding = model.model.embed_tokens.weight.mul_(model.config.hidden_size**0.5)
        embedding[:, 0] = CONSTANT_CHANNEL
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[0] = 0.0
            layer.mlp.down_proj.weight[0] = 0.0
            layer.self_attn.q_norm.weight.mul_(ATTENTION_LOGITS_STD)

        head = model.lm_head.weight.mul_(OUTPUT_LOGITS_STD)
        head[:, 0] = -SUPPRESSION
        head[allowed, 0] = 0.0
