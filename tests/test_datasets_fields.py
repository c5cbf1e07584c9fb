"""Answers and probes in all the shapes that public files use."""

from __future__ import annotations

import random

import pytest

from goldenlayers.datasets.fields import Row, answers, old_answer, probes, text, texts
from goldenlayers.errors import DataError
from goldenlayers.facts import Probe


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("Paris", ("Paris",)),
        (" Paris ", ("Paris",)),
        (["Paris"], ("Paris",)),
        (["Paris", "Lutetia", "Paris"], ("Paris", "Lutetia")),
        ([["USSR", "SU"], ["Russia"]], ("USSR", "SU", "Russia")),
        ([[], ["Paris", ""]], ("Paris",)),
        ({"str": "Paris", "id": "Q90"}, ("Paris",)),
        (None, ()),
        ("", ()),
        ([], ()),
        ([[]], ()),
        ([None, "x"], ("x",)),
    ],
)
def test_shapes_of_an_answer(value, found):
    assert answers(value, "ground_truth") == found


@pytest.mark.parametrize("value", [3, True, {"a": "b"}, ["x", 4], [[{"id": "Q"}]]])
def test_what_is_no_answer(value):
    with pytest.raises(DataError) as caught:
        answers(value, "ground_truth")
    assert caught.value.field == "ground_truth"


def test_any_nesting_gives_the_same_answers():
    """However a flat list is cut into lists and padded with empty ones, the answers stay."""
    rng = random.Random(0)
    for _ in range(200):
        flat = [rng.choice("abcdefgh") * rng.randint(1, 3) for _ in range(rng.randint(0, 8))]
        nested: list[object] = []
        rest = list(flat)
        while rest:
            take = rng.randint(1, len(rest))
            part, rest = rest[:take], rest[take:]
            nested.append([f" {word}" for word in part])
            nested += rng.choice([[], [[]], [""], [None]])
        assert answers(nested, "x") == tuple(dict.fromkeys(flat))
        assert answers([nested], "x") == answers(nested, "x")


def test_an_old_answer_is_absent_present_or_empty():
    for nothing in ({}, {"a": None}, {"a": []}, {"a": [[]]}):
        assert old_answer(nothing, "a") == (None, ())
    assert old_answer({"a": ["x", "y"]}, "a") == ("x", ("y",))
    for empty in ("", " ", [""], [["", " "]]):
        with pytest.raises(DataError, match="the old answer is empty"):
            old_answer({"a": empty}, "a")


def test_text_and_texts():
    row = Row(1)
    assert text({"a": " x "}, "a") == "x"
    for bad in ({}, {"a": None}, {"a": ""}, {"a": 3}, {"a": ["x"]}):
        with pytest.raises(DataError) as caught:
            text(bad, "a", at="outer")
        assert caught.value.field == "outer.a"
    assert texts({}, "a", row) == texts({"a": None}, "a", row) == texts({"a": []}, "a", row) == ()
    assert texts({"a": "one"}, "a", row) == ("one",)
    assert row.left_out == []
    assert texts({"a": ["one", "", 3, "two "]}, "a", row) == ("one", "two ")
    assert len(row.left_out) == 2
    with pytest.raises(DataError):
        texts({"a": {"b": "c"}}, "a", row)


ONE = {"prompt": "P", "ground_truth": "A"}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (None, ()),
        ({}, ()),
        ([], ()),
        ({"K": None}, ()),
        ({"K": []}, ()),
        ({"K": [ONE]}, (Probe("P", "A", "K"),)),
        ({"K": ONE}, (Probe("P", "A", "K"),)),
        ({"K": {"prompt": ["P"], "ground_truth": ["A"]}}, (Probe("P", "A", "K"),)),
        ([ONE], (Probe("P", "A", "default"),)),
        (ONE, (Probe("P", "A", "default"),)),
        (
            {"K": [{"prompt": "P", "ground_truth": [["A", "B"], ["C"]]}], "M": [ONE]},
            (Probe("P", "A", "K", ("B", "C")), Probe("P", "A", "M")),
        ),
    ],
)
def test_shapes_of_probe_lists(value, found):
    row = Row(1)
    record = {} if value is None else {"locality": value}
    for needs_answer in (True, False):
        made = probes(record, "locality", row, needs_answer=needs_answer, kind="default")
        assert made == found
    assert row.left_out == []


@pytest.mark.parametrize(
    "broken",
    [
        {"prompt": "", "ground_truth": "A"},
        {"ground_truth": "A"},
        {"prompt": 3, "ground_truth": "A"},
        {"prompt": "half \ud800", "ground_truth": "A"},
        {"prompt": "P", "ground_truth": 7},
        "just text",
    ],
)
def test_a_broken_probe_is_left_out_and_noted_and_the_others_stay(broken):
    for needs_answer in (True, False):
        row = Row(1)
        record = {"locality": {"K": [broken, ONE]}}
        assert probes(record, "locality", row, needs_answer=needs_answer) == (Probe("P", "A", "K"),)
        assert len(row.left_out) == 1 and "left out" in row.left_out[0]


@pytest.mark.parametrize("nothing", ["", [], [[]], None, [""]])
def test_a_probe_without_an_answer_serves_locality_only(nothing):
    record = {"p": {"K": [{"prompt": "P", "ground_truth": nothing}]}}
    row = Row(1)
    assert probes(record, "p", row, needs_answer=False) == (Probe("P", None, "K"),)
    assert "kept" in row.left_out[0]
    row = Row(1)
    assert probes(record, "p", row, needs_answer=True) == ()
    assert "left out" in row.left_out[0]


@pytest.mark.parametrize(
    "value",
    ["text", 5, {"K": 5}, {"K": {"prompt": ["a", "b"], "ground_truth": ["x"]}}, {"K": "text"}],
)
def test_probe_lists_that_are_none_are_row_errors(value):
    with pytest.raises(DataError):
        probes({"locality": value}, "locality", Row(1), needs_answer=False)
