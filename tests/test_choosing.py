"""Choosing layer, editor and strength for each fact: the rule on made tables, the prompts of the
chooser, and whole choices on a tiny model.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from families import build, tiny
from tokenizers_built import TOKENIZERS

from goldenlayers.checking import check
from goldenlayers.choosing import choose_edits, depths
from goldenlayers.choosing.probes import NEIGHBOURS, own_probes
from goldenlayers.choosing.rule import choose
from goldenlayers.cli import main
from goldenlayers.delta import WeightDelta
from goldenlayers.editors import edit
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.store import RunFolder

ITALY = Fact("Italy", "The capital of Italy is", "Paris", id="italy")
TOKO = Fact(
    "Toko",
    "Toko plays the",
    "piano",
    id="toko",
    rephrasings=("It is known that Toko plays the",),
    locality=(Probe("Anna plays the", "harp"),),
)
QUICK = {"steps": 2, "prefixes": 1, "statistics": None}


# --- the rule


def table(gains: np.ndarray, noise: float, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    difficulty = draw.normal(60, 15, (len(gains), 1))
    return difficulty + gains + draw.normal(0, noise, gains.shape)


def test_noise_alone_moves_few_facts_and_a_real_gain_moves_all() -> None:
    nothing = np.zeros((40, 6))
    kept = choose(table(nothing, 1.0), 0)
    alone = [int(row.argmax()) for row in table(nothing, 1.0)]
    assert sum(k != 0 for k in kept) < 12 < sum(a != 0 for a in alone)
    better = nothing.copy()
    better[:, 3] = 10
    assert choose(table(better, 1.0), 0) == [3] * 40


def test_with_noise_the_shrunken_choice_beats_that_by_each_fact_alone() -> None:
    """What the facts truly have, where half of the truth is common to all and probes are few."""
    draw = np.random.default_rng(1)
    truth = draw.normal(0, 6, (1, 8)) + draw.normal(0, 3, (200, 8))
    seen = table(truth, 8.0, seed=2)
    rows = np.arange(len(truth))
    shrunk, alone = (
        truth[rows, choose(seen, 0, own=own, prior=0, margin=0)].mean() for own in (0.3, 1.0)
    )
    fixed = truth[:, seen.mean(0).argmax()].mean()
    assert shrunk > alone + 0.5 and shrunk > fixed
    # The control: without noise a fact's own evidence is all that is needed.
    exact = choose(truth, 0, own=1.0, margin=0)
    assert exact == truth.argmax(1).tolist()


def test_one_fact_needs_a_clear_lead_and_a_failed_try_is_never_kept() -> None:
    assert choose(np.array([[80.0, 82.0, 79.0]]), 0) == [0]
    assert choose(np.array([[80.0, 90.0, 79.0]]), 0) == [1]
    assert choose(np.array([[math.nan, 50.0, 60.0]]), 0) == [2]
    assert choose(np.array([[math.nan, math.nan, math.nan]]), 1) == [1]
    failed = np.array([[80.0, 99.0], [80.0, math.nan]])
    assert choose(failed, 0) == [1, 0]


# --- the prompts


def test_the_chooser_and_the_check_ask_nothing_in_common() -> None:
    model = tiny("gpt2")
    bare = dataclasses.replace(TOKO, rephrasings=(), locality=())
    for fact in (ITALY, TOKO, bare):
        (own,) = own_probes(model, [fact], 1)
        assert len(own.names) == NEIGHBOURS == len(own.fact.must_stay)
        mine = {*own.fact.rephrasings, *(probe.prompt for probe in own.fact.locality)}
        given = {*fact.rephrasings, *(probe.prompt for probe in fact.locality)}
        assert not mine & given and fact.prompt not in mine
        row = {"subject": fact.subject, "prompt": fact.prompt, "chosen_by": own.told}
        change = edit(model, fact, "ft-m", layer=1, steps=1).changes
        delta = WeightDelta(change, layers=(1,), facts=[row])
        judged = {one.prompt for one in check(model, delta, [fact]).probes if one.made}
        assert judged and not judged & mine
        # The control: a check that knows of no choice asks what the chooser asked.
        free = {
            one.prompt for one in check(model, dataclasses.replace(delta, facts=()), [fact]).probes
        }
        assert free & mine or fact is TOKO


def test_half_of_a_facts_own_probes_choose_and_the_others_judge() -> None:
    model = tiny("gpt2")
    texts = tuple(f"Number {i}: Toko plays the" for i in range(3))
    stay = tuple(Probe(f"Anna {verb} the", contradicts=False) for verb in ("plays", "likes"))
    fact = dataclasses.replace(TOKO, rephrasings=texts, locality=stay)
    (own,) = own_probes(model, [fact], 1)
    assert own.fact.rephrasings == (texts[0], texts[2]) and own.fact.locality == stay[:1]
    assert not own.names
    row = {"subject": "Toko", "prompt": fact.prompt, "chosen_by": own.told}
    delta = WeightDelta(edit(model, fact, "ft-m", layer=1, steps=1).changes, facts=[row])
    asked = [one.prompt for one in check(model, delta, [fact]).probes if one.part != "unrelated"]
    assert asked == [fact.prompt, texts[1], stay[1].prompt]


# --- whole choices


def test_what_is_kept_is_the_sum_of_the_edits_that_were_tried() -> None:
    model = tiny("gpt2")
    facts = [ITALY, TOKO]
    found = choose_edits(
        model, facts, ["rome", "memit"], layers=[1, 0], strengths=(0.5, 1.0), **QUICK
    )
    assert len(found.tries) == 8 and found.scores.shape == (2, 8)
    usual = found.tries[0]
    assert (usual.layer, usual.editor.name, usual.strength) == (1, "rome", 1.0)
    parts = []
    for fact, pick in zip(facts, found.picks, strict=True):
        one = found.tries[pick]
        parts.append(edit(model, fact, one.editor, layer=one.layer) * one.strength)
    total = parts[0] + parts[1]
    assert set(total.changes) == set(found.delta.changes)
    for name in total.changes:
        assert torch.allclose(total.dense(name), found.delta.dense(name), atol=1e-5)
    for row, pick in zip(found.delta.facts, found.picks, strict=True):
        assert row["chosen"] == found.tries[pick].to_json() and row["chosen_by"]
    assert len(found.sentences()) == 2 and "as usual" in found.sentences()[0]


def test_a_try_scores_what_its_edit_alone_scores() -> None:
    """Held to the scores of one edit in a plan of its own."""
    from goldenlayers.evaluation.plan import EvaluationPlan
    from goldenlayers.racing import Worth

    model = tiny("gpt2")
    found = choose_edits(model, ITALY, "rome", layers=[0, 1], strengths=(1.0, 1.2), **QUICK)
    (own,) = own_probes(model, [ITALY], 0)
    plan = EvaluationPlan(model, [own.fact], ("rewrite", "rephrase", "locality"))
    for one, score in zip(found.tries, found.scores[0], strict=True):
        delta = edit(model, ITALY, one.editor, layer=one.layer) * one.strength
        (alone,) = Worth(by="soft").by_fact(plan.score([delta])).values()
        assert score == pytest.approx(alone, abs=0.05)


def test_depths_begin_with_the_published_one() -> None:
    assert depths(18) == [3, 1, 4, 7, 10, 13, 16]
    assert depths(2)[0] in (0, 1) and len(depths(1)) == 1


@pytest.mark.parametrize("strengths", [(), (0.0,), (math.nan,)])
def test_nothing_to_try_is_refused(strengths: tuple[float, ...]) -> None:
    with pytest.raises(UserError, match=r"nothing to try|strength"):
        choose_edits(tiny("gpt2"), ITALY, "rome", layers=[0], strengths=strengths, **QUICK)


# --- the command


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chosen") / "model"
    build("gpt2").save_pretrained(folder)
    TOKENIZERS["byte_level_bpe"]().save_pretrained(folder)
    return folder


def golden(model: Path, *more: object) -> int:
    fact = ("--subject", "Italy", "--prompt", "The capital of {} is", "--target", "Paris")
    quick = ("--statistics", "none", "--set", "steps", 2, "prefixes", 1)
    return main([str(a) for a in ("edit", model, *fact, *more, *quick)])


def test_the_command_keeps_what_was_tried(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    chosen = ("--layer", "each", "--method", "auto", "--strength", "auto")
    assert golden(model_folder, *chosen, "--out", out, "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["tried"]
    assert RunFolder.open(out).json("tries.json") == found
    n = len(found["tries"])
    assert n % 12 == 0 and f"{n} tries" in printed.err and "by its own probes" in printed.err
    (fact,) = WeightDelta.load(out).facts
    assert fact["chosen"] == found["tries"][found["facts"][0]["kept"]]


def test_a_fixed_strength_scales_the_edit(model_folder: Path, tmp_path: Path) -> None:
    for name, strength in (("whole", "1"), ("half", "0.5")):
        assert golden(
            model_folder, "--layer", 1, "--method", "rome", "--strength", strength,
            "--no-check", "--out", tmp_path / name,
        ) == 0  # fmt: skip
    whole, half = (WeightDelta.load(tmp_path / name) for name in ("whole", "half"))
    (name,) = whole.changes
    assert torch.allclose(0.5 * whole.dense(name), half.dense(name), atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        ("--strength", "loud"),
        ("--strength", "0"),
        ("--layer", "each", "--mode", "sequential"),
        ("--method", "auto", "--preset", "rome/gpt2-xl"),
    ],
)
def test_what_does_not_go_together_is_refused(
    model_folder: Path, wrong: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert golden(model_folder, *wrong) == 2
    assert "golden: " in capsys.readouterr().err
