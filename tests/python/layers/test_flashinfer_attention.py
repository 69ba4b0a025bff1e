"""Attention by FlashInfer against fp32 attention; on a CPU with a stand-in for its compiled kernels."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.layers import AttentionSpec, KVLayer, make_attention_backend
from lora_serve.layers import flashinfer_attention as attention_module
from lora_serve.layers import flashinfer_attention_kernels as kernels_module
from lora_serve.layers.flashinfer_attention import FlashInferAttentionBackend
from lora_serve.layers.flashinfer_attention_kernels import KernelShape, StepSize, fa2_int_bytes
from lora_serve.layers.flashinfer_attention_plan import HostRows, fill_rows
from lora_serve.layers.flashinfer_attention_split import is_unsplit_faster
from lora_serve.layers.flashinfer_attention_staging import StagingRing
from support.fake_flashinfer import FakeFlashInfer
from support.paged_attention import PagedStep, PagePool, assert_attention

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class FakeEvent:
    """A place in a stream that runs when `FakeEvent.run_stream` is called."""

    def __init__(self) -> None:
        self.is_pending = False
        self.num_waits = 0

    def record(self) -> None:
        self.is_pending = True

    def synchronize(self) -> None:
        self.num_waits += self.is_pending
        self.is_pending = False


def host_ring(num_buffers: int = 4) -> StagingRing:
    return StagingRing(num_buffers, FakeEvent, lambda size: torch.empty(size, dtype=torch.uint8))


@pytest.fixture
def fake(monkeypatch) -> FakeFlashInfer:
    fake = FakeFlashInfer()
    monkeypatch.setattr(attention_module, "import_flashinfer", lambda: fake.get_batch_prefill_module)
    monkeypatch.setattr(attention_module, "device_traits", lambda device: ((9, 0), 132))
    return fake


@pytest.fixture(params=DEVICES)
def make_backend(request) -> Callable[..., tuple[FlashInferAttentionBackend, str]]:
    if request.param == "cuda":
        return lambda **options: (FlashInferAttentionBackend(**options), "cuda")
    request.getfixturevalue("fake")
    return lambda **options: (FlashInferAttentionBackend(**options, ring=host_ring()), "cpu")


def make_spec(
    num_heads: int = 8, num_kv_heads: int = 2, head_dim: int = 128, window: int | None = None
) -> AttentionSpec:
    return AttentionSpec(num_heads, num_kv_heads, head_dim, head_dim**-0.5, window)


def run_step(backend: FlashInferAttentionBackend, step: PagedStep) -> tuple[Tensor, Tensor]:
    """Give the query and the backend's output."""
    pool, query = step.pool, step.query()
    plan = backend.plan(step.metadata(), pool.layer, {pool.spec})
    return query, backend.attend(query, pool.layer, pool.spec, plan)


def make_step(pool: PagePool, lengths: list[tuple[int, int]]) -> PagedStep:
    """A step of rows of (tokens of this step, tokens in all)."""
    return PagedStep(pool, [(query_len, seq_len, pool.pages_with(seq_len)) for query_len, seq_len in lengths])


STEPS = {
    "one_decode": [(1, 37)],
    "decode_of_a_first_token": [(1, 1)],
    "decodes_of_many_lengths": [(1, n) for n in (1, 15, 16, 17, 300, 2049, 64, 5)],
    "one_long_among_short_decodes": [(1, 3000), *[(1, 20 + n) for n in range(60)]],
    "whole_prompts": [(5, 5), (130, 130), (16, 16)],
    "later_chunks": [(128, 300), (7, 1007), (140, 151)],
    "mixed": [(1, 40), (1, 333), (1, 16), (50, 50), (129, 300), (2, 18)],
    "mixed_with_a_chunk_of_one_token": [(1, 40), (33, 33), (1, 50), (17, 65)],
}


class TestSteps:
    @pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
    @pytest.mark.parametrize("prefill_kernel", ["fa2", "fa3"])
    def test_step_equals_fp32_attention(self, make_backend, lengths, prefill_kernel) -> None:
        backend, device = make_backend(prefill_kernel=prefill_kernel)
        step = make_step(PagePool(make_spec(), torch.bfloat16, device), lengths)

        query, found = run_step(backend, step)

        assert found.is_contiguous()
        assert_attention(found, step, query)

    @pytest.mark.parametrize(
        ("num_heads", "num_kv_heads", "head_dim", "dtype"),
        [
            (14, 2, 64, torch.float16),
            (4, 4, 64, torch.bfloat16),
            (16, 8, 128, torch.float16),
            (32, 8, 128, torch.bfloat16),
            (28, 4, 128, torch.bfloat16),
        ],
    )
    def test_step_equals_fp32_attention_for_many_shapes(
        self, make_backend, num_heads, num_kv_heads, head_dim, dtype
    ) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(num_heads, num_kv_heads, head_dim), dtype, device)
        step = make_step(pool, STEPS["mixed"])

        query, found = run_step(backend, step)

        assert_attention(found, step, query)

    def test_window_hides_older_tokens(self, make_backend) -> None:
        backend, device = make_backend()
        step = make_step(PagePool(make_spec(window=50), torch.bfloat16, device), STEPS["mixed"])

        query, found = run_step(backend, step)

        assert_attention(found, step, query)

    @pytest.mark.parametrize("page_size", [8, 32])
    def test_page_size_is_honoured(self, make_backend, page_size) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device, page_size=page_size)
        step = make_step(pool, STEPS["mixed"])

        query, found = run_step(backend, step)

        assert_attention(found, step, query)

    def test_rows_share_the_pages_of_a_common_prefix(self, make_backend) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device)
        prefix = pool.pages_with(160)
        rows = [(1, 170), (1, 200), (10, 170), (90, 250)]
        step = PagedStep(pool, [(q, n, pool.pages_with(n, shared=prefix)) for q, n in rows])

        query, found = run_step(backend, step)

        assert_attention(found, step, query)

    def test_same_step_twice_gives_the_same_bits(self, make_backend) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device)
        step = make_step(pool, STEPS["mixed"] + [(400, 1500)])
        query = step.query()

        first, second = (
            backend.attend(
                query, pool.layer, pool.spec, backend.plan(step.metadata(), pool.layer, {pool.spec})
            )
            for _ in range(2)
        )

        assert torch.equal(first, second)

    def test_random_steps_equal_fp32_attention(self, make_backend) -> None:
        backend, device = make_backend()
        generator = random.Random(3)
        for seed in range(30 if device == "cuda" else 4):
            pool = PagePool(make_spec(), torch.bfloat16, device, num_pages=512, seed=seed)
            decodes = [(1, generator.randint(1, 400)) for _ in range(generator.randint(0, 9))]
            chunks = [(n, n + generator.choice([0, 0, 16, 77])) for n in generator.sample(range(2, 150), 3)]
            step = make_step(pool, decodes + chunks)

            query, found = run_step(backend, step)

            assert_attention(found, step, query)

    @pytest.mark.gpu
    @pytest.mark.parametrize("lengths", [STEPS["decodes_of_many_lengths"], STEPS["later_chunks"]])
    @pytest.mark.parametrize("prefill_kernel", ["fa2", "fa3"])
    def test_pages_beyond_32_bit_offsets_are_read(self, lengths, prefill_kernel) -> None:
        backend = FlashInferAttentionBackend(prefill_kernel)
        # 8,192 elements a page: the pages in use begin behind element 2**32.
        pool = PagePool(
            make_spec(), torch.bfloat16, "cuda", num_layers=1, num_pages=2**19 + 2000, first_page=2**19 + 1
        )
        step = make_step(pool, lengths)

        query, found = run_step(backend, step)

        assert min(step.flat_pages()) * pool.layer.k.stride(0) > 2**32
        assert_attention(found, step, query)


class GraphHarness:
    """Decode steps of one padded size, captured where there are graphs; none is waited for."""

    def __init__(
        self,
        backend: FlashInferAttentionBackend,
        pool: PagePool,
        num_rows: int,
        *,
        is_split: bool = True,
    ) -> None:
        self.pool = pool
        self.num_rows = num_rows
        self.backend = backend
        device = pool.pool.device
        self.page_indices = torch.zeros(64 * 1024, dtype=torch.int32, device=device)
        self.state = backend.make_decode_graph_state(
            num_rows, pool.layer, {pool.spec}, self.page_indices, is_split=is_split
        )
        self.query = torch.zeros(
            num_rows, pool.spec.num_heads, pool.spec.head_dim, dtype=pool.pool.dtype, device=device
        )
        self.output = torch.empty_like(self.query)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.state.plan(self.padded([]).metadata(self.page_indices))
        if device.type == "cuda":
            self.run()
            torch.cuda.synchronize()
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.run()

    def padded(self, rows: list[tuple[int, int, list[int]]]) -> PagedStep:
        """Padded rows are as the executor makes them: one token, on page 0, which holds NaN."""
        return PagedStep(self.pool, rows + [(1, 1, [0])] * (self.num_rows - len(rows)))

    def run(self) -> None:
        self.output.copy_(self.backend.attend(self.query, self.pool.layer, self.pool.spec, self.state))

    def submit(self, lengths: list[int], delay_cycles: int = 0) -> tuple[PagedStep, Tensor, Tensor]:
        """Give the step without padded rows, its query and its output to be."""
        step = PagedStep(self.pool, [(1, n, self.pool.pages_with(n)) for n in lengths])
        query = step.query()
        padded = self.padded(step.rows)
        self.state.plan(padded.metadata(self.page_indices))
        pages = torch.tensor(padded.flat_pages(), dtype=torch.int32)
        if self.graph is not None:
            pages = pages.pin_memory()
        self.page_indices[: len(pages)].copy_(pages, non_blocking=True)
        self.query[: len(query)].copy_(query)
        self.output.fill_(7.0)
        if self.graph is None:
            self.run()
        else:
            torch.cuda._sleep(delay_cycles)
            self.graph.replay()
        return step, query, self.output[: len(query)].clone()


class TestDecodeGraphs:
    @pytest.mark.parametrize("is_split", [True, False])
    @pytest.mark.parametrize("num_rows", [1, 8, 40])
    def test_replays_follow_changing_lengths(self, make_backend, num_rows, is_split) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device, num_pages=4096)
        harness = GraphHarness(backend, pool, num_rows, is_split=is_split)
        generator = random.Random(1)
        for num_real in {num_rows, max(1, num_rows - 3), 1}:
            lengths = [generator.choice([1, 16, 17, 100, 600]) for _ in range(num_real)]

            step, query, found = harness.submit(lengths)

            assert_attention(found, step, query)

    def test_padded_rows_change_nothing(self, make_backend) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device)
        harness = GraphHarness(backend, pool, 8)
        harness.submit([500, 400, 300, 200, 100, 90, 80, 70])

        step, query, found = harness.submit([33, 48])

        assert_attention(found, step, query)

    @pytest.mark.parametrize("is_split", [True, False])
    def test_plan_may_be_called_while_replays_run(self, make_backend, is_split) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device, num_pages=8192)
        harness = GraphHarness(backend, pool, 8, is_split=is_split)
        generator = random.Random(2)
        # More steps than the ring has buffers, each of them far behind the host.
        steps = [
            harness.submit([generator.randint(1, 600) for _ in range(8)], delay_cycles=20_000_000)
            for _ in range(7)
        ]

        for step, query, found in steps:
            assert_attention(found, step, query)

    def test_sizes_and_eager_steps_share_one_stream(self, make_backend) -> None:
        backend, device = make_backend()
        pool = PagePool(make_spec(), torch.bfloat16, device, num_pages=8192)
        harnesses = [GraphHarness(backend, pool, num_rows) for num_rows in (16, 4)]
        results = []
        for number in range(4):
            results.append(harnesses[number % 2].submit([50 + 200 * number, 3], delay_cycles=10_000_000))
            eager = make_step(pool, [(1, 70), (30, 90)])
            results.append((eager, *run_step(backend, eager)))

        for step, query, found in results:
            assert_attention(found, step, query)

    @pytest.mark.parametrize(
        ("num_heads", "num_kv_heads", "head_dim", "window"),
        [
            (8, 2, 128, None),
            (14, 2, 64, None),
            (4, 4, 64, None),
            (20, 1, 128, None),
            pytest.param(32, 8, 128, 50, id="window"),
        ],
    )
    def test_both_ways_attend_the_same_whatever_the_lengths(
        self, make_backend, num_heads, num_kv_heads, head_dim, window
    ) -> None:
        backend, device = make_backend()
        spec = make_spec(num_heads, num_kv_heads, head_dim, window)
        pool = PagePool(spec, torch.bfloat16, device, num_pages=1200)
        ways = [GraphHarness(backend, pool, 16, is_split=is_split) for is_split in (False, True)]
        for lengths in ([1] * 16, [3000, *[5] * 12], list(range(250, 266))):
            results = []
            for harness in ways:
                pool.generator.manual_seed(5)
                results.append(harness.submit(lengths))

            for step, query, found in results:
                assert_attention(found, step, query)
        if device == "cuda":
            plans = [tuple(way.state.launches[spec][0].plan_info) for way in ways]
            # Programs of a KV head come first, whether partial results are merged comes last.
            assert (plans[0][0], plans[0][-1]) == (16, 0)
            assert (plans[1][0] > 16, plans[1][-1]) == (True, 1)

    def test_state_refuses_a_step_of_another_size(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64)
        harness = GraphHarness(backend, pool, 4)
        for lengths in ([(1, 5)] * 3, [(1, 5), (1, 5), (1, 5), (2, 5)]):
            metadata = make_step(pool, lengths).metadata(harness.page_indices)

            with pytest.raises(InternalError, match="4 rows"):
                harness.state.plan(metadata)

    def test_state_refuses_a_plan_that_was_not_captured(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        harness = GraphHarness(backend, PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64), 2)
        for module in fake.modules:
            module.plan_info = (8, 3)

        with pytest.raises(InternalError, match="were captured"):
            harness.submit([5, 6])

    def test_state_must_be_planned_first(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=8)
        state = backend.make_decode_graph_state(2, pool.layer, {pool.spec}, torch.zeros(8, dtype=torch.int32))

        with pytest.raises(InternalError, match="before it is planned"):
            backend.attend(torch.zeros(2, 8, 128).bfloat16(), pool.layer, pool.spec, state)


class TestHostLogic:
    def test_rows_are_written_as_the_kernels_read_them(self) -> None:
        rows = HostRows(
            np.array([1, 1, 5, 3], dtype=np.int32),
            np.array([16, 17, 5, 40], dtype=np.int32),
            np.array([0, 1, 3, 4, 7], dtype=np.int32),
        )
        table = np.full((4, 6), -9, dtype=np.int32)

        fill_rows(table, rows, page_size=16)

        assert table.tolist() == [
            [0, 1, 2, 0, 5, 8],
            [0, 1, 3, 4, 7, -9],
            [16, 1, 5, 8, -9, -9],
            [16, 17, 5, 40, -9, -9],
        ]

    def test_decode_rows_and_prefill_rows_get_different_kernels(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=256)
        step = make_step(pool, STEPS["mixed"])
        plan = backend.plan(step.metadata(), pool.layer, {pool.spec})

        pieces = [launch.piece for launch in plan.launches[pool.spec]]

        assert [(p.kernel.name, p.first_row, p.size.num_rows, p.size.num_tokens) for p in pieces] == [
            ("fa2", 0, 3, 3),
            ("fa3", 3, 3, 181),
        ]
        assert [piece.is_causal for piece in pieces] == [False, True]

    def test_specs_of_one_shape_share_plans_and_others_do_not(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64)
        full, scaled = make_spec(), AttentionSpec(8, 2, 128, 0.5)
        window = make_spec(window=8)
        step = make_step(pool, [(1, 40)])
        plan = backend.plan(step.metadata(), pool.layer, {full, scaled, window})

        assert plan.launches[full] == plan.launches[scaled]
        assert plan.launches[full] != plan.launches[window]
        assert plan.launches[window][0].piece.kernel.shape.window_left == 7

    def test_rows_may_be_split_although_they_are_many(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64)
        GraphHarness(backend, pool, 5)

        arguments = fake.modules[0].plan_arguments[-1]

        # Room for five splits more on two KV heads; a row has one token in each step.
        assert arguments[16:] == [-1, False, -10, 1]

    def test_unsplit_rows_are_planned_once(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64)
        harness = GraphHarness(backend, pool, 5, is_split=False)

        for lengths in ([70, 1], [2, 30, 100]):
            harness.submit(lengths)

        (arguments,) = fake.modules[0].plan_arguments
        # Not padded, as with room for splits; splitting is forbidden.
        assert (arguments[11], arguments[16:]) == (False, [-1, True, 0, 0])

    def test_captured_steps_are_not_split_where_that_suits_their_lengths(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(32, 8), torch.bfloat16, "cpu", num_pages=4)
        states = backend.make_decode_graph_states(
            32, pool.layer, {pool.spec}, torch.zeros(8, dtype=torch.int32)
        )

        def chosen(lengths: list[int]) -> list[bool]:
            metadata = PagedStep(pool, [(1, n, [0]) for n in lengths]).metadata()
            return [state.suits(metadata) for state in states]

        assert chosen([1000] * 32) == [True, True]
        assert chosen([1000] * 31 + [9000]) == [False, True]

    def test_more_pages_than_a_window_reads_do_not_count(self) -> None:
        lengths = np.array([100_000, 5], dtype=np.int32)

        assert is_unsplit_faster(lengths, KernelShape(8, 2, 128, 255), 132)
        assert not is_unsplit_faster(lengths, KernelShape(8, 2, 128, 256), 132)

    @pytest.mark.parametrize(
        ("lengths", "num_kv_heads", "is_unsplit"),
        [
            ([256], 8, True),
            ([257], 8, False),
            ([1, 256] * 8, 1, True),
            ([300] * 24, 8, False),  # 192 programs for 132 multiprocessors.
            ([300] * 25, 8, True),
            ([300] * 198, 1, True),
            ([900] * 30 + [1800, 1], 8, True),
            ([900] * 30 + [1861, 1], 8, False),  # Twice the mean is 1802 and something.
            ([2000] * 2 + [1] * 126, 8, False),  # Two rows, padded to 128.
        ],
    )
    def test_rows_are_split_where_some_are_long_and_few(self, lengths, num_kv_heads, is_unsplit) -> None:
        shape = KernelShape(4 * num_kv_heads, num_kv_heads, 128, -1)

        assert is_unsplit_faster(np.array(lengths, dtype=np.int32), shape, 132) == is_unsplit

    def test_page_indices_of_the_step_are_used_where_they_are_given(self, fake) -> None:
        backend = FlashInferAttentionBackend(ring=host_ring())
        pool = PagePool(make_spec(), torch.bfloat16, "cpu", num_pages=64)
        step = make_step(pool, [(1, 40), (3, 20)])
        indices = torch.tensor(step.flat_pages(), dtype=torch.int32)

        plan = backend.plan(step.metadata(indices), pool.layer, {pool.spec})

        assert plan.page_indices is indices

    def test_larger_steps_get_larger_workspaces(self) -> None:
        shape = KernelShape(32, 8, 128, -1)
        sizes = [fa2_int_bytes(shape, StepSize(n, n, n, is_fixed=True), 132) for n in (1, 64, 4096)]
        # Thirteen bytes for each of 33 programs and one of each row's own, and two offsets for each row.
        assert sizes[2] >= 13 * (33 + 4096) + 2 * 4 * 4097
        assert sizes == sorted(sizes)


class TestStagingRing:
    def test_buffers_are_taken_in_turn(self) -> None:
        ring = host_ring(3)
        places = []
        for _ in range(6):
            with ring.buffer(100) as buffer:
                places.append(buffer.data_ptr())

        assert len(set(places[:3])) == 3
        assert places[:3] == places[3:]

    def test_buffer_is_not_lent_again_before_its_copy_has_passed(self) -> None:
        events: list[FakeEvent] = []

        def make_event() -> FakeEvent:
            events.append(FakeEvent())
            return events[-1]

        ring = StagingRing(2, make_event, lambda size: torch.empty(size, dtype=torch.uint8))
        for _ in range(2):
            with ring.buffer(8):
                pass
        assert [event.is_pending for event in events] == [True, True]

        with ring.buffer(8):
            assert [event.is_pending for event in events] == [False, True]
        assert [event.num_waits for event in events] == [1, 0]

    def test_failed_plan_leaves_its_copies_guarded(self) -> None:
        event = FakeEvent()
        ring = StagingRing(1, lambda: event, lambda size: torch.empty(size, dtype=torch.uint8))

        with pytest.raises(RuntimeError), ring.buffer(8):
            raise RuntimeError

        assert event.is_pending

    def test_larger_plan_gets_a_larger_buffer(self) -> None:
        ring = host_ring(1)
        for size in (100, 5000, 10):
            with ring.buffer(size) as buffer:
                assert len(buffer) >= size


class TestRefusals:
    def layer(self, dtype: torch.dtype = torch.bfloat16, head_dim: int = 128):
        return PagePool(make_spec(head_dim=head_dim), dtype, "cpu", num_pages=4).layer

    @pytest.mark.parametrize(
        ("spec", "dtype", "message"),
        [
            (make_spec(head_dim=80), torch.bfloat16, "head size 80"),
            (make_spec(), torch.float32, "float32"),
            (make_spec(num_heads=7), torch.bfloat16, "7 query heads over 2"),
        ],
    )
    def test_unsupported_models_are_refused(self, spec, dtype, message) -> None:
        with pytest.raises(InvalidArgumentError, match=message) as error:
            kernels_module.check_supported(self.layer(dtype), [spec], (9, 0))
        assert "--attention-backend torch" in str(error.value)

    @pytest.mark.parametrize("capability", [(0, 0), (7, 5)])
    def test_unsupported_devices_are_refused(self, capability) -> None:
        with pytest.raises(InvalidArgumentError, match="compute capability"):
            kernels_module.check_supported(self.layer(), [make_spec()], capability)

    def test_pages_further_apart_than_32_bits_are_refused(self) -> None:
        pages = torch.empty_strided(
            (1, 16, 2, 128), (2**32, 256, 128, 1), dtype=torch.bfloat16, device="meta"
        )
        with pytest.raises(InvalidArgumentError, match="4294967296 elements apart"):
            kernels_module.check_supported(KVLayer(pages, pages), [make_spec()], (9, 0))

    def test_missing_flashinfer_is_explained(self, monkeypatch) -> None:
        def fail(name: str) -> None:
            raise ModuleNotFoundError("No module named 'flashinfer'")

        monkeypatch.setattr(kernels_module.importlib, "import_module", fail)
        with pytest.raises(InvalidArgumentError, match=r"lora-serve\[cuda\].*--attention-backend torch"):
            make_attention_backend("flashinfer")

    def test_cpu_model_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(
            attention_module, "import_flashinfer", lambda: FakeFlashInfer().get_batch_prefill_module
        )
        with pytest.raises(InvalidArgumentError, match=r"compute capability 0\.0"):
            FlashInferAttentionBackend().prepare(self.layer(), [make_spec()])
