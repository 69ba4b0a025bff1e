"""Engines of every kind, so that the same tests run on each."""

from __future__ import annotations

import pytest

from support.engine_kinds import EXACT, GRAPHS, ROUNDED_ON_CPU, ROUNDED_ON_CUDA, EngineKind


@pytest.fixture(scope="module", params=EXACT)
def exact_engine(request: pytest.FixtureRequest) -> EngineKind:
    """Computes in fp32."""
    return request.param


@pytest.fixture(scope="module", params=[*EXACT, *ROUNDED_ON_CUDA])
def engine(request: pytest.FixtureRequest) -> EngineKind:
    """Any but those that exist for the tests' own sake."""
    return request.param


@pytest.fixture(scope="module", params=[*EXACT, *ROUNDED_ON_CPU, *ROUNDED_ON_CUDA])
def any_engine(request: pytest.FixtureRequest) -> EngineKind:
    """Any."""
    return request.param


@pytest.fixture(scope="module", params=[*EXACT, *GRAPHS])
def fast_engine(request: pytest.FixtureRequest) -> EngineKind:
    """Computes in fp32, or replays decode steps from graphs."""
    return request.param
