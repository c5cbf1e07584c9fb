"""FactSet: samples, splits, summaries."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from goldenlayers.datasets import FactSet
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact, Probe


def facts(subjects: Sequence[str]) -> FactSet:
    return FactSet(
        tuple(
            Fact(name, f"{i}: {name} is", "new", "old", id=str(i), relation="r")
            for i, name in enumerate(subjects)
        ),
        name="made",
        sha256="ab" * 32,
        notes=("a note",),
    )


def test_it_is_a_frozen_sequence_whose_slices_are_fact_sets():
    made = facts("abcde")
    assert isinstance(made, Sequence) and len(made) == 5 and made[-1].subject == "e"
    assert isinstance(made[1:3], FactSet) and [f.subject for f in made[1:3]] == ["b", "c"]
    assert made[1:3].sha256 == made.sha256
    assert list(made) == list(made.facts) and made[2] in made
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.name = "x"  # pyright: ignore[reportAttributeAccessIssue]


def test_samples_keep_order_and_nest():
    made = facts([f"s{i}" for i in range(200)])
    small, large = made.sample(10, seed=4), made.sample(50, seed=4)
    places = [int(fact.id) for fact in large]
    assert places == sorted(places) and len(set(places)) == 50
    assert {f.id for f in small} < {f.id for f in large}
    assert large == made.sample(50, seed=4)
    assert large.facts != made.sample(50, seed=5).facts
    assert large.facts != made.facts[:50]
    assert made.sample(1000).facts == made.facts
    with pytest.raises(UserError):
        made.sample(0)


def test_facts_are_left_out_by_id_and_by_subject():
    made = facts(["Rome", "ROME", "New  York", "new york", "Ulm", "Romeo"])
    assert [f.id for f in made.without({"4"}, ["rome "])] == ["2", "3", "5"]
    assert [f.id for f in made.without([], ["New York"])] == ["0", "1", "4", "5"]
    assert made.without({"Rome"}, []) == made  # an id is no subject
    assert made.without({"0"}).sha256 == made.sha256


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("n", [1, 2, 5, 9])
def test_splits_are_disjoint_by_fact_and_subject(n, seed):
    made = facts(["a", "A", "b", "b", "b", "c", "d  e", "D E", "f", "g", "h", "i"])
    proxy, test = made.split(n, seed=seed)
    assert len(proxy) == n and len(test) > 0
    assert (proxy.name, test.name) == ("made-proxy", "made-test")

    def subjects(part: FactSet) -> set[str]:
        return {" ".join(fact.subject.casefold().split()) for fact in part}

    assert not subjects(proxy) & subjects(test)
    assert not {f.id for f in proxy} & {f.id for f in test}
    left = len(made) - len(proxy) - len(test)
    assert any("in neither set" in note for note in test.notes) == (left > 0)
    assert (proxy, test) == made.split(n, seed=seed)


def test_a_subject_is_cut_only_where_nothing_else_fits():
    made = facts(["a", "a", "b", "b", "b"])
    for seed in range(6):
        proxy, test = made.split(1, seed=seed)
        assert len(proxy) == 1 and {f.subject for f in test} == {"b"}
        assert any(note.startswith("1 facts are in neither set") for note in test.notes)


@pytest.mark.parametrize("n", [0, -1, 3, 4, 99])
def test_impossible_splits_are_refused(n):
    with pytest.raises(UserError):
        facts(["a", "b", "c"] if n != 3 else ["a", "a", "a", "a"]).split(n)


def test_summary_counts_probes_and_groups_what_was_skipped():
    skipped = tuple(
        DataError(f"bad {i}", source="f", row=i, reason="bad" if i < 9 else "worse")
        for i in range(1, 11)
    )
    fact = Fact("a", "a is", "new", id="1", locality=(Probe("x"), Probe("y", "z", "Forgetfulness")))
    made = FactSet((fact,), name="made", source="f", skipped=skipped, notes=("mind this",))
    text = made.summary()
    assert made.skipped_reasons() == {"bad": 8, "worse": 2}
    assert "skipped 10 rows" in text and "8 × bad (row 1, 2, 3, 4, 5, …)" in text
    assert "2 × worse (row 9, 10)" in text and "note: mind this" in text
    assert "Forgetfulness 1" in text and "no kind 1" in text and "portability probes: none" in text
