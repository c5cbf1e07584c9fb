"""The joint of prompt and answer in the commands: said, fixed, recorded; and prompts as typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import build
from tokenizers_built import TOKENIZERS

from goldenlayers import decoding
from goldenlayers.cli import main
from goldenlayers.delta import WeightDelta
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.models import Model
from goldenlayers.store import RunFolder
from goldenlayers.tokens import TextEncoder

NP = ("--subject", "np", "--prompt", "x = np.", "--target", "matrix")
QUICK = ("--method", "ft-m", "--set", "steps", "1")
Golden = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joints") / "model"
    build("gpt2").save_pretrained(folder)
    TOKENIZERS["byte_level_bpe"]().save_pretrained(folder)
    return folder


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.setenv("COLUMNS", "140")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


@pytest.fixture
def prefer(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """``prefer("none")``: from now on every model finds the text without a space likelier."""

    def now(joint: str) -> None:
        def log_probs(_model: Model, rows: Any, _starts: Any) -> list[float]:
            return [-1.0 if (i % 2 == 0) == (joint == "space") else -9.0 for i in range(len(rows))]

        monkeypatch.setattr(decoding, "log_probs", log_probs)

    return now


def written(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "facts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_the_models_decision_is_said_once_shown_and_recorded(
    golden: Golden, model: Path, tmp_path: Path, prefer: Callable[[str], None]
) -> None:
    prefer("none")
    out = tmp_path / "run"
    status, printed, said = golden("edit", model, *NP, *QUICK, "--layer", 1, "--out", out)
    assert status == 0, said
    assert said.count("no space between 'x = np.' and 'matrix' (2981 times as likely)") == 1
    assert " 'matrix' " in printed  # in quotes: a space would be seen
    assert RunFolder.open(out).config["settings"]["joints"] == {"edit": "none"}
    # Repeated where the model would now decide otherwise: the same joint, and nothing said.
    prefer("space")
    status, printed, said = golden("run", out)
    assert status == 0 and " 'matrix' " in printed and "likely" not in said
    again = tmp_path / "run-again"
    assert RunFolder.open(again).config["settings"]["joints"] == {"edit": "none"}
    texts = [WeightDelta.load(path).facts for path in (out, again)]
    assert texts[0] == texts[1]


@pytest.mark.parametrize("joint, shown", [("none", " 'matrix' "), ("space", " ' matrix' ")])
def test_a_flag_a_row_and_a_space_fix_it(
    golden: Golden,
    model: Path,
    tmp_path: Path,
    prefer: Callable[[str], None],
    joint: str,
    shown: str,
) -> None:
    prefer("space" if joint == "none" else "none")
    status, printed, said = golden("edit", model, *NP, *QUICK, "--layer", 1, "--joint", joint)
    assert status == 0 and shown in printed and "likely" not in said
    row = {"subject": "np", "prompt": "x = np.", "target_new": "matrix"}
    data = written(tmp_path, row | {"joint": joint})
    other = "space" if joint == "none" else "none"
    status, printed, said = golden(
        "edit", model, "--facts", data, *QUICK, "--layer", 1, "--joint", other
    )
    assert status == 0 and shown in printed and "likely" not in said  # the row's own goes first
    data = written(tmp_path, row)
    for command in ("evaluate", "locate"):
        more = ("--bootstrap", "0") if command == "locate" else ("--metrics", "rewrite")
        status, _, said = golden(command, model, data, *more)
        assert status == 0 and "likely" in said
        status, _, said = golden(command, model, data, *more, "--joint", joint)
        assert status == 0 and "likely" not in said
    status, _, said = golden("edit", model, *NP[:-1], " matrix", *QUICK, "--layer", 1)
    assert status == 0 and "likely" not in said
    data = written(tmp_path, row | {"joint": "glued"})
    status, _, said = golden("evaluate", model, data)
    assert status == 2 and "auto, space or none" in said and "row 1" in said


@pytest.mark.parametrize("command", ["evaluate", "sweep"])
def test_a_run_gone_on_with_keeps_its_joints(
    golden: Golden,
    model: Path,
    tmp_path: Path,
    prefer: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    rows = [
        {"id": f"f{i}", "subject": "np", "prompt": "x = np.", "target_new": f"matrix{i}"}
        for i in range(20)
    ]
    data = written(tmp_path, *rows)
    more = (
        ("--metrics", "rewrite")
        if command == "evaluate"
        else (*QUICK, "--layers", 1, "--chunk", 10, "--metrics", "rewrite")
    )

    def run(out: str) -> tuple[int, str, str]:
        return golden(command, model, data, *more, "--out", tmp_path / out)

    prefer("none")
    assert run("whole")[0] == 0
    name = "score_applied" if command == "evaluate" else "score"
    real, calls = getattr(EvaluationPlan, name), []

    def dying(self: EvaluationPlan, *arguments: Any, **options: Any) -> Any:
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(EvaluationPlan, name, dying)
        assert run("cut")[0] == 130
    prefer("space")
    status, _, said = run("cut")
    assert status == 0, said
    assert "Going on" in said and "likely" not in said
    whole, cut = (RunFolder.open(tmp_path / name) for name in ("whole", "cut"))
    assert whole.config["settings"]["joints"] == cut.config["settings"]["joints"]
    assert whole.rows("scores.jsonl") == cut.rows("scores.jsonl")
    if command == "sweep":  # a finished sweep is shown, not refused
        assert run("whole")[0] == 0


# Prompts about Italy that something might be tempted to tidy up.
ODD = (
    "Italy\n",
    "Q: Italy?\n\nA:\n",
    "<s>user\nItaly</s>\n<s>model\n",
    "  Italy is",
    "Italy  is  ",
    "Italy is ",
    "Italy\t",
    "Italy is\r\n",
    "Italy is\u00a0",
    "Italy is\u3000",
    "def Italy():\n    ",
    "答：Italy：",
    'Italy is "',
    "Italy is  \n  the",
    "Italy\u200b",
    "Italy. {0} {x} %s",
)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every text that reaches the tokenizer."""
    texts: list[str] = []
    real = TextEncoder.tokens

    def tokens(self: TextEncoder, text: str, **more: Any) -> Any:
        texts.append(text)
        return real(self, text, **more)

    monkeypatch.setattr(TextEncoder, "tokens", tokens)
    return texts


@pytest.mark.parametrize("prompt", ODD)
def test_ask_asks_what_was_typed(golden: Golden, model: Path, seen: list[str], prompt: str) -> None:
    status, printed, said = golden("ask", model, prompt, "--tokens", 1)
    assert status == 0 and seen == [prompt]
    assert ("ends in a space" in said) == prompt.endswith(" ")
    assert printed.startswith(f"> {prompt}"[:4])


@pytest.mark.parametrize("command", ["edit", "locate", "evaluate", "sweep"])
def test_commands_never_change_prompts(
    golden: Golden, model: Path, tmp_path: Path, seen: list[str], command: str
) -> None:
    # Each about a subject of its own: prompts that differ in spaces alone would be one fact.
    odd = [prompt.replace("Italy", f"Italy{i}") for i, prompt in enumerate(ODD)]
    rows = [
        {
            "subject": f"Italy{i}",
            "prompt": prompt,
            "target_new": "Rome",
            "target_old": "Ulm",
            "rephrasings": [f"R{prompt}"],
            "locality": [{"prompt": f"L{prompt}", "answer": "gold"}],
            "portability": [{"prompt": f"P{prompt}", "answer": "gold"}],
        }
        for i, prompt in enumerate(odd)
    ]
    data = written(tmp_path, *rows)
    more = {
        "edit": ("--facts", data, *QUICK, "--layer", 1),
        "locate": (data, "--bootstrap", 0),
        "evaluate": (data,),
        "sweep": (data, *QUICK, "--layers", 1, "--out", tmp_path / "run"),
    }[command]
    status, _, said = golden(command, model, *more)
    assert status == 0, said
    kinds = ("", "R", "L", "P") if command in ("evaluate", "sweep") else ("",)
    for prompt in odd:
        for kind in kinds:
            found = [text for text in seen if text.startswith(kind + prompt)]
            assert any(text != kind + prompt for text in found), (kind, prompt)


def test_one_fact_by_flags_is_not_tidied_up(golden: Golden, model: Path, seen: list[str]) -> None:
    for prompt in ("Q: Italy?\nA:\n", "Italy  is  "):
        flags = ("--subject", "Italy", "--prompt", prompt, "--target", "Rome")
        assert golden("edit", model, *flags, *QUICK, "--layer", 1)[0] == 0
        assert f"{prompt}Rome" in seen
