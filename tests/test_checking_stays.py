"""Which answers count as kept: also those that gave way to one that the model wavers between."""

from __future__ import annotations

from families import tiny
from test_checking import ITALY, moved, slowly, tie_of

from goldenlayers.checking import check
from goldenlayers.checking.answers import TIE, Said, stays
from goldenlayers.checking.probes import Asked


def test_an_answer_that_the_model_wavers_between_is_kept() -> None:
    model = tiny("gpt2")
    ends = {True: 0, False: 0}
    for size in (1, 30):
        delta = moved(model, [ITALY], size)
        found = [one for one in check(model, delta, [ITALY]).probes if one.tie is not None]
        for one in found:
            assert one.before != one.after and one.ok == ((one.tie or 0) >= TIE)
            ends[one.ok] += 1
        old = slowly(model, found[0].prompt, "Paris")[0]
        with delta.applied(model):
            new = slowly(model, found[0].prompt, "Paris")[0]
        tie_of(found[0], model, delta, old, new)  # holds it to what whole passes say
    assert min(ends.values()) > 2, ends


def test_the_new_answer_in_its_place_is_damage_however_even_the_two_are() -> None:
    model = tiny("gpt2")
    old, new = Said((1,), "a", 0.1, False), Said((2,), "Paris", 0.5, True)
    asked = Asked(0, "neighbours", "The capital of Spain is")
    assert not stays(model, asked, old, new, tie=0.9)
    assert stays(model, asked, old, new._replace(is_new=False), tie=0.9)
    assert not stays(model, asked, old, new._replace(is_new=False), tie=0.4)
    assert stays(model, asked, old, old, tie=None)
