"""Key transfer: against the formula by whole-model passes, one text and layer at a time."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny
from torch import Tensor, nn

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.locating import Transfer, Work, locate
from goldenlayers.locating.reach import Reach, Weights, _unit
from goldenlayers.locating.transfer import transfer_rows
from goldenlayers.models import Model
from goldenlayers.statistics.moments import Covariance

FACTS = [
    Fact(
        id="a",
        subject="Danielle Darrieux",
        prompt="The mother tongue of Danielle Darrieux is",
        target="English",
        rephrasings=("Danielle Darrieux speaks", "No. Danielle Darrieux was born in"),
        locality=(Probe("Montesquieu was a native speaker of"), Probe("The sea is")),
    ),
    Fact(
        id="b",
        subject="Toko Yasuda",
        prompt="Toko Yasuda plays the",
        target="piano forte",
        rephrasings=("She plays", "One hears Toko Yasuda on the"),
        locality=(Probe("The sea is"), Probe("Where Toko Yasuda lives there is")),
    ),
    Fact(
        id="c",
        subject="Autonomous University of Madrid",
        prompt="Autonomous University of Madrid, which is in",
        target="Sweden",
        rephrasings=("Where is Autonomous University of Madrid? In",),
        locality=(Probe("Oslo lies in"),),
    ),
]
BARE = [dataclasses.replace(f, rephrasings=(), locality=()) for f in FACTS]
PREFIXES = ("", "It rains today. ", "We went home. ")


def covariances(model: Model, scale: float = 1.0, seed: int = 0) -> dict[int, Covariance]:
    """A different, far from round covariance for every layer."""
    found = {}
    for block in model.layers.blocks:
        n = block.down.in_features
        generator = torch.Generator().manual_seed(seed + block.index)
        A = torch.randn(n, 2 * n, generator=generator, dtype=torch.float64)
        A *= torch.linspace(0.1, 3, n, dtype=torch.float64)[:, None]
        found[block.index] = Covariance.from_matrix(scale * (A @ A.T) / (2 * n))
    return found


def slow_keys(model: Model, text: str) -> list[Tensor]:
    """The down projection's input (T, F) of every layer, by plain hooks on one unpadded text."""
    seen: dict[int, Tensor] = {}

    def keep(layer: int) -> Any:
        def hook(_module: Any, args: Any) -> None:
            seen[layer] = args[0].detach().clone()

        return hook

    handles = [b.down.module.register_forward_pre_hook(keep(b.index)) for b in model.layers.blocks]
    ids = torch.tensor([model.encoder.encode(text).ids])
    with torch.no_grad():
        model.hf(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [x.reshape(ids.shape[1], -1).double() for _, x in sorted(seen.items())]


def slow_rho(k_other: Tensor, k: Tensor, covariance: Covariance) -> float:
    inverse = torch.linalg.inv(covariance.matrix())
    return float(k_other @ inverse @ k) / float(k @ inverse @ k)


def slow_scores(
    model: Model, fact: Fact, rephrasings: list[str], locality: list[str], C: dict[int, Covariance]
) -> tuple[list[float], list[float]]:
    own = slow_keys(model, fact.prompt)
    at = model.encoder.fact(fact).lookup
    transfer, interference = [], []
    for layer in range(len(model.layers)):
        k = own[layer][at]
        carried = []
        for text in rephrasings:
            lookup = model.encoder.encode(text, "", fact.subject).lookup
            carried.append(slow_rho(slow_keys(model, text)[layer][lookup], k, C[layer]))
        spilt = [
            max(abs(slow_rho(key, k, C[layer])) for key in slow_keys(model, text)[layer][1:])
            for text in locality
        ]
        transfer.append(float(np.mean(carried)))
        interference.append(float(np.mean(spilt)))
    return transfer, interference


def rows_of(
    model: Model, facts: list[Fact], C: dict[int, Covariance], seed: int = 0, **options: Any
) -> dict[str, dict]:
    work = Work(model, facts, seed, C)
    rows = [row for part in transfer_rows(work, Transfer(**options)) for row in part]
    assert sorted(row["fact"] for row in rows) == sorted(fact.id for fact in facts)
    return {row["fact"]: row for row in rows}


def test_the_formula_on_every_family(family: str) -> None:
    model = tiny(family, dtype=torch.float64)
    C = covariances(model)
    fact = FACTS[1]
    row = rows_of(model, FACTS[:2], C, batch_size=3)["b"]
    probes = [p.prompt for p in fact.locality]
    transfer, interference = slow_scores(model, fact, ["One hears Toko Yasuda on the"], probes, C)
    # Even in float64 some families compute norms and positions in float32.
    np.testing.assert_allclose(row["transfer"], transfer, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(row["interference"], interference, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(row["phi"], np.subtract(transfer, interference), atol=2e-5)
    assert (row["rephrasings"], row["without_subject"], row["locality"]) == (1, 1, 2)
    assert row["reach"] is None is row["alignment"] and not row["prefixed"] and not row["borrowed"]
    # The control: layers differ, so that a mixed-up layer would show.
    assert len({round(v, 3) for v in row["transfer"]}) == len(model.layers)


def test_batches_order_and_precision_do_not_matter() -> None:
    model = tiny("gemma3", tokenizer="sentencepiece_bpe")
    C = covariances(model)
    one = rows_of(model, FACTS, C, batch_size=1)
    for facts, size in ((FACTS, 2), (FACTS[::-1], 50)):
        many = rows_of(model, facts, C, batch_size=size)
        for fact in FACTS:
            np.testing.assert_allclose(many[fact.id]["phi"], one[fact.id]["phi"], atol=2e-4)
    half = tiny("gemma3", tokenizer="sentencepiece_bpe", dtype=torch.bfloat16)
    rough = rows_of(half, FACTS, C)
    assert all(np.isfinite(row["phi"]).all() for row in rough.values())
    np.testing.assert_allclose(rough["a"]["transfer"], one["a"]["transfer"], atol=0.2)


def test_identical_text_carries_wholly_and_the_scale_of_c_is_nothing() -> None:
    model = tiny("llama", dtype=torch.float64)
    same = dataclasses.replace(FACTS[0], rephrasings=(FACTS[0].prompt,))
    other = FACTS[0]
    row = rows_of(model, [same], covariances(model))["a"]
    np.testing.assert_allclose(row["transfer"], 1.0, rtol=1e-4)
    plain = rows_of(model, [other], covariances(model))["a"]
    assert (np.abs(np.array(plain["transfer"]) - 1) > 0.1).all()  # the control
    scaled = rows_of(model, [other], covariances(model, scale=1e4))["a"]
    np.testing.assert_allclose(scaled["phi"], plain["phi"], rtol=1e-4)
    another = rows_of(model, [other], covariances(model, seed=9))["a"]
    assert not np.allclose(another["phi"], plain["phi"], rtol=1e-2)
    # A locality probe that is the prompt itself spills wholly.
    spilling = dataclasses.replace(other, locality=(Probe(other.prompt),))
    row = rows_of(model, [spilling], covariances(model))["a"]
    assert all(v >= 1 - 1e-4 for v in row["interference"])


def test_prefixes_and_other_prompts_stand_in_for_probes() -> None:
    model = tiny("gpt_neox", dtype=torch.float64)
    C = covariances(model)
    rows = rows_of(model, BARE, C, prefixes=PREFIXES, batch_size=2)
    fact = BARE[2]
    behind = [prefix + fact.prompt for prefix in PREFIXES[1:]]
    transfer, interference = slow_scores(model, fact, behind, [f.prompt for f in BARE[:2]], C)
    np.testing.assert_allclose(rows["c"]["transfer"], transfer, rtol=1e-4)
    np.testing.assert_allclose(rows["c"]["interference"], interference, rtol=1e-4)
    assert rows["c"]["prefixed"] and rows["c"]["borrowed"]
    assert (rows["c"]["rephrasings"], rows["c"]["locality"]) == (2, 2)
    # Rephrasings without the subject are no rephrasings: the prefixes stand in.
    without = dataclasses.replace(BARE[2], rephrasings=("It is in", "One finds it in"))
    row = rows_of(model, [*BARE[:2], without], C, prefixes=PREFIXES)["c"]
    assert (row["without_subject"], row["prefixed"]) == (2, True)
    np.testing.assert_allclose(row["phi"], rows["c"]["phi"], rtol=1e-4)


def test_the_draw_of_probes_hangs_on_seed_and_fact_only() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    C = covariances(model)
    many = tuple(Probe(f"Number {i} is") for i in range(20))
    facts = [dataclasses.replace(f, locality=many) for f in FACTS]

    def spill(facts: list[Fact], **options: Any) -> list[float]:
        return rows_of(model, facts, C, max_probes=2, **options)["a"]["interference"]

    first = spill(facts)
    np.testing.assert_allclose(spill(facts[:1], batch_size=1), first, rtol=1e-4)
    assert not np.allclose(spill(facts, seed=1), first)
    # Borrowed ones do not hang on the order of the facts either.
    borrowed = [dataclasses.replace(f, locality=()) for f in FACTS]
    borrowed += [Fact(f"Person {i}", f"Person {i} is in", "Rome", id=str(i)) for i in range(6)]
    a, b = spill(borrowed), spill(borrowed[::-1])
    np.testing.assert_allclose(a, b, rtol=1e-4)
    assert not np.allclose(spill(borrowed, seed=2), a)


def slow_slopes(
    model: Model, text: str, answer: str, subject: str
) -> tuple[list[Tensor], list[float], float]:
    """∂ℓ/∂v and ‖v‖ at the lookup token of every layer, and the answer's loss ℓ, by plain hooks."""
    encoding = model.encoder.encode(text, answer, subject)
    ids = torch.tensor([encoding.ids])
    outputs: dict[int, Tensor] = {}
    sizes: dict[int, float] = {}

    def hook(layer: int) -> Any:
        def change(_module: Any, _args: Any, y: Tensor) -> Tensor:
            flat = y.detach().reshape(-1, y.shape[-1])
            sizes[layer] = float(flat[encoding.lookup].norm())
            added = torch.zeros_like(flat[0], requires_grad=True)
            outputs[layer] = added
            mask = torch.zeros(len(flat), 1, dtype=y.dtype)
            mask[encoding.lookup] = 1
            return y + (mask * added).reshape(y.shape)

        return change

    handles = [b.down.module.register_forward_hook(hook(b.index)) for b in model.layers.blocks]
    logits = model.hf(input_ids=ids, use_cache=False).logits[0]
    first = encoding.n_prompt
    loss = nn.functional.cross_entropy(logits[first - 1 : -1], ids[0, first:])
    layers = sorted(outputs)
    gradients = torch.autograd.grad(loss, [outputs[i] for i in layers])
    for handle in handles:
        handle.remove()
    return list(gradients), [sizes[i] for i in layers], float(loss.detach())


def slow_reach(model: Model, fact: Fact, clamp: float) -> tuple[list[float], float]:
    gradients, sizes, loss = slow_slopes(model, fact.prompt, fact.target, fact.subject)
    return [clamp * float(g.norm()) * v for g, v in zip(gradients, sizes, strict=True)], loss


def slow_cosines(model: Model, fact: Fact, text: str) -> list[float]:
    """cos of the prompt's and the rephrasing's slopes by layer; 0 where one of them vanishes."""
    own, _, _ = slow_slopes(model, fact.prompt, fact.target, fact.subject)
    other, _, _ = slow_slopes(model, text, fact.target, fact.subject)
    return [
        float(nn.functional.cosine_similarity(a, b, dim=0)) for a, b in zip(own, other, strict=True)
    ]


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "opt", "falcon", "bloom", "gptj", "gpt2"])
def test_alignment_is_the_cosine_of_what_prompt_and_rephrasing_want(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    C = covariances(model)
    plain = rows_of(model, FACTS, C)
    clamp = 0.05
    rows = rows_of(model, FACTS, C, align=True, clamp=clamp, batch_size=2)
    for fact in FACTS:
        row = rows[fact.id]
        texts = [text for text in fact.rephrasings if fact.subject in text]
        cosines = np.array([slow_cosines(model, fact, text) for text in texts])  # (P, L)
        np.testing.assert_allclose(row["alignment"], cosines.mean(0), rtol=1e-4, atol=1e-5)
        carried = [
            slow_scores(model, fact, [text], [p.prompt for p in fact.locality], C)[0]
            for text in texts
        ]
        transfer = (np.array(carried) * cosines).mean(0)
        np.testing.assert_allclose(row["transfer"], transfer, rtol=1e-4, atol=1e-5)
        assert row["interference"] == pytest.approx(plain[fact.id]["interference"])
        reach, loss = slow_reach(model, fact, clamp)
        share = np.minimum(1.0, np.array(reach) / loss)
        spilt = np.minimum(1.0, share * np.array(row["interference"]))
        expected = share * (1 + transfer) - spilt
        np.testing.assert_allclose(row["phi"], expected, rtol=1e-4, atol=1e-5)
        assert row["rephrasings"] == len(texts) == plain[fact.id]["rephrasings"]
    assert any(len({round(v, 3) for v in row["alignment"]}) > 1 for row in rows.values())
    # In the last block a subject in mid-prompt does nothing.
    assert rows["c"]["alignment"][-1] == 0 == rows["c"]["phi"][-1]
    assert not any(m._forward_hooks for m in model.hf.modules())


def test_slopes_are_unit_vectors_however_small_and_gaps_stay_gaps() -> None:
    g = torch.tensor([[3.0, 4.0], [3e-30, 4e-30], [0.0, 0.0], [float("nan"), 1.0]])
    unit = _unit(g)
    torch.testing.assert_close(unit[:2], torch.tensor([[0.6, 0.8], [0.6, 0.8]]))
    assert (unit[2] == 0).all() and unit[3].isnan().all()


def test_what_spills_costs_no_more_than_all_of_locality() -> None:
    reach = Reach(torch.tensor([[2.0, 0.2]], dtype=torch.float64), torch.ones(1).double(), None)
    weights = Weights(reach, [torch.ones(1, 2, dtype=torch.float64)], [1])
    transfer, interference = torch.tensor([0.5, 0.5]).double(), torch.tensor([3.0, 3.0]).double()
    # The layer at which the answer is out of reach is not the better one for that.
    torch.testing.assert_close(
        weights.phi(0, transfer, interference), torch.tensor([0.5, -0.3]).double()
    )


def test_alignment_with_itself_is_whole_and_stand_ins_are_aligned_too() -> None:
    model = tiny("llama", dtype=torch.float64)
    C = covariances(model)
    same = dataclasses.replace(FACTS[0], rephrasings=(FACTS[0].prompt,))
    row = rows_of(model, [same], C, align=True)["a"]
    np.testing.assert_allclose(row["alignment"][:-1], 1.0, atol=1e-5)
    rows = rows_of(model, BARE, C, align=True, prefixes=PREFIXES)
    for fact in BARE:
        cosines = [slow_cosines(model, fact, prefix + fact.prompt) for prefix in PREFIXES[1:]]
        expected = np.mean(cosines, axis=0)
        np.testing.assert_allclose(rows[fact.id]["alignment"], expected, rtol=1e-4, atol=1e-5)
    # Batches and the order of the facts do not matter.
    alone = rows_of(model, BARE[::-1], C, align=True, prefixes=PREFIXES, batch_size=1)
    for name, row in rows.items():
        np.testing.assert_allclose(alone[name]["phi"], row["phi"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["gemma3", "olmo2", "opt", "falcon", "bloom", "gptj", "gpt2"])
def test_reach_is_the_first_order_change_within_the_clamp(name: str) -> None:
    model = tiny(name, dtype=torch.float64)
    C = covariances(model)
    plain = rows_of(model, FACTS, C)["b"]
    for clamp in (4.0, 0.01):
        row = rows_of(model, FACTS, C, reach=True, clamp=clamp, batch_size=2)["b"]
        reach, loss = slow_reach(model, FACTS[1], clamp)
        np.testing.assert_allclose(row["reach"], reach, rtol=1e-4)  # norms are taken in float32
        assert row["loss"] == pytest.approx(loss, rel=1e-4)
        share = np.minimum(1.0, np.array(reach) / loss)
        expected = np.array(plain["transfer"]) * share - plain["interference"]
        np.testing.assert_allclose(row["phi"], expected, rtol=1e-4, atol=1e-8)
        assert row["transfer"] == pytest.approx(plain["transfer"], rel=1e-4)
    assert (share < 1).all()  # the smaller clamp binds
    assert not any(m._forward_hooks for m in model.hf.modules())


def test_the_rows_rank_layers_and_one_layer_is_enough() -> None:
    model = tiny("llama")
    ranking = locate(model, FACTS, "transfer", statistics=covariances(model))
    assert ranking.n_facts == 3 and (ranking.fence, ranking.reduce) == ("none", "mean")
    # Cutting the model after its first block leaves that block's keys, and so its score.
    blocks = model.layers.blocks
    cut = dataclasses.replace(model.layers, blocks=blocks[:1])
    single = dataclasses.replace(model, layers=cut)
    rows = rows_of(single, FACTS, {0: covariances(model)[0]})
    mean = np.mean([row["phi"] for row in rows.values()])
    assert mean == pytest.approx(ranking.layers[0].score, rel=1e-4)


def test_a_fact_without_anything_to_measure_by_is_not_scored() -> None:
    model = tiny("llama")
    model.encoder.max_length = 20
    long = dataclasses.replace(
        FACTS[2], prompt="Autonomous University of Madrid", rephrasings=("x " * 30,)
    )
    short = Fact(
        "Rome",
        "Rome is",
        "big",
        id="s",
        rephrasings=("So Rome is",),
        locality=(Probe("Oslo lies in"),),
    )
    rows = rows_of(
        model,
        [dataclasses.replace(long, subject="Madrid", prompt="Madrid"), short],
        covariances(model),
        prefixes=(),
    )
    assert rows["c"]["too_long"] == 1 and all(math.isnan(v) for v in rows["c"]["transfer"])
    assert all(math.isnan(v) for v in rows["c"]["phi"])
    assert np.isfinite(rows["c"]["interference"]).all()


def test_what_the_user_can_get_wrong() -> None:
    model = tiny("llama")
    C = covariances(model)

    def run(facts: list[Fact] = FACTS, C: dict[int, Covariance] = C, **options: Any) -> None:
        list(transfer_rows(Work(model, facts, 0, C), Transfer(**options)))

    with pytest.raises(UserError, match=r"do not hold layers 1, 3\."):
        run(C={i: C[i] for i in (0, 2)})
    with pytest.raises(UserError, match=r"layer 2 .*width 5"):
        run(C=C | {2: Covariance.from_matrix(torch.eye(5))})
    with pytest.raises(UserError, match="no facts"):
        run([])
    with pytest.raises(UserError, match="prefixes"):
        run(BARE, prefixes=())
    with pytest.raises(UserError, match="more than one subject"):
        run(BARE[:1], prefixes=PREFIXES)
    with pytest.raises(UserError, match="batch size is 0"):
        run(batch_size=0)
    with pytest.raises(UserError, match="locality probes is 0"):
        run(max_probes=0)
    with pytest.raises(UserError, match="clamp is 0"):
        run(reach=True, clamp=0)
