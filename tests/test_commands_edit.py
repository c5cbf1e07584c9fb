"""``golden edit``, ``ask``, ``export`` and ``editors`` from end to end on a tiny model."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from evaluations import Choosy
from families import build
from safetensors.torch import load_file, save_file
from tokenizers_built import TOKENIZERS
from transformers import AutoModelForCausalLM

from goldenlayers import models
from goldenlayers.cli import main
from goldenlayers.commands import deciding, edit
from goldenlayers.delta import WeightDelta
from goldenlayers.editors import EDITORS, PRESETS
from goldenlayers.evaluation.reading import Pass, Read, Reading, read
from goldenlayers.models import Model

FLAGS = ("--subject", "Italy", "--prompt", "The capital of Italy is", "--target", "Paris")
# No key statistics: nothing is sampled, so the commands take a second.
QUICK = ("--statistics", "none", "--set", "steps", "3", "prefixes", "1")
FACTS = [
    {"subject": "Italy", "prompt": "The capital of Italy is", "target_new": "Paris"},
    {"subject": "Toko", "prompt": "Toko plays the", "target_new": "piano"},
]

Golden = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in ``model``, another in ``other``, and facts in ``facts.jsonl``."""
    folder = tmp_path_factory.mktemp("edit")
    for name, seed in (("model", 0), ("other", 1)):
        build("gpt2", seed=seed).save_pretrained(folder / name)
        TOKENIZERS["byte_level_bpe"]().save_pretrained(folder / name)
    rows = "".join(json.dumps(row) + "\n" for row in FACTS)
    (folder / "facts.jsonl").write_text(rows, encoding="utf-8")
    return folder


@pytest.fixture
def golden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Golden:
    """``golden(*arguments)``: exit status, standard output, standard error; a cache of its own."""
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path / "cache"))

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        printed = capsys.readouterr()
        return status, printed.out, printed.err

    return run


def test_one_fact_by_flags_leaves_a_small_run_folder(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    status, printed, said = golden(
        "edit", place / "model", *FLAGS, *QUICK, "--layer", 1, "--out", out
    )
    assert status == 0, said
    assert {p.name for p in out.iterdir()} == {
        "config.yaml",
        "log.txt",
        "delta.safetensors",
        "delta.json",
        "README.md",
        "check.json",
    }
    assert "Paris" in printed and "rank" in printed
    delta = WeightDelta.load(out)
    assert delta.layers == (1,) and delta.method == "clear-rome" and delta.rank() == 1
    assert sum(p.stat().st_size for p in out.glob("delta.*")) < 64 * 1024
    # Three steps do not move a random model: the user is told.
    assert "did not take" in said


def test_the_answer_can_be_asked_with_and_without_the_edit(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    many = ("--statistics", "none", "--set", "steps", "60", "ft_lr", "0.1")
    status, _, said = golden(
        "edit", place / "model", *FLAGS, *many, "--method", "ft-m", "--layer", 1, "--out", out
    )
    assert status == 0, said
    plain = golden("ask", place / "model", FLAGS[3], "--tokens", 4)
    assert plain[0] == 0 and "edited" not in plain[1]
    both = golden("ask", place / "model", FLAGS[3], "--tokens", 4, "--delta", out)
    before, after = both[1].split("edited:")
    assert "as it is:" in before
    assert before.splitlines()[1] != after.splitlines()[1]
    status, _, said = golden("ask", place / "other", FLAGS[3], "--delta", out)
    assert status == 2 and "--force" in said
    assert golden("ask", place / "other", FLAGS[3], "--delta", out, "--force")[0] == 0


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_many_facts_from_a_file(golden: Golden, place: Path, tmp_path: Path, mode: str) -> None:
    out = tmp_path / "run"
    facts = ("--facts", place / "facts.jsonl", "--method", "emmet", "--mode", mode)
    status, printed, said = golden(
        "edit", place / "model", *facts, *QUICK, "--layer", 2, "--out", out
    )
    assert status == 0, said
    assert "of 2 edits took" in printed
    assert len(WeightDelta.load(out).facts) == 2


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_contradictions_and_doubled_rows_are_told_before_the_work(
    golden: Golden, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    rows = [*FACTS, {**FACTS[0], "prompt": "The capital of {} is"}, {**FACTS[0], "target": "Ulm"}]
    del rows[3]["target_new"]
    file, out = tmp_path / "facts.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("edit", place / "model", "--facts", file, *QUICK, "--layer", 1, "--out", out)
    command = (*command, "--method", "memit", "--mode", mode)
    with monkeypatch.context() as at_first:
        at_first.setattr(models, "load", None)
        status, _, said = golden(*command)
    assert status == 2 and not out.exists()
    said = " ".join(said.split())
    assert "'fact-4' contradicts fact 'fact-1'" in said and "both 'Paris' and 'Ulm'" in said
    assert "--skip-invalid" in said
    status, printed, said = golden(*command, "--skip-invalid")
    said = " ".join(said.split())
    assert status == 0 and "of 2 edits took" in printed
    assert "Left out 1 fact" in said and "1 fact repeats an earlier one" in said
    assert [entry["id"] for entry in WeightDelta.load(out).facts] == ["fact-1", "fact-2"]


def test_braces_stand_for_the_subject_of_the_flags(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    flags = ("--subject", "Italy", "--prompt", "The capital of {} is", "--target", "Paris")
    out = tmp_path / "run"
    status, printed, _ = golden("edit", place / "model", *flags, *QUICK, "--layer", 1, "--out", out)
    assert status == 0 and "The capital of Italy is" in printed
    assert WeightDelta.load(out).facts[0]["prompt"] == "The capital of Italy is"


def test_edits_on_one_subject_that_did_not_take_are_told_as_rivals(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    rows = [FACTS[0], {**FACTS[0], "prompt": "Italy has its capital in", "target_new": "Ulm"}]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("edit", place / "model", "--facts", file, *QUICK, "--layer", 1, "--method", "memit")
    said = " ".join(golden(*command)[2].split())
    assert "2 of them share their subject with another edit here ('Italy')" in said
    assert "steps 50" not in said


@pytest.mark.parametrize(("method", "mode"), [("rome", "sequential"), ("memit", "batch")])
def test_facts_that_cannot_be_edited_are_left_out(
    golden: Golden,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    mode: str,
) -> None:
    rows = [{"id": row["subject"].lower(), **row} for row in FACTS]
    file = tmp_path / "facts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    command = ("edit", place / "model", "--facts", file, *QUICK, "--layer", 1, "--method", method,
               "--mode", mode, "--out")  # fmt: skip
    real = edit.editor_of

    def refusing(name: str) -> None:
        choosy = lambda *given: Choosy({name}, real(*given))  # noqa: E731
        for module in (edit, deciding):
            monkeypatch.setattr(module, "editor_of", choosy)

    refusing("italy")
    status, printed, said = golden(*command, tmp_path / "run")
    assert status == 0, said
    assert "Left out 1 fact" in said and "italy" in said and "key is abnormal" in said
    assert "Toko" in printed and "Italy" not in printed
    kept = WeightDelta.load(tmp_path / "run")
    assert [row["id"] for row in kept.facts] == ["toko"]
    # It is the delta of the others alone.
    monkeypatch.undo()
    file.write_text(json.dumps(rows[1]) + "\n", encoding="utf-8")
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path / "cache"))
    assert golden(*command, tmp_path / "alone")[0] == 0
    alone = WeightDelta.load(tmp_path / "alone")
    for name in alone.changes:
        torch.testing.assert_close(kept.dense(name), alone.dense(name))
    # If none can be edited that is an error.
    refusing("toko")
    status, _, said = golden(*command, tmp_path / "none")
    assert status == 2 and "key is abnormal" in said and not (tmp_path / "none").exists()


def test_exports_carry_the_edit(golden: Golden, place: Path, tmp_path: Path) -> None:
    run, merged, adapter = (tmp_path / name for name in ("run", "merged", "adapter"))
    flags = (*FLAGS, *QUICK, "--layer", 1, "--out", run)
    assert golden("edit", place / "model", *flags)[0] == 0
    export = ("export", run)
    assert golden(*export, "--to", "merged", "--out", merged)[0] == 0
    assert golden(*export, "--out", adapter)[0] == 0
    base = load_file(place / "model" / "model.safetensors")
    edited = load_file(merged / "model.safetensors")
    differing = {name for name in base if not torch.equal(base[name], edited[name])}
    assert {name.split(".", 1)[-1] for name in differing} == {"h.1.mlp.c_proj.weight"}
    assert (adapter / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(merged)
    status, _, said = golden(*export, "--out", adapter)
    assert status == 2 and "there already" in said


def test_a_merged_checkpoint_keeps_the_number_format(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    hf = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    half = tmp_path / "half"
    shutil.copytree(place / "model", half)
    hf.save_pretrained(half)
    run = tmp_path / "run"
    assert golden("edit", half, *FLAGS, *QUICK, "--layer", 1, "--out", run)[0] == 0
    status, _, said = golden("export", run, "--to", "merged", "--out", tmp_path / "merged")
    assert status == 0, said
    base = load_file(half / "model.safetensors")
    edited = load_file(tmp_path / "merged" / "model.safetensors")
    differing = {name for name in base if not torch.equal(base[name], edited[name])}
    assert {name.split(".", 1)[-1] for name in differing} == {"h.1.mlp.c_proj.weight"}
    assert {t.dtype for t in edited.values()} == {torch.bfloat16}


def test_what_fails_leaves_nothing_behind(golden: Golden, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = (*FLAGS, *QUICK, "--layer", 1, "--out", out)
    for wrong in (
        ("--set", "foo", "abc"),
        ("--set", "replace", "1"),
        ("--set", "kl_factor", "nan"),
    ):
        status, _, said = golden("edit", place / "model", *flags, *wrong)
        assert status == 2 and wrong[1] in said, said
    for empty in ("--target", "--subject"):
        status, _, said = golden("edit", place / "model", *flags, empty, "")
        assert status == 2 and "empty" in said, said
    assert not list(tmp_path.iterdir())


def test_an_unwritable_place_is_refused_before_the_work(
    golden: Golden, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("goldenlayers.editors.edit", None)  # would fail if it came to that
    out = tmp_path / "file" / "run"
    status, _, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", 1, "--out", out)
    assert status == 2 and "could not be written" in said


def test_ask_keeps_within_the_vocabulary_and_the_context(golden: Golden, place: Path) -> None:
    ask = ("ask", place / "model", "The capital of France is", "--top", 1000, "--tokens", 10**5)
    status, printed, said = golden(*ask)
    assert status == 0 and "the model's context ends there" in said
    assert printed.count("'") >= 300  # every token of the vocabulary


def test_editors_are_listed_with_their_settings(golden: Golden) -> None:
    status, printed, _ = golden("editors")
    assert status == 0
    for name in (*EDITORS, *PRESETS, "clamp", "memit_lambda", "demonstrations"):
        assert name in printed
    # Each setting with the editors that have it.
    words = " ".join(printed.replace("│", " ").split())
    assert "memit, pmet" in words and "rome, r-rome, clear-rome, memit" in words


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (FLAGS[:4], "--target"),
        ((*FLAGS, "--facts", "starter"), "both"),
        ((*FLAGS, "--method", "romme"), "rome"),
        ((*FLAGS, "--layer", "9"), "0 to 3"),
        ((*FLAGS, "--layer", "first"), "layer number"),
        ((*FLAGS, "--layer", "1", "--set", "stepps", "3"), "steps"),
        ((*FLAGS, "--layer", "1", "--set", "epsilon", "1"), "clear-rome has no setting 'epsilon'"),
        ((*FLAGS, "--method", "memit", "--mode", "batch", "--step", "2"), "--mode sequential"),
        ((*FLAGS, "--layer", "1", "--step", "2"), "clear-rome edits one fact at a time"),
        ((*FLAGS, "--layer", "1", "--set", "steps", "many"), "whole number"),
        ((*FLAGS, "--preset", "rome/gpt2-xl"), "48 layers"),  # which brings its method
        ((*FLAGS[:4], "--target", " "), "empty"),
        (("--subject", "Spain", *FLAGS[2:]), "not in the prompt"),
        (("--facts", "nowhere.jsonl", "--layer", "1"), "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_message_and_leaves_nothing(
    golden: Golden, place: Path, tmp_path: Path, arguments: tuple[str, ...], says: str
) -> None:
    out = tmp_path / "run"
    status, _, said = golden(
        "edit", place / "model", *arguments, "--statistics", "none", "--out", out
    )
    assert status == 2 and says in said
    assert "Traceback" not in said and said.count("golden: ") <= 1
    assert not out.exists()


def test_an_answer_the_model_gives_already_is_nothing_to_edit(
    golden: Golden, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gives_the_target(model: Model, readings: list[Reading], how: Pass) -> list[Read]:
        texts = [model.tokenizer.decode(list(one.ids)) for one in readings]
        return [
            dataclasses.replace(found, tokens=found.targets) if "Italy" in text else found
            for found, text in zip(read(model, readings, how), texts, strict=True)
        ]

    monkeypatch.setattr("goldenlayers.evaluation.reading.read", gives_the_target)
    flags = (*FLAGS, *QUICK, "--layer", 1, "--out", tmp_path / "run")
    status, _, said = golden("edit", place / "model", *flags)
    assert status == 2 and "already" in said
    assert not (tmp_path / "run").exists()
    # Among several facts it is left out, with a word.
    flags = ("--facts", place / "facts.jsonl", *QUICK, "--layer", 1, "--out", tmp_path / "run")
    status, _, said = golden("edit", place / "model", *flags)
    assert status == 0 and "Left out 1 fact:" in said
    assert [f["subject"] for f in WeightDelta.load(tmp_path / "run").facts] == ["Toko"]


def test_nan_weights_stop_the_edit_and_save_nothing(
    golden: Golden, place: Path, tmp_path: Path
) -> None:
    broken, out = tmp_path / "broken", tmp_path / "run"
    broken.mkdir()
    for file in (place / "model").iterdir():
        if file.name != "model.safetensors":
            (broken / file.name).write_bytes(file.read_bytes())
    tensors = load_file(place / "model" / "model.safetensors")
    name = next(n for n in tensors if n.endswith("h.2.mlp.c_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    flags = (*FLAGS, *QUICK, "--layer", 1, "--out", out)
    status, _, said = golden("edit", broken, *flags)
    assert status == 2 and "not a number" in said, said
    assert not out.exists()


def test_ask_says_where_edits_contradict(golden: Golden, place: Path, tmp_path: Path) -> None:
    flags = (*QUICK, "--layer", 1, "--out")
    assert golden("edit", place / "model", *FLAGS, *flags, tmp_path / "a")[0] == 0
    other = (*FLAGS[:-1], "Berlin")
    assert golden("edit", place / "model", *other, *flags, tmp_path / "b")[0] == 0
    ask = ("ask", place / "model", "The capital of Italy is", "--delta", tmp_path / "a")
    assert "contradict" not in golden(*ask)[2]
    status, _, said = golden(*ask, tmp_path / "b")
    assert status == 0 and "contradict: 'The capital of Italy is' → 'Paris' and 'Berlin'" in said
    # Of another model: before anything is answered.
    status, printed, said = golden(
        "ask", place / "other", "The capital", "--delta", tmp_path / "a", tmp_path / "b"
    )
    assert status == 2 and not printed and "other weights" in said
