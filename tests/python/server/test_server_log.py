"""Lines of the log; those of whole processes are read in test_engine_restart.py."""

from __future__ import annotations

import json
import logging

import pytest

from lora_serve.common.log_format import JsonFormatter, make_formatter
from lora_serve.server.server_log import RequestIdFilter
from server.http_calls import call, make_app


def record(message, *arguments, **fields):
    made = logging.LogRecord("some.logger", logging.WARNING, __file__, 1, message, arguments, None)
    made.__dict__.update(fields)
    return made


def test_a_line_of_json_holds_what_a_line_of_text_says_and_stays_one_line():
    line = JsonFormatter("server").format(record('a "message"\nof %d lines é', 2))
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == 'a "message"\nof 2 lines é'
    assert (parsed["level"], parsed["logger"], parsed["process"]) == ("warning", "some.logger", "server")
    assert "request_id" not in parsed


def test_a_stack_trace_is_a_field_of_the_line():
    try:
        raise RuntimeError("the reason")
    except RuntimeError as error:
        made = record("it failed")
        made.exc_info = (RuntimeError, error, error.__traceback__)
    line = JsonFormatter("server").format(made)
    assert "\n" not in line
    assert "RuntimeError: the reason" in json.loads(line)["exception"]


@pytest.fixture
def lines():
    """What the server's loggers write as JSON."""
    written = []
    handler = logging.Handler()
    handler.setFormatter(make_formatter("json", "server", ""))
    handler.addFilter(RequestIdFilter())
    handler.emit = lambda made: written.append(json.loads(handler.format(made)))
    logger = logging.getLogger("lora_serve.access")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield written
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_a_request_is_one_line_with_its_id_status_and_whose_key_it_showed_but_not_the_key(lines):
    headers = {"X-Request-Id": "abc", "Authorization": "Bearer hidden"}
    call(make_app(api_keys=("hidden",)), "GET", "/v1/models?key=hidden", headers=headers)
    call(make_app(api_keys=("hidden",)), "GET", "/v1/models")
    first, second = lines
    assert (first["request_id"], first["status"], first["caller"]) == ("abc", 200, "api-key-1")
    assert first["message"].startswith("GET /v1/models 200 in ")
    assert (second["status"], second["caller"]) == (401, "stranger")
    assert "hidden" not in json.dumps(lines)
