"""The rules of docs/architecture.md that tell where things may be known."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python" / "lora_serve"
# From the lowest layer to the highest; a module imports only from layers before its own.
LAYERS: list[set[str]] = [
    {"common"},
    {"kernels", "distributed", "scheduler"},
    {"layers"},
    {"models"},
    {"lora"},
    {"executor"},
    {"engine"},
    {"server", "llm", "testing"},
    {"demo"},
    {"cli"},
]


def python_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Every absolute module name that a file imports, lazily or not; relative imports are resolved."""
    package = path.relative_to(PACKAGE.parent).with_suffix("").parts[:-1]
    modules: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            modules.add(name)
            modules.update(f"{name}.{alias.name}" for alias in node.names)
    return modules


def layer_of(part: str) -> int | None:
    return next((index for index, names in enumerate(LAYERS) if part in names), None)


def part_of(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def test_every_part_has_a_layer() -> None:
    parts = {part_of(path) for path in python_files()} - {"__init__"}
    assert {part for part in parts if layer_of(part) is None} == set()


def test_imports_point_to_lower_layers_only() -> None:
    wrong = []
    for path in python_files():
        own = layer_of(part_of(path))
        for module in imported_modules(path):
            pieces = module.split(".")
            if pieces[0] != "lora_serve" or len(pieces) < 2 or own is None:
                continue
            other = layer_of(pieces[1])
            is_other_part = pieces[1] != part_of(path)
            if other is not None and is_other_part and other >= own:
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert wrong == []


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("lora_serve._core", {"scheduler.py", "lora/peft_reader.py"}),
        ("triton", {"kernels/_triton.py"}),
    ],
)
def test_module_is_imported_in_one_place_only(module: str, allowed: set[str]) -> None:
    importers = {
        str(path.relative_to(PACKAGE))
        for path in python_files()
        if any(name == module or name.startswith(f"{module}.") for name in imported_modules(path))
    }
    assert importers <= allowed


def test_kernels_import_nothing_internal() -> None:
    for path in sorted((PACKAGE / "kernels").rglob("*.py")):
        internal = {name for name in imported_modules(path) if name.startswith("lora_serve")}
        assert {name for name in internal if not name.startswith("lora_serve.kernels")} == set(), path


def test_core_includes_no_python_torch_or_cuda_header() -> None:
    forbidden = re.compile(r'#include\s*[<"](Python\.h|pybind11|torch|ATen|c10|cuda)')
    files = [*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cc")]
    assert files
    assert [str(file) for file in files if forbidden.search(file.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("folder", "may_include"),
    [
        ("common", {"common"}),
        ("adapter_weights", {"common", "adapter_weights"}),
        ("kv_prefix_cache", {"common", "kv_prefix_cache"}),
        ("scheduler", {"common", "kv_prefix_cache", "scheduler"}),
    ],
)
def test_core_folders_include_only_lower_folders(folder: str, may_include: set[str]) -> None:
    for file in (ROOT / "csrc" / folder).iterdir():
        for included in re.findall(r'#include "([^"/]+)/', file.read_text(encoding="utf-8")):
            assert included in may_include, f"{file.name} includes {included}/"


def test_scheduler_uses_the_cache_through_its_facade_only() -> None:
    facade = {"kv_prefix_cache.h", "cache_options.h", "lease.h", "namespace_handle.h"}
    for file in (ROOT / "csrc" / "scheduler").iterdir():
        for header in re.findall(r'#include "kv_prefix_cache/([^"]+)"', file.read_text(encoding="utf-8")):
            assert header in facade, f"{file.name} includes kv_prefix_cache/{header}"


def test_page_ids_become_positions_in_one_place_only() -> None:
    """Only the input batch multiplies page ids; on the device `kernels/step_inputs.py` does."""
    pattern = re.compile(r"\*\s*(self\.)?_?(page_size|PAGE_SIZE)\s*\+")
    folders = ("executor", "kernels", "engine", "models")
    files = [path for folder in folders for path in (PACKAGE / folder).rglob("[!r]*.py")]
    found = [path.name for path in files if pattern.search(path.read_text(encoding="utf-8"))]
    assert found == ["input_batch.py"]


@pytest.mark.parametrize("folder", ["kernels", "layers", "models", "executor"])
def test_adapter_names_do_not_reach_the_runtime(folder: str) -> None:
    files = (PACKAGE / folder).rglob("*.py")
    found = [
        str(path) for path in files if re.search(r"\b(lora|adapter)_name\b", path.read_text(encoding="utf-8"))
    ]
    assert found == []
