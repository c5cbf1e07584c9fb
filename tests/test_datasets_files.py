"""The public files themselves, with the exact counts; skipped where they are not at hand."""

from __future__ import annotations

from collections import Counter
from functools import cache

import pytest
from shared_data import DATA, needs_data

from goldenlayers.datasets import FactSet, load_facts
from goldenlayers.errors import DataError, UserError

pytestmark = needs_data

EQUAL = "the new answer equals the old answer"
# file: format, facts, {reason: skipped rows}, first bad row
FILES = {
    "counterfact/counterfact_500.json": ("counterfact-nested", 500, {}, None),
    "counterfact/counterfact_3k.json": ("counterfact-flat", 3000, {}, None),
    "zsre/zsre_mend_train-1k.json": (
        "zsre-mend",
        977,
        {EQUAL: 17, "the new answer is among the old answer's aliases": 4, "alt is empty": 2},
        (89, "alt"),
    ),
    "KnowEdit/ZsRE/ZsRE-test-all.json": (
        "zsre-knowedit",
        1261,
        {EQUAL: 43},
        (9, "target_new"),
    ),
    "KnowEdit/wiki_recent/recent_train.json": ("wiki-recent", 570, {}, None),
    "KnowEdit/wiki_counterfact/train_cf.json": (
        "wiki-counterfact",
        1421,
        {EQUAL: 6, "the old answer is empty": 1},
        (94, "target_new"),
    ),
    "KnowEdit/WikiBio/wikibio-test-all.json": ("wikibio", 306, {}, None),
    "MQuAKE/MQuAKE-hard.json": ("mquake", 1716, {}, None),
    "known_1000/known_1000.json": (
        "known",
        1208,
        {"no other answer in the same relation": 1},
        (894, "relation_id"),
    ),
}


@cache
def facts_of(name: str) -> FactSet:
    return load_facts(DATA / name, skip_invalid=True)


def probe_kinds(facts: FactSet, what: str) -> dict[str, int]:
    return dict(Counter(probe.kind for fact in facts for probe in getattr(fact, what)))


@pytest.mark.parametrize("name", FILES)
def test_exact_counts_and_recognition(name):
    form, count, skipped, _ = FILES[name]
    facts = facts_of(name)
    assert (facts.format, len(facts)) == (form, count)
    assert facts.skipped_reasons() == skipped
    assert len({fact.id for fact in facts}) == count


@pytest.mark.parametrize("name", [name for name in FILES if FILES[name][3]])
def test_without_skip_invalid_the_first_bad_row_is_named(name):
    _, _, skipped, (row, field) = FILES[name]
    with pytest.raises(DataError) as caught:
        load_facts(DATA / name)
    assert (caught.value.row, caught.value.field) == (row, field)
    assert "--skip-invalid" in str(caught.value) and name in str(caught.value)
    total = sum(skipped.values())
    assert (f"{total} of 1," in str(caught.value)) == (total > 1)


@pytest.mark.parametrize("name", [name for name in FILES if not FILES[name][3]])
def test_clean_files_load_without_skip_invalid(name):
    assert load_facts(DATA / name).facts == facts_of(name).facts


def test_counterfact_nested():
    facts = facts_of("counterfact/counterfact_500.json")
    first = facts[0]
    assert (first.id, first.relation) == ("20952", "P30")
    assert first.prompt == "Angola is located in"
    assert (first.target_old, first.target) == ("Africa", "Antarctica")
    assert [len(first.rephrasings), len(first.generation_prompts)] == [2, 10]
    assert {probe.answer for probe in first.locality} == {"Africa"}
    assert probe_kinds(facts, "locality") == {"neighborhood": 5000}


def test_counterfact_flat():
    facts = facts_of("counterfact/counterfact_3k.json")
    assert facts[0].locality[0].prompt == "Mount Erebus, in"
    assert facts[0].locality[0].answer == "Antarctica"
    assert all(len(fact.rephrasings) == 1 for fact in facts)
    assert probe_kinds(facts, "locality") == {"neighborhood": 3000}


def test_zsre_mend():
    facts = facts_of("zsre/zsre_mend_train-1k.json")
    first = facts[0]
    assert (first.target_old, first.target) == ("uniform", "unmanned aircraft")
    assert first.locality[0].prompt == "john goodman's character in the big lebowski?"
    assert first.locality[0].answer == "Walter Sobchak"
    assert not any("nq question" in probe.prompt for fact in facts for probe in fact.locality)
    # The old answer is the true one, not what MEND's own model said ("politician").
    assert any(fact.target_old == "cinematographer" for fact in facts)


def test_knowedit_zsre():
    facts = facts_of("KnowEdit/ZsRE/ZsRE-test-all.json")
    assert facts[0].rephrasings == ("What family are Epaspidoceras?",)
    assert facts[0].target_old == "Aspidoceratidae"
    assert sum(bool(fact.old_aliases) for fact in facts) > 0
    assert probe_kinds(facts, "portability") == {
        "Reasoning": 756,
        "Logical_Generalization": 268,
        "Subject_Aliasing": 237,
    }
    assert probe_kinds(facts, "locality") == {"Relation_Specificity": 2522}


def test_wiki_recent():
    facts = facts_of("KnowEdit/wiki_recent/recent_train.json")
    assert all(fact.target_old is None and fact.rephrasings == () for fact in facts)
    assert probe_kinds(facts, "locality") == {"Relation_Specificity": 1648, "Forgetfulness": 298}
    assert probe_kinds(facts, "portability") == {
        "Reasoning": 476,
        "Logical_Generalization": 223,
        "Subject_Aliasing": 52,
    }
    # Alias lists: the first is the answer, the others are aliases of it.
    soviet = next(p for p in facts[0].locality if p.answer == "Soviet Union")
    assert "USSR" in soviet.aliases and "Soviet Union" not in soviet.aliases
    # Seven have an empty alias list as their answer: kept without it, and said.
    unanswered = [p for fact in facts for p in fact.locality if p.answer is None]
    assert len(unanswered) == 7
    assert any(note.startswith("7 locality probes without an answer, kept") for note in facts.notes)


def test_wiki_counterfact():
    facts = facts_of("KnowEdit/wiki_counterfact/train_cf.json")
    assert sum(p.answer is None for fact in facts for p in fact.locality) == 2
    assert any(note.startswith("2 locality probes without an answer, kept") for note in facts.notes)
    assert sum(not fact.portability for fact in facts) == 8
    assert probe_kinds(facts, "locality") == {"Relation_Specificity": 1247, "Forgetfulness": 782}
    assert [error.row for error in facts.skipped] == sorted(e.row or 0 for e in facts.skipped)


def test_wikibio():
    facts = facts_of("KnowEdit/WikiBio/wikibio-test-all.json")
    first = facts[0]
    assert first.subject == "john russell reynolds"
    assert first.prompt.startswith("This is a Wikipedia passage about john russell reynolds. Sir")
    assert first.target.startswith("He received general education")
    # Passages are kept as they are; a space at their end is the joint with the sentence.
    assert sum(fact.prompt.endswith(" ") for fact in facts) == 68


def test_mquake():
    facts = facts_of("MQuAKE/MQuAKE-hard.json")
    record = facts[:4]
    assert [fact.id for fact in record] == ["7417.1", "7417.2", "7417.3", "7417.4"]
    assert record[0].prompt == "Hey Jude was performed by"
    assert record[0].rephrasings == ("Who performed Hey Jude?",)
    assert "Fab Four" in record[0].old_aliases
    assert [len(fact.portability) for fact in record] == [3, 0, 0, 0]
    probe = record[0].portability[0]
    assert (probe.kind, probe.answer) == ("Reasoning", "Arabic")
    assert probe.aliases == ("ar", "Arabian language", "Arabic language")
    assert any("follow only from all rewrites" in note for note in facts.notes)
    assert any(note.startswith("947 facts repeat an earlier one") for note in facts.notes)


def test_known_facts_get_a_false_answer_of_their_relation_whatever_the_seed():
    facts = facts_of("known_1000/known_1000.json")
    answers: dict[str | None, set[str | None]] = {}
    for fact in facts:
        answers.setdefault(fact.relation, set()).add(fact.target_old)
    for fact in facts:
        assert fact.target in answers[fact.relation] and fact.target != fact.target_old
    other = load_facts(DATA / "known_1000/known_1000.json", skip_invalid=True, seed=7, limit=50)
    by_id = {fact.id: fact for fact in facts}
    assert all(by_id[fact.id] == fact for fact in other)
    assert any("has no new answers" in note for note in facts.notes)


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("counterfact", "counterfact/counterfact_500.json"),
        ("CounterFact", "counterfact/counterfact_3k.json"),
        ("zsre", "zsre/zsre_mend_train-1k.json"),
        ("knowedit", "KnowEdit/WikiBio/wikibio-test-all.json"),
        ("wiki_recent", "KnowEdit/wiki_recent/recent_train.json"),
    ],
)
def test_a_format_or_its_family_may_be_named(called, name):
    wanted = facts_of(name)
    named = load_facts(called, path=DATA / name, skip_invalid=True)
    assert (named.facts, named.format) == (wanted.facts, wanted.format)
    assert load_facts(f"{called}:{DATA / name}", skip_invalid=True).facts == wanted.facts


def test_a_text_corpus_is_no_fact_file():
    with pytest.raises(UserError, match=r"no format known here.*no row has .*id, title, text"):
        load_facts(DATA / "corpora/wikipedia_en_2014_heldout.jsonl")


@pytest.mark.parametrize("n", [1, 30, 200])
def test_splits_of_real_data_share_no_subject(n):
    facts = facts_of("KnowEdit/ZsRE/ZsRE-test-all.json")  # many subjects have several facts
    proxy, test = facts.split(n, seed=3)
    assert len(proxy) == n
    assert not {f.subject.casefold() for f in proxy} & {f.subject.casefold() for f in test}
    dropped = len(facts) - len(proxy) - len(test)
    assert dropped == 0 or any(note.startswith(f"{dropped} facts are in") for note in test.notes)
