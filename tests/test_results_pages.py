"""The pages of docs/results say what the kept cells say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[1] / "tools" / "results"


@pytest.mark.parametrize(
    "script",
    [
        *("render.py", "golden_layers.py", "earlier_study.py", "clear_rome.py", "each_page.py"),
        "worked.py",
    ],
)
def test_pages_are_those_of_the_cells(script: str) -> None:
    done = subprocess.run(
        [sys.executable, str(TOOLS / script), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
