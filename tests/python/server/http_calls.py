"""Calls of the application without a network."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import httpx
from fastapi import FastAPI

from lora_serve.engine.engine_client import AsyncEngineClient
from lora_serve.server.app import create_app
from lora_serve.server.settings import ServerSettings
from server.fake_engine_client import FakeEngineClient, adapter_info

BASE = "tiny"


def make_client(**fields: Any) -> FakeEngineClient:
    """A fake engine with the adapters 'sql' (1) and 'law' (2)."""
    return FakeEngineClient(adapters={"sql": adapter_info("sql", 1), "law": adapter_info("law", 2)}, **fields)


def make_app(client: FakeEngineClient | None = None, **settings: Any) -> FastAPI:
    return create_app(
        cast(AsyncEngineClient, client or make_client()),
        ServerSettings(served_model_name=BASE, model_path="/models/base", **settings),
    )


def call(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as http:
            return await http.request(method, path, **arguments)

    return asyncio.run(send())


def complete(app: FastAPI, **body: Any) -> httpx.Response:
    return call(app, "POST", "/v1/completions", json={"model": BASE, "prompt": "hello", **body})


def chat(app: FastAPI, **body: Any) -> httpx.Response:
    messages = [{"role": "user", "content": "hello"}]
    return call(app, "POST", "/v1/chat/completions", json={"model": BASE, "messages": messages, **body})


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with '[DONE]'."""
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(line.startswith("data: ") for line in lines[:-1])
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
