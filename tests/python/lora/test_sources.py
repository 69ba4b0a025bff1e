from __future__ import annotations

import os
from pathlib import Path

import httpx
import pytest
from huggingface_hub import errors as hub_errors

from lora.adapter_setup import make_adapter, make_targets
from lora.source_setup import COMMIT, install_plugin, make_hub_cache
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.hub import HubReference, parse_hub_reference
from lora_serve.lora.peft_adapter import check_peft_adapter
from lora_serve.lora.peft_modules import AdapterLimits
from lora_serve.lora.resolvers import load_resolvers
from lora_serve.lora.sources import AdapterFolder, AdapterSources
from lora_serve.testing.adapters import ALL_PROJECTIONS

torch = pytest.importorskip("torch")


class FakeHub:
    """Gives one folder for everything, or raises; keeps what it was asked."""

    def __init__(self, answer):
        self.answer = answer
        self.calls = []

    def __call__(self, repo_id, *, revision, allow_patterns, local_files_only=False):
        self.calls.append((repo_id, revision, sorted(allow_patterns)))
        if isinstance(self.answer, Exception):
            raise self.answer
        return str(self.answer)


def hub_error(kind: type[Exception]) -> Exception:
    if not issubclass(kind, hub_errors.HfHubHTTPError):
        return kind("no network here")
    response = httpx.Response(404, request=httpx.Request("GET", "https://hub.example/api"))
    return kind("no such thing", response=response)


def num_matched_modules(folder: AdapterFolder) -> int:
    limits = AdapterLimits(max_lora_rank=64, dtype=torch.float32)
    with check_peft_adapter(folder.path, make_targets(), limits, resolve=folder.resolve) as checked:
        return len(checked.layout.modules)


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """The working directory, with allowed and other folders in it."""
    for name in ("allowed/sql", "outside/sql", "org/name", "plain"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- Local paths ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["./org/name", "org/name", "org/name/", "plain", "outside/../plain"])
def test_local_folder_is_found_and_the_hub_is_not_asked(path, working_folder):
    hub = FakeHub(AssertionError("asked the hub"))

    folder = AdapterSources(download=hub).locate(path)

    assert folder.path == os.path.realpath(path)
    assert hub.calls == []


def test_home_folder_is_expanded_only_at_the_start(working_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(working_folder / "allowed"))

    assert AdapterSources().locate("~/sql").path == str(working_folder / "allowed" / "sql")
    assert AdapterSources().locate("plain/~/sql").path == str(working_folder / "plain" / "~" / "sql")


@pytest.mark.parametrize(
    "path", ["outside/sql", "./outside/sql", "../x", "/etc", "~/x", "plain", "allowed/../outside/sql"]
)
def test_no_spelling_leads_out_of_the_allowed_roots(path, working_folder):
    sources = AdapterSources(
        allowed_roots=["allowed"],
        allow_hub=True,
        download=FakeHub(hub_error(hub_errors.RepositoryNotFoundError)),
    )

    with pytest.raises(InvalidArgumentError, match=r"outside the allowed roots|not on the Hugging Face hub"):
        sources.locate(path)


def test_relative_folder_that_could_be_a_repository_is_refused_once_the_hub_is_allowed(working_folder):
    hub = FakeHub(AssertionError("asked the hub"))
    sources = AdapterSources(allow_hub=True, download=hub)

    with pytest.raises(InvalidArgumentError, match=r"ambiguous.*'\./org/name' or 'hf://org/name'"):
        sources.locate("org/name")

    assert sources.locate("./org/name").path == str(working_folder / "org" / "name")


def test_folder_outside_the_roots_does_not_make_a_repository_ambiguous(working_folder):
    snapshot = make_hub_cache(working_folder / "cache", "org/name", make_adapter(working_folder / "a"))
    sources = AdapterSources(allowed_roots=["allowed"], allow_hub=True, download=FakeHub(snapshot))

    assert sources.locate("org/name").path == str(snapshot)


# --- The hub ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/name", HubReference("org/name")),
        ("org/name@v1.2", HubReference("org/name", "v1.2")),
        ("org/name@refs/pr/1", HubReference("org/name", "refs/pr/1")),
        (f"Org-1/na.me_2@{COMMIT}", HubReference("Org-1/na.me_2", COMMIT)),
    ],
)
def test_reference_is_read(text, expected):
    assert parse_hub_reference(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "a/b/c",
        "../name",
        "org/..",
        "org/na..me",
        "org/na--me",
        "org/name@",
        "org/name@../../x",
        "org/name@a/../b",
        "org/name@a//b",
        "org/name@/a",
        "org/name@a/",
        "org/name@a\n",
        "org/name\n",
        "org/.name",
        "órg/name",
        "org/name@a@b",
    ],
)
def test_what_is_no_reference_is_not_taken_for_one(text):
    assert parse_hub_reference(text) is None
    with pytest.raises(InvalidArgumentError, match="names no repository"):
        AdapterSources(allow_hub=True).locate(f"hf://{text}")


@pytest.mark.parametrize("path", ["org/sql@v2", "hf://org/sql@v2"])
def test_adapter_of_the_hub_is_read_through_the_links_of_its_cache(path, tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    (adapter / "README.md").write_text("not wanted")
    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", adapter)
    (tmp_path / "root").mkdir()
    hub = FakeHub(snapshot)

    folder = AdapterSources(allowed_roots=[str(tmp_path / "root")], allow_hub=True, download=hub).locate(path)

    assert hub.calls == [("org/sql", "v2", ["adapter_config.json", "adapter_model.safetensors"])]
    assert folder.path == str(snapshot)
    assert num_matched_modules(folder) == 4 * len(ALL_PROJECTIONS)


def test_link_out_of_the_repository_in_the_cache_is_refused(tmp_path):
    adapter = make_adapter(tmp_path / "adapter")
    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", adapter)
    (snapshot / "adapter_config.json").unlink()
    (snapshot / "adapter_config.json").symlink_to(adapter / "adapter_config.json")

    folder = AdapterSources(allow_hub=True, download=FakeHub(snapshot)).locate("org/sql")

    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        num_matched_modules(folder)


def test_user_cannot_name_the_cache_when_there_are_roots(tmp_path):
    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", make_adapter(tmp_path / "adapter"))
    (tmp_path / "root").mkdir()
    sources = AdapterSources(
        allowed_roots=[str(tmp_path / "root")], allow_hub=True, download=FakeHub(snapshot)
    )
    sources.locate("org/sql")

    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        sources.locate(str(snapshot))


@pytest.mark.parametrize(
    ("path", "roots"), [("hf://org/sql", None), ("hf://org/sql", ["."]), ("org/sql", None)]
)
def test_hub_is_not_asked_unless_the_operator_allows_it(path, roots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(AssertionError("asked the hub"))

    with pytest.raises(InvalidArgumentError, match="--lora-allow-hub"):
        AdapterSources(allowed_roots=roots, download=hub).locate(path)

    assert hub.calls == []


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub_errors.RepositoryNotFoundError, "is not on the Hugging Face hub, or is private"),
        (hub_errors.GatedRepoError, "is gated"),
        (hub_errors.RevisionNotFoundError, "not this revision"),
        (hub_errors.LocalEntryNotFoundError, "cannot be asked.*HF_HUB_OFFLINE"),
        (OSError, "could not be downloaded.*OSError: no network here"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(kind, words):
    sources = AdapterSources(allow_hub=True, download=FakeHub(hub_error(kind)))

    with pytest.raises(InvalidArgumentError, match=f"adapter 'org/sql@v1' .*{words}"):
        sources.locate("org/sql@v1")


def test_cache_is_enough_when_the_real_library_is_offline(tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = make_hub_cache(tmp_path / "cache", "org/sql", make_adapter(tmp_path / "adapter"), branch="v1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sources = AdapterSources(allow_hub=True)

    for revision in ("v1", COMMIT):
        folder = sources.locate(f"org/sql@{revision}")
        assert folder.path == str(snapshot)
        assert num_matched_modules(folder) == 4 * len(ALL_PROJECTIONS)
    for missing in ("org/sql@v2", "org/sql", "org/other"):
        with pytest.raises(InvalidArgumentError, match=f"adapter '{missing}' is not in the local cache"):
            sources.locate(missing)


# --- Resolvers --------------------------------------------------------------------------------------------

PLUGIN = """
import pathlib
FOLDER = pathlib.Path({folder!r})
calls = []
def s3(reference, adapter_name):
    calls.append((reference, adapter_name))
    return FOLDER if reference.startswith("s3://") else None
class Named:
    def __call__(self, reference, adapter_name):
        return str(FOLDER) if reference == "sql-v2" else None
class Unmakeable:
    def __init__(self):
        raise ValueError("no credentials")
def broken(reference, adapter_name):
    raise TimeoutError("bucket is away")
def leaves(reference, adapter_name):
    raise SystemExit("bye")
def relative(reference, adapter_name):
    return "adapters/sql"
def missing(reference, adapter_name):
    return "/does/not/exist"
def number(reference, adapter_name):
    return 3
text = "not callable"
"""
NAMES = ("s3", "Named", "Unmakeable", "broken", "leaves", "relative", "missing", "number", "text")


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """The module of a plug-in with one resolver of each kind; its folder is outside every root."""
    module = f"plugin_{abs(hash(tmp_path))}"
    make_adapter(tmp_path / "fetched")
    (tmp_path / "root").mkdir()
    site = install_plugin(
        tmp_path / "site",
        module,
        PLUGIN.format(folder=str(tmp_path / "fetched")),
        {name.lower(): name for name in NAMES} | {"absent": "absent"},
    )
    monkeypatch.syspath_prepend(str(site))
    return module


@pytest.mark.parametrize(("path", "resolver"), [("s3://bucket/sql", "s3"), ("sql-v2", "named")])
def test_resolver_gives_the_folder(path, resolver, plugin, tmp_path):
    sources = AdapterSources(allowed_roots=[str(tmp_path / "root")], resolvers=["s3", "named"])

    folder = sources.locate(path, "sql")

    assert folder.path == str(tmp_path / "fetched")
    assert num_matched_modules(folder) == 4 * len(ALL_PROJECTIONS)
    import importlib

    asked = importlib.import_module(plugin).calls
    assert asked == [(path, "sql")]
    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        sources.locate(str(tmp_path / "fetched"))


def test_local_folder_wins_over_the_resolvers(plugin, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sql-v2").mkdir()

    assert AdapterSources(resolvers=["named"]).locate("sql-v2").path == str(tmp_path / "sql-v2")


def test_unknown_reference_names_who_was_asked(plugin):
    sources = AdapterSources(resolvers=["named", "s3"])

    for path in ("gs://bucket/sql", "other"):
        with pytest.raises(InvalidArgumentError, match=rf"{path}.*asked: named, s3"):
            sources.locate(path)


def test_uri_without_a_resolver_says_which_option_is_missing():
    with pytest.raises(InvalidArgumentError, match="--lora-resolver"):
        AdapterSources().locate("s3://bucket/sql")


@pytest.mark.parametrize(
    ("resolver", "words"),
    [
        ("broken", "TimeoutError: bucket is away"),
        ("leaves", "SystemExit: bye"),
        ("relative", "it gave 'adapters/sql', expected the absolute path of a folder"),
        ("missing", "it gave '/does/not/exist'"),
        ("number", "TypeError"),
    ],
)
def test_failure_inside_a_resolver_is_reported_under_its_name(resolver, words, plugin):
    sources = AdapterSources(resolvers=[resolver])

    with pytest.raises(
        InvalidArgumentError, match=rf"resolver '{resolver}' failed on 's3://b/x' \(.*{words}"
    ):
        sources.locate("s3://b/x")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["unheard-of"], "'unheard-of' is not installed .*s3"),
        (["s3", "s3"], "given twice"),
        (["unmakeable"], "ValueError: no credentials"),
        (["absent"], "AttributeError"),
        (["text"], "is a str, expected a function"),
    ],
)
def test_resolver_that_cannot_be_used_is_refused_at_the_start(names, words, plugin):
    with pytest.raises(InvalidArgumentError, match=words):
        AdapterSources(resolvers=names)


def test_two_plugins_of_one_name_are_refused(plugin, tmp_path, monkeypatch):
    assert len(load_resolvers(["s3"])) == 1
    other = install_plugin(tmp_path / "other", "another_plugin", "", {"s3": "s3"})
    monkeypatch.syspath_prepend(str(other))

    with pytest.raises(InvalidArgumentError, match="several plug-ins: another_plugin:s3, plugin_"):
        load_resolvers(["s3"])


def test_link_out_of_a_resolvers_folder_is_refused_when_there_are_roots(plugin, tmp_path):
    fetched, root = tmp_path / "fetched", tmp_path / "root"
    for target, is_allowed in ((root, True), (tmp_path, False)):
        moved = target / "weights"
        os.replace(Path(os.path.realpath(fetched / "adapter_model.safetensors")), moved)
        (fetched / "adapter_model.safetensors").unlink(missing_ok=True)
        (fetched / "adapter_model.safetensors").symlink_to(moved)
        folder = AdapterSources(allowed_roots=[str(root)], resolvers=["s3"]).locate("s3://bucket/sql")
        if is_allowed:
            assert num_matched_modules(folder) > 0
            continue
        with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
            num_matched_modules(folder)
