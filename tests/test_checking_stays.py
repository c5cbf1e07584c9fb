"""Which answers count as kept: also those that gave way to one that the model wavered between."""

from __future__ import annotations

from families import tiny
from test_checking import ITALY, left_of, moved, slowly

from goldenlayers.checking import check
from goldenlayers.checking.answers import STILL, Said, stays
from goldenlayers.checking.probes import Asked


def test_an_answer_that_is_still_half_as_likely_is_kept() -> None:
    model = tiny("gpt2")
    ends = {True: 0, False: 0}
    for size in (1, 30):
        delta = moved(model, [ITALY], size)
        found = [one for one in check(model, delta, [ITALY]).probes if one.left is not None]
        for one in found:
            assert one.before != one.after and one.ok == ((one.left or 0) >= STILL)
            ends[one.ok] += 1
        said = slowly(model, found[0].prompt, "Paris")[0]
        left_of(found[0], model, delta, said)  # holds it to what whole passes say
    assert min(ends.values()) > 2, ends


def test_the_new_answer_in_its_place_is_damage_however_likely_the_old_one_still_is() -> None:
    model = tiny("gpt2")
    old, new = Said((1,), "a", 0.1, False), Said((2,), "Paris", 0.5, True)
    asked = Asked(0, "neighbours", "The capital of Spain is")
    assert not stays(model, asked, old, new, left=0.9)
    assert stays(model, asked, old, new._replace(is_new=False), left=0.9)
    assert not stays(model, asked, old, new._replace(is_new=False), left=0.4)
    assert stays(model, asked, old, old, left=None)
