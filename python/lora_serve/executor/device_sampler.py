"""Chooses the tokens of rows that are not plainly greedy on the device, without waiting for it.

The same choice as `sampler.sample` makes, put on the execution stream behind the model's logits. The host
gives parameters and uniform numbers, all in one copy; tokens and log probabilities come back with the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lora_serve.common.sampling_params import SamplingParams
from lora_serve.executor.last_tokens import FAILED
from lora_serve.executor.logit_adjustments import apply_changes, collect_changes
from lora_serve.executor.logprobs import gather_logprobs
from lora_serve.executor.sampling_state import SamplingState
from lora_serve.executor.uniform_stream import seeded_uniforms
from lora_serve.executor.uploads import Uploads
from lora_serve.kernels.draw_token import draw_token
from lora_serve.kernels.draw_token_floors import raise_floors_by_count, raise_floors_by_mass
from lora_serve.kernels.greedy_sample import greedy_sample


@dataclass(frozen=True)
class RowsToSample:
    """Rows of logits that sample, by place. All lists are aligned.

    Parameters
    ----------
    places : list of int
        Each row's place in the logits [N, V], ascending.
    states : list of SamplingState
        Their outputs are read only where there are penalties, and their grammars.
    num_outputs : list of int
        Tokens that each has sampled before.
    failed : list of int
        Places of rows that must not go on, whatever their logits are.
    """

    places: list[int]
    states: list[SamplingState]
    num_outputs: list[int]
    failed: list[int]

    def adjusting(self) -> list[int]:
        """Indices of rows whose token is chosen from other logits than the model's."""
        pairs = zip(self.states, self.num_outputs, strict=True)
        return [i for i, (state, num_outputs) in enumerate(pairs) if state.adjusts_logits_at(num_outputs)]

    def random(self) -> list[int]:
        """Indices of rows whose token is drawn."""
        return [i for i, state in enumerate(self.states) if not state.params.is_greedy]

    def with_logprobs(self) -> list[int]:
        """Indices of rows that want log probabilities."""
        return [i for i, state in enumerate(self.states) if state.params.logprobs is not None]


@dataclass(frozen=True, eq=False)
class _Draws:
    """What drawing needs, one number a random row: on the host numpy arrays, on the device tensors."""

    uniforms: npt.NDArray[np.float64]
    top_p: npt.NDArray[np.float64]
    top_k: npt.NDArray[np.float64]
    temperature: npt.NDArray[np.float32]
    floors: npt.NDArray[np.float32]

    @staticmethod
    def of(rows: RowsToSample, random: list[int], vocab_size: int) -> _Draws:
        states = [rows.states[i] for i in random]
        params = [state.params for state in states]
        return _Draws(
            uniforms=seeded_uniforms(
                [state.drawing_seed for state in states], [rows.num_outputs[i] for i in random]
            ),
            top_p=np.array([p.top_p if p.top_p < 1 else 0 for p in params], dtype=np.float64),
            top_k=np.array([p.top_k if 0 < p.top_k < vocab_size else 0 for p in params], dtype=np.float64),
            temperature=np.array([p.temperature for p in params], dtype=np.float32),
            floors=np.array([_lowest_score(p) for p in params], dtype=np.float32),
        )

    def arrays(self) -> list[npt.NDArray[np.generic]]:
        return [self.uniforms, self.top_p, self.top_k, self.temperature, self.floors]


class DeviceSampler:
    """Changes the best tokens of rows into the tokens that the rows' parameters ask for.

    Parameters
    ----------
    num_buffers : int
        Steps that may be on their way.
    device : torch.device
        Where logits are; the CPU in tests, with the kernels in Triton's interpreter.
    """

    def __init__(self, num_buffers: int, device: torch.device) -> None:
        self._uploads = Uploads(num_buffers, device)

    def sample(self, logits: Tensor, rows: RowsToSample, tokens: Tensor) -> Tensor | None:
        """Choose one token a row; see `sampler.sample`.

        Parameters
        ----------
        logits : Tensor
            [N, V] float32, float16 or bfloat16, the model's output; not changed.
        rows : RowsToSample
            Those of the N rows that sample; the others' tokens stay.
        tokens : Tensor
            [N] int32, changed: the best token by the model's own logits becomes the token that is chosen;
            `FAILED` where there was or is none.

        Returns
        -------
        Tensor or None
            [L, 2 + 2 * K] int32, what `read_logprobs` reads for the rows that want log probabilities, K being
            the most that one of them wants; None = no row does.

        Notes
        -----
        Runs on the current stream; nothing waits for the device.
        """
        adjusting, random, with_logprobs = rows.adjusting(), rows.random(), rows.with_logprobs()
        # Where some rows are adjusted, they are chosen from a copy, together with those that are drawn.
        copied = sorted({*adjusting, *random}) if adjusting else []
        place_in_copy = {i: place for place, i in enumerate(copied)}
        places_to_draw = [place_in_copy[i] if adjusting else rows.places[i] for i in random]
        draws = _Draws.of(rows, random, logits.shape[1])
        changes = collect_changes(
            [rows.states[i] for i in copied], [rows.num_outputs[i] for i in copied], logits.shape[1]
        )
        uploaded = self._uploads.upload(
            [
                _int32([rows.places[i] for i in copied]),
                _int32(places_to_draw),
                _int32([rows.places[i] for i in with_logprobs]),
                _int32(rows.failed),
                *draws.arrays(),
                *changes,
            ]
        )
        places_to_copy, draw_rows, logprob_places, failed, *numbers = uploaded
        draw_numbers, change_numbers = numbers[: -len(changes)], numbers[-len(changes) :]
        if copied:
            adjusted, best = _adjust(logits, tokens, places_to_copy, change_numbers)
            _draw(adjusted, draw_rows, best, draws, draw_numbers)
            tokens.index_copy_(0, places_to_copy.long(), best)
            del adjusted  # Log probabilities need as much memory.
        else:
            _draw(logits, draw_rows, tokens, draws, draw_numbers)
        if rows.failed:
            tokens.index_fill_(0, failed.long(), FAILED)
        if not with_logprobs:
            return None
        num_kept = min(max(rows.states[i].params.logprobs or 0 for i in with_logprobs), logits.shape[1])
        index = logprob_places.long()
        chosen = tokens.index_select(0, index).clamp(min=0).long()  # Of failed rows nothing is read.
        return gather_logprobs(logits.index_select(0, index).float(), chosen, num_kept)


def _adjust(logits: Tensor, tokens: Tensor, places: Tensor, changes: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Changed float32 copies of rows of logits, and the best token of each, `FAILED` where there is none."""
    index = places.long()
    adjusted = logits.index_select(0, index).float()
    apply_changes(adjusted, changes)
    has_failed = (tokens.index_select(0, index) < 0).to(torch.int32)
    best = torch.empty_like(has_failed)
    greedy_sample(adjusted, places, has_failed, torch.empty_like(tokens), out=best)
    return adjusted, best


def _draw(logits: Tensor, rows: Tensor, tokens: Tensor, draws: _Draws, numbers: list[Tensor]) -> None:
    uniforms, top_p, top_k, temperature, floors = numbers
    if draws.top_k.any():
        raise_floors_by_count(logits, rows, tokens, top_k, temperature, floors)
    if draws.top_p.any():
        raise_floors_by_mass(logits, rows, tokens, top_p, temperature, floors)
    draw_token(logits, rows, tokens, temperature, floors, uniforms)


def _lowest_score(params: SamplingParams) -> float:
    return math.log(params.min_p) if params.min_p > 0 else -math.inf


def _int32(values: list[int]) -> npt.NDArray[np.int32]:
    return np.array(values, dtype=np.int32)
