from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from lora_serve.cli.bench.open_loop import RequestTimes, _Progress
from lora_serve.cli.bench.rows import ROWS
from lora_serve.cli.bench.table import choose_rows, group_by_engine
from lora_serve.cli.bench.workloads import ClosedBatch, OpenLoop, RequestMaker
from lora_serve.common.errors import InvalidArgumentError

NAMES = [f"adapter-{index}" for index in range(8)]


def open_loop(popularity, num_adapters=8):
    return OpenLoop(
        num_requests=4000,
        num_prompt_tokens=2,
        num_output_tokens=1,
        rate=1.0,
        num_adapters=num_adapters,
        popularity=popularity,
    )


def test_requests_of_a_closed_batch_take_the_adapters_in_turn():
    maker = RequestMaker(vocab_size=50)
    batch = ClosedBatch(num_requests=7, num_prompt_tokens=5, num_output_tokens=3, num_adapters=3)

    requests = maker.make(batch, NAMES, seed=1)

    assert [request.lora_name for request in requests] == [NAMES[index % 3] for index in range(7)]
    assert {len(request.prompt_token_ids) for request in requests} == {5}
    assert len({tuple(request.prompt_token_ids) for request in requests}) == 7
    assert {token for request in requests for token in request.prompt_token_ids} <= set(range(50))
    assert all(
        (params.max_tokens, params.temperature, params.ignore_eos) == (3, 0.0, True)
        for params in (request.sampling_params for request in requests)
    )


def test_a_seed_decides_prompts_but_ids_are_never_used_twice():
    maker = RequestMaker(vocab_size=50)
    batch = ClosedBatch(num_requests=4, num_prompt_tokens=5, num_output_tokens=3)

    first, again, other = (maker.make(batch, [], seed) for seed in (1, 1, 2))

    prompts = [[request.prompt_token_ids for request in made] for made in (first, again, other)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert len({request.request_id for made in (first, again, other) for request in made}) == 12
    assert {request.lora_name for request in first} == {None}


def test_zipf_asks_for_adapters_in_proportion_to_one_over_their_place():
    requests = RequestMaker(50).make(open_loop("zipf"), NAMES, seed=3)

    counts = Counter(request.lora_name for request in requests)
    expected = 1 / np.arange(1, 9) / np.sum(1 / np.arange(1, 9)) * 4000
    assert np.abs([counts[name] for name in NAMES] - expected).max() < 5 * np.sqrt(expected.max())
    assert counts[NAMES[0]] > 1.5 * counts[NAMES[1]]


def test_uniform_asks_for_all_adapters_alike():
    counts = Counter(
        request.lora_name for request in RequestMaker(50).make(open_loop("uniform"), NAMES, seed=3)
    )

    assert min(counts[name] for name in NAMES) > 400


def test_more_adapters_than_the_engine_has_are_refused():
    with pytest.raises(InvalidArgumentError, match="asks for 9 adapters but the engine has 8"):
        RequestMaker(50).make(open_loop("zipf", num_adapters=9), NAMES, seed=0)


def test_times_are_from_arrival_to_first_token_between_tokens_and_to_the_last():
    times = RequestTimes()
    times.live = {1: _Progress(10.0), 2: _Progress(10.5)}

    times.note_token(1, 11.0, is_last=False)
    times.note_token(2, 11.0, is_last=True)
    times.note_token(1, 11.25, is_last=False)
    times.note_token(1, 13.0, is_last=True)

    assert times.ttft == [1000.0, 500.0]
    assert times.itl == [250.0, 1750.0]
    assert times.e2e == [500.0, 3000.0]
    assert times.live == {}
    figures = times.figures()
    assert (figures["ttft_p50_ms"], figures["itl_max_ms"], figures["e2e_max_ms"]) == (750.0, 1750.0, 3000.0)
    assert figures["itl_p99_ms"] == pytest.approx(1735.0)


def test_rows_have_names_of_their_own_and_goals_in_the_right_order():
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        for figure in row.figures:
            if figure.gate is not None:
                better = figure.stretch < figure.gate if figure.is_time else figure.stretch > figure.gate
                assert better, row.name
        assert row.workload.num_adapters <= row.needs.num_adapters


def test_idle_rows_send_what_their_base_rows_send():
    by_name = {row.name: row for row in ROWS}
    idle = [row for row in ROWS if row.base_row is not None]

    assert len(idle) == 4
    for row in idle:
        assert by_name[row.base_row].workload == row.workload
        assert row.needs.num_adapters
        assert not by_name[row.base_row].needs.num_adapters


def test_rows_are_chosen_by_patterns_in_the_order_of_the_table():
    assert [row.name for row in choose_rows("idle-1, base-*")] == [
        *("base-1", "base-32", "base-128", "base-prefill", "idle-1"),
    ]
    with pytest.raises(InvalidArgumentError, match="'bass'"):
        choose_rows("base-1,bass")


def test_every_engine_is_started_once():
    needs = [row.needs for row in group_by_engine(ROWS[::2] + ROWS[1::2])]

    changes = [one for one, before in zip(needs, [None, *needs], strict=False) if one != before]
    assert len(changes) == len(set(needs)) < len(ROWS)
