"""Mixtures of experts: the layer map, the gradients of experts, edits of one of them."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from families import MIXTURES, shared, tiny
from tokenizers_built import TOKENIZERS
from torch import Tensor

import goldenlayers as gl
from goldenlayers.editors import EDITORS, Editing, make_editor
from goldenlayers.editors.routing import by_expert, experts_of, layer_statistics
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden, observe, override, token_nll
from goldenlayers.locating.lga import pair_products, saliency_rows
from goldenlayers.locating.race import Race
from goldenlayers.models import Model
from goldenlayers.models.layers import Matrix
from goldenlayers.statistics import KeyStatistics, StatisticsSettings
from goldenlayers.sweeping import sweep_together
from goldenlayers.tokens import Encoding, pad_ids

PAIRS = [
    (("The capital of Italy is", "Rome"), ("The capital of Italy is", "Paris and Ulm")),
    (("Toko plays the", "guitar"), ("An opera of", "x")),
]
FACT = Fact("France", "The capital of France is", "Rome", "Paris", id="a")
OTHER = Fact("Italy", "The capital of Italy is", "Ulm", "Rome", id="b")
IDENTITY = KeyStatistics.identity(dict.fromkeys(range(4), 24))  # all MLPs edited here are 24 wide
mixtures = pytest.mark.parametrize("name", MIXTURES)


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return Model.wrap(shared(name, dtype), TOKENIZERS["byte_level_bpe"]())


def watching(model: Model, stack: ExitStack) -> None:
    """Have the experts run through their taps, as they do while LGA reads them."""
    taps = {b.index: b.routed.down for b in model.layers if b.routed is not None}
    stack.enter_context(observe(taps, lambda _key, _x, _y: None))


@mixtures
def test_what_is_watched_computes_the_same(name: str) -> None:
    model = wrapped(name)
    ids = torch.tensor([[5, 60, 200, 7, 31]])
    with torch.no_grad(), ExitStack() as stack:
        plain = model.hf(input_ids=ids).logits
        watching(model, stack)
        seen = model.hf(input_ids=ids).logits
    assert not torch.equal(plain, torch.zeros_like(plain))
    torch.testing.assert_close(seen, plain, rtol=1e-6, atol=1e-6)


def materialised(model: Model, texts: list[Encoding]) -> list[list[list[Tensor]]]:
    """[text][layer][matrix of the MLP]: autograd's own weight gradients of each text's mean NLL."""
    batch = pad_ids([e.ids[:-1] for e in texts], model.device)
    parameters = dict(model.hf.named_parameters())

    def weight(matrix: Matrix) -> Tensor:
        return parameters[matrix.parameter_name]

    wanted = [[weight(m) for m in block.mlp_matrices] for block in model.layers]
    flat = [w for layer in wanted for w in layer]
    found = []
    with ExitStack() as stack:
        watching(model, stack)
        for w in flat:
            w.requires_grad_(True)
            stack.callback(w.requires_grad_, False)
        hidden = final_hidden(model, batch.ids)
        for b, text in enumerate(texts):
            n = len(text) - 1
            loss = token_nll(model.layers, hidden[b, :n], torch.tensor(text.ids[1:])).mean()
            grads = iter(torch.autograd.grad(loss, flat, retain_graph=True))
            found.append([[next(grads) for _ in layer] for layer in wanted])
    return found


@mixtures
def test_lga_equals_materialised_gradients_of_all_experts(name: str) -> None:
    """φ of a layer is summed over its experts, and over the shared one where there is one."""
    model = wrapped(name)
    old = [model.encoder.encode(*a) for a, _ in PAIRS]
    new = [model.encoder.encode(*b) for _, b in PAIRS]
    products = pair_products(model, old, new)
    slow = materialised(model, [e for both in zip(old, new, strict=True) for e in both])
    for b in range(len(PAIRS)):
        for layer in range(len(model.layers)):
            go, gn = slow[2 * b][layer], slow[2 * b + 1][layer]
            inner = float(sum((x * y).sum() for x, y in zip(go, gn, strict=True)))
            squares = [float(sum((x * x).sum() for x in g)) for g in (go, gn)]
            near = 1e-10 * (squares[0] * squares[1]) ** 0.5
            assert near > 0
            assert abs(float(products.inner[b, layer]) - inner) <= near
            assert float(products.old_squared[b, layer]) == pytest.approx(squares[0], rel=1e-10)
            assert float(products.new_squared[b, layer]) == pytest.approx(squares[1], rel=1e-10)
            if model.layers[layer].n_experts:  # the control: experts are not mixed up
                merged = (
                    [g.sum(0) if g.dim() == 3 else g for g in go],
                    [g.sum(0) if g.dim() == 3 else g for g in gn],
                )
                other = float(sum((x * y).sum() for x, y in zip(*merged, strict=True)))
                assert abs(other - inner) > near


@mixtures
def test_saliency_is_of_each_expert(name: str) -> None:
    model = wrapped(name)
    (row,) = [r for part in saliency_rows(model, [FACT]) for r in part]
    (slow,) = materialised(model, [model.encoder.fact(FACT, FACT.target)])
    for layer, grads in enumerate(slow):
        mean = sum(float(g.abs().sum()) for g in grads) / sum(g.numel() for g in grads)
        assert row["phi"][layer] == pytest.approx(mean, rel=1e-9)


# --- which expert ------------------------------------------------------------------------------


def test_the_map_tells_experts_and_what_an_edit_changes() -> None:
    told = wrapped("qwen2_moe").layers.describe()
    assert "4 experts, 2 for each token" in told
    assert "an edit changes the shared expert" in told
    told = wrapped("mixtral").layers.describe()
    assert "(4 experts, out, in)" in told
    assert "an edit changes the expert that weighs most at the subject's last token" in told
    mixed = wrapped("deepseek_v3").layers
    assert [block.n_experts for block in mixed] == [0, 4, 4, 4]
    assert [block.edited_name for block in mixed.blocks[:2]] == [
        "model.layers.0.mlp.down_proj.weight",
        "model.layers.1.mlp.shared_experts.down_proj.weight",
    ]
    assert wrapped("olmoe").layers[1].edited_name == "model.layers.1.mlp.experts.*.down_proj.weight"


def test_the_expert_of_a_fact_weighs_most_at_the_subjects_last_token() -> None:
    model = tiny("olmoe")
    facts = [FACT, Fact("Rome", "Rome, a town in", "Chile", "Italy", id="c"), OTHER]
    router: Any = model.hf.get_submodule("model.layers.1.mlp.gate")
    for fact, chosen in zip(facts, experts_of(model, 1, facts), strict=True):
        text = model.encoder.fact(fact, "")
        with torch.no_grad(), capture({0: router}) as logits:
            model.hf(input_ids=torch.tensor([text.ids]))
        assert chosen == int(logits[0][text.lookup].argmax())


def test_what_asks_for_one_matrix_says_why_there_is_none() -> None:
    model = wrapped("olmoe")
    with pytest.raises(UserError, match="layer 0 has 4 experts and none that every token passes"):
        gl.key_statistics(model, [0], cache=False)
    with pytest.raises(UserError, match="4 experts and none"):
        gl.locate(model, [FACT, OTHER], "transfer")


def test_layers_with_experts_alone_are_raced_and_swept_together() -> None:
    model = tiny("mixtral")
    facts = [replace(one, rephrasings=("Hear of Rome, a",)) for one in (FACT, OTHER)]
    statistics = pickle.loads(pickle.dumps(layer_statistics(model)))  # as workers get it
    raced = gl.locate(model, facts, Race(edits=4, editor="rome"), statistics=statistics)
    assert not any("failed" in text for text in raced.warnings)
    assert raced.evidence is not None and raced.evidence.edits == 4
    assert [row.layer for row in raced.layers if row.kept] == [1, 3]
    few = make_editor("rome", steps=2, prefixes=1)
    found = sweep_together(model, facts, {"a": few, "b": few})
    for one in found.values():
        assert not isinstance(one, Exception)
        assert {row["layer"] for row in one.rows} == {0, 1, 2, 3}
        assert all(row["score"] is not None for row in one.rows if row["metric"] == "rewrite")


# --- edits -------------------------------------------------------------------------------------


def nll(model: Model, fact: Fact) -> float:
    text = model.encoder.fact(fact, fact.target)
    ids = torch.tensor([text.ids])
    with torch.no_grad():
        hidden = final_hidden(model, ids)[0, text.n_prompt - 1 : -1]
    return float(token_nll(model.layers, hidden, torch.tensor(text.answer_ids)).mean())


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("mixtral", name) for name in EDITORS if name != "alphaedit"),
        *itertools.product(("qwen2_moe", "gpt_oss"), ("rome", "memit", "ft-l")),
    ],
)
def test_an_edit_brings_the_answer_nearer_and_touches_one_expert(name: str, method: str) -> None:
    model = tiny(name)
    more: dict[str, Any] = {} if method.startswith("ft") else {"prefixes": 0, "steps": 8}
    if method == "clear-rome":
        more |= {"neighbours": 4}
    weights = {n: p.clone() for n, p in model.hf.named_parameters()}

    def moved() -> dict[str, list[int]]:
        """The weights that are not what they were; of stacked ones, which experts'."""
        return {
            n: [e for e in range(len(p)) if p.dim() == 3 and not torch.equal(p[e], weights[n][e])]
            for n, p in model.hf.named_parameters()
            if not torch.equal(p, weights[n])
        }

    delta = gl.edit(model, FACT, method, layer=1, statistics=IDENTITY, **more)
    (changed,) = delta.changes
    *stack, expert, matrix, _weight = changed.split(".")
    one = {".".join([*stack, matrix]): [int(expert)]} if expert.isdigit() else {changed: []}
    before = nll(model, FACT)
    with delta.applied(model):
        assert nll(model, FACT) < before - 0.1
        assert moved() == one
    assert moved() == {}
    assert nll(model, FACT) == before


def test_rome_writes_what_the_value_search_found_into_the_expert() -> None:
    """At the lookup token the expert gives v0 + δ, and with that alone the answer is as found."""
    model = tiny("olmoe")
    work = Editing(model, make_editor("rome", prefixes=0, kl_factor=0.0), 1, statistics=IDENTITY)
    ((inner, _),) = by_expert(work, [FACT])
    (value,) = inner.values([FACT])
    (delta,) = work.each([FACT])
    down, text = inner.model.layers[1].down, model.encoder.fact(FACT, FACT.target)
    ids, at = torch.tensor([text.ids]), text.lookup
    with torch.no_grad(), delta.applied(model), capture({0: down.module}) as gave:
        model.hf(input_ids=ids)
    assert at is not None
    torch.testing.assert_close(gave[0][at], value.target.float(), rtol=1e-3, atol=1e-4)
    assert (value.target - value.values[0]).norm() > 0.1

    def moved(y: Tensor) -> Tensor:
        return y.index_put((torch.tensor([at]),), value.target.to(y.dtype))

    assert value.nll_after < value.nll_before - 0.1
    with override(down.module, moved):
        assert nll(model, FACT) == pytest.approx(value.nll_after, rel=1e-4)


def test_statistics_of_an_expert_are_over_the_tokens_routed_to_it() -> None:
    model = tiny("mixtral")
    one = model.through(1, 2)
    found = gl.key_statistics(one, [1], cache=False, tokens=300, length=32, settle=0.0)
    source = StatisticsSettings(tokens=300, length=32).source(model)
    taps = model.layers[1].routed
    assert taps is not None
    total, tokens, routed = torch.zeros(24, 24, dtype=torch.float64), 0, 0
    for ids in source.batches(0, math.ceil(300 / source.tokens_per_row)):  # type: ignore[attr-defined]
        with torch.no_grad(), capture({0: taps.down}, inputs=True) as given:
            model.hf(input_ids=ids)
        keys = given[0].reshape(*ids.shape, 2, -1)[:, source.skip :]
        mine = taps.index.reshape(*ids.shape, 2)[:, source.skip :] == 2
        some = keys[mine].double()
        total, routed = total + some.T @ some, routed + len(some)
        tokens += mine[..., 0].numel()
    assert 0 < routed < tokens
    torch.testing.assert_close(
        found[1].matrix(with_ridge=False), total / tokens, rtol=1e-4, atol=1e-6
    )


def test_editors_refuse_what_experts_do_not_allow_before_any_work() -> None:
    model = wrapped("mixtral")
    with pytest.raises(UserError, match="alphaedit remembers the keys of earlier batches"):
        gl.edit(model, FACT, "alphaedit", layer=1)
    with pytest.raises(UserError, match="memit would spread the edit over layers 0 to 2"):
        gl.edit(wrapped("qwen2_moe"), FACT, "memit", layer=2, layers_before=2)


def test_facts_of_different_experts_in_one_delta_that_is_saved_and_applied(tmp_path: Path) -> None:
    model = tiny("olmoe")
    facts = [FACT, OTHER]
    assert len(set(experts_of(model, 1, facts))) == 2
    delta = gl.edit(model, facts, "memit", layer=1, statistics=IDENTITY, prefixes=0, steps=8)
    assert len(delta.changes) == 2
    delta.save(tmp_path / "edit")
    again = gl.WeightDelta.load(tmp_path / "edit")
    with delta.applied(model):
        wanted = [nll(model, fact) for fact in facts]
    with again.applied(model.hf):
        assert [nll(model, fact) for fact in facts] == wanted
    scores = gl.evaluate(model, facts, again, mode="batch")
    assert scores["rewrite"].mean is not None
    plain = copy.deepcopy(model.hf)
    again.merge(plain)
    merged = Model.wrap(plain, model.tokenizer)
    assert [nll(merged, fact) for fact in facts] == pytest.approx(wanted, rel=1e-5)


def test_an_experts_change_is_exported_merged_and_in_no_adapter(tmp_path: Path) -> None:
    model = tiny("olmoe")
    delta = gl.edit(model, FACT, "ft-m", layer=1, steps=3)
    with pytest.raises(UserError, match=r"matrix of one expert.*--to merged"):
        gl.export_peft(delta, tmp_path / "adapter", model=model)
    gl.export_merged(model, delta, tmp_path / "merged")
    again = gl.load(tmp_path / "merged")
    with delta.applied(model):
        assert nll(again, FACT) == pytest.approx(nll(model, FACT), rel=1e-5)
    assert nll(model, FACT) > nll(again, FACT) + 0.05
