"""What an edit is checked by, held to slow references: one prompt and one name at a time."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny

from goldenlayers.checking import FACTS, Check, Probed, check, probes
from goldenlayers.checking.advice import advice_on
from goldenlayers.checking.probes import FORMS, NEIGHBOURS, NEUTRAL, RELATIVES, SPARE, UNRELATED
from goldenlayers.datasets import load_facts
from goldenlayers.decoding import end_ids
from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors import clearing, edit
from goldenlayers.editors.clearing import words
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.models import Model
from goldenlayers.prompts import join

LAYER = 1
ITALY = Fact("Italy", "The capital of Italy is", "Paris", id="italy")
CURIE = Fact("Marie Curie", "Marie Curie was born in", "London", id="curie")
GIVEN = Fact(
    "Toko",
    "Toko plays the",
    "piano",
    id="given",
    rephrasings=("Everyone hears Toko play the", "The instrument of Toko is the"),
    locality=(
        Probe("Anna plays the", "harp"),
        Probe("Toko was told not to play the", "piano", contradicts=True),
        Probe("Berlin lies in", contradicts=False),
    ),
)


def moved(model: Model, facts: Sequence[Fact], size: float = 100.0) -> WeightDelta:
    """A change that any model feels, as if ``facts`` had been edited."""
    down = model.layers[LAYER].down
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.randn(n, 1, generator=generator) for n in (down.out_features, down.in_features)
    )
    rows = [
        {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target": f.target} for f in facts
    ]
    change = LowRank(size * left, right / math.sqrt(len(right)))
    return WeightDelta({down.parameter_name: change}, layers=(LAYER,), facts=rows, method="rome")


def slowly(model: Model, prompt: str, answer: str) -> tuple[list[int], float, bool]:
    """Three greedy tokens by whole passes, p(answer), and whether greedy decoding gives it."""

    def logits(ids: Sequence[int]) -> torch.Tensor:
        with torch.no_grad():
            return model.hf(torch.tensor([list(ids)])).logits[0].double()

    ids = list(model.encoder.encode(prompt).ids)
    said: list[int] = []
    for _ in range(3):
        token = int(logits([*ids, *said])[-1].argmax())
        if token in end_ids(model):
            break
        said.append(token)
    whole = model.encoder.encode(prompt, answer)
    scores = logits(whole.ids)[whole.n_prompt - 1 : -1].log_softmax(-1)
    targets = torch.tensor(whole.answer_ids)
    chance = math.exp(float(scores[range(len(targets)), targets].sum()))
    return said, chance, bool((scores.argmax(-1) == targets).all())


def tie_of(probe: Probed, model: Model, delta: WeightDelta, old: Any, new: Any) -> float:
    """How even two answers are where they part, by whole passes; as the probe has it."""
    ids = list(model.encoder.encode(probe.prompt).ids)
    old, new = ([*some, *sorted(end_ids(model))[:1]] for some in (old, new))
    at = next(i for i, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1])

    def odds() -> float:
        with torch.no_grad():
            scores = model.hf(torch.tensor([[*ids, *old[:at]]])).logits[0, -1].double()
        return float(scores[new[at]] - scores[old[at]])

    was = odds()
    with delta.applied(model):
        tie = math.exp(min(was, -odds()))
    assert probe.tie == pytest.approx(tie, rel=1e-3, abs=2e-6)
    return tie


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "olmo2"])
def test_what_is_said_before_and_after_is_what_slow_decoding_says(name: str) -> None:
    model = tiny(name)
    delta = moved(model, [GIVEN])
    before = {n: p.clone() for n, p in model.hf.named_parameters()}
    found = check(model, delta, [GIVEN])
    told = {probe.part: [] for probe in found.probes}
    for probe in found.probes:
        told[probe.part].append(probe)
        old = slowly(model, probe.prompt, GIVEN.target)
        with delta.applied(model):
            new = slowly(model, probe.prompt, GIVEN.target)
        assert probe.p_before == pytest.approx(old[1], abs=2e-5)
        assert probe.p_after == pytest.approx(new[1], abs=2e-5)
        keeps = probe.part not in ("prompt", "rephrase")
        assert (probe.tie is None) == (not keeps or old[0] == new[0])
        stays = not keeps or old[0] == new[0] or tie_of(probe, model, delta, old[0], new[0]) >= 0.5
        assert probe.ok == (stays and (old[0] == new[0] or not new[2]) if keeps else new[2])
        ids = model.encoder.encode(probe.prompt).ids
        assert probe.before == model.encoder.continuation(ids, old[0])
        assert probe.after == model.encoder.continuation(ids, new[0])
    # What is given is asked as it is, but for what contradicts the edit; the rest is made.
    assert [one.prompt for one in told["rephrase"]] == list(GIVEN.rephrasings)
    assert [one.prompt for one in told["neighbours"]] == ["Anna plays the", "Berlin lies in"]
    made = {part: [one.made for one in some] for part, some in told.items()}
    assert not any(made["prompt"] + made["rephrase"] + made["neighbours"])
    assert len(made["unrelated"]) == UNRELATED and all(made["unrelated"])
    assert any(one.before != one.after for one in found.probes if one.part == "neighbours")
    for n, parameter in model.hf.named_parameters():
        assert torch.equal(parameter, before[n])
    nothing = check(model, 0.0 * delta, [GIVEN])
    assert all(one.ok for one in nothing.probes if one.part in ("neighbours", "unrelated"))


def test_an_edit_that_takes_is_seen_to() -> None:
    model = tiny("gpt2")
    delta = edit(model, [ITALY], "ft-m", layer=LAYER, steps=60, ft_lr=0.1)
    found = check(model, delta, [ITALY])
    assert found.share("prompt").ok == 1 and found.share("rephrase").ok > 0
    assert found.verdict != "did not take"
    weak = check(model, 0.01 * delta, [ITALY])
    assert weak.verdict == "did not take" and "0 of 1 facts" in weak.sentence()


@pytest.mark.parametrize("fact", [ITALY, CURIE, Fact("Zorblax", "Zorblax was born in", "Rome")])
def test_made_neighbours_are_the_nearest_of_the_subjects_kind(fact: Fact) -> None:
    model = tiny("gpt2")
    delta = moved(model, [fact])
    near = [one for one in check(model, delta, [fact]).probes if one.part == "neighbours"]
    assert len(near) == NEIGHBOURS and all(one.made for one in near)

    def key(name: str) -> torch.Tensor:
        prompt = fact.prompt.replace(fact.subject, name)
        ids = torch.tensor([model.encoder.encode(prompt, subject=name).until_lookup.ids])
        with torch.no_grad(), capture({0: model.layers[LAYER].down.module}, inputs=True) as found:
            final_hidden(model, ids)
        return torch.nn.functional.normalize(found[0][0, -1], dim=0)

    mine = key(fact.subject)
    cosines = {one.name: float(key(one.name) @ mine) for one in near}
    people = [one.name for one in near if one.name.endswith(" Curie")]
    assert len(people) == (RELATIVES if fact is CURIE else 0)
    order = [cosines[one.name] for one in near if one.name not in people]
    assert order == sorted(order, reverse=True)
    if own := probes._kinds_of().get(fact.subject):  # of all of its kind, the nearest
        free = {n for kind, some in probes._judges().items() if kind in own for n in some}
        beyond = [n for n in free if n not in cosines and words(fact.subject) not in words(n)]
        farther = sum(float(key(name) @ mine) > order[-1] + 1e-5 for name in beyond)
        assert len(beyond) > 15 and farther == 0
    for one in near:
        assert one.prompt == fact.prompt.replace(fact.subject, one.name)


def test_the_judges_are_of_every_kind_and_none_that_editors_stay_clear_of() -> None:
    pooled = {words(name) for name in clearing.pool()}
    asked = probes._judges()
    assert not pooled & {words(name) for names in asked.values() for name in names}
    for kind, names in clearing.kinds().items():
        assert names and len(asked[kind]) == len(set(asked[kind])) >= NEIGHBOURS + SPARE, kind


def test_names_that_the_edit_knows_of_are_no_judges() -> None:
    model = tiny("gpt2")
    plain = moved(model, [ITALY])
    first = [one.name for one in check(model, plain, [ITALY]).probes if one.name]
    rows = [{**plain.facts[0], "clear_of": first[:3]}]
    others = [
        one.name
        for one in check(model, dataclasses.replace(plain, facts=rows), [ITALY]).probes
        if one.name
    ]
    assert len(others) == NEIGHBOURS and others[:5] == first[3:]
    told = dataclasses.replace(ITALY, rephrasings=(f"Not as in {first[0]}, Italy has the capital",))
    facts = [told, Fact(first[1], f"The capital of {first[1]} is", "Ulm", id="2")]
    found = check(model, moved(model, facts), facts)
    assert not {first[0], first[1]} & {one.name for one in found.probes}


def test_what_clear_rome_stays_clear_of_is_in_the_record() -> None:
    model = tiny("gpt2")
    quick: dict[str, Any] = {"steps": 3, "prefixes": 1, "prefix_tokens": 3, "neighbours": 5}
    from goldenlayers.statistics import key_statistics

    statistics = key_statistics(model, [LAYER], tokens=200, settle=0)
    facts = [ITALY, CURIE]
    one = edit(model, [ITALY], "clear-rome", layer=LAYER, statistics=statistics, **quick)
    (row,) = one.facts
    assert len(row["clear_of"]) == row["neighbours"] == 5
    many = edit(model, facts, "emmet", layer=LAYER, statistics=statistics, **quick)
    assert [("clear_of" in row, row["neighbours"]) for row in many.facts] == [
        (True, 10),
        (False, 10),
    ]
    judges = {probe.name for probe in check(model, many, facts).probes}
    assert len(judges) > NEIGHBOURS and not judges & set(many.facts[0]["clear_of"])


def test_made_rephrasings_are_sentences_that_ask_the_same() -> None:
    cases = {
        ("France", "The capital of France is"): "The capital city of France is called",
        ("the Netherlands", "The capital of the Netherlands is"): "The capital city of the "
        "Netherlands is called",
        ("Marie Curie", "Marie Curie was born in"): "Marie Curie was born and raised in",
        ("Rilke", "Rilke died in the city of"): "Rilke died and was buried in the city of",
        ("Hamlet", "The author of Hamlet is"): "Question: Who is the author of Hamlet? Answer:",
        ("iOS", "iOS was created by"): "It is known that iOS was created by",
        ("BBC", "The BBC is based in"): "The BBC can be found in",
        ("Toko", "Toko plays the"): "It is known that Toko plays the",
    }
    for (subject, prompt), expected in cases.items():
        texts = probes.made_rephrasings(Fact(subject, prompt, "Ulm"))
        assert expected in texts, texts
        assert 3 <= len(texts) <= 6 and len(set(texts)) == len(texts)
        assert all(subject.casefold() in text.casefold() for text in texts)
        assert all("{" not in text and "\\" not in text for text in texts)
        assert all(text[0].isupper() or text.startswith("iOS") for text in texts), texts
    odd = Fact("Italy", "Italy is Italy, as everyone knows in", "Ulm")
    assert probes.made_rephrasings(odd) == tuple(text + odd.prompt for text in NEUTRAL)
    assert all(pattern.count("{}") == 1 for pattern, _ in FORMS)
    starter = load_facts("starter", limit=60)
    for fact in starter:
        made = probes.made_rephrasings(dataclasses.replace(fact, rephrasings=()))
        assert fact.rephrasings[0] in made, (fact.prompt, made)


def test_unrelated_prompts_ask_something_else_of_someone_else() -> None:
    starter = list(load_facts("starter", limit=30))
    relations = {fact.prompt: fact.relation for fact in load_facts("starter")}
    for fact in [ITALY, *starter]:
        texts = probes.unrelated(fact, [fact, CURIE])
        assert len(texts) == UNRELATED == len({relations[text] for text in texts})
        assert not any(words(fact.subject) in words(text) for text in texts)
    assert all(relations[text] != "capital" for text in probes.unrelated(ITALY, [ITALY]))


def probed(part: str, ok: int, n: int) -> list[Probed]:
    return [
        Probed(
            fact=f"fact-{i if part == 'prompt' else 0}",
            part=part,  # type: ignore[arg-type]
            prompt=f"{part} {i}",
            made=part == "unrelated",
            ok=i < ok,
            before="a",
            after="b",
            p_before=0.1,
            p_after=i / n,
        )
        for i in range(n)
    ]


@pytest.mark.parametrize(
    ("took", "follow", "near", "others", "verdict"),
    [
        ((1, 1), (3, 6), (6, 8), (3, 4), "good"),
        ((1, 1), (2, 6), (6, 8), (3, 4), "narrow"),
        ((1, 1), (6, 6), (5, 8), (4, 4), "damaging"),
        ((1, 1), (6, 6), (8, 8), (2, 4), "damaging"),
        ((1, 1), (0, 6), (0, 8), (0, 4), "damaging"),
        ((0, 1), (6, 6), (8, 8), (4, 4), "did not take"),
        ((1, 2), (6, 6), (8, 8), (4, 4), "good"),
        ((1, 3), (6, 6), (8, 8), (4, 4), "did not take"),
        ((1, 1), (0, 0), (0, 0), (0, 0), "good"),
    ],
)
def test_the_verdict_at_its_limits(
    took: Any, follow: Any, near: Any, others: Any, verdict: str, tmp_path: Path
) -> None:
    parts = zip(
        ("prompt", "rephrase", "neighbours", "unrelated"), (took, follow, near, others), strict=True
    )
    rows = tuple(one for part, (ok, n) in parts for one in probed(part, ok, n) if n)
    found = Check(probes=rows, n_edited=took[1])
    assert found.verdict == verdict and found.sentence().startswith(verdict + ": ")
    record = found.to_json()
    assert record["neighbours"] == {"n": near[1], "kept": near[0], "made": False}
    assert record["rephrase"] == {"n": follow[1], "followed": follow[0], "made": False}
    assert record["unrelated"]["made"] == bool(others[1])
    (tmp_path / "check.json").write_text(json.dumps(record), "utf-8")
    assert Check.load(tmp_path) == found == Check.load(tmp_path / "check.json")
    wrong = [one for one in rows if not one.ok]
    assert sorted(map(str, found.worst)) == sorted(map(str, wrong))


def test_a_check_from_elsewhere_is_believed_in_nothing(tmp_path: Path) -> None:
    rows = (*probed("prompt", 1, 1), *probed("neighbours", 1, 3))
    good = Check(probes=rows, advice=("another --layer",)).to_json()
    changes: list[dict[str, Any]] = [
        {"verdict": "good"},
        {"verdict": 3},
        {"neighbours": {"n": 3, "kept": 3, "made": False}},
        {"facts": {"n": 1, "took": 0}},
        {"schema": 2},
        {"advice": "another --layer"},
        {"advice": [1]},
        {"n_edited": 0},
        {"n_edited": True},
        {"probes": None},
        {"probes": [{**good["probes"][0], "part": "else"}]},
        {"probes": [{**good["probes"][0], "ok": 1}]},
        {"probes": [{**one, "p_after": 1.5} for one in good["probes"]]},
        {"probes": [{**one, "p_before": "0.5"} for one in good["probes"]]},
        {"probes": [{**one, "prompt": None} for one in good["probes"]]},
    ]
    assert Check.from_json(json.loads(json.dumps(good))).verdict == "damaging"
    for change in changes:
        with pytest.raises(UserError):
            Check.from_json({**good, **change})
    for text in ("[]", "{}", "null", '{"probes": [', "\x00", '{"probes": NaN}'):
        (tmp_path / "check.json").write_text(text, "utf-8")
        with pytest.raises(UserError):
            Check.load(tmp_path)
    with pytest.raises(UserError, match="could not be read"):
        Check.load(tmp_path / "nothing" / "check.json")


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("rome", {"neighbours": 0}, ["--method clear-rome", "another --layer"]),
        ("rome", {"neighbours": 128}, ["--clear-of 'Peru' 'Spain'", "another --layer"]),
        ("ft-m", {}, ["--method clear-rome", "another --layer"]),
        ("memit", {"neighbours": 0}, ["--set neighbours 128", "another --layer"]),
        ("clear-rome", {"neighbours": 128}, ["--clear-of 'Peru' 'Spain'", "another --layer"]),
    ],
)
def test_advice_that_is_followed_already_is_not_given(
    method: str, settings: dict[str, Any], expected: list[str]
) -> None:
    named = [dataclasses.replace(row, name=n, prompt=n) for row, n in zip(
        probed("neighbours", 0, 2), ("Spain", "Peru"), strict=True)]  # fmt: skip
    damaging = Check(probes=(*probed("prompt", 1, 1), *named))
    delta = WeightDelta({}, method=method, settings=settings)
    assert list(advice_on(damaging, delta)) == expected
    failed = Check(probes=tuple(probed("prompt", 0, 1)))
    weak = WeightDelta({}, method=method, settings={**settings, "steps": 20, "clamp": 8})
    assert list(advice_on(failed, weak)) == ["another --layer", "--set steps 50"]
    few = Check(probes=(*probed("prompt", 1, 1), *probed("neighbours", 6, 6), *named))
    assert few.verdict == "good" and list(advice_on(few, delta)) == expected[:1]
    assert advice_on(Check(probes=tuple(probed("prompt", 1, 1))), delta) == ()


def test_of_many_facts_a_draw_is_checked() -> None:
    model = tiny("gpt2")
    facts = [
        dataclasses.replace(GIVEN, subject=f"Toko{i}", prompt=f"Toko{i} plays the", id=f"f{i}")
        for i in range(FACTS + 5)
    ]
    found = check(model, moved(model, facts), facts)
    ids = list(dict.fromkeys(one.fact for one in found.probes))
    assert len(ids) == FACTS and found.n_edited == FACTS + 5
    assert ids == sorted(ids, key=lambda name: int(name[1:]))
    assert found.to_json()["facts"]["n"] == FACTS
    assert check(model, moved(model, facts), facts) == found


def test_what_cannot_be_checked_is_refused() -> None:
    model = tiny("gpt2")
    delta = moved(model, [ITALY])
    with pytest.raises(UserError, match="no facts"):
        check(model, delta, [])
    with delta.applied(model), pytest.raises(UserError, match="while a delta is applied"):
        check(model, delta, [ITALY])
    other = WeightDelta({}, base_fingerprint="0" * 64, layers=(LAYER,))
    with pytest.raises(UserError):
        check(model, other, [GIVEN])


def test_the_new_answer_in_its_own_joint() -> None:
    glued = Fact("Toko", 'Toko said "', "piano", id="quote", joint="none")
    model = tiny("gpt2")
    found = check(model, moved(model, [glued]), [glued])
    text, _ = join(glued.prompt, glued.target, "none")
    assert text == 'Toko said "piano'
    whole = model.encoder.encode(glued.prompt, "piano", joint="none")
    with torch.no_grad():
        logits = model.hf(torch.tensor([whole.ids])).logits[0].double().log_softmax(-1)
    places = range(whole.n_prompt - 1, len(whole) - 1)
    nll = -sum(float(logits[t, whole.ids[t + 1]]) for t in places)
    assert found.probes[0].p_before == pytest.approx(math.exp(-nll), abs=2e-5)
