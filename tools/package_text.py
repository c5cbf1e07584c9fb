"""Makes the text for key statistics that comes with the package (``statistics/text.jsonl``).

SmolLM2-135M-Instruct (Apache-2.0; the packaged ``smollm2-135m``) goes on from many short openings
at temperature 0.8, from the tokens that hold 95 % of the mass (at 1 a model this small, and
quantised, soon talks nonsense). The openings are our own words: kinds of text about things of
``names.json`` and about everyday matters. Text that repeats itself, or is hardly text, is dropped.

A cell takes about a minute of a core. They go into a folder, and a run that was stopped goes on
behind its last whole cell:

    OMP_NUM_THREADS=1 nice python tools/package_text.py cells --cells 15
    python tools/package_text.py cells --write src/goldenlayers/statistics/text.jsonl
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from goldenlayers.models import Model

MODEL = "smollm2-135m"
ROWS, DRAWN = 64, 152  # texts of a cell, tokens drawn for each
TEMPERATURE, TOP_P = 0.8, 0.95
NOTE = """# The text of the package

`text.jsonl` is what a model reads while its key statistics are collected (`--statistics package`,
the default). {} texts, those worth keeping of {}, sampled once by `tools/package_text.py` in {}
cells with the seeds 0, 1, … at temperature {}, top-p {}, from SmolLM2-135M-Instruct by Hugging Face
(Apache-2.0; the packaged `smollm2-135m`, Q4_1). The openings are ours. The text is under the Apache
License 2.0, as the project.

It is made up, by a small model: no sentence of it is to be believed. Nothing of it is learned; only
the mean products of a layer's activations on it are used.

sha256 of `text.jsonl`: {}
"""
NAMES = Path("src/goldenlayers/editors/names.json")

LIVING = (
    "rulers and politicians",
    "musicians and composers",
    "actors and directors",
    "athletes",
    "companies",
)
UNWANTED = re.compile(
    r"(?i)\b(sex|porn|rape|suicid|nazi|hitler|fuck|shit|nigg|slur|terroris|murder)"
)

OF_NAMES = (
    "{} is",
    "{} was",
    "{} has",
    "The history of {} begins",
    "In the early years of {},",
    "The name {} comes from",
    "What most people know of {} is",
    "Visitors who come for {}",
    "A short guide to {}:",
    "Question: What is {}?\nAnswer:",
    "My first memory of {} is",
    "Critics of {} say that",
    "Last week, {}",
    "When I was young, {}",
    "There are three reasons why {}",
    "According to the newspaper, {}",
    "Compared with others, {}",
    "The story of {} in brief:",
)
OF_MATTERS = (
    "How {} works:",
    "The first book on {} was",
    "She had studied {} for years when",
    "Notes on {}, chapter one.",
    "The most common mistake in {} is",
    "In {}, the word",
    "The committee on {} met",
    "A beginner's guide to {}",
    "Researchers in {} found that",
    "During the war, {}",
    "The economics of {}:",
    "He wrote to his brother about {}:",
    "Today's lesson is about {}.",
    "The town was known for its {}, and",
    "In the nineteenth century, {}",
    "Two friends argue about {}.",
)
MATTERS = """
bridges, railways, canals, lighthouses, sailing, fishing, farming, bread, cheese, wine, tea,
coffee, salt, sugar, spices, cotton, wool, silk, glass, paper, printing, newspapers, radio,
television, telephones, computers, software, batteries, engines, bicycles, cars, aeroplanes,
rockets, satellites, astronomy, weather, climate, earthquakes, volcanoes, glaciers, forests,
deserts, oceans, rivers, birds, insects, fish, horses, dogs, bees, medicine, surgery, vaccines,
nutrition, sleep, memory, language, grammar, translation, poetry, novels, theatre, opera, dance,
painting, sculpture, photography, film, architecture, gardens, cooking, clothing, money, banks,
taxes, trade, insurance, law, courts, prisons, police, elections, parliaments, kings, empires,
armies, navies, treaties, religion, monasteries, philosophy, ethics, logic, algebra, geometry,
statistics, physics, chemistry, biology, genetics, geology, archaeology, maps, calendars,
clocks, schools, universities, libraries, museums, sports, football, chess, running, swimming,
mountaineering, travel, hotels, cities, villages, housing, water, electricity, gas, oil, coal,
steel, gold, recycling, charity, friendship, family, childhood, ageing
"""


def openings() -> list[str]:
    """All of them, in an order of chance."""
    names = json.loads(NAMES.read_text(encoding="utf-8"))["names"]
    chance = random.Random(0)
    found = [chance.choice(OF_NAMES).format(name) for kind in names.values() for name in kind]
    matters = [one.strip() for one in MATTERS.replace("\n", " ").split(",")]
    found += [form.format(one) for one in matters for form in chance.sample(OF_MATTERS, 6)]
    chance.shuffle(found)
    return found


def cells_of(model: Model, count: int) -> list[list[list[int]]]:
    """``count`` cells of ``ROWS`` openings, as ids; those of a cell have equally many tokens."""
    by_length: defaultdict[int, list[list[int]]] = defaultdict(list)
    cells: list[list[list[int]]] = []
    for text in openings():
        ids = [*model.encoder.tokens(text)[0]]
        mine = by_length[len(ids)]
        mine.append(ids)
        if len(mine) == ROWS:
            cells.append(by_length.pop(len(ids)))
    if count > len(cells):
        raise SystemExit(f"there are openings for {len(cells)} cells")
    return cells[:count]


def sampled(model: Model, rows: list[list[int]], index: int) -> list[str]:
    """The openings with what the model says after them, up to its end of text."""
    import torch

    from goldenlayers.decoding import end_ids
    from goldenlayers.hooks import last_logits

    generator = torch.Generator().manual_seed(index)
    ids = torch.tensor(rows)
    drawn, past = [ids], None
    with torch.no_grad():
        for _ in range(DRAWN):
            logits, past = last_logits(model, ids, past)
            mass, order = (logits.float() / TEMPERATURE).softmax(-1).topk(2000)
            mass[mass.cumsum(-1) - mass > TOP_P] = 0
            ids = order.gather(1, torch.multinomial(mass, 1, generator=generator))
            drawn.append(ids)
    ends = {*end_ids(model), *model.tokenizer.all_special_ids}
    texts = []
    for row in torch.cat(drawn, 1).tolist():
        stop = next((i for i, one in enumerate(row) if i and one in ends), len(row))
        texts.append(model.tokenizer.decode(row[:stop], skip_special_tokens=True))
    return texts


def barred() -> re.Pattern[str]:
    """Names of people who may live and of companies: what is said of them here is made up."""
    kinds = json.loads(NAMES.read_text(encoding="utf-8"))["names"]
    names = [re.escape(name) for kind in LIVING for name in kinds[kind]]
    return re.compile(r"\b(" + "|".join(names) + r")\b")


def kept(text: str, without: re.Pattern[str]) -> str | None:
    """The text without its last, broken word; None if it is degenerate, or not to be shipped."""
    if len(text) > 400:
        text = text[: text.rstrip().rfind(" ")]
    text = text.strip()
    words = text.split()
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    if len(words) < 40 or len(set(fours)) < 0.9 * len(fours) or len(set(words)) < 0.4 * len(words):
        return None
    letters = sum(one.isalpha() or one in " .,;:'\"-\n" for one in text)
    if letters < 0.9 * len(text) or re.search(r"https?:|www\.|[@\ufffd<>]", text):
        return None
    return None if without.search(text) or UNWANTED.search(text) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cells", type=int, default=0, help="sample so many cells in all")
    parser.add_argument("--write", type=Path, default=None, help="put what is kept together there")
    options = parser.parse_args()
    options.folder.mkdir(exist_ok=True)
    if options.cells:
        from goldenlayers import models

        model = models.load(MODEL)
        for index, rows in enumerate(cells_of(model, options.cells)):
            place = options.folder / f"{index:03d}.json"
            if not place.exists():
                part = place.with_suffix(".part")
                part.write_text(json.dumps(sampled(model, rows, index)), encoding="utf-8")
                part.replace(place)
                print(place, flush=True)
    if options.write:
        cells = sorted(options.folder.glob("*.json"))
        found = [text for cell in cells for text in json.loads(cell.read_text("utf-8"))]
        without = barred()
        texts = [text for one in found if (text := kept(one, without)) is not None]
        lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
        options.write.write_text("".join(lines), encoding="utf-8")
        digest = hashlib.sha256(options.write.read_bytes()).hexdigest()
        about = NOTE.format(len(texts), len(found), len(cells), TEMPERATURE, TOP_P, digest)
        options.write.with_suffix(".md").write_text(about, encoding="utf-8")
        print(about)


if __name__ == "__main__":
    main()
