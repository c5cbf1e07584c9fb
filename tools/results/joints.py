"""How likely models find an answer with and without a space before it: the table of docs/data.md.

    python tools/results/prompts.py smollm2-135m qwen2.5-coder-0.5b.gguf

Each form's probability is that of the text from the first token on in which the forms differ.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import goldenlayers.models as models
from goldenlayers.decoding import compare_joints
from goldenlayers.prompts import join, sure_joint

CASES = [
    ("x = np.", "matrix"),
    ("答：", "1945"),
    ("Das kostet $", "5"),
    ("https://", "example.com"),
    ("path/to/", "file"),
    ('He said "', "Rome"),
    ("Well-", "known"),
    ("print", "(x)"),
    ("It costs", "$5"),
    ("The end.", "Then"),
    ('The word "superior"', "means"),
]


def main() -> None:
    """Print the table for the models named."""
    names = sys.argv[1:]
    found = []
    for name in names:
        told = compare_joints(models.load(name), CASES)
        found.append({(one.prompt, one.answer): one for one in told})
    head = ["prompt", "answer", *(f"{Path(n).stem}: space, none" for n in names), "joined"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for case in CASES:
        cells = [f"`{case[0]}`", f"`{case[1]}`"]
        texts = []
        for one in (each[case] for each in found):
            cells.append(f"{math.exp(one.space):.2g}, {math.exp(one.none):.2g}")
            texts.append(join(*case, sure_joint(*case) or one.joint)[0])
        cells.append(" or ".join(f"`{text}`" for text in dict.fromkeys(texts)))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
