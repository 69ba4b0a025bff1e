from __future__ import annotations

import socket

import pytest

from lora_serve.cli.main import main, make_parser
from lora_serve.cli.serve import ADMIN_API_KEY_VARIABLE, API_KEY_VARIABLE, make_launch
from lora_serve.common.config import EngineConfig
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.engine.process_handle import SHUTDOWN_TIMEOUT_S
from lora_serve.server.api_keys import KeyEntry
from lora_serve.server.engine_supervisor import RestartSettings
from lora_serve.server.launch import AdapterModule
from lora_serve.server.limits import ServerLimits
from lora_serve.server.settings import DEFAULT_DRAIN_TIMEOUT_S, AdapterFolderSettings


@pytest.fixture(autouse=True)
def _no_key_in_the_environment(monkeypatch):
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    monkeypatch.delenv(ADMIN_API_KEY_VARIABLE, raising=False)


def launch_of(*arguments):
    return make_launch(make_parser().parse_args(["serve", *arguments]))


def test_without_options_the_engine_has_its_own_defaults():
    launch = launch_of("some/model")
    assert launch.config == EngineConfig(model="some/model")
    assert launch.settings.served_model_name == "some/model"
    assert (launch.host, launch.port, list(launch.adapters)) == ("127.0.0.1", 8000, [])
    assert launch.settings.api_keys == ()


def test_every_option_reaches_the_engine():
    options = (
        "--dtype float32 --device cpu --load-format dummy --page-size 8 --num-device-pages 77 "
        "--max-num-seqs 3 --max-num-batched-tokens 64 --max-model-len 100 --max-loras 5 --max-lora-rank 6 "
        "--kv-host-memory-gb 1.5 --kv-write-policy write_back "
        "--no-prefix-caching --lora-allowed-roots /a /b --lora-allowed-roots /c --seed 9 "
        "--lora-memory-gb 0.25 --max-loading-adapters 7 --adapter-patience-ms 20 "
        "--adapter-time-slice-steps 0 --adapter-pause-ms 30 "
        "--scheduling-policy lpm --priority-ageing-ms 250 --max-queued-requests 11 --max-queued-tokens 12 "
        "--max-requests-per-adapter 13 --no-async-scheduling "
        "--attention-backend torch --enforce-eager --cuda-graph-sizes 1 3 "
        "--prefill-graph-sizes 20 10"
    )
    assert launch_of("m", *options.split()).config == EngineConfig(
        model="m",
        dtype="float32",
        device="cpu",
        load_format="dummy",
        page_size=8,
        num_device_pages=77,
        max_num_seqs=3,
        max_num_batched_tokens=64,
        max_model_len=100,
        max_loras=5,
        max_lora_rank=6,
        kv_host_memory_gb=1.5,
        kv_write_policy="write_back",
        enable_prefix_caching=False,
        lora_allowed_roots=["/a", "/b", "/c"],
        seed=9,
        lora_memory_gb=0.25,
        max_loading_adapters=7,
        adapter_patience_ms=20,
        adapter_time_slice_steps=0,
        adapter_pause_ms=30,
        scheduling_policy="lpm",
        priority_ageing_ms=250,
        max_queued_requests=11,
        max_queued_tokens=12,
        max_requests_per_adapter=13,
        async_scheduling=False,
        attention_backend="torch",
        enforce_eager=True,
        cuda_graph_sizes=[1, 3],
        prefill_graph_sizes=[20, 10],
    )
    assert launch_of("m", "--prefill-graph-sizes").config.prefill_graph_sizes == []
    assert launch_of("m", "--gpu-memory-utilization", "0.5").config.gpu_memory_utilization == 0.5
    assert launch_of("m", "--kv-memory-gb", "0.25").config.kv_memory_gb == 0.25


def test_every_field_of_the_engine_has_an_option():
    parser = make_parser()
    options = vars(parser.parse_args(["serve", "m"]))
    negated = {"enable_prefix_caching": "no_prefix_caching", "async_scheduling": "no_async_scheduling"}
    fields = {negated.get(field, field) for field in EngineConfig.__struct_fields__}
    assert fields - set(options) == set()


def test_adapters_come_as_name_and_path():
    launch = launch_of("m", "--lora-modules", "a=/x", "b=/y=z", "--lora-modules", "c=w")
    assert list(launch.adapters) == [
        AdapterModule("a", "/x"),
        AdapterModule("b", "/y=z"),
        AdapterModule("c", "w"),
    ]


def test_api_keys_come_from_options_and_environment(monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "three")
    launch = launch_of("m", "--api-key", "one", "--api-key", "two")
    assert launch.settings.api_keys == ("one", "two", "three")


def test_admin_keys_and_keys_of_a_file_come_beside_them(monkeypatch, tmp_path):
    monkeypatch.setenv(ADMIN_API_KEY_VARIABLE, "admin-2")
    path = tmp_path / "keys.json"
    path.write_text('{"keys": [{"name": "acme", "key": "secret", "adapters": ["sql"]}]}')
    settings = launch_of("m", "--admin-api-key", "admin-1", "--api-keys-file", str(path)).settings
    assert settings.admin_api_keys == ("admin-1", "admin-2")
    assert settings.key_entries == (KeyEntry(name="acme", key="secret", adapters=["sql"]),)


def test_limits_and_life_reach_the_server():
    options = (
        "--max-body-bytes 10 --max-concurrent-requests 11 --max-concurrent-requests-per-key 12 "
        "--max-connections 13 --header-timeout 14 --body-timeout 15 --drain-timeout 16 --restart-engine "
        "--max-engine-restarts 17"
    )
    launch = launch_of("m", *options.split())
    assert launch.settings.max_body_bytes == 10
    assert launch.settings.limits == ServerLimits(11, 12, 13, 14.0, 15.0)
    assert launch.drain_timeout_s == 16.0
    assert launch.restart == RestartSettings(max_restarts=17)
    without = launch_of("m")
    assert without.settings.limits == ServerLimits()
    assert (without.restart.max_restarts, without.drain_timeout_s) == (0, DEFAULT_DRAIN_TIMEOUT_S)
    assert without.drain_timeout_s + SHUTDOWN_TIMEOUT_S <= 30, "Kubernetes' default grace period"


def test_limit_of_answers_per_request_reaches_the_server():
    assert launch_of("m").settings.max_answers_per_request == 1024
    assert launch_of("m", "--max-answers-per-request", "9").settings.max_answers_per_request == 9


def test_the_operator_page_can_be_left_out():
    assert launch_of("m").settings.operator_page is True
    assert launch_of("m", "--no-operator-page").settings.operator_page is False


def test_the_tokenizer_tells_its_settings_only_when_asked_to():
    assert launch_of("m").settings.tokenizer_info is False
    assert launch_of("m", "--enable-tokenizer-info-endpoint").settings.tokenizer_info is True


@pytest.mark.parametrize("module", ["a", "=path", "a=", "="])
def test_malformed_adapter_is_refused(module):
    with pytest.raises(InvalidArgumentError, match="NAME=PATH"):
        launch_of("m", "--lora-modules", module)


def test_an_adapter_given_twice_is_refused():
    with pytest.raises(InvalidArgumentError, match="'a' twice"):
        launch_of("m", "--lora-modules", "a=/x", "a=/x")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--max-num-seqs", "0"], "max_num_seqs is 0"),
        (["--max-num-seqs", "9", "--max-num-batched-tokens", "8"], "max_num_batched_tokens is 8"),
        (["--served-model-name", ""], "--served-model-name"),
        (["--api-key", ""], "--api-key"),
        (["--admin-api-key", " "], "--admin-api-key"),
        (["--api-key", "same", "--admin-api-key", "same"], "there twice"),
        (["--api-keys-file", "/nowhere"], "--api-keys-file '/nowhere' cannot be read"),
        (["--max-connections", "-1"], "--max-connections is -1"),
        (["--body-timeout", "0"], "--body-timeout is 0"),
        (["--drain-timeout", "-1"], "--drain-timeout is -1"),
        (["--restart-engine", "--max-engine-restarts", "-1"], "--max-engine-restarts is -1"),
        (["--kv-host-memory-gb", "-1"], "kv_host_memory_gb is -1.0"),
        (["--lora-memory-gb", "0"], "lora_memory_gb is 0.0"),
        (["--max-queued-requests", "-1"], "max_queued_requests is -1"),
        (["--max-answers-per-request", "0"], "max_answers_per_request is 0"),
        (["--lora-modules", "a:b=/x"], "lora_name is 'a:b'"),
        (["--served-model-name", "base", "--lora-modules", "base=/x"], "the base model's name"),
        (["--host", "no such host"], "--host"),
        (["--port", "99999"], "--port"),
    ],
)
def test_wrong_option_exits_with_one_line(arguments, text, capsys):
    assert main(["serve", "m", *arguments]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith("lora-serve: error: ")
    assert text in printed
    assert "Traceback" not in printed


def test_taken_port_is_named_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "/no/such/model", "--port", str(port)]) == 1
    assert f"port {port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nothing"],
        ["serve"],
        ["serve", "m", "--dtype", "int3"],
        ["serve", "m", "--kv-write-policy", "sometimes"],
        ["serve", "m", "--scheduling-policy", "lifo"],
    ],
)
def test_bad_usage_exits_with_two(arguments):
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2


@pytest.mark.parametrize("option", ["--num-device-pages", "--gpu-memory-utilization"])
def test_sizes_of_the_kv_memory_exclude_each_other(option):
    with pytest.raises(SystemExit):
        main(["serve", "m", option, "1", "--kv-memory-gb", "1"])


@pytest.mark.parametrize("option", ["--enable-lora", "--enable-tokenizer-info", "--max-cpu-loras=4"])
def test_option_of_another_server_points_to_the_page_on_migrating(option, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["serve", "m", option])

    assert ended.value.code == 2
    assert f"unrecognized arguments: {option} (" in (error := capsys.readouterr().err)
    assert "docs/migrating.md" in error


def test_demo_prints_its_paths(capsys):
    assert main(["demo", "--print-paths"]) == 0
    assert '"adapters"' in capsys.readouterr().out


def test_sources_of_adapters_reach_the_engine():
    options = "--lora-allow-hub --lora-resolver s3 --lora-resolver gs"
    assert launch_of("m", *options.split()).config == EngineConfig(
        model="m", lora_allow_hub=True, lora_resolvers=["s3", "gs"]
    )


def test_watched_folder_is_checked_against_the_roots_and_reaches_the_server(tmp_path):
    options = ["--lora-dir", str(tmp_path), "--lora-dir-poll-seconds", "0.5", "--served-model-name", "base"]

    assert launch_of("m").adapter_folder is None
    assert launch_of("m", *options).adapter_folder == AdapterFolderSettings(str(tmp_path), "base", 0.5, None)
    (tmp_path / "root").mkdir()
    with pytest.raises(InvalidArgumentError, match="--lora-dir cannot be used"):
        launch_of("m", *options, "--lora-allowed-roots", str(tmp_path / "root"))
