from __future__ import annotations

import os

import pytest

from lora.adapter_setup import make_adapter
from lora.peft_setup import check
from lora_serve.common.errors import InvalidArgumentError
from lora_serve.lora.allowed_roots import AllowedRoots


@pytest.fixture
def roots(tmp_path):
    for name in ("allowed/inner", "allowed-not", "outside"):
        (tmp_path / name).mkdir(parents=True)
    return AllowedRoots([str(tmp_path / "allowed")])


def test_path_inside_a_root_is_resolved(roots, tmp_path):
    inner = tmp_path / "allowed" / "inner"
    assert roots.resolve(str(inner)) == str(inner)
    assert roots.resolve(str(tmp_path / "allowed")) == str(tmp_path / "allowed")
    assert roots.resolve(f"{inner}/../inner/./") == str(inner)


@pytest.mark.parametrize(
    "path",
    [
        "outside",
        "allowed/../outside",
        "allowed-not",
        "allowed/inner/../../outside",
        "allowed/nothing/../../x",
    ],
)
def test_path_outside_is_refused(path, roots, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"outside the allowed roots.*--lora-allowed-roots"):
        roots.resolve(f"{tmp_path}/{path}")


def test_link_out_of_a_root_is_refused(roots, tmp_path):
    (tmp_path / "allowed" / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        roots.resolve(str(tmp_path / "allowed" / "link"))


def test_link_into_a_root_is_followed(roots, tmp_path):
    (tmp_path / "outside" / "link").symlink_to(tmp_path / "allowed" / "inner")
    assert roots.resolve(str(tmp_path / "outside" / "link")) == str(tmp_path / "allowed" / "inner")


def test_root_that_is_a_link_stands_for_its_target(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    roots = AllowedRoots([str(tmp_path / "root")])
    assert roots.resolve(str(tmp_path / "root" / "a")) == str(tmp_path / "real" / "a")


def test_relative_path_is_meant_from_the_working_directory(roots, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "allowed")
    assert roots.resolve("inner") == str(tmp_path / "allowed" / "inner")
    with pytest.raises(InvalidArgumentError):
        roots.resolve("../outside")


def test_refusal_does_not_tell_whether_the_path_exists(roots, tmp_path):
    messages = []
    (tmp_path / "secret").mkdir()
    for name in ("secret", "nothing"):
        with pytest.raises(InvalidArgumentError) as caught:
            roots.resolve(str(tmp_path / name))
        messages.append(str(caught.value).replace(name, "..."))
    assert messages[0] == messages[1]


def test_without_roots_any_path_is_allowed_and_with_an_empty_list_none(tmp_path):
    assert AllowedRoots(None).resolve(str(tmp_path)) == str(tmp_path)
    with pytest.raises(InvalidArgumentError):
        AllowedRoots([]).resolve(str(tmp_path))


@pytest.mark.parametrize("path", ["", "a\x00b", "\ud800"])
def test_what_is_no_path_is_refused(path):
    for roots in (None, ["/"]):
        with pytest.raises(InvalidArgumentError, match="adapter path"):
            AllowedRoots(roots).resolve(path)


def test_too_long_path_is_refused_by_the_check():
    with pytest.raises(InvalidArgumentError):
        check("x" * 5000, resolve=AllowedRoots(None).resolve)


def test_root_that_is_no_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    for root in ("", str(tmp_path / "file"), str(tmp_path / "nothing")):
        with pytest.raises(InvalidArgumentError):
            AllowedRoots([root])


def test_adapter_is_checked_inside_the_roots_only(tmp_path):
    inside = make_adapter(tmp_path / "allowed" / "a", rank=2)
    outside = make_adapter(tmp_path / "outside" / "b", rank=2)
    resolve = AllowedRoots([str(tmp_path / "allowed")]).resolve
    with check(inside, resolve=resolve) as checked:
        assert checked.path == str(inside)
    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        check(outside, resolve=resolve)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_file_that_links_out_of_the_roots_is_refused(name, tmp_path):
    inside = make_adapter(tmp_path / "allowed" / "a", rank=2)
    outside = make_adapter(tmp_path / "outside" / "b", rank=2)
    os.unlink(inside / name)
    (inside / name).symlink_to(outside / name)
    with check(inside) as checked:
        assert checked.layout.lora_rank == 2
    with pytest.raises(InvalidArgumentError, match="outside the allowed roots"):
        check(inside, resolve=AllowedRoots([str(tmp_path / "allowed")]).resolve)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_file_that_becomes_a_link_after_it_was_resolved_is_refused(name, tmp_path):
    inside = make_adapter(tmp_path / "allowed" / "a", rank=2)
    outside = make_adapter(tmp_path / "outside" / "b", rank=2)

    def resolve_and_swap(path):
        real = AllowedRoots([str(tmp_path / "allowed")]).resolve(path)
        if path.endswith(name):
            os.unlink(inside / name)
            (inside / name).symlink_to(outside / name)
        return real

    with pytest.raises(InvalidArgumentError, match=f"{name}: Too many levels of symbolic links"):
        check(inside, resolve=resolve_and_swap)
