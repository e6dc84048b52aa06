"""A small language model with a tokenizer and a chat template, made on the spot: a token for each character of
ASCII that can be printed, random weights, no end token."""

from __future__ import annotations

from pathlib import Path

import torch

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONTEXT = 512


def save(folder: Path, template: str | None = TEMPLATE) -> Path:
    """Config, weights and tokenizer in a folder, as a hub download has them."""
    import transformers

    torch.manual_seed(0)
    config = transformers.OlmoeConfig(
        hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=97, num_experts=8, num_experts_per_tok=2, pad_token_id=0, eos_token_id=None, bos_token_id=None,
        max_position_embeddings=CONTEXT, initializer_range=0.2,
    )  # fmt: skip
    transformers.OlmoeForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder, template)
    return folder


def save_tokenizer(folder: Path, template: str | None = TEMPLATE) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    letters = [chr(c) for c in range(33, 127)] + [
        "\u0120",
        "\u010a",
    ]  # a space and a line's end, as ByteLevel writes them
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=97, special_tokens=["<pad>"], initial_alphabet=letters, show_progress=False
    )
    made.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>")
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
