"""The ranking against fences worked out by hand and a bootstrap written as a plain loop."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from goldenlayers.errors import UserError
from goldenlayers.locating.base import Scoring
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.ranking import LayerRanking, keep, tukey_fences


def rows_of(phi, **extra):
    return [
        {
            "fact": f"f{i:04d}",
            "phi": list(map(float, row)),
            "cosine": [0.5] * len(row),
            "norm_old": [2.0] * len(row),
            "norm_new": [4.0] * len(row),
            "old": "a",
            "new": "b",
            "old_is_generated": i % 2 == 0,
            **extra,
        }
        for i, row in enumerate(phi)
    ]


def rank(phi, method="lga", **options):
    phi = np.asarray(phi, dtype=np.float64)
    return builder_of(method, phi.shape[1], **options).update(rows_of(phi)).result()


def builder_of(method, n_layers, *, bootstrap=1000, seed=0, top_k=5, **scoring):
    more: Any = {"bootstrap": bootstrap, "seed": seed, "top_k": top_k}
    return RankingBuilder(method, n_layers, Scoring(**scoring), **more)


def slow_choice(scores, fence, kappa):
    """The golden layer with sorted lists and no numpy quantile."""
    ordered = sorted(scores)

    def quartile(q):
        place = q * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    low, high = -float("inf"), float("inf")
    if fence == "tukey":
        q1, q3 = quartile(0.25), quartile(0.75)
        low, high = q1 - kappa * (q3 - q1), q3 + kappa * (q3 - q1)
    best = None
    for layer, score in enumerate(scores):
        if low <= score <= high and (best is None or score > scores[best]):
            best = layer
    return best


def test_fences_by_hand():
    # Sorted 0..8: q1 = 2, q3 = 6, width 4.
    assert tukey_fences(np.arange(9.0)) == (-2.0, 10.0)
    assert tukey_fences(np.arange(9.0), kappa=0.5) == (0.0, 8.0)
    # Four values 1 2 4 100: q1 at place 0.75 = 1.75, q3 at place 2.25 = 28.
    assert tukey_fences(np.array([100.0, 1.0, 4.0, 2.0])) == (1.75 - 26.25, 28 + 26.25)


def test_bounds_are_kept_and_outliers_left_out():
    # 0 1 2 3 4 with q1 = 1, q3 = 3: the fences -1 and 5; the extra scores sit on and past them.
    scores = [0.0, 8.0, 16.0, 24.0, 32.0, 8.0, 24.0, 8.0, 24.0]
    low, high = tukey_fences(np.array(scores))
    assert (low, high) == (-8.0, 40.0)
    ranking = rank([[*scores[:4], 40.0, *scores[5:]]])
    assert tukey_fences(np.array([*scores[:4], 40.0, *scores[5:]])) == (-8.0, 40.0)
    assert ranking.golden_layer == 4 and ranking.layers[4].kept
    ranking = rank([[*scores[:4], 40.001, *scores[5:]]])
    assert not ranking.layers[4].kept and ranking.golden_layer == 3
    # Control: without the fence the same layer wins.
    assert rank([[*scores[:4], 40.001, *scores[5:]]], fence="none").golden_layer == 4


def test_low_outlier_is_excluded_and_signs_stay():
    ranking = rank([[-1000.0, -4.0, -3.0, -2.0, -5.0]])
    assert not ranking.layers[0].kept
    assert ranking.golden_layer == 3 and ranking.layers[3].score == -2.0
    assert ranking.candidates == (3, 2, 1, 4)


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_score_is_sum_or_mean_over_facts(reduce):
    phi = np.random.default_rng(0).normal(size=(17, 6))
    ranking = rank(phi, reduce=reduce)
    expected = [sum(row[i] for row in phi) / (17 if reduce == "mean" else 1) for i in range(6)]
    assert [layer.score for layer in ranking.layers] == pytest.approx(expected, rel=1e-12)
    assert [layer.positive for layer in ranking.layers] == pytest.approx(
        [sum(row[i] > 0 for row in phi) / 17 for i in range(6)]
    )
    assert (ranking.layers[0].cosine, ranking.layers[0].norm_old) == (0.5, 2.0)
    assert ranking.n_generated == 9


@pytest.mark.parametrize("fence", ["tukey", "none"])
@pytest.mark.parametrize(("n", "n_layers"), [(7, 5), (40, 12), (3, 2), (11, 1)])
def test_bootstrap_equals_a_plain_loop(fence, n, n_layers, monkeypatch):
    # Small chunks so that the seams are crossed too.
    monkeypatch.setattr("goldenlayers.locating.building._CHUNK", 7 * n * n_layers)
    phi = np.random.default_rng(n).normal(size=(n, n_layers)) ** 3
    ranking = rank(phi, fence=fence, bootstrap=200, seed=5)
    draws = np.random.default_rng(5).integers(0, n, size=(200, n))
    wins = [0] * n_layers
    for draw in draws:
        scores = [0.0] * n_layers
        for fact in draw:
            for layer in range(n_layers):
                scores[layer] += float(phi[fact, layer])
        wins[slow_choice(scores, fence, 1.0)] += 1
    assert [layer.wins for layer in ranking.layers] == [w / 200 for w in wins]
    assert sum(layer.wins or 0 for layer in ranking.layers) == pytest.approx(1)


def test_properties_on_random_scores():
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, n_layers = int(rng.integers(1, 30)), int(rng.integers(1, 50))
        phi = rng.standard_t(2, size=(n, n_layers)) * 10.0 ** rng.integers(-12, 6)
        ranking = rank(phi, bootstrap=20, seed=seed)
        by_layer = {layer.layer: layer for layer in ranking.layers}
        assert ranking.golden_layer == ranking.candidates[0]
        assert by_layer[ranking.golden_layer].kept
        assert all(
            by_layer[ranking.golden_layer].value >= x.value for x in ranking.layers if x.kept
        )
        # A scale changes nothing (a power of two is exact), nor does the order of the facts.
        scaled = rank(phi * 1024.0, bootstrap=20, seed=seed)
        assert scaled.candidates == ranking.candidates
        assert [x.wins for x in scaled.layers] == [x.wins for x in ranking.layers]
        builder = RankingBuilder("lga", n_layers, bootstrap=20, seed=seed)
        rows = rows_of(phi)
        for i in rng.permutation(n):
            builder.update([rows[i]])
        assert builder.result() == ranking


def test_ties_are_told_and_share_the_resamples():
    phi = np.random.default_rng(1).normal(size=(9, 1)) + 3.0
    tied = np.hstack([phi - 1.0, phi, phi - 2.0, phi])
    ranking = rank(tied, fence="none", bootstrap=50)
    assert ranking.golden_layer == 1 and ranking.candidates == (1, 3, 0, 2)
    assert [layer.wins for layer in ranking.layers] == [0.0, 0.5, 0.0, 0.5]
    assert any("Layers 1 and 3 share the best score" in text for text in ranking.warnings)
    assert not any("share" in text for text in rank(tied[:, :3], fence="none").warnings)


@pytest.mark.parametrize("fence", ["tukey", "none", "last"])
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("value", [0.0, 0.1, -3e-9])
def test_scores_that_are_all_alike_choose_nothing(fence, reduce, value):
    alike = np.full((7, 6), value)
    with pytest.raises(UserError, match=r"no layer stands out: all \d layers .*have the score"):
        rank(alike, fence=fence, reduce=reduce)
    # Rounding is no difference.
    with pytest.raises(UserError, match="no layer stands out"):
        rank(alike * (1 + 1e-15 * np.arange(6)), fence=fence, reduce=reduce)
    # Most layers damaged: their scores are the quartiles, the sound layers are outside the fences.
    alike[:, 2] += 1.0
    if fence == "tukey":
        with pytest.raises(UserError, match="all 5 layers within the fences"):
            rank(alike, fence=fence, reduce=reduce)
    else:
        assert rank(alike, fence=fence, reduce=reduce).golden_layer == 2


def test_facts_that_say_nothing_are_told():
    phi = np.random.default_rng(0).normal(size=(12, 4))
    phi[3:5] = 0.0
    assert any("2 facts of 12 score all layers alike" in text for text in rank(phi).warnings)


def test_facts_left_out_before_are_counted():
    rows = rows_of(np.random.default_rng(0).normal(size=(2, 4)))
    ranking = builder_of("cma", 4, fence="none").update(rows).result(dropped={"unknown": 4})
    assert (ranking.n_facts, ranking.n_given, ranking.dropped) == (2, 6, {"unknown": 4})
    assert ranking.warnings[0] == "Only 2 of the 6 facts could be used. Left out: unknown: 4."
    assert LayerRanking.from_json(ranking.to_json()) == ranking
    rows[1] |= {"phi": [None] * 4, "unscored": "no locality probe"}
    found = builder_of("transfer", 4, fence="none").update(rows).result()
    assert any("1 fact of 2 took no part: no locality probe" in text for text in found.warnings)
    assert not any("finite" in text for text in found.warnings)


def test_degenerate_shapes():
    single = rank([[-3.0], [-4.0]])
    assert single.golden_layer == 0 and single.layers[0].kept and single.layers[0].wins == 1.0
    two = rank([[1.0, 2.0]], kappa=0.0)  # narrower than the two scores' distance: nothing is inside
    assert two.golden_layer == 1 and all(layer.kept for layer in two.layers)
    assert two.layers[0].wins is None  # one fact cannot be resampled


def test_facts_without_finite_scores_are_left_out_and_counted():
    phi = np.ones((5, 3)) * [1.0, 2.0, 1.0]
    phi[1, 2] = np.nan
    phi[3, 0] = np.inf
    ranking = rank(phi)
    assert (ranking.n_facts, ranking.n_unscored) == (3, 2)
    assert [layer.score for layer in ranking.layers] == [3.0, 6.0, 3.0]
    assert any(text.startswith("2 facts of 5 had scores") for text in ranking.warnings)
    rows = rows_of(np.ones((2, 3)) * [1.0, 2.0, 1.0])
    rows[0]["phi"] = [1.0, None, 1.0]  # how JSON keeps a NaN
    assert RankingBuilder("lga", 3).update(rows).result().n_unscored == 1
    with pytest.raises(UserError, match="none of the 2 facts"):
        rank(np.full((2, 3), np.nan))
    with pytest.raises(UserError, match="no fact"):
        RankingBuilder("lga", 3).result()
    with pytest.raises(UserError, match="too large"):
        rank(np.full((3, 2), 1.7e308) * [1.0, 0.9])


def test_diagnostics_that_are_missing_stay_missing():
    rows = [{"fact": i, "phi": [1.0, 2.0]} for i in range(12)]
    ranking = builder_of("saliency", 2, reduce="mean").update(rows).result()
    assert ranking.layers[0].cosine is None and ranking.layers[0].norm_new is None
    rows[0] = {"fact": 0, "phi": [1.0, 2.0], "cosine": [0.25, float("nan")]}
    ranking = RankingBuilder("saliency", 2).update(rows).result()
    assert ranking.layers[0].cosine == 0.25 and ranking.layers[1].cosine is None


def test_warns_only_when_the_choice_is_shaky():
    rng = np.random.default_rng(3)
    firm = rng.normal(size=(150, 8))
    firm[:, 2] += 3.0
    assert rank(firm, fence="none").warnings == ()
    shaky = rank(rng.normal(size=(13, 8)))
    text = " ".join(shaky.warnings)
    assert "not stable with 13 facts: no layer wins half of the 1000 resamples (layer" in text
    assert "about 100 or more" in text and "Only 13 facts" in text
    # The best score by one huge fact that most resamples of the others do not share.
    phi = np.zeros((150, 3))
    phi[:, 1] = 10.0 + rng.normal(size=150)
    phi[0, 0] = phi[:, 1].sum() + 0.01
    lone = rank(phi, fence="none")
    assert lone.golden_layer == 0
    assert any("of the resamples layer 1 wins" in text for text in lone.warnings)
    twice = rows_of(firm) + rows_of(firm[:1])
    assert any(
        "1 row repeat" in w for w in RankingBuilder("lga", 8).update(twice).result().warnings
    )


def test_bad_settings_and_rows_are_the_users_errors():
    bad: tuple[dict[str, Any], ...] = (
        {"fence": "tuky"},
        {"reduce": "median"},
        {"kappa": -1.0},
        {"kappa": float("nan")},
        {"bootstrap": -1},
        {"top_k": 0},
    )
    for options in bad:
        with pytest.raises(UserError):
            builder_of("lga", 3, **options)
    builder = RankingBuilder("lga", 3)
    with pytest.raises(UserError, match=r"fact x: 'phi' is not a list of 3"):
        builder.update([{"fact": "x", "phi": [1.0, 2.0]}])
    with pytest.raises(UserError, match="'cosine'"):
        builder.update([{"fact": "x", "phi": [1.0, 2.0, 3.0], "cosine": ["a", 1, 2]}])
    with pytest.raises(UserError, match="'fact' and 'phi'"):
        builder.update([{"phi": [1.0, 2.0, 3.0]}])
    assert len(builder) == 0


def test_json_round_trip_is_strict_and_holds_the_contract():
    builder = RankingBuilder("lga", 4, bootstrap=10).update(rows_of(np.diag([1.0, 2.0, 3.0, 5.0])))
    ranking = builder.result(seconds=1.5, peak_memory_bytes=7, model="tiny", data="starter")
    text = json.dumps(ranking.to_json(), allow_nan=False)
    assert LayerRanking.from_json(text) == ranking
    assert LayerRanking.from_json(json.loads(text)) == ranking
    plain = json.loads(text)
    assert plain["schema"] == 1 and plain["seconds"] == 1.5 and plain["n_facts"] == 4
    assert {"layer", "score", "kept", "cosine", "wins"} <= set(plain["layers"][0])
    assert LayerRanking.from_json({**plain, "later_field": 1}) == ranking
    one = RankingBuilder("kta", 2).update([{"fact": 1, "phi": [0.0, 1.0]}]).result()
    assert '"wins": null' in json.dumps(one.to_json(), allow_nan=False)
    for broken in (
        "{",
        "[]",
        "{}",
        text[:-20],
        json.dumps({**plain, "schema": 2}),
        json.dumps({**plain, "golden_layer": 9}),
        json.dumps({**plain, "layers": 3}),
    ):
        with pytest.raises(UserError):
            LayerRanking.from_json(broken)


def test_fixed_choice_ranks_neighbours_next():
    ranking = LayerRanking.fixed("middle", 12, 6, top_k=3, model="tiny")
    assert ranking.golden_layer == 6 and ranking.candidates == (6, 5, 7)
    assert LayerRanking.from_json(ranking.to_json()) == ranking
    with pytest.raises(UserError, match="out of range"):
        LayerRanking.fixed("middle", 12, 12)


def test_the_last_block_alone_can_be_left_out() -> None:
    scores = np.array([[1.0, 9.0, 2.0, 30.0], [5.0, 1.0, 1.0, 1.0]])
    assert keep(scores, "last", 1.0).tolist() == [[True, True, True, False]] * 2
    assert keep(scores, "none", 1.0).all()
    assert keep(np.ones((1, 1)), "last", 1.0).all()  # the only block there is
    rows = [{"fact": "a", "phi": scores[0].tolist()}, {"fact": "b", "phi": scores[1].tolist()}]
    chosen = {
        fence: builder_of("lga", 4, fence=fence).update(rows).result().golden_layer
        for fence in ("last", "none")
    }
    assert chosen == {"last": 1, "none": 3}
