"""Fails when a file or a function is longer than its budget (CONTRIBUTING.md, "Size")."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE_SUFFIXES = {".py", ".cc", ".h"}
GENERATED = {"python/lora_serve/_core.pyi"}
MAX_FILE_LINES = 500
MAX_TEST_FILE_LINES = 900
MAX_FUNCTION_LINES = 80
MAX_KERNEL_LINES = 120


def project_files() -> list[Path]:
    """The files that git tracks or would track, so that build outputs never count."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / line for line in listed.splitlines() if (ROOT / line).is_file()]


def function_problems(path: Path, text: str) -> list[str]:
    """One line for each Python function over its budget."""
    problems = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        is_kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        limit = MAX_KERNEL_LINES if is_kernel else MAX_FUNCTION_LINES
        num_lines = (node.end_lineno or node.lineno) - node.lineno + 1
        if num_lines > limit:
            name = path.relative_to(ROOT)
            problems.append(
                f"{name}:{node.lineno}: {node.name} has {num_lines} lines, at most {limit}: split it"
            )
    return problems


def main() -> int:
    problems = []
    for path in project_files():
        name = path.relative_to(ROOT)
        if path.suffix not in SOURCE_SUFFIXES or str(name) in GENERATED:
            continue
        text = path.read_text(encoding="utf-8")
        limit = MAX_TEST_FILE_LINES if name.parts[0] == "tests" else MAX_FILE_LINES
        num_lines = text.count("\n")
        if num_lines > limit:
            problems.append(f"{name}: {num_lines} lines, at most {limit}: split it by what it does")
        if path.suffix == ".py":
            problems.extend(function_problems(path, text))
    print("\n".join(problems) if problems else "size budgets: every file and function is within them")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
