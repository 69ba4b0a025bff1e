"""Offline use: the engine inside the caller's process, prompts in, finished answers out."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar, cast

from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InternalError, InvalidArgumentError
from lora_serve.common.lora_request import LoRARequest
from lora_serve.common.outputs import RequestOutput
from lora_serve.common.queueing import Queueing
from lora_serve.common.sampling_params import SamplingParams
from lora_serve.engine.engine_core import EngineCore
from lora_serve.engine.input_processor import InputProcessor, ProcessedRequest, PromptTokenizer
from lora_serve.engine.messages import EngineOutput, LoadAdapterResult, UnloadAdapterResult
from lora_serve.engine.output_merger import OutputMerger
from lora_serve.engine.output_processor import OutputProcessor
from lora_serve.engine.status import AdapterInfo, EngineStats
from lora_serve.engine.tokenizer import Tokenizer

Prompt = str | Sequence[int] | Mapping[str, Any]
"""Text, token ids, or {'prompt': text} or {'prompt_token_ids': ids}."""
AdapterChoice = str | LoRARequest | None
"""An adapter by name, with a path for the first use, or None for the base model."""

_STALLED_WAIT_S = 0.005
_Result = TypeVar("_Result")


class LLM:
    """A model with its adapters, for offline use.

    The engine runs in this process, inside the calls. Not thread-safe: use it from one thread.

    Parameters
    ----------
    model : str
        A Hugging Face directory or hub id.
    **options : Any
        The fields of `EngineConfig`, such as `max_num_seqs=64`.

    Raises
    ------
    InvalidArgumentError
        An option is unknown or wrong, or the model or its tokenizer cannot be loaded.

    Examples
    --------
    >>> with LLM("path/to/model") as llm:  # doctest: +SKIP
    ...     llm.load_lora_adapter("sql", "path/to/adapter")
    ...     [output] = llm.generate("SELECT", SamplingParams(max_tokens=8), lora_request="sql")
    """

    def __init__(self, model: str, **options: Any) -> None:
        unknown = sorted(set(options) - set(EngineConfig.__struct_fields__))
        if unknown:
            raise InvalidArgumentError(
                f"LLM got the unknown options {unknown}; the options are "
                f"{', '.join(field for field in EngineConfig.__struct_fields__ if field != 'model')}"
            )
        config = EngineConfig(model=model, **options)
        self._tokenizer = Tokenizer.from_pretrained(model)
        self._core = EngineCore(config)
        self._prompt_tokenizer = PromptTokenizer(self._tokenizer, self._core.model_info.max_model_len)
        self._input_processor = InputProcessor(self._core.model_info)
        self._output_processor = OutputProcessor(self._tokenizer)
        self._request_ids = itertools.count()
        self._last_loads: dict[str, tuple[str, int]] = {}  # Name to path and generation, of what serves.
        self._core.on_retired = self._forget_load

    # --- Text ---------------------------------------------------------------------------------------------

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: AdapterChoice | Sequence[AdapterChoice] = None,
        use_tqdm: bool = False,
        priority: int | Sequence[int] = 0,
    ) -> list[RequestOutput]:
        """Answer prompts, all of them in one batch as far as memory allows.

        Parameters
        ----------
        prompts : str, sequence of int, mapping, or sequence of these
            One prompt or several: text, token ids, or a mapping with `prompt` or `prompt_token_ids`.
        sampling_params : SamplingParams, sequence of SamplingParams, or None
            For all prompts, or one a prompt; None = the defaults.
        lora_request : str, LoRARequest, None, or a sequence of these
            The adapter of all prompts, or one a prompt. A LoRARequest with a path loads it at its first use.
        use_tqdm : bool
            Show a progress bar.
        priority : int or sequence of int
            Class of priority of all prompts, or one a prompt; lower goes first.

        Returns
        -------
        list of RequestOutput
            One a prompt, in the order of the prompts.

        Raises
        ------
        InvalidArgumentError
            A prompt or parameter is wrong, or lengths differ; nothing is generated then.
        AdapterNotFoundError
            A name is not loaded; nothing is generated then.
        CapacityError
            The prompts exceed a limit on what waits (`max_queued_requests` and others, which are off unless
            set); nothing is generated then.
        LoraServeError
            A request failed; the others of the call are aborted.
        """
        prompt_list = _to_prompt_list(prompts)
        sampling_params = sampling_params or SamplingParams()
        params = _spread("sampling_params", sampling_params, len(prompt_list), SamplingParams)
        adapters = _spread("lora_request", lora_request, len(prompt_list), (str, LoRARequest, type(None)))
        queueing = [Queueing(one) for one in _spread("priority", priority, len(prompt_list), int)]
        tokenised = [self._tokenise(prompt) for prompt in prompt_list]
        names = [self._resolve_adapter(adapter) for adapter in adapters]
        requests = [
            self._input_processor.process(str(next(self._request_ids)), text, token_ids, *arguments)
            for (text, token_ids), *arguments in zip(tokenised, params, names, queueing, strict=True)
        ]
        return self._run(requests, use_tqdm)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        lora_request: AdapterChoice | Sequence[AdapterChoice] = None,
        use_tqdm: bool = False,
        *,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several, rendered with the model's chat template.

        Parameters
        ----------
        messages : sequence of mappings, or sequence of such sequences
            Conversations of messages with `role` and `content`.
        sampling_params, lora_request, use_tqdm
            As for `generate`.
        add_generation_prompt : bool
            End the prompt with the start of the assistant's turn.
        chat_template_kwargs : mapping or None
            Further variables of the template.

        Raises
        ------
        InvalidArgumentError
            There is no chat template or it refuses the messages; else as `generate`.
        """
        is_single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Mapping[str, Any]]]", [messages] if is_single else messages)
        prompts = [
            self._prompt_tokenizer.encode_chat(
                conversation,
                add_generation_prompt=add_generation_prompt,
                template_kwargs=chat_template_kwargs,
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, lora_request=lora_request, use_tqdm=use_tqdm)

    # --- Adapters -----------------------------------------------------------------------------------------

    def load_lora_adapter(
        self,
        name: str,
        path: str,
        load_inplace: bool = False,
        pinned: bool = False,
        weight: float = 1.0,
    ) -> LoadAdapterResult:
        """Load an adapter; return when it is ready to serve.

        With the content that `name` serves already, only `pinned` and `weight` are taken over: False unpins.

        Parameters
        ----------
        name, path : str
            What to call it, and its PEFT directory: a local folder, or what `lora_allow_hub` and
            `lora_resolvers` make possible.
        load_inplace : bool
            Replace what the name has when its content differs.
        pinned : bool
            Keep it on the device.
        weight : float
            Its share of the steps beside other adapters under the policy 'fair', in (0, 1000].

        Raises
        ------
        InvalidArgumentError
            The name is no adapter name, the weight is out of range, or the files cannot be applied exactly or
            may not be read.
        AdapterConflictError
            The name serves other content and `load_inplace` is not set.
        CapacityError
            It can never be on the device beside the pinned adapters, or pinned beside others that are open.
        InternalError
            The weights could not be brought to the device, or the engine has stopped.
        """
        result = self._wait_for(
            self._core.load_adapter(name, path, load_inplace=load_inplace, pinned=pinned, weight=weight)
        )
        self._last_loads[name] = (path, result.adapter_id)
        return result

    def unload_lora_adapter(self, name: str, force: bool = False) -> UnloadAdapterResult:
        """Unload an adapter; return when its memory is free.

        Raises
        ------
        AdapterNotFoundError
            The name is not loaded.
        """
        self._last_loads.pop(name, None)
        return self._wait_for(self._core.unload_adapter(name, force=force))

    def list_lora_adapters(self) -> list[AdapterInfo]:
        """Every generation that exists, by adapter id."""
        return self._core.adapters()

    # --- The rest -----------------------------------------------------------------------------------------

    def get_tokenizer(self) -> Any:
        """The model's tokenizer, as transformers made it."""
        return self._tokenizer.backend

    def stats(self) -> EngineStats:
        """Counts over all adapters and the base model."""
        return self._core.stats()

    def close(self) -> None:
        """Stop the engine and free its memory. Closing twice changes nothing."""
        self._core.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- Inside -------------------------------------------------------------------------------------------

    def _tokenise(self, prompt: Prompt) -> tuple[str | None, Sequence[int]]:
        if isinstance(prompt, Mapping):
            if len(prompt) != 1 or not set(prompt) <= {"prompt", "prompt_token_ids"}:
                raise InvalidArgumentError(
                    f"a prompt has the keys {sorted(prompt)} but must have either 'prompt' or "
                    "'prompt_token_ids', and nothing else"
                )
            prompt = next(iter(prompt.values()))
        if isinstance(prompt, str):
            return prompt, self._prompt_tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence):
            raise InvalidArgumentError(
                f"a prompt is of type {type(prompt).__name__} but must be text, a list of token ids or a "
                "mapping"
            )
        return None, cast("Sequence[int]", prompt)

    def _resolve_adapter(self, adapter: AdapterChoice) -> str | None:
        if not isinstance(adapter, LoRARequest):
            return adapter
        name, path = adapter.lora_name, adapter.lora_path
        if path is not None and not self._core.serves(name, path):
            serving = next((i for i in self._core.adapters() if i.is_serving and i.name == name), None)
            # What the hub or a resolver has brought is not asked for again with every call.
            if serving is None or self._last_loads.get(name) != (path, serving.adapter_id):
                # The request says nothing of sharing: content that is loaded from elsewhere keeps both.
                pinned, weight = (serving.pinned, serving.weight) if serving else (False, 1.0)
                self.load_lora_adapter(name, path, pinned=pinned, weight=weight)
        return name

    def _forget_load(self, adapter_id: int) -> None:
        """Forget how a generation was loaded that does not serve any more."""
        self._last_loads = {name: load for name, load in self._last_loads.items() if load[1] != adapter_id}

    def _run(self, requests: Sequence[ProcessedRequest], use_tqdm: bool) -> list[RequestOutput]:
        try:
            for request in requests:
                self._add(request)
            return self._finish(requests, use_tqdm)
        except BaseException:
            for request in requests:
                for engine_id in self._output_processor.remove(request.request_id):
                    self._core.finish_request(engine_id)
            raise
        finally:
            self._core.settle()

    def _add(self, request: ProcessedRequest) -> None:
        self._output_processor.add(request)
        admission = self._core.add_requests(request.engine_requests)
        self._output_processor.set_adapter_id(request.request_id, admission.adapter_id)

    def _finish(self, requests: Sequence[ProcessedRequest], use_tqdm: bool) -> list[RequestOutput]:
        from tqdm import tqdm

        merged = {request.request_id: OutputMerger() for request in requests}
        num_left = len(requests)
        with tqdm(total=num_left, desc="Prompts", disable=not use_tqdm) as progress:
            while num_left:
                processed = self._output_processor.process(self._step())
                for engine_id in processed.engine_ids_to_finish:
                    self._core.finish_request(engine_id)
                for _, error in processed.failures:
                    raise error
                for delta in processed.deltas:
                    merged[delta.request_id].add(delta)
                num_finished = sum(delta.finished for delta in processed.deltas)
                num_left -= num_finished
                progress.update(num_finished)
        return [merged[request.request_id].result() for request in requests]

    def _step(self) -> list[EngineOutput]:
        outputs = self._core.step()
        if not outputs and self._core.failure is not None:
            raise InternalError(self._core.failure)
        if not outputs and self._core.is_stalled:
            self._core.wait_for_news(_STALLED_WAIT_S)
        return outputs

    def _wait_for(self, operation: Future[_Result]) -> _Result:
        while not operation.done():
            self._step()
        return operation.result()


def _to_prompt_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, (str, Mapping)):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidArgumentError(
            f"prompts are of type {type(prompts).__name__} but must be text, token ids, or a list of prompts"
        )
    if prompts and isinstance(prompts[0], int):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))


def _spread(field: str, value: Any, num_prompts: int, kinds: type | tuple[type, ...]) -> list[Any]:
    """Give one value a prompt."""
    if isinstance(value, kinds):
        return [value] * num_prompts
    if not isinstance(value, Sequence) or not all(isinstance(one, kinds) for one in value):
        raise InvalidArgumentError(f"{field} is {value!r} but must be one value or a list with one a prompt")
    if len(value) != num_prompts:
        raise InvalidArgumentError(
            f"{field} has {len(value)} entries for {num_prompts} prompts; give one value, or one a prompt"
        )
    return list(value)
