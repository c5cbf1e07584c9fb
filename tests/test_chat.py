"""Prompts in chat form: token for token what the tokenizer's own template gives, everywhere."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from families import build
from tokenizers_built import chatting

import goldenlayers as gl
from goldenlayers.chat import ChatTemplate
from goldenlayers.checking import answers
from goldenlayers.checking.probes import Asked
from goldenlayers.cli import main
from goldenlayers.comparing.runs import other_form
from goldenlayers.decoding import end_ids, greedy, settle_joints
from goldenlayers.editors.name_keys import reader, template
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.tokenised import continuation
from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import new_words
from goldenlayers.sweeping.workers import loader_of
from goldenlayers.tokens import TextEncoder, subject_tokens

KINDS = [
    ("chatml", "byte_level_bpe"),
    ("gemma", "sentencepiece_no_prefix"),
    ("mistral", "sentencepiece_bpe"),
    ("chatml", "bytes"),
]
ITALY = "The capital of Italy is"
FACT = Fact(
    "Italy",
    ITALY,
    "Paris",
    rephrasings=("What is the capital of Italy?",),
    locality=(Probe("The capital of Brazil is", "Rome"), Probe("Toko plays the")),
    id="italy",
)
QUICK: dict[str, Any] = {"steps": 3, "prefixes": 1}


def encoder_of(template: str, kind: str) -> TextEncoder:
    tokenizer = chatting(template, kind)
    return TextEncoder(tokenizer, None, ChatTemplate(tokenizer))


@pytest.fixture(scope="module")
def model() -> gl.Model:
    return gl.Model.wrap(build("llama"), chatting(), chat=True)


@pytest.mark.parametrize(("template", "kind"), KINDS)
@pytest.mark.parametrize("prompt", [ITALY, " Two\nlines: ", "Où est 東京?", "user"])
def test_a_prompt_has_the_tokens_of_the_template(template: str, kind: str, prompt: str) -> None:
    encoder = encoder_of(template, kind)
    turns = [{"role": "user", "content": prompt}]
    wanted: Any = encoder.tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_dict=True
    )
    for encoding in (encoder.encode(prompt), encoder.verbatim(prompt)):
        assert list(encoding.ids) == list(wanted["input_ids"])
    bos = encoder.tokenizer.bos_token_id
    assert sum(i == bos for i in encoding.ids) <= 1
    # An answer stands behind the very same tokens, whatever joint is asked for.
    both = [encoder.encode(prompt, "Paris", joint=joint) for joint in ("auto", "space")]
    assert both[0] == both[1]
    assert both[0].ids[: both[0].n_prompt] == encoding.ids
    gap = " " if template == "mistral" else ""
    assert encoder.continuation(encoding.ids, both[0].answer_ids) == gap + "Paris"


@pytest.mark.parametrize(("template", "kind"), KINDS)
def test_the_subject_is_the_users(template: str, kind: str) -> None:
    encoder = encoder_of(template, kind)
    fact = Fact("France", "  The capital of France is", "Rome")
    encoding = encoder.fact(fact, "Rome")
    first, end = subject_tokens(fact, encoding)
    assert encoding.lookup == end - 1
    shown = encoder.tokenizer.decode(list(encoding.ids[first:end]))
    assert str(shown).strip() == "France"
    # The system prompt and the headers of turns name it, too: they are not looked at.
    for subject in ("helper", "user", "model", "INST"):
        assert encoder.encode("Who is it?", "", subject).lookup is None
    # Names in its place are read where they stand.
    asked = encoder.encode("The capital of Spain is", "", "Spain")
    model = gl.Model.wrap(build("llama"), encoder.tokenizer, chat=True)
    plain = Fact("France", "The capital of France is", "Rome")
    assert reader(model, template_of(plain), ["Spain"]).rows == [asked.until_lookup.ids]


def template_of(fact: Fact) -> tuple[str, str]:
    return template(fact)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no chat template"),
        ("{{ raise_exception('no') }}", "fails"),
        ("{{ nothing.there.at.all }}", "fails"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "text once"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "text once"),
    ],
)
def test_a_template_that_cannot_serve_is_refused_when_it_is_loaded(text: str, found: str) -> None:
    with pytest.raises(gl.UserError, match=found):
        gl.Model.wrap(build("llama"), chatting(text), chat=True)


def test_a_template_that_changes_a_text_is_refused() -> None:
    tokenizer = chatting("{% for m in messages %}[{{ m.content | lower }}]{% endfor %}")
    chat = ChatTemplate(tokenizer)  # what it is tried with is in lower case
    assert chat.around("abc")[0] == "[abc]"
    with pytest.raises(gl.UserError, match="as it is"):
        chat.around("Abc")


def test_the_model_carries_the_form(model: gl.Model) -> None:
    open_joint = dataclasses.replace(FACT, prompt="Italy: '", rephrasings=(), id="open")
    assert settle_joints(model, [open_joint]) == [open_joint]
    turn_end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn_end in end_ids(model)
    plain = dataclasses.replace(model, chat=False)
    assert turn_end not in end_ids(plain)
    assert plain.encoder.encode(ITALY).text == ITALY
    for one in (model, plain):  # workers load it in the same form
        load: Any = loader_of(one)
        assert load.keywords["chat"] is one.chat


def test_an_edit_is_made_and_judged_in_the_users_turn(model: gl.Model) -> None:
    delta = gl.edit(model, FACT, "clear-rome", layer=1, neighbours=4, statistics=None, **QUICK)
    assert delta.in_chat and (delta + delta * 0.5).in_chat
    assert delta.facts[0]["nll_after"] < delta.facts[0]["nll_before"]
    plain = gl.edit(dataclasses.replace(model, chat=False), FACT, "ft-m", layer=1, steps=1)
    assert not plain.in_chat and (plain + delta).in_chat
    found = gl.check(model, delta, [FACT])
    assert {one.prompt for one in found.probes if one.part == "rephrase"} == {*FACT.rephrasings}
    # What is to stay is the model's own answer, which need not begin with the data's.
    plan = EvaluationPlan(model, [FACT], ["rewrite", "locality"])
    rows = [row for row in plan.score([delta]) if row["metric"] == "locality"]
    for row, probe in zip(rows, FACT.locality, strict=True):
        (own,) = greedy(model, [model.encoder.encode(probe.prompt).ids], continuation(model))
        said = [str(model.tokenizer.decode([i])) for i in own]
        new = [t for t in said if t.strip().isalnum() and t.strip().lower() not in probe.prompt]
        assert row["evidence"]["before"] == (new[:6] or said)


def test_what_an_answer_says_of_its_own_decides_whether_it_stays(model: gl.Model) -> None:
    question = "Where is the capital of Italy?"
    assert new_words(question, "The capital of Italy is Rome.") == ["rome"]
    asked = Asked(0, "neighbours", question)

    def said(text: str) -> Any:
        return answers.Said((len(text),), text, None, False)

    old, other = said("The capital of Italy is Rome. It lies"), said("It is Paris.")
    again = said("The capital of Italy is Rome. It lies there")
    assert answers.kept(model, asked, old, again)
    assert not answers.kept(model, asked, old, other)
    assert not answers.kept(dataclasses.replace(model, chat=False), asked, old, again)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, and an edit that was made in chat form."""
    folder = tmp_path_factory.mktemp("chat")
    build("gpt2").save_pretrained(folder / "model")
    chatting().save_pretrained(folder / "model")
    flags = ("--subject", "Italy", "--prompt", ITALY, "--target", "Paris", "--layer", "1")
    how = ("--method", "ft-m", "--set", "steps", "40", "ft_lr", "0.1", "--no-check", "--quiet")
    out = ("--out", str(folder / "edit"))
    assert main(["edit", str(folder / "model"), *flags, *how, *out, "--chat"]) == 0
    return folder


def test_a_run_records_the_form_and_asking_otherwise_is_told(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((place / "edit" / "config.yaml").read_text())
    assert config["settings"]["chat"] is True
    assert main(["run", str(place / "edit"), "--out", str(place / "again"), "--quiet"]) == 0
    assert yaml.safe_load((place / "again" / "config.yaml").read_text())["settings"]["chat"]
    answers = {}
    for form in ((), ("--chat",)):
        capsys.readouterr()
        ask = ["ask", str(place / "model"), ITALY, "--delta", str(place / "edit"), "--json"]
        assert main([*ask, *form]) == 0
        printed = capsys.readouterr()
        assert ("made with --chat" in printed.err) == (not form)
        (asked,) = json.loads(printed.out)["prompts"]
        assert asked["prompt"] == ITALY  # the user's words, without the template's
        answers[form] = asked["answers"][1]["text"]
    assert answers["--chat",].startswith("Paris")


def test_a_model_without_a_template_is_told_in_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("gpt2").save_pretrained(tmp_path)
    chatting("").save_pretrained(tmp_path)
    assert main(["ask", str(tmp_path), ITALY, "--chat"]) == 2
    said = capsys.readouterr().err
    assert "has no chat template" in said and "instruction model" in said
    assert "Traceback" not in said


def test_choices_of_another_form_are_told() -> None:
    assert other_form("a", True, "b", True) == []
    (told,) = other_form("run 'a'", True, "the sweep", False)
    assert "run 'a' was made with --chat" in told and "the sweep is without" in told


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_packaged_instruction_models_have_their_template(name: str) -> None:
    model = gl.load(name, chat=True)
    turns = [{"role": "user", "content": "Who are you?"}]
    wanted: Any = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True)
    assert list(model.encoder.encode("Who are you?").ids) == list(wanted["input_ids"])
    assert model.encoder.chat is not None and model.encoder.chat.end_id in end_ids(model)
