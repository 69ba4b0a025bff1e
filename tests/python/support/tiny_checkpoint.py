"""A complete random checkpoint with a byte tokenizer and a chat template, made in milliseconds."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lora_serve.testing.models import make_random_model

NUM_BYTES = 256
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' and not loop.first %}"
    "{{ raise_exception('the system message must come first') }}{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_checkpoint(path: Path, architecture: str = "Qwen3ForCausalLM", **options: Any) -> Path:
    """Write a model whose tokens are bytes, so that a prompt's length in tokens is its length in bytes.

    It never ends a text by itself: an answer has exactly `max_tokens` tokens unless a stop is asked for.
    """
    options = {"vocab_size": VOCAB_SIZE, "seed": 7, **options}
    make_random_model(path, architecture, **options)
    write_byte_tokenizer(path)
    return path


def write_byte_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            eos_token="<|im_end|>",
            pad_token="<|endoftext|>",
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(path)
