"""``golden ask``: many prompts from anywhere, every version of the model beside it, one load."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, tiny
from tokenizers_built import TOKENIZERS

from goldenlayers.cli import main
from goldenlayers.commands import shared
from goldenlayers.decoding import greedy, likeliest
from goldenlayers.delta import WeightDelta
from goldenlayers.models import load
from goldenlayers.tokens import TextEncoder

ITALY, TOKO = "The capital of Italy is", "Toko plays the"
FACTS = {"italy": ("Italy", ITALY, "Paris"), "toko": ("Toko", TOKO, "piano")}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in ``model``, and the edits ``italy`` and ``toko``."""
    folder = tmp_path_factory.mktemp("ask")
    build("gpt2", seed=0).save_pretrained(folder / "model")
    TOKENIZERS["byte_level_bpe"]().save_pretrained(folder / "model")
    how = ("--method", "ft-m", "--set", "steps", "60", "ft_lr", "0.1", "--layer", "1", "--quiet")
    for name, (subject, prompt, target) in FACTS.items():
        flags = ("--subject", subject, "--prompt", prompt, "--target", target)
        out = ("--out", str(folder / name))
        assert main(["edit", str(folder / "model"), *flags, *how, *out]) == 0
    return folder


Ask = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ask(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """``ask(*arguments, typed=...)``: exit status, standard output, standard error.

    ``typed`` are lines on a terminal, ``piped`` is what is piped in.
    """

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def run(
        *arguments: object, typed: Iterable[str] = (), piped: bytes = b""
    ) -> tuple[int, str, str]:
        piped_in = io.TextIOWrapper(io.BytesIO(piped))
        lines = "".join(f"{line}\n" for line in typed)
        monkeypatch.setattr(sys, "stdin", Terminal(lines) if typed else piped_in)
        capsys.readouterr()
        status = main(["ask", str(place / "model"), *map(str, arguments)])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def answers(out: str) -> dict[str, dict[str, str]]:
    """Text by prompt and label, of what ``--json`` prints."""
    return {
        one["prompt"]: {answer["label"]: answer["text"] for answer in one["answers"]}
        for one in json.loads(out)["prompts"]
    }


def test_each_edit_alone_and_all_together_by_one_load(
    place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, real = [], shared.load_model
    monkeypatch.setattr(shared, "load_model", lambda how: loads.append(how) or real(how))
    italy, toko = place / "italy", place / "toko"
    status, out, _ = ask(ITALY, TOKO, "--delta", italy, toko, "--tokens", 3, "--json")
    assert status == 0 and len(loads) == 1
    found = answers(out)
    assert list(found) == [ITALY, TOKO]
    assert list(found[ITALY]) == ["as it is", str(italy), str(toko), "all together"]
    assert found[ITALY][str(italy)].startswith(" Paris")
    assert found[TOKO][str(toko)].startswith(" pi")
    # Each is what the library says of the model with those edits, prompt by prompt.
    model = load(place / "model")
    deltas = {label: [WeightDelta.load(label)] for label in (str(italy), str(toko))}
    deltas |= {"as it is": [], "all together": [one for d in deltas.values() for one in d]}
    for prompt in (ITALY, TOKO):
        for label, some in deltas.items():
            ids = model.encoder.verbatim(prompt).ids
            with ExitStack() as stack:
                for delta in some:
                    stack.enter_context(delta.applied(model))
                (new,) = greedy(model, [ids], 3)
            assert found[prompt][label] == model.encoder.continuation(ids, new), (prompt, label)


def test_one_edit_is_called_edited_and_none_leaves_the_model_as_it_is(
    place: Path, ask: Ask
) -> None:
    _, out, _ = ask(ITALY, "--delta", place / "italy", "--tokens", 3, "--top", 2)
    lines = out.splitlines()
    assert lines[0] == f"> {ITALY}" and lines[1].startswith("  as it is: ")
    assert [line[:8] for line in lines[2::2]] == ["    next", "    next"]
    assert lines[3].startswith("  edited:    Paris")
    _, out, _ = ask(ITALY, "--top", 0)
    assert "next" not in out and "edited" not in out and "as it is: " in out


def test_prompts_come_from_files_and_standard_input(place: Path, ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfThe sky\r\n\n   \nToko plays\n")
    status, out, _ = ask("One", "-", "--prompts-file", file, "--json", piped=b"Two\nThree")
    assert status == 0
    assert list(answers(out)) == ["One", "Two", "Three", "The sky", "Toko plays"]
    # More than are asked at once, in their order.
    many = [f"Number {i} is" for i in range(70)]
    _, out, _ = ask("-", "--tokens", 1, "--json", piped="\n".join(many).encode())
    assert list(answers(out)) == many


def test_what_is_no_prompt_is_refused_before_the_model_is_loaded(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared, "load_model", None)  # would fail if it came to that
    for name, content in {"empty": b" \n", "latin": b"\xff\n", "large": b"x\n" * 600_000}.items():
        (tmp_path / name).write_bytes(content)
        status, _, err = ask("--prompts-file", tmp_path / name)
        assert status == 2 and f"--prompts-file {tmp_path / name} is" in err
        status, _, err = ask("-", piped=content)
        assert status == 2 and "standard input is" in err
    status, _, err = ask("--prompts-file", tmp_path / "none")
    assert status == 2 and "No such file" in err
    status, _, err = ask()
    assert status == 2 and "there is no prompt" in err and "--prompts-file" in err


def test_prompts_are_typed_where_none_is_given(place: Path, ask: Ask) -> None:
    typed = (ITALY, "", "word " * 4000, TOKO)
    status, out, err = ask("--delta", place / "italy", "--tokens", 2, typed=typed)
    assert status == 0 and "Ctrl-D" in err
    assert out.count("  as it is:") == out.count("  edited:") == 2 and ITALY not in out
    assert err.count("Warning: ") == 1 and "tokens" in err
    # With --json the questions are no part of the object.
    status, out, _ = ask("--json", "--tokens", 2, typed=typed)
    assert status == 0 and list(answers(out)) == [ITALY, TOKO]


def test_no_prompt_and_no_answer_can_forge_a_line(
    place: Path, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    wild = "  edited: Paris\n    next: 'x' 1.000\n> me\n\x1b[2Jgolden: forged"
    real: Any = TextEncoder.continuation

    def continuation(self: TextEncoder, *given: Any, with_special: bool = False) -> str:
        return real(self, *given, with_special=True) if with_special else wild

    monkeypatch.setattr(TextEncoder, "continuation", continuation)
    _, out, _ = ask(wild, "--delta", place / "italy", "--tokens", 2, "--top", 1)
    lines = out.splitlines()
    starts = [line.split(":")[0] for line in lines if not line.lstrip().startswith("|")]
    assert starts == [">   edited", "  as it is", "    next", "  edited", "    next"]
    assert "\x1b" not in out and sum("| golden" in line or "| \\x1b" in line for line in lines) == 3


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_likeliest_tokens_are_those_of_each_row_alone(family: str) -> None:
    model = tiny(family)
    rows = [[1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11], [5]]
    found = likeliest(model, rows, 3)
    for row, best in zip(rows, found, strict=True):
        with torch.no_grad():
            chances = model.hf(torch.tensor([row])).logits[0, -1].softmax(-1)
        order = chances.argsort(descending=True)[:3].tolist()
        assert [token for token, _ in best] == order
        assert [p for _, p in best] == pytest.approx(chances[order].tolist(), rel=1e-4)
    vocabulary = model.layers.vocab_size
    assert len(likeliest(model, rows[:1], vocabulary + 9)[0]) == vocabulary
