"""Run by Python of the clients' environment: what ChatOpenAI gets from a server, as JSON.

Usage: langchain_calls.py URL MODEL MESSAGES
"""

from __future__ import annotations

import asyncio
import json
import sys

from langchain_openai import ChatOpenAI


def main() -> None:
    url, model, messages = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    chat = ChatOpenAI(
        base_url=f"{url}/v1",
        api_key="unused",
        model=model,
        temperature=0,
        max_tokens=48,
        max_retries=0,
        timeout=60,
        stream_usage=True,
    )
    whole = chat.invoke(messages)
    chunks = list(chat.stream(messages))
    joined = chunks[0]
    for chunk in chunks[1:]:
        joined += chunk

    async def astream() -> str:
        return "".join([chunk.content async for chunk in chat.astream(messages)])

    answer = {
        "whole": whole.content,
        "finish_reason": whole.response_metadata["finish_reason"],
        "model": whole.response_metadata["model_name"],
        "usage": whole.usage_metadata,
        "pieces": [chunk.content for chunk in chunks if chunk.content],
        "streamed_usage": joined.usage_metadata,
        "async": asyncio.run(astream()),
        "batch": [message.content for message in chat.batch([messages] * 3)],
    }
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
