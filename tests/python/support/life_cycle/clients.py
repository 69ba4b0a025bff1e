"""Clients that do at random what clients do, and check each answer against what it may be."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.life_cycle.catalogue import NUM_ANSWER_TOKENS, PROMPTS, Answer, Name
from support.life_cycle.history import Call
from support.life_cycle.server import BASE
from support.life_cycle.world import Listed, World

HANG_S = 60.0
"""A call that takes longer hangs."""
NUM_HOT_NAMES = 4
_HTTP_ERROR = 400
_CHANGED = "the folder was changed"
_STATUS_OF = {"adapter_conflict": 409}
"""What an error would have been answered with if it had come before a stream's first token, by its code."""


@dataclass
class Part:
    """What one prompt of a request has got so far."""

    name: str | None
    prompt: int
    tokens: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    adapter_id: int | None = None
    answer: Answer | None = None


class RandomClient:
    """One client: a thread with random numbers and a connection of its own."""

    def __init__(self, world: World, http: httpx.Client, seed: str) -> None:
        self._world = world
        self._http = http
        self._rng = random.Random(seed)
        self._all_names = world.catalogue.names

    def run(self, deadline: float) -> None:
        """Act until the time is over, or somebody has found a problem."""
        acts = {self.request: 62, self.load: 22, self.unload: 10, self.list: 3, self.change: 3}
        while time.monotonic() < deadline and not self._world.stop.is_set():
            act = self._rng.choices(list(acts), list(acts.values()))[0]
            try:
                act()
            except httpx.TimeoutException as error:
                self._world.fail(f"{act.__name__} hangs: {error!r}")
            except Exception as error:
                self._world.fail(f"{act.__name__} failed: {type(error).__name__}: {error}")

    # --- Adapters -----------------------------------------------------------------------------------------

    def load(self) -> None:
        """Load a random content under its name."""
        rng, name = self._rng, self._pick()
        folders = [*name.contents, *([None, None] if name.live else [])]
        self.load_content(
            name, folders.index(rng.choice(folders)), inplace=rng.random() < 0.65, pinned=rng.random() < 0.15
        )

    def load_content(self, name: Name, folder: int, *, inplace: bool, pinned: bool) -> int | None:
        """Load from one of a name's folders, the one that changes last; give the generation."""
        is_live = folder == len(name.contents)
        path = name.live if is_live else name.contents[folder].path
        body = {"lora_name": name.name, "lora_path": str(path), "load_inplace": inplace, "pinned": pinned}
        begin = time.monotonic()
        status, answer = self._post("/v1/load_lora_adapter", body)
        end = time.monotonic()
        labels = name.live_labels(begin, end) if is_live else frozenset({name.contents[folder].label})
        kind = self._kind_of_load(status, answer, is_live=is_live)
        if kind is None:
            self._world.fail(f"load of {body} was answered {status} {answer}")
            return None
        adapter_id: int | None = answer.get("adapter_id")
        self._world.add(
            name.name,
            Call(
                kind=kind,
                begin=begin,
                end=end,
                adapter_id=adapter_id,
                contents=labels,
                inplace=inplace,
                pinned=pinned,
                is_live=is_live,
            ),
        )
        return adapter_id

    def _kind_of_load(self, status: int, answer: dict[str, Any], *, is_live: bool) -> str | None:
        message = answer.get("error", {}).get("message", "")
        if status == 200:
            return "already" if answer["already_loaded"] else "loaded"
        if status == 409 and _CHANGED in message:  # It was off the host again before it got to the device.
            return "broken_load" if is_live else None
        if status == 409:
            return "cancelled" if "cancelled by an unload" in message else "conflict"
        if status == 429:
            return "refused"
        return "broken_load" if is_live and status == 400 and "changed" in message else None

    def unload(self) -> None:
        """Unload a name, and look now and then whether it is gone."""
        name, force = self._pick(), self._rng.random() < 0.4
        newest = self._world.newest_seen[name.name]
        begin = time.monotonic()
        if force:
            span = (begin, float("inf"))
            self._world.forced[name.name].append(span)
        status, answer = self._post("/v1/unload_lora_adapter", {"lora_name": name.name, "force": force})
        end = time.monotonic()
        if force:
            with self._world.lock:
                self._world.forced[name.name].remove(span)
                self._world.forced[name.name].append((begin, end))
        kind = {200: "unloaded", 404: "not_found"}.get(status)
        if kind is None:
            self._world.fail(f"unload of {name.name} was answered {status} {answer}")
            return
        self._world.add(name.name, Call(kind=kind, begin=begin, end=end))
        if status == 200 and self._rng.random() < 0.5:
            left = [a["adapter_id"] for a in self.list() if a["name"] == name.name]
            if any(adapter_id <= newest for adapter_id in left):
                self._world.fail(f"{name.name} was unloaded with all up to {newest}, but {left} are left")

    def list(self) -> list[dict[str, Any]]:
        """Look at all generations."""
        begin = time.monotonic()
        response = self._http.get("/v1/loras")
        end = time.monotonic()
        body = response.json()
        if response.status_code != 200:
            self._world.fail(f"the list was answered {response.status_code} {body}")
            return []
        shown: list[dict[str, Any]] = body["data"]
        serving = {adapter["name"]: adapter for adapter in shown if adapter["is_serving"]}
        for adapter in shown:
            content = self._world.content(adapter["name"], adapter["adapter_id"], adapter["content_digest"])
            if content is not None:
                self._world.num_bytes_of[content.label] = adapter["num_bytes"]
        with self._world.lock:
            pinned = {adapter["adapter_id"]: adapter["pinned"] for adapter in shown}
            self._world.lists.append(Listed(begin, end, pinned))
        for name in self._all_names:
            one = serving.get(name.name, {"adapter_id": None, "pinned": False})
            self._world.add(
                name.name,
                Call(kind="listed", begin=begin, end=end, adapter_id=one["adapter_id"], pinned=one["pinned"]),
            )
        on_device = sum(adapter["num_bytes"] for adapter in shown if adapter["tier"] == "device")
        if max(on_device, body["stats"]["num_adapter_bytes"]) > self._world.device_bytes:
            self._world.fail(f"{on_device} bytes on the device, {body['stats']}")
        return shown

    def change(self) -> None:
        """Replace what lies in a folder that was, perhaps, loaded."""
        self._rng.choice([name for name in self._all_names if name.live]).change_live()

    # --- Requests -----------------------------------------------------------------------------------------

    def request(self) -> None:
        """Ask for one prompt, or for two under different names; whole or as a stream; and perhaps leave."""
        rng = self._rng
        names: list[str | None] = [None if rng.random() < 0.1 else self._pick().name]
        if rng.random() < 0.15:
            names.append(rng.choice([name for name in [None, *self._world.names] if name not in names]))
        leaves = rng.random() < 0.15
        self.ask(
            names,
            [rng.randrange(len(PROMPTS)) for _ in names],
            rng.randint(1, NUM_ANSWER_TOKENS),
            is_stream=rng.random() < 0.5,
            leaves=leaves,
        )

    def ask(
        self,
        names: list[str | None],
        prompts: list[int],
        max_tokens: int,
        *,
        is_stream: bool = False,
        leaves: bool = False,
    ) -> list[Part]:
        """Send one request, and check whatever comes back."""
        parts = [Part(name, prompt) for name, prompt in zip(names, prompts, strict=True)]
        body: dict[str, Any] = {
            "model": BASE,
            "prompt": [PROMPTS[prompt] for prompt in prompts] if len(prompts) > 1 else PROMPTS[prompts[0]],
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "return_token_ids": True,
            "stream": is_stream,
        }
        if len(names) > 1 or (names[0] is not None and self._rng.random() < 0.3):
            body["lora_path"] = names if len(names) > 1 else names[0]
        elif names[0] is not None:
            body["model"] = self._rng.choice([names[0], f"{BASE}:{names[0]}"])
        begin = time.monotonic()
        status, error, has_left = 200, None, False
        try:
            for event_status, event in self._send(body, is_stream=is_stream, leaves=leaves):
                if "error" in event:
                    status, error = event_status, event["error"]
                else:
                    self._take(parts, event)
        except _LeftError:
            has_left = True
        self._conclude(parts, begin, time.monotonic(), status, error, max_tokens, has_left=has_left)
        return parts

    def _send(self, body: dict[str, Any], *, is_stream: bool, leaves: bool) -> Iterator[tuple[int, Any]]:
        """Yield the status and the answer, or its pieces."""
        if not is_stream:
            patience = self._rng.uniform(0.005, 0.1) if leaves else HANG_S
            timeout = httpx.Timeout(HANG_S, read=patience)
            try:
                response = self._http.post("/v1/completions", json=body, timeout=timeout)
            except httpx.ReadTimeout:
                if leaves:
                    raise _LeftError from None
                raise
            yield response.status_code, response.json()
            return
        patience = self._rng.randint(0, 6) if leaves else 10**6
        with self._http.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code >= _HTTP_ERROR:
                response.read()
                yield response.status_code, response.json()
                return
            for number, line in enumerate(part for part in response.iter_lines() if part):
                if line == "data: [DONE]":
                    return
                if number >= patience:
                    raise _LeftError
                event = json.loads(line.removeprefix("data: "))
                yield (_STATUS_OF.get(event["error"]["code"], 500) if "error" in event else 200), event
            raise AssertionError("the stream has no end")

    def _take(self, parts: list[Part], event: dict[str, Any]) -> None:
        """Take an answer, or a piece of one."""
        shown = dict(_split(fingerprint) for fingerprint in event["system_fingerprint"].split(","))
        for choice in event["choices"]:
            part = parts[choice["index"]]
            name = BASE if part.name is None else part.name
            if name not in shown:
                self._world.fail(f"{part} was answered by {event['system_fingerprint']}")
                return
            adapter_id, digest = shown[name]
            if part.adapter_id not in (None, adapter_id):
                self._world.fail(f"{part} was answered by another generation, {adapter_id}")
                return
            part.adapter_id = adapter_id
            if part.name is None:
                part.answer = self._world.catalogue.base_answers[part.prompt]
            else:
                content = self._world.content(part.name, adapter_id, digest)
                part.answer = content.answers[part.prompt] if content else None
            part.tokens += choice["token_ids"] or []
            part.finish_reason = choice["finish_reason"] or part.finish_reason

    def _conclude(
        self,
        parts: list[Part],
        begin: float,
        end: float,
        status: int,
        error: dict[str, Any] | None,
        max_tokens: int,
        *,
        has_left: bool,
    ) -> None:
        for part in parts:
            if part.answer is not None and not part.answer.agrees(part.tokens):
                self._world.fail(
                    f"wrong answer: {part}, {self._world.content_of.get(part.adapter_id or 0)}, "
                    f"{end - self._world.started:.1f} s after the start"
                )
            if part.name is None:
                continue
            if part.adapter_id is not None:
                call = Call(kind="served", begin=begin, end=end, adapter_id=part.adapter_id)
                self._world.add(part.name, call)
                if part.finish_reason == "abort":
                    with self._world.lock:
                        self._world.aborted.append(call)
                        self._world.aborted_names.append(part.name)
        if has_left:
            self._world.counts["left"] += 1
        elif error is not None:
            self._conclude_error(parts, begin, end, status, error)
        else:
            for part in parts:
                is_complete = part.finish_reason == "length" and len(part.tokens) == max_tokens
                is_aborted = part.finish_reason == "abort" and len(part.tokens) < max_tokens
                if part.answer is None or not (is_complete or (is_aborted and part.name is not None)):
                    self._world.fail(f"{part} has ended otherwise than after {max_tokens} tokens")
                self._world.counts[f"ended: {part.finish_reason}"] += 1

    def _conclude_error(
        self, parts: list[Part], begin: float, end: float, status: int, error: dict[str, Any]
    ) -> None:
        message = error["message"]
        concerned = [part.name for part in parts if part.name is not None and repr(part.name) in message]
        concerned += [p.name for p in parts if p.name and f"'{BASE}:{p.name}'" in message]
        kind = None
        if status == 404 and error["code"] == "model_not_found":
            kind = "missing"
        elif status == 409 and "could not be brought to the device" in message and _CHANGED in message:
            kind = "broken"
        if kind is None or len(concerned) != 1 or (kind == "missing" and parts[0].tokens):
            self._world.fail(f"{parts} were answered {status} {error}")
            return
        assert concerned[0] is not None
        self._world.add(concerned[0], Call(kind=kind, begin=begin, end=end))

    # --- Random -------------------------------------------------------------------------------------------

    def _pick(self) -> Name:
        """Some names are met often, so that calls about one meet each other."""
        rng = self._rng
        if rng.random() < 0.35:
            return self._all_names[rng.randrange(NUM_HOT_NAMES)]
        return rng.choice(self._all_names)

    def _post(self, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        response = self._http.post(path, json=body)
        return response.status_code, response.json()


class _LeftError(Exception):
    """The client went away."""


def _split(fingerprint: str) -> tuple[str, tuple[int, str]]:
    """'n01-g7-0123abcd' as name, generation and digest; the base model has no digest."""
    name, generation, *digest = fingerprint.split("-")
    return name, (int(generation.removeprefix("g")), digest[0] if digest else "")


def run_clients(world: World, make_http: Any, num_clients: int, seconds: float, seed: str) -> None:
    """Let clients act at random for a while; return when all have ended, or one hangs."""
    deadline = time.monotonic() + seconds

    def run(number: int) -> None:
        with make_http(timeout_s=HANG_S) as http:
            RandomClient(world, http, f"{seed}-{number}").run(deadline)

    threads = [threading.Thread(target=run, args=[number], daemon=True) for number in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()) + 2 * HANG_S)
        if thread.is_alive():
            world.fail("a client hangs")
