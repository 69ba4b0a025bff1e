"""What is sent to an engine: a closed batch or an open loop of random prompts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lora_serve.common.errors import InvalidArgumentError
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import EngineRequest

POPULARITIES = ("uniform", "zipf")


@dataclass(frozen=True, kw_only=True)
class ClosedBatch:
    """Requests that are all there at the start.

    Parameters
    ----------
    num_requests, num_prompt_tokens, num_output_tokens
        Sizes; with one output token the figure is prompt tokens/s.
    num_adapters
        Adapters that take turns; 0 = all requests are the base model's.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    num_adapters: int = 0

    @property
    def is_prefill(self) -> bool:
        """Whether prompt tokens are what counts."""
        return self.num_output_tokens == 1

    def describe(self) -> str:
        """Such as '32 requests, 128 in, 128 out, 8 adapters'."""
        adapters = f"{_count(self.num_adapters, 'adapter')} in use" if self.num_adapters else "base"
        return (
            f"{_count(self.num_requests, 'request')}, {self.num_prompt_tokens} in, "
            f"{self.num_output_tokens} out, {adapters}"
        )


@dataclass(frozen=True, kw_only=True)
class OpenLoop:
    """Requests that come at random times, whatever becomes of those before.

    Parameters
    ----------
    num_requests, num_prompt_tokens, num_output_tokens
        Sizes.
    rate
        Arrivals a second, exponentially distributed gaps.
    num_adapters
        Adapters that are asked for; 0 = the base model.
    popularity
        'uniform', or 'zipf': the k-th adapter is asked for in proportion to 1/k.
    """

    num_requests: int
    num_prompt_tokens: int
    num_output_tokens: int
    rate: float
    num_adapters: int = 0
    popularity: str = "zipf"

    def describe(self) -> str:
        """Such as '1200 requests at 12/s, 128 in, 64 out, 64 adapters zipf'."""
        adapters = (
            f"{_count(self.num_adapters, 'adapter')} {self.popularity}" if self.num_adapters else "base"
        )
        return (
            f"{_count(self.num_requests, 'request')} at {self.rate:g}/s, {self.num_prompt_tokens} in, "
            f"{self.num_output_tokens} out, {adapters}"
        )


Workload = ClosedBatch | OpenLoop


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)


class RequestMaker:
    """Makes requests of random prompts, greedy, that always run to their last token.

    Parameters
    ----------
    vocab_size
        Tokens are drawn from all of it.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._next_id = 0

    def make(self, workload: Workload, names: list[str], seed: int) -> list[EngineRequest]:
        """Give the requests of a workload.

        Parameters
        ----------
        names
            The adapters, the most popular one first; at least as many as the workload asks for.
        seed
            Of prompts and choices.

        Raises
        ------
        InvalidArgumentError
            The engine has fewer adapters.
        """
        if workload.num_adapters > len(names):
            raise InvalidArgumentError(
                f"the workload asks for {workload.num_adapters} adapters but the engine has {len(names)}"
            )
        random = np.random.default_rng(seed)
        shape = (workload.num_requests, workload.num_prompt_tokens)
        prompts = random.integers(0, self._vocab_size, shape).tolist()
        params = SamplingParams(temperature=0.0, max_tokens=workload.num_output_tokens, ignore_eos=True)
        chosen = choose_adapters(workload, random)
        requests = []
        for prompt, index in zip(prompts, chosen.tolist(), strict=True):
            requests.append(
                EngineRequest(
                    request_id=self._next_id,
                    prompt_token_ids=prompt,
                    sampling_params=params,
                    lora_name=None if index < 0 else names[index],
                )
            )
            self._next_id += 1
        return requests


def choose_adapters(workload: Workload, random: np.random.Generator) -> npt.NDArray[np.int64]:
    """[num_requests] int64: which adapter each request asks for; -1 = the base model."""
    num_requests, num_adapters = workload.num_requests, workload.num_adapters
    if num_adapters == 0:
        return np.full(num_requests, -1, dtype=np.int64)
    if isinstance(workload, ClosedBatch):  # In turn, as far as they go.
        return np.arange(num_requests, dtype=np.int64) % num_adapters
    weights = np.ones(num_adapters)
    if workload.popularity == "zipf":
        weights /= np.arange(1, num_adapters + 1)
    return random.choice(num_adapters, num_requests, p=weights / weights.sum()).astype(np.int64)
