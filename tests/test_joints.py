"""Prompt and answer are joined as the user means it: by characters, by the model, or as fixed."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import takewhile
from typing import Any

import pytest
import torch
from families import tiny
from reference import full_logits

from goldenlayers import decoding
from goldenlayers.decoding import Settled, joints_record, settle_joints
from goldenlayers.editors.named import in_context_prefix
from goldenlayers.editors.values import fact_prompts
from goldenlayers.errors import DataError
from goldenlayers.evaluation.metrics import questions
from goldenlayers.evaluation.tokenised import Texts
from goldenlayers.facts import Fact, Probe
from goldenlayers.locating.known import fill_old_answers
from goldenlayers.models import Model
from goldenlayers.prompts import Joint, join, sure_joint

RULES: list[tuple[str, str, str | None]] = [
    # Words and numbers, and the separating marks of prose.
    ("The capital of France is", "Paris", "space"),
    ("In", "1945", "space"),
    ("What is the capital of France?", "Paris", "space"),
    ("Q: What of it?\nA:", "Paris", "space"),
    ("The year 1990,", "it", "space"),
    ("The man (a tailor)", "sang", "space"),
    ("Quelle est la capitale ?", "Paris", "space"),
    ("Texas works in the U.S.,", "Austin", "space"),
    ("Who sang for AC/DC?", "Bon Scott", "space"),
    ("She wrote it in C++,", "he said", "space"),
    ("عاصمة مصر؟", "القاهرة", "space"),
    ("프랑스의 수도는", "파리", "space"),
    # Scripts without spaces, with all their punctuation.
    ("答：", "1945", "none"),
    ("首都は「", "Rome", "none"),
    ("法国的首都，", "Paris", "none"),
    ("（法国）", "Paris", "none"),
    ("価格は￥", "500", "none"),
    ("パリは。", "Rome", "none"),
    ("ｱｲ｡", "Rome", "none"),
    ("The city of", "東京", "none"),
    ("ประเทศไทย", "1945", "none"),
    ("བོད་", "1945", "none"),
    # Brackets, and closing punctuation before which nothing stands.
    ("The book (", "Rome", "none"),
    ("x[", "0", "none"),
    ("Rome", ", the city", "none"),
    ("Rome", ".", "none"),
    ("Rome", ") yes", "none"),
    ("The dog", "'s bone", "none"),
    # Code, prices, paths, addresses, quotations.
    ("x = np.", "matrix", None),
    ("Das kostet $", "5", None),
    ("Das kostet €", "5", None),
    ("https://", "example.com", None),
    ("https:", "//example.com", None),
    ("https://example.com/search?", "q=1", None),
    ("path/to/", "file", None),
    ("C:\\", "Users", None),
    ('He said "', "Rome", None),
    ("He said '", "Rome", None),
    ("He said “", "Rome", None),
    ("Er sagte „", "Rom", None),
    ("Er sagte »", "Rom", None),
    ('the word "superior"', "means", None),
    ("Well-", "known", None),
    ("1939–", "1945", None),
    ("std::", "vector", None),
    ("me@", "example.com", None),
    ("snake_", "case", None),
    ("x =", "y", None),
    ("print", "(x)", None),
    ("f()", "x", None),
    ("if (!", "done", None),
    ("It costs", "$5", None),
    ("The value is", ".5", None),
    ("It runs on", ".NET", None),
    ("1,", "000", None),
    ("12:", "30", None),
    ("答案是:", "Paris", None),
    ("法国的首都是哪里?", "Paris", None),
    ("<|im_end|>", "Paris", None),
    ("The end.", "Then", None),
]
OPEN = "x = np."


@pytest.mark.parametrize("prompt, answer, joint", RULES)
def test_what_the_characters_ask_for(prompt: str, answer: str, joint: str | None) -> None:
    assert sure_joint(prompt, answer) == joint
    gap = "" if joint == "none" else " "
    assert join(prompt, answer) == (prompt + gap + answer, len(prompt))
    # Whoever fixes it, has it so.
    assert join(prompt, answer, "space")[0] == f"{prompt} {answer}"
    assert join(prompt, answer, "none")[0] == prompt + answer
    # White space at the prompt's end is the joint, whatever else is said.
    joints: tuple[Joint, ...] = ("auto", "space", "none")
    for end in (" ", "\n", "\t", "  ", "\n    ", "\r\n", "\u00a0"):
        for fixed in joints:
            assert join(prompt + end, answer, fixed)[0] == prompt + end + answer


def test_no_prompt_is_changed() -> None:
    rng = random.Random(3)
    letters = "ab 1\n\t.,:;!?'\"()[]{}<>/\\@#$%&*-_=+|~^`“”„»«日本：、ไ한éж\u200b\u00a0\u3000😀"
    joints: tuple[Joint, ...] = ("auto", "space", "none")
    for _ in range(3000):
        prompt = "".join(rng.choice(letters) for _ in range(rng.randint(1, 12)))
        answer = "".join(rng.choice(letters) for _ in range(rng.randint(1, 6))).strip()
        if not answer:
            continue
        text, end = join(prompt, answer, rng.choice(joints))
        assert text in (prompt + answer, f"{prompt} {answer}")
        assert text[:end] == prompt.removesuffix(" ") == join(prompt, "")[0]


def fact(prompt: str = OPEN, answer: str = "matrix", **more: Any) -> Fact:
    return Fact(prompt.split(".")[0].split()[-1], prompt, answer, id="one", **more)


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny("gpt2")


def whole_log_prob(model: Model, text: str, start: int) -> float:
    ids = model.encoder.verbatim(text).ids
    logs = full_logits(model, ids).double().log_softmax(-1)
    return sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids)))


@pytest.mark.parametrize("tokenizer", ["byte_level_bpe", "sentencepiece_bpe"])
def test_the_model_decides_by_its_own_probability(tokenizer: str) -> None:
    model = tiny("llama", tokenizer)
    told: list[Settled] = []
    facts = [fact(answer=word) for word in ("matrix", "array", "Paris", "7", "zeros")]
    settled = settle_joints(model, facts, on_settled=told.extend)
    assert [one.answer for one in told] == [f.target for f in facts]
    for one, made in zip(told, settled, strict=True):
        spaced, glued = (join(one.prompt, one.answer, j)[0] for j in ("space", "none"))
        both = (model.encoder.verbatim(spaced).ids, model.encoder.verbatim(glued).ids)
        alike = len(list(takewhile(lambda p: p[0] == p[1], zip(*both, strict=False))))
        assert one.space == pytest.approx(whole_log_prob(model, spaced, alike), abs=1e-3)
        assert one.none == pytest.approx(whole_log_prob(model, glued, alike), abs=1e-3)
        assert one.joint == ("none" if one.none > one.space + math.log(5) else "space")
        assert made.joints == ((one.prompt, one.answer, one.joint),)
        encoded = model.encoder.fact(made, made.target)
        assert encoded.text == (glued if one.joint == "none" else spaced)


def prefer(monkeypatch: pytest.MonkeyPatch, joint: str) -> list[int]:
    """Let every model find one form likelier; returns how many texts each call compared."""
    calls: list[int] = []

    def log_probs(_model: Model, rows: Any, _starts: Any, **_: Any) -> list[float]:
        calls.append(len(rows))
        return [-1.0 if (i % 2 == 0) == (joint == "space") else -9.0 for i in range(len(rows))]

    monkeypatch.setattr(decoding, "log_probs", log_probs)
    return calls


def rich(**more: Any) -> Fact:
    """A fact with one sure and one open text of each kind."""
    return fact(
        target_old="array",
        rephrasings=("The numpy class of matrices is", "import numpy; y = numpy."),
        locality=(Probe("The capital of Peru is", "Lima"), Probe("z = torch.", "Tensor")),
        portability=(Probe("He said '", "np"), Probe("path/to/", "np", joint="space")),
        **more,
    )


def test_only_what_is_open_is_decided_and_once(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = prefer(monkeypatch, "none")
    (settled,) = settle_joints(model, [rich()])
    assert [pair[:2] for pair in settled.joints] == [
        (OPEN, "matrix"),
        (OPEN, "array"),
        ("import numpy; y = numpy.", "matrix"),
        ("import numpy; y = numpy.", "array"),
        ("z = torch.", "Tensor"),
        ("z = torch.", "matrix"),
        ("He said '", "np"),
    ]
    assert {joint for *_, joint in settled.joints} == {"none"}
    assert settle_joints(model, [settled]) == [settled] and calls == [14]
    # What is sure or fixed by the probe stays so.
    assert settled.joint_of("The capital of Peru is", "Lima") == "auto"
    assert settled.joint_of("path/to/", "np") == "space"
    plain = Fact("France", "The capital of France is", "Rome", id="two")
    assert settle_joints(model, [plain]) == [plain] and calls == [14]
    # A run's record gives the same again, whatever the model now finds.
    record = joints_record([settled, plain])
    assert record == {"one": " ".join(["none"] * 7)}
    prefer(monkeypatch, "space")
    assert settle_joints(model, [rich()], recorded=record) == [settled]
    # A record of other facts, or no record at all, counts for nothing.
    broken: Any = {"one": 3}
    for odd in (broken, {"one": "none"}, {"one": " ".join(["glue"] * 7)}, {"two": "none"}):
        (other,) = settle_joints(model, [rich()], recorded=odd)
        assert {joint for *_, joint in other.joints} == {"space"}


@pytest.mark.parametrize("joint, text", [("space", "x = np. matrix"), ("none", "x = np.matrix")])
def test_the_user_fixes_it(
    model: Model, monkeypatch: pytest.MonkeyPatch, joint: Joint, text: str
) -> None:
    calls = prefer(monkeypatch, "space" if joint == "none" else "none")
    (fixed,) = settle_joints(model, [fact(joint=joint)])
    assert fixed.joints == () and calls == []
    assert model.encoder.fact(fixed, "matrix").text == text
    given = rich().with_joint(joint)
    assert given.joint == given.locality[0].joint == given.portability[0].joint == joint
    assert given.portability[1].joint == "space"  # its own
    assert fact(joint="space").with_joint("none").joint == "space"


def test_a_space_before_the_answer_is_meant() -> None:
    assert fact(answer=" matrix").joint == "space" and fact(answer=" matrix").target == "matrix"
    assert Probe("z = torch.", " Tensor").joint == "space" and fact().joint == "auto"
    for wrong in ("glue", "", None, 3):
        with pytest.raises(DataError, match="auto, space or none"):
            fact(joint=wrong)
        with pytest.raises(DataError, match="auto, space or none"):
            Probe("z", "y", joint=wrong)  # pyright: ignore[reportArgumentType]


def test_numbers_that_are_not_finite_and_long_texts_leave_a_space(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "x " * 600 + OPEN
    (made,) = settle_joints(model, [fact(long)])
    assert made.joint_of(long, "matrix") == "auto"
    monkeypatch.setattr(decoding, "log_probs", lambda _m, rows, _s: [float("nan")] * len(rows))
    (made,) = settle_joints(model, [fact()])
    assert made.joint_of(OPEN, "matrix") == "space"
    assert Settled(OPEN, "matrix", space=-5.0, none=-3.5).joint == "space"  # a toss-up
    assert Settled(OPEN, "matrix", space=-5.0, none=-3.3).joint == "none"


def test_everyone_reads_the_decision(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Editors behind any prefix, evaluation behind any prefix, worked examples."""
    prefer(monkeypatch, "none")
    (settled,) = settle_joints(model, [rich()])
    for text in fact_prompts(model, settled, ["", 'He "sang". '], "matrix"):
        assert text.text.endswith("x = np.matrix")
    asked = questions([settled], ("rewrite", "rephrase", "locality", "portability", "counterfact"))
    texts = Texts(model, asked, [settled])
    glued = {(p, a) for p, a, _ in settled.joints}
    seen = 0
    for u, question in enumerate(asked):
        for spec in texts.specs.get(u, []):
            want = model.encoder.encode(
                question.prompt, spec.answer, joint=settled.joint_of(question.prompt, spec.answer)
            )
            (reading, *_) = [r for r in texts.readings(u, "") if r.targets == spec.targets]
            assert reading.targets == want.answer_ids
            seen += (question.prompt, spec.answer) in glued
    assert seen >= 7
    example = dataclasses.replace(settled, id="other")
    told = in_context_prefix(settled, [example])
    assert told.count("x = np.matrix.") == 3 and "np. matrix" not in told


def test_old_answers_of_the_model_are_joined_in_their_likelier_form(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    prefer(monkeypatch, "none")
    (filled,), dropped = fill_old_answers(model, settle_joints(model, [fact()]))
    assert not dropped and filled.target_old and filled.target_old_is_generated
    text = model.encoder.fact(filled, filled.target_old).text
    sure = sure_joint(OPEN, filled.target_old)
    assert text == OPEN + (" " if sure == "space" else "") + filled.target_old
    assert filled.joints[0] == (OPEN, "matrix", "none")


def test_an_edit_in_force_does_not_decide(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from goldenlayers import evaluation
    from goldenlayers.delta import Dense, WeightDelta
    from goldenlayers.evaluation import evaluate

    name = "transformer.h.1.mlp.c_proj.weight"
    weight = dict(model.hf.named_parameters())[name]
    clean, seen = weight.detach().clone(), []

    def spied(*args: Any, **options: Any) -> Any:
        seen.append(torch.equal(weight, clean))
        return settle_joints(*args, **options)

    monkeypatch.setattr(evaluation, "settle_joints", spied)
    delta = WeightDelta({name: Dense(torch.ones_like(weight.T))}, model.fingerprint(), "tiny-gpt2")
    with delta.applied(model):
        evaluate(model, [fact()], metrics=["rewrite"])
        assert not torch.equal(weight, clean)
    assert seen == [True]
