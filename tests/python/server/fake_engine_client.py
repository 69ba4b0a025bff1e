"""An engine without a model: every character is a token, and an adapter's answer is its own name."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import AdapterNotFoundError, InvalidArgumentError, LoraServeError
from lora_serve.common.outputs import CompletionOutput, Logprob, RequestOutput
from lora_serve.common.queueing import DEFAULT_QUEUEING, Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.messages import AdmissionResult, LoadAdapterResult, ModelInfo, UnloadAdapterResult
from lora_serve.engine.request_stream import RequestStream, StreamObserver
from lora_serve.engine.status import AdapterInfo, EngineStats

VOCABULARY = 256
MAX_MODEL_LEN = 128


TEMPLATE = "{{ tools }} <tool_call> {{ messages }}"


class FakeTokenizer:
    special_token_ids = frozenset({0})
    chat_template = TEMPLATE

    def public_settings(self) -> dict[str, Any]:
        return {"eos_token": "\0", "chat_template": TEMPLATE}

    def token_id(self, text: str) -> int | None:
        return {"<think>": 1, "</think>": 2}.get(text)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        return "".join(chr(token_id) for token_id in token_ids)

    def decode_token(self, token_id: int) -> str:
        return chr(token_id)


@dataclass
class Submission:
    prompt: str | list[int]
    params: SamplingParams
    lora_name: str | None
    stream: RequestStream
    queueing: Queueing
    isolation_domain: bytes = b""


@dataclass
class FakeEngineClient:
    """`num_tokens_before_hold`: streams give so many tokens and then nothing more."""

    adapters: dict[str, AdapterInfo] = field(default_factory=dict)
    num_tokens_before_hold: int | None = None
    first_stream_fails_with: LoraServeError | None = None
    is_healthy: bool = True
    failure: str | None = None

    def __post_init__(self) -> None:
        self.submissions: list[Submission] = []
        self.aborted: list[str] = []
        self.operations: list[tuple[Any, ...]] = []
        self.chat_messages: list[Mapping[str, Any]] = []
        self.chat_options: dict[str, Any] = {}
        self.encoded: list[tuple[str, bool]] = []
        self.load_error: LoraServeError | None = None
        self.observe: Callable[[RequestStream, int, float], StreamObserver] | None = None
        self.config = EngineConfig(model="/models/base")
        self.tokenizer = FakeTokenizer()
        self.answer_text: str | None = None
        self.model_info = ModelInfo(
            model="/models/base",
            max_model_len=MAX_MODEL_LEN,
            vocab_size=VOCABULARY,
            eos_token_ids=[0],
            page_size=16,
            num_device_pages=8,
            num_host_pages=32,
            max_num_seqs=4,
            max_loras=4,
        )

    async def submit(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams,
        *,
        lora_name: str | None = None,
        request_id: str | None = None,
        queueing: Queueing = DEFAULT_QUEUEING,
        isolation_domain: bytes = b"",
    ) -> RequestStream:
        await asyncio.sleep(0)
        if lora_name is not None and lora_name not in self.adapters:
            raise AdapterNotFoundError(f"adapter {lora_name!r} does not serve")
        token_ids = [ord(c) for c in prompt] if isinstance(prompt, str) else list(prompt)
        if len(token_ids) >= MAX_MODEL_LEN:
            raise InvalidArgumentError(
                f"the prompt has {len(token_ids)} tokens but max_model_len is {MAX_MODEL_LEN}; shorten it"
            )
        request_id = f"r{len(self.submissions)}"
        stream = RequestStream(
            request_id=request_id,
            prompt=prompt if isinstance(prompt, str) else None,
            prompt_token_ids=token_ids,
            lora_name=lora_name,
            abort=lambda: self.aborted.append(request_id),
        )
        if lora_name is None:
            stream.set_admission(AdmissionResult(adapter_id=0, content_digest=""))
        else:
            info = self.adapters[lora_name]
            stream.set_admission(
                AdmissionResult(adapter_id=info.adapter_id, content_digest=info.content_digest)
            )
        if self.observe is not None:
            stream.observer = self.observe(stream, sampling_params.n, time.perf_counter())
        prompt = prompt if isinstance(prompt, str) else token_ids
        self.submissions.append(
            Submission(prompt, sampling_params, lora_name, stream, queueing, isolation_domain)
        )
        self._answer(stream, sampling_params, lora_name)
        return stream

    def _answer(self, stream: RequestStream, params: SamplingParams, lora_name: str | None) -> None:
        text = f"{lora_name or 'base'}!" if self.answer_text is None else self.answer_text
        text = text[: params.max_tokens]
        for position, char in enumerate(text):
            if self.num_tokens_before_hold is not None and position >= self.num_tokens_before_hold:
                return
            is_last = position == len(text) - 1
            delta = RequestOutput(
                request_id=stream.request_id,
                prompt=stream.prompt,
                prompt_token_ids=stream.prompt_token_ids,
                finished=is_last,
                num_cached_tokens=len(stream.prompt_token_ids) // 2,
                lora_name=lora_name,
                adapter_id=stream.adapter_id,
            )
            if position == 0 and params.prompt_logprobs is not None:
                delta.prompt_logprobs = [None] + [
                    a_position(token_id) for token_id in stream.prompt_token_ids[1:]
                ]
            for index in range(params.n):
                answer = CompletionOutput(index=index, text=char, token_ids=[ord(char)])
                if params.logprobs is not None:
                    answer.logprobs = [a_position(ord(char))]
                if is_last:
                    answer.finish_reason = "length" if len(text) == params.max_tokens else "stop"
                delta.outputs.append(answer)
            stream.put(delta)
            if self.first_stream_fails_with is not None and stream.request_id == "r0":
                stream.put(self.first_stream_fails_with)
                return

    async def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        self.encoded.append((text, add_special_tokens))
        return [ord(char) for char in text]

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        self.chat_messages = list(messages)
        self.chat_options = {"add_generation_prompt": add_generation_prompt, **(template_kwargs or {})}
        return [ord(char) for message in messages for char in message["content"]]

    async def load_lora_adapter(
        self,
        name: str,
        path: str,
        *,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> LoadAdapterResult:
        if self.load_error is not None:
            raise self.load_error
        self.operations.append(("load", name, path, load_inplace, pinned, weight))
        was_loaded = name in self.adapters
        info = self.adapters.setdefault(name, adapter_info(name, len(self.adapters) + 1))
        return LoadAdapterResult(
            name=name,
            adapter_id=info.adapter_id,
            content_digest=info.content_digest,
            already_loaded=was_loaded,
        )

    async def unload_lora_adapter(self, name: str, *, force: bool = False) -> UnloadAdapterResult:
        if name not in self.adapters:
            raise AdapterNotFoundError(f"adapter {name!r} is not loaded; GET /v1/loras lists the adapters")
        self.operations.append(("unload", name, force))
        return UnloadAdapterResult(name=name, adapter_ids=[self.adapters.pop(name).adapter_id])

    async def list_lora_adapters(self) -> list[AdapterInfo]:
        return list(self.adapters.values())

    async def stats(self) -> EngineStats:
        pages = {"num_device_pages": 8, "num_host_pages": 32, "num_free_host_pages": 30}
        return EngineStats(
            **{**dict.fromkeys(EngineStats.__struct_fields__, 0), **pages, "total_host_hit_tokens": 64}
        )


def adapter_info(name: str, adapter_id: int, *, is_serving: bool = True) -> AdapterInfo:
    return AdapterInfo(
        name=name,
        adapter_id=adapter_id,
        path=f"/adapters/{name}",
        content_digest=f"{adapter_id:08x}" * 8,
        lora_rank=8,
        num_bytes=1000,
        pinned=False,
        weight=1.0,
        is_serving=is_serving,
        state="resident" if is_serving else "draining",
        is_closed=False,
        is_paused=False,
        load_failed=False,
        tier="device",
        is_being_read=False,
        adapter_slot=adapter_id - 1,
        last_used_s=1000.0,
        load_ms={"check": 1.0, "read": 2.0, "copy": 0.5},
        total_reads=1,
        num_waiting_requests=0,
        num_running_requests=0,
        num_tree_pages=0,
        num_private_pages=0,
        num_host_pages=0,
        total_hit_tokens=0,
        total_missed_tokens=0,
        total_scheduled_tokens=0,
        total_started_requests=0,
        total_queue_us=0,
        total_loads=1,
        total_evictions=0,
    )


def a_position(token_id: int) -> dict[int, Logprob]:
    """The token of the position is the third best; the best two are '#' and '$'."""
    return {
        token_id: Logprob(-3.0, 3, chr(token_id)),
        ord("$"): Logprob(-2.0, 2, "$"),
        ord("#"): Logprob(-1.0, 1, "#"),
    }
