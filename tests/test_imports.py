"""Imports only point down the house's list, and nothing heavy is imported for nothing."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import goldenlayers

ROOT = Path(goldenlayers.__file__).parent

# From the ground up: a room may import those before it.
ORDER: list[str] = [
    "shown",
    "errors",
    "registry",
    "progress",
    "prompts",
    "facts",
    "records",
    "durable",
    "runfiles",
    "store",
    "datasets",
    "chat",
    "tokens",
    "models",
    "hooks",
    "decoding",
    "statistics",
    "delta",
    "editors",
    "evaluation",
    "harness",
    "truth",
    "racing",
    "locating",
    "sweeping",
    "comparing",
    "atlas",
    "checking",
    "choosing",
    "export",
    "report",
    "studying",
    "studio",
    "commands",
    "cli",
]
HEAVY = ("torch", "transformers", "matplotlib", "tokenizers", "numpy", "gguf", "rich", "gradio")


def room(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(tree: ast.AST) -> list[tuple[int, str]]:
    """(line, goldenlayers module) of every import that runs, at the top or inside functions."""
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                visit(other)
            return
        if isinstance(node, ast.Import):
            found.extend((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import"
            module = node.module or ""
            if module == "goldenlayers":
                found.extend((node.lineno, f"goldenlayers.{alias.name}") for alias in node.names)
            else:
                found.append((node.lineno, module))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def offences(name: str, text: str) -> list[str]:
    """The imports of room ``name`` that point up."""
    wrong = []
    for line, module in imports(ast.parse(text)):
        parts = module.split(".")
        if parts[0] != "goldenlayers" or len(parts) < 2:
            continue
        target = parts[1]
        if target == "__version__" or target == name:
            continue
        if target not in ORDER or ORDER.index(target) > ORDER.index(name):
            wrong.append(f"line {line}: {name} imports {module}")
        # Pictures and tables are of those who write run folders.
        if target == "report" and name not in ("studying", "commands", "cli"):
            wrong.append(f"line {line}: {name} imports {module}; it is not to report")
    return wrong


def test_every_room_is_on_the_list() -> None:
    rooms = {room(p) for p in ROOT.rglob("*.py")} - {"__init__", "__main__"}
    assert rooms <= set(ORDER), rooms - set(ORDER)


def test_imports_point_down() -> None:
    wrong = []
    n = 0
    for path in sorted(ROOT.rglob("*.py")):
        if room(path) not in ORDER:  # the package itself; others fail the test above
            continue
        n += 1
        found = offences(room(path), path.read_text(encoding="utf-8"))
        wrong += [f"{path.relative_to(ROOT)} {line}" for line in found]
    assert n > 30
    assert not wrong, "\n".join(wrong)


def test_the_check_sees_what_it_should() -> None:
    assert offences("tokens", "from goldenlayers.locating import locate")
    assert offences("tokens", "def f():\n    import goldenlayers.cli")
    assert offences("locating", "from goldenlayers.report import show")
    assert offences("tokens", "from goldenlayers import editors")
    assert not offences("locating", "from goldenlayers.tokens import join")
    lazy = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from goldenlayers import cli"
    assert not offences("tokens", lazy)


def loaded(code: str) -> set[str]:
    """Which heavy packages a fresh interpreter has loaded after ``code``."""
    tail = f"\nimport sys; print('\\n', *[m for m in {HEAVY!r} if m in sys.modules], sep=' ')"
    env = {**os.environ, "PYTHONPATH": str(ROOT.parent), "COLUMNS": "100"}
    run = subprocess.run(
        [sys.executable, "-c", code + tail], capture_output=True, text=True, env=env, check=True
    )
    return set(run.stdout.splitlines()[-1].split())


def test_nothing_heavy_is_imported_by_the_package() -> None:
    assert loaded("import goldenlayers") == set()
    assert not loaded("import goldenlayers.cli") & {"torch", "transformers", "matplotlib", "numpy"}
    assert loaded("import numpy") == {"numpy"}  # the check sees it


def test_help_is_quick() -> None:
    code = (
        "from goldenlayers.cli import main\n"
        "try: main({!r})\nexcept SystemExit as e: assert e.code == 0"
    )
    # Timings depend on the machine; what makes help slow is these.
    slow = {"torch", "transformers", "matplotlib", "tokenizers", "gguf"}
    for arguments in (["--help"], ["--version"], []):
        assert not loaded(code.format(arguments)) & slow, arguments
    every = (
        "from goldenlayers.commands import COMMANDS, options_of\nfor c in COMMANDS: options_of(c)"
    )
    assert not loaded(every) & slow  # the help of a command needs no more
    assert not loaded(code.format(["edit", "--help"])) & slow
