"""Adapters that requests load, through a real server, its engine process and its file system."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from lora.source_setup import make_hub_cache
from lora_serve.testing.adapters import make_random_adapter
from support.server_process import ServerProcess
from support.tiny_checkpoint import make_tiny_checkpoint

NAMES = ("one", "two", "three")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("autoload")
    model = make_tiny_checkpoint(folder / "model")
    for seed, name in enumerate(NAMES):
        make_random_adapter(folder / "root" / name, model, rank=4, seed=seed)
    make_random_adapter(folder / "outside", model, rank=4)
    make_random_adapter(folder / "root" / "large", model, rank=32)
    make_hub_cache(folder / "cache", "org/two", folder / "root" / "two")
    (folder / "root" / "link").symlink_to(folder / "outside")
    (folder / "root" / "empty").mkdir()
    return folder


@pytest.fixture(scope="module")
def server(folder):
    options = (
        "--served-model-name",
        "tiny",
        "--max-lora-rank",
        "16",
        "--lora-modules",
        f"own={folder}/root/one",
    )
    options += ("--lora-autoload", "--lora-autoload-max", "2", "--lora-allowed-roots", str(folder / "root"))
    options += ("--lora-allow-hub",)
    environment = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(folder / "cache")}
    with ServerProcess(folder / "model", *options, environment=environment) as server:
        yield server


@pytest.fixture
def http(server):
    with server.http() as http:
        yield http


def complete(http, path, **options):
    body = {
        "model": "tiny",
        "prompt": "Hello",
        "max_tokens": 4,
        "temperature": 0,
        "lora_path": path,
        **options,
    }
    return http.post("/v1/completions", json=body)


def loads(server, path):
    return server.log().count(f"adapter '{path}' is loaded on first use")


def test_paths_are_loaded_once_and_make_way_for_each_other(server, http, folder):
    paths = [f"{folder}/root/{name}" for name in NAMES]
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda path: complete(http, path), paths[:2] * 3))
    assert [answer.status_code for answer in answers] == [200] * 6
    assert [loads(server, path) for path in paths] == [1, 1, 0]
    texts = {answer.json()["choices"][0]["text"] for answer in answers}
    assert len(texts) == 2
    own = complete(http, "own").json()["choices"][0]["text"]
    assert own == complete(http, paths[0]).json()["choices"][0]["text"]

    assert complete(http, paths[2]).status_code == 200
    names = {info["name"] for info in http.get("/v1/loras").json()["data"] if info["is_serving"]}
    assert names == {"own", paths[0], paths[2]}  # The second was used least recently.
    lorax = {"inputs": "Hello", "parameters": {"adapter_id": paths[1], "max_new_tokens": 4}}
    assert http.post("/generate", json=lorax).json()["generated_text"] in texts


def test_batch_loads_the_paths_of_its_prompts_and_each_runs_under_its_own(http, folder):
    paths = [f"{folder}/root/{name}" for name in ("one", "two")]
    expected = [complete(http, path).json()["choices"][0]["text"] for path in (*paths, None)]
    assert len(set(expected)) == 3
    batch = complete(http, [*paths, None], prompt=["Hello"] * 3).json()
    assert [choice["text"] for choice in batch["choices"]] == expected


def test_id_of_the_hub_is_loaded_as_lorax_clients_give_it(http, folder):
    expected = complete(http, f"{folder}/root/two").json()["choices"][0]["text"]
    parameters = {"adapter_id": "org/two", "adapter_source": "hub", "max_new_tokens": 4}
    answer = http.post("/generate", json={"inputs": "Hello", "parameters": parameters})
    assert answer.json()["generated_text"] == expected
    missing = http.post("/generate", json={"inputs": "Hello", "parameters": {"adapter_id": "org/none"}})
    assert missing.status_code == 404
    assert str(folder) not in missing.text


def test_what_lies_outside_the_roots_cannot_be_told_from_what_is_not_there(http, folder):
    answers = set()
    for path in (
        "outside",
        "outside/adapter_config.json",
        "nothing",
        "root/../outside",
        "root/link",
        "root/empty",
    ):
        response = complete(http, f"{folder}/{path}")
        assert response.status_code == 404
        answers.add(response.text.replace(path, "PATH"))
    assert len(answers) == 1
    assert complete(http, "/etc").status_code == 404


def test_adapter_inside_the_roots_that_is_refused_says_why(http, folder):
    response = complete(http, f"{folder}/root/large")
    assert response.status_code == 400
    assert "max_lora_rank" in response.json()["error"]["message"]


def test_option_without_a_place_to_load_from_does_not_start(folder, capsys):
    from lora_serve.cli.main import main

    assert main(["serve", str(folder / "model"), "--lora-autoload"]) != 0
    assert "--lora-allowed-roots" in capsys.readouterr().err
