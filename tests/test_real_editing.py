"""LGA and ROME on real weights, end to end: what the tiny random models cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from goldenlayers import models
from goldenlayers.checking import check
from goldenlayers.datasets import load_facts
from goldenlayers.decoding import forced_predictions
from goldenlayers.delta import LowRank, WeightDelta
from goldenlayers.editors import Rome, edit_each
from goldenlayers.facts import Fact
from goldenlayers.locating import locate
from goldenlayers.locating.known import known_facts
from goldenlayers.models import Model
from goldenlayers.statistics import key_statistics

pytestmark = pytest.mark.real
LAYER = 3


@pytest.fixture(scope="module")
def model() -> Model:
    return models.load("smollm2-135m")


@pytest.fixture(scope="module")
def facts(model: Model) -> list[Fact]:
    return known_facts(model, load_facts("starter", limit=24))[:4]


def took(model: Model, fact: Fact) -> bool:
    encoding = model.encoder.fact(fact, fact.target)
    return tuple(forced_predictions(model, [encoding])[0]) == encoding.answer_ids


def test_lga_ranks_real_layers_alike_on_two_draws_of_facts(model: Model) -> None:
    drawn = list(load_facts("starter", limit=48))
    halves = [locate(model, part, bootstrap=0) for part in (drawn[::2], drawn[1::2])]
    first, second = ([row.score for row in half.layers] for half in halves)
    # The shape over layers is the model's, not the facts': outliers stand out in both halves.
    assert halves[0].layers[11].kept is False and halves[1].layers[11].kept is False
    assert torch.corrcoef(torch.tensor([first, second]).log().double())[0, 1] > 0.9


def test_rome_installs_facts_and_a_random_change_of_equal_length_does_not(
    model: Model, facts: list[Fact], tmp_path: Path
) -> None:
    assert len(facts) == 4 and not any(took(model, fact) for fact in facts)
    before = {name: p.detach().clone() for name, p in model.hf.named_parameters()}
    statistics = key_statistics(model, [LAYER], tokens=4000, settle=0)
    rome = Rome(prefixes=2, steps=20)
    deltas = edit_each(model, facts, rome, layer=LAYER, statistics=statistics)
    generator = torch.Generator().manual_seed(0)
    for fact, delta in zip(facts, deltas, strict=True):
        with delta.applied(model):
            assert took(model, fact), fact.id
        ((name, change),) = delta.changes.items()
        assert isinstance(change, LowRank)
        noise = LowRank(
            torch.randn(change.left.shape, generator=generator),
            torch.randn(change.right.shape, generator=generator),
        )
        random = WeightDelta({name: noise.scaled(change.norm() / noise.norm())})
        with random.applied(model):
            assert not took(model, fact), fact.id
    for name, parameter in model.hf.named_parameters():
        assert torch.equal(before[name], parameter), name
    deltas[0].save(tmp_path / "edit")
    assert sum(p.stat().st_size for p in (tmp_path / "edit").iterdir()) <= 64 * 1024


def test_the_check_sees_what_rome_does_to_the_neighbours_of_gemma() -> None:
    gemma = models.load("gemma3-270m")
    fact = Fact("Marie Curie", "{} was born in", "London")
    statistics = key_statistics(gemma, [LAYER], tokens=2000, settle=0)
    rome = Rome(prefixes=2, steps=15)
    (delta,) = edit_each(gemma, [fact], rome, layer=LAYER, statistics=statistics)  # a sixth of 18
    found = check(gemma, delta, [fact])
    assert found.verdict == "damaging" and found.share("prompt").ok == 1, found.sentence()
    assert any(one.name.endswith(" Curie") for one in found.worst), found.worst
    assert "--method clear-rome" in found.advice
