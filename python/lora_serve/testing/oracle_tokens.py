"""The oracle's tokens: a hash of everything that a row has read."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from lora_serve.executor.uniform_stream import mix_64


def oracle_tokens(
    adapter_id: int, prompt_token_ids: Iterable[int], max_tokens: int, vocab_size: int = 1000
) -> list[int]:
    """Tokens that a request gets when it runs alone.

    Parameters
    ----------
    adapter_id : int
        The generation; 0 = the base model.
    prompt_token_ids : iterable of int
        At least one token.
    max_tokens : int
        Tokens to give.
    vocab_size : int
        As in `OracleOptions`.

    Returns
    -------
    list of int
        [max_tokens], each in [0, vocab_size).

    Notes
    -----
    O(prompt + max_tokens); does not share any state or page with an `OracleExecutor`.
    """
    prompt = np.array(list(prompt_token_ids), dtype=np.int64)
    adapters = np.full(len(prompt), adapter_id, dtype=np.int64)
    total = entry_hashes(adapters, prompt, np.arange(len(prompt))).sum(keepdims=True)
    tokens: list[int] = []
    for index in range(max_tokens):
        tokens.append(int(tokens_of(total, vocab_size)[0]))
        newest = np.array([tokens[-1]], dtype=np.int64)
        total = total + entry_hashes(adapters[:1], newest, np.array([len(prompt) + index]))
    return tokens


def entry_hashes(
    adapters: npt.NDArray[np.int64], tokens: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.uint64]:
    """One hash an entry; their sum modulo 2**64 is the hash of a sequence, since each holds its position."""
    inner = mix_64(adapters.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + tokens.astype(np.uint64))
    return mix_64(inner + positions.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03))


def tokens_of(hashes: npt.NDArray[np.uint64], vocab_size: int) -> npt.NDArray[np.int32]:
    """Give the tokens, [B] int32, that follow sequences of these hashes, [B] uint64."""
    tokens: npt.NDArray[np.int32] = (mix_64(hashes) % np.uint64(vocab_size)).astype(np.int32)
    return tokens
