"""The built wheel, in a fresh environment: the commands, the package, and the data inside."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from goldenlayers import __version__

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path) -> str:
    # No source tree on the path: what answers is what was installed.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    words = list(map(str, command))
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the working tree."""
    place = tmp_path_factory.mktemp("wheel")
    without = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(ROOT / "src", place / "source/src", ignore=without)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "wheel")
    run(*pip, "--no-deps", "--no-build-isolation", "--no-index", "-w", place, place / "source")
    (found,) = place.glob("*.whl")
    return found


def test_all_data_of_the_source_is_inside(wheel: Path) -> None:
    there = set(zipfile.ZipFile(wheel).namelist())
    source = ROOT / "src"
    files = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    ours = {name for name in files if "__pycache__" not in name and ".egg-info" not in name}
    assert ours - there == set()
    assert {".json", ".jsonl", ".md"} <= {Path(name).suffix for name in ours}
    assert any(name.endswith("licenses/LICENSE") for name in there)


def test_it_works_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=False, symlinks=True)
    python = fresh / "bin/python"
    pip = (sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check")
    run(*pip, "--no-input", "install", "--no-deps", "--no-index", wheel)
    # The libraries are those of the tests; a plain path runs no .pth file of theirs.
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")
    golden = fresh / "bin/golden"
    assert run(golden, "--version") == f"goldenlayers {__version__}\n"
    assert "clear-rome" in run(golden, "editors")
    code = "import goldenlayers as gl; print(gl.__file__, len(gl.load_facts('starter')))"
    where, count = run(python, "-c", code).split()
    assert Path(where).is_relative_to(site) and int(count) > 700
