"""vLLM's serving loop in a few lines, to find what one of its adapter loads costs.

vLLM's loads were not measured by themselves; what is known is how its open-loop figures change when
adapters have to be loaded. `calibrate` looks for the two load times with which this loop comes closest to
them. Requests are admitted in order of arrival, past those whose adapter finds no place; victims are least
recently used; a load stops the loop, be it from the file into host memory or from there to the device.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median, quantiles

NUM_PROMPT_TOKENS, NUM_NEW_TOKENS, MAX_NUM_SEQS = 128, 64, 128

# (decode rows, tokens in their contexts, prompts, distinct adapters, places) -> milliseconds
StepMs = Callable[[int, int, int, int, int], float]


@dataclass(frozen=True)
class Figures:
    """Milliseconds."""

    ttft_p50: float
    ttft_p99: float
    itl_p50: float
    itl_p99: float
    e2e_p99: float

    def tails(self) -> tuple[float, float, float]:
        return self.ttft_p99, self.itl_p99, self.e2e_p99


@dataclass(frozen=True)
class OpenLoop:
    """One row of the table: Poisson arrivals, adapters of rank 16 drawn with weights k ** -exponent."""

    name: str
    num_requests: int
    rate_per_s: float
    num_adapters: int
    exponent: float
    places: int
    host_places: int
    measured: Figures


IN_HOST_MEMORY = 1_000
HOST_ROWS = (
    OpenLoop("16 uniform, 8 places", 180, 12, 16, 0, 8, IN_HOST_MEMORY, Figures(41, 850, 11.0, 63, 1713)),
    OpenLoop("64 zipf, 8 places", 180, 12, 64, 1, 8, IN_HOST_MEMORY, Figures(50, 1067, 11.3, 67, 2054)),
)
DISK_ROWS = (
    OpenLoop("64 zipf, 8 places, host 16", 180, 12, 64, 1, 8, 16, Figures(773, 2920, 11.7, 172, 4073)),
    OpenLoop("64 uniform, 8 places, host 16", 180, 12, 64, 0, 8, 16, Figures(2390, 5097, 11.6, 208, 6333)),
)
RESIDENT_ROWS = (
    OpenLoop("8 uniform, 8 places", 180, 12, 8, 0, 8, IN_HOST_MEMORY, Figures(35, 159, 10.2, 34, 977)),
    OpenLoop("64 zipf, 64 places", 720, 12, 64, 1, 64, IN_HOST_MEMORY, Figures(46, 226, 13.2, 94, 1672)),
    OpenLoop(
        "64 zipf, 64 places, 24/s", 960, 24, 64, 1, 64, IN_HOST_MEMORY, Figures(205, 522, 28.5, 146, 5215)
    ),
)


@dataclass
class Request:
    arrival_ms: float
    adapter: int
    num_new_tokens: int = 0
    last_token_ms: float = 0.0


class Tier:
    """Adapters in order of their last use."""

    def __init__(self, places: int, held: Iterable[int] = ()) -> None:
        self.places = places
        self.held: OrderedDict[int, None] = OrderedDict((adapter, None) for adapter in held)

    def use(self, adapter: int, in_use: set[int]) -> bool:
        """Make it the most recently used; true when it had to be brought in."""
        is_missing = adapter not in self.held
        if is_missing and len(self.held) >= self.places:
            del self.held[next(held for held in self.held if held not in in_use)]
        self.held[adapter] = None
        self.held.move_to_end(adapter)
        return is_missing


def simulate(loop: OpenLoop, seed: int, step_ms: StepMs, to_device_ms: float, to_host_ms: float) -> Figures:
    generator = random.Random(seed)
    weights = [(k + 1) ** -loop.exponent for k in range(loop.num_adapters)]
    arrivals: list[Request] = []
    now = 0.0
    for _ in range(loop.num_requests):
        now += generator.expovariate(loop.rate_per_s) * 1e3
        arrivals.append(Request(now, generator.choices(range(loop.num_adapters), weights)[0]))
    host = Tier(loop.host_places, range(min(loop.num_adapters, loop.host_places)))
    device = Tier(loop.places)
    first_ms: list[float] = []
    gap_ms: list[float] = []
    end_ms: list[float] = []
    queue, running = arrivals, list[Request]()
    now = 0.0
    while queue or running:
        if not running:
            now = max(now, queue[0].arrival_ms)
        in_use = {request.adapter for request in running}
        admitted = admit(queue, running, in_use, loop.places, now)
        for request in admitted + running:
            if host.use(request.adapter, in_use):
                now += to_host_ms
            if device.use(request.adapter, in_use):
                now += to_device_ms
        num_context_tokens = sum(NUM_PROMPT_TOKENS + request.num_new_tokens for request in running)
        now += step_ms(len(running), num_context_tokens, len(admitted), len(in_use), loop.places)
        gap_ms += [now - request.last_token_ms for request in running]
        first_ms += [now - request.arrival_ms for request in admitted]
        running += admitted
        for request in running:
            request.num_new_tokens += 1
            request.last_token_ms = now
        end_ms += [now - r.arrival_ms for r in running if r.num_new_tokens == NUM_NEW_TOKENS]
        running = [request for request in running if request.num_new_tokens < NUM_NEW_TOKENS]
        taken = {id(request) for request in admitted}
        queue = [request for request in queue if id(request) not in taken]
    return Figures(median(first_ms), p99(first_ms), median(gap_ms), p99(gap_ms), p99(end_ms))


def admit(
    queue: list[Request], running: list[Request], in_use: set[int], places: int, now: float
) -> list[Request]:
    """Those who have arrived and find a row and a place; their adapters join `in_use`."""
    admitted: list[Request] = []
    for request in queue:
        if request.arrival_ms > now or len(running) + len(admitted) == MAX_NUM_SEQS:
            break
        if request.adapter in in_use or len(in_use) < places:
            in_use.add(request.adapter)
            admitted.append(request)
    return admitted


def p99(values: list[float]) -> float:
    return quantiles(values, n=100, method="inclusive")[98]


def typical(
    loop: OpenLoop, step_ms: StepMs, to_device_ms: float, to_host_ms: float, num_seeds: int
) -> Figures:
    """The median of each figure over the seeds."""
    runs = [simulate(loop, seed, step_ms, to_device_ms, to_host_ms) for seed in range(num_seeds)]
    return Figures(*(median(getattr(run, name) for run in runs) for name in Figures.__dataclass_fields__))


def distance(
    loops: Iterable[OpenLoop], step_ms: StepMs, to_device_ms: float, to_host_ms: float, num_seeds: int
) -> float:
    """How far the tails are from the measured ones: a factor of two counts the same both ways."""
    total = 0.0
    for loop in loops:
        model = typical(loop, step_ms, to_device_ms, to_host_ms, num_seeds)
        pairs = zip(model.tails(), loop.measured.tails(), strict=True)
        total += sum((max(a, b) / min(a, b) - 1) ** 2 for a, b in pairs)
    return total


def calibrate(step_ms: StepMs, num_seeds: int) -> tuple[float, float]:
    """Milliseconds of a load from host memory, and of one from a file in the page cache to host memory."""
    to_device_ms = min(range(4, 41, 3), key=lambda ms: distance(HOST_ROWS, step_ms, ms, 0.0, num_seeds))
    to_host_ms = min(
        range(20, 141, 10), key=lambda ms: distance(DISK_ROWS, step_ms, to_device_ms, ms, num_seeds)
    )
    return float(to_device_ms), float(to_host_ms)
