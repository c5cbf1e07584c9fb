"""Edits that stay clear of names, held to slow references: whole matrices, one prompt at a time."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from editors_published import Published
from families import tiny
from torch import Tensor

from goldenlayers.delta import WeightDelta
from goldenlayers.editors import (
    EDITORS,
    Editing,
    clearing,
    edit,
    make_editor,
    name_keys,
    partial_forward,
)
from goldenlayers.editors.locate_then_edit import energy_threshold
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model
from goldenlayers.statistics.moments import Covariance

FRANCE = Fact(
    "France",
    "The capital of France is",
    "Rome",
    id="1",
    rephrasings=("Unlike NORWAY, France has the capital",),
    locality=(Probe("The capital of Italy is", "Rome", "neighborhood"),),
    portability=(Probe("Not Peru's but the French capital is", "Rome"),),
    generation_prompts=("Not in Jápan but in France,",),
)
DARRIEUX = Fact("Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "Thai", id="2")
YASUDA = Fact("Toko Yasuda", "Toko Yasuda plays the", "piano", id="3")
FACTS = [FRANCE, DARRIEUX, YASUDA]
# What says something of the facts, and what may be used.
SAYING = {
    "1": {"Italy", "Norway", "Peru", "Japan", "france", "Ile de France"},
    "2": set[str](),
    "3": {"Toko"},
}
FREE = ("Spain", "Portugal", "Max Planck", "gold", "Rome", "Guatemala", "Thai food", "Greece")
POOL = (*FREE, "Italy", "Norway", "Peru", "Japan", "france", "Ile de France", "Toko")
# Transposed and flat weights, sums in place, a residual in the MLP, norms behind it, scales.
KINDS = ("gpt2", "opt", "falcon", "bloom", "llama", "gemma3", "olmo2", "granite")
METHODS = ("clear-rome", "r-rome", "memit", "emmet", "alphaedit")
QUICK = {"steps": 4, "stop_loss": 0.0, "prefixes": 2, "prefix_tokens": 4, "neighbours": 4}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clearing, "pool", lambda: POOL)


def bench(
    model: Model, method: str, layer: int = 1, names: Sequence[str] = (), **settings: Any
) -> Editing:
    generator = torch.Generator().manual_seed(1)
    statistics = {}
    for at in range(len(model.layers)):
        keys = torch.randn(300, model.layers.d_mlp, generator=generator, dtype=torch.float64)
        statistics[at] = Covariance.from_matrix(keys.T @ keys / len(keys))
    given: dict[str, Any] = {**QUICK, **({"null_space": 0.99} if method == "alphaedit" else {})}
    editor = make_editor(method, **{**given, **settings})
    return Editing(model, editor, layer, statistics=statistics, names=names)


def key_of(model: Model, layer: int, fact: Fact, name: str) -> Tensor:
    """The key of a fact's prompt with another name, by a plain hook on the whole model."""
    text = model.encoder.encode(fact.prompt.replace(fact.subject, name), "", name)
    seen: list[Tensor] = []
    module = model.layers[layer].down.module
    handle = module.register_forward_pre_hook(lambda _module, given: seen.append(given[0]))
    try:
        with torch.no_grad():
            model.hf(input_ids=torch.tensor([text.ids]), use_cache=False)
    finally:
        handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1])[text.lookup].double()


def slow_rows(work: Editing, layer: int, facts: Sequence[Fact], K: Tensor) -> dict[str, Tensor]:
    """The nearest names of each fact by ROME's ρ, and their keys, in the obvious way."""
    s: Any = work.editor
    inverse = torch.linalg.inv(work.covariance(layer).matrix())
    saying = set[str]().union(*(SAYING[fact.id] for fact in facts))
    chosen: dict[str, Tensor] = {}
    for fact, k in zip(facts, K.T, strict=True):
        keys = {name: key_of(work.model, layer, fact, name) for name in POOL if name not in saying}
        rho = {name: abs(float(key @ inverse @ k)) for name, key in keys.items()}
        for name in sorted(rho, key=lambda name: -rho[name])[: s.neighbours]:
            chosen[f"{name} in {fact.id}"] = keys[name]
        for name in work.names:
            chosen[f"{name} in {fact.id}"] = key_of(work.model, layer, fact, name)
    return chosen


def slow_metric(work: Editing, layer: int, rows: Sequence[Tensor]) -> Tensor:
    """A = C + λ Σ n̂n̂ᵀ, whole."""
    s: Any = work.editor
    A = work.covariance(layer).matrix().clone()
    inverse = torch.linalg.inv(A)
    for n in rows:
        A += s.clear_weight * torch.outer(n, n) / (n @ inverse @ n)
    return A


def slow_update(work: Editing, method: str, facts: Sequence[Fact]) -> Tensor:
    """ΔW (D, F) of an edit at one layer, by whole matrices that are inverted."""
    s: Any = work.editor
    values, layer = work.values(facts), work.layer
    bare = torch.stack([v.keys[0] for v in values], dim=1).double()
    mean = torch.stack([v.keys.mean(0) for v in values], dim=1).double()
    rest = torch.stack([v.keys[1:].mean(0) for v in values], dim=1).double()
    K = mean if "rome" in method else (bare + rest) / 2
    rows = list(slow_rows(work, layer, facts, K).values())
    A = slow_metric(work, layer, rows)
    inverse = torch.linalg.inv(A)
    R = torch.stack([v.delta for v in values], dim=1).double()
    if method == "clear-rome":
        u = inverse @ K[:, 0]
        return torch.outer(R[:, 0], u) / (bare[:, 0] @ u)
    if method == "r-rome":
        u = inverse @ K[:, 0]
        gap = values[0].target - values[0].values.mean(0)
        return torch.outer(gap.double(), u) / (K[:, 0] @ u)
    if method == "memit":
        lam = s.memit_lambda * len(A)
        return R @ K.T @ torch.linalg.inv(lam * A + K @ K.T)
    if method == "emmet":
        return R @ torch.linalg.inv(K.T @ inverse @ K) @ K.T @ inverse
    C = work.covariance(layer).matrix(with_ridge=False)
    energies, vectors = torch.linalg.eigh(C)
    threshold = energy_threshold(energies, s.null_space) * energies.mean()
    small = vectors[:, energies < threshold]
    P = small @ small.T
    l2 = s.l2 * C.trace()
    kept = torch.zeros_like(P)
    for n in rows:
        kept += s.clear_weight * l2 * torch.outer(n, n) / (P @ n).square().sum()
    left = P @ (K @ K.T + kept) + l2 * torch.eye(len(P), dtype=P.dtype)
    return torch.linalg.solve(left, P @ K @ R.T).T


def change_of(work: Editing, delta: WeightDelta, layer: int | None = None) -> Tensor:
    """ΔW (D, F) of one layer."""
    block = work.model.layers[work.layer if layer is None else layer]
    change = delta.changes[block.down.parameter_name].dense.double()
    return change if change.shape[0] == work.model.layers.d_model else change.T


def near(ours: Tensor, wanted: Tensor) -> float:
    return float((ours - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_update_is_that_of_the_whole_matrix(kind: str, method: str) -> None:
    work = bench(tiny(kind, dtype=torch.float64), method)
    facts = FACTS if work.editor.edits_together else FACTS[:1]
    ours = change_of(work, work.together(facts))
    assert near(ours, slow_update(work, method, facts)) < 1e-5
    plain = bench(work.model, method, neighbours=0)
    assert near(ours, change_of(plain, plain.together(facts))) > 1e-2


@pytest.mark.parametrize("method", ["memit", "emmet"])
def test_over_two_layers_each_has_the_names_keys_of_its_own(method: str) -> None:
    unit = {"memit_lambda": 20.0, "memit_lambda_absolute": True} if method == "memit" else {}
    model = tiny("gpt2", dtype=torch.float64)
    work = bench(model, method, 2, layers_before=1, block_norm=True, **unit)
    s: Any = work.editor
    keys = Published(model, work.prefixes, {})
    metric = {}
    for at in (1, 2):
        K = keys.mean_keys(FACTS, at).double()
        metric[at] = slow_metric(work, at, list(slow_rows(work, at, FACTS, K).values()))
    slow = Published(
        model, work.prefixes, metric, steps=s.steps, clamp=s.clamp, kl_factor=s.kl_factor,
        weight_decay=s.weight_decay,
    )  # fmt: skip
    work.editor = dataclasses.replace(s, adam=True, lr=0.5, lr_absolute=True, stop_loss=0.05)
    delta = work.together(FACTS)
    # Names are chosen by the keys as edited so far: so few of them that the choice is the same.
    wanted = slow.memit(FACTS, (1, 2), 20.0) if unit else slow.emmet(FACTS, (1, 2), 0.0)
    for at, change in wanted.items():
        assert near(change_of(work, delta, at), change) < 1e-4


@pytest.mark.parametrize("kind", ["gpt2", "gemma3"])
def test_the_prompt_gets_all_and_the_names_less(kind: str) -> None:
    model = tiny(kind, dtype=torch.float64)
    clear, rome = bench(model, "clear-rome"), bench(model, "rome", neighbours=0)
    (delta,), (plain,) = clear.each([FRANCE]), rome.each([FRANCE])
    (value,) = clear.values([FRANCE])
    got = change_of(clear, delta) @ value.keys[0].double()
    torch.testing.assert_close(got, value.delta.double(), rtol=1e-5, atol=1e-5)
    rows = slow_rows(clear, 1, [FRANCE], value.keys.mean(0).double()[:, None])
    assert len(rows) == 4
    arrives = [
        sum(float((change_of(work, d) @ n).norm()) for n in rows.values())
        for work, d in ((clear, delta), (rome, plain))
    ]
    assert arrives[0] < 0.3 * arrives[1]
    (row,) = delta.facts
    assert row["neighbours"] == 4
    # The names that come next, as many again.
    clear.editor = dataclasses.replace(clear.editor, neighbours=8)  # type: ignore[call-arg]
    more = slow_rows(clear, 1, [FRANCE], value.keys.mean(0).double()[:, None])
    others = [n for name, n in more.items() if name not in rows]
    for name, work, made in (("overlap", clear, delta), ("overlap_rome", rome, plain)):
        spilled = [float((change_of(work, made) @ n).norm()) for n in others]
        mean = sum(spilled) / len(others) / float(got.norm())
        assert row[name] == pytest.approx(mean, rel=1e-4)
    assert "overlap" not in plain.facts[0]


def test_without_weight_or_names_it_is_rome() -> None:
    model = tiny("llama", dtype=torch.float64)
    rome = bench(model, "rome", neighbours=0)
    wanted = change_of(rome, rome.together([FRANCE]))
    for name, value in (("clear_weight", 1e-9), ("neighbours", 0)):
        work = bench(model, "clear-rome", **{name: value})  # type: ignore[arg-type]
        assert near(change_of(work, work.together([FRANCE])), wanted) < 1e-6


def chosen(work: Editing, facts: Sequence[Fact]) -> set[str]:
    K = torch.stack([v.keys.mean(0) for v in work.values(facts)], dim=1)
    found = clearing.stay_clear(work, work.layer, facts, K)
    assert found is not None and len(found.names) == found.keys.shape[1]
    return set(found.names)


def test_what_the_probes_say_is_never_used_and_the_users_names_always_are() -> None:
    model = tiny("gpt2")
    work = bench(model, "clear-rome", neighbours=100)
    assert chosen(work, [FRANCE]) == {*FREE, "Toko"}
    assert chosen(work, [YASUDA]) == set(POOL) - {"Toko"}
    sign = Fact("%", "The sign % means", "per mille", id="5")
    assert chosen(work, [sign]) == set(POOL)
    # In sequence the edits are judged by the probes of all facts, too.
    apart = dataclasses.replace(work, judged=FACTS, kept={})
    assert chosen(apart, [YASUDA]) == set(FREE)
    assert chosen(dataclasses.replace(work, names=["Italy"]), [FRANCE]) == {*FREE, "Toko", "Italy"}
    few = bench(model, "clear-rome", names=["Italy", "Spain", "FRANCE", "Oz"], neighbours=3)
    assert len(chosen(few, [FRANCE]) - {"Italy", "Spain", "Oz"}) == 3
    # Any editor of the kind can stay clear of names that the user gives, of none but those.
    assert chosen(bench(model, "rome", names=["Oz"], neighbours=0), [FRANCE]) == {"Oz"}


def test_a_sequence_is_told_what_it_is_judged_by() -> None:
    work = bench(tiny("gpt2"), "clear-rome")
    told = []
    work.sequence(FACTS, after_each=lambda i, _: told.append(list(work.judged)))
    assert told == [FACTS] * 3 and not work.judged


def test_keys_that_two_facts_share_count_once() -> None:
    """Behind a name that comes first the prompt changes nothing."""
    other = Fact("Danielle Darrieux", "Danielle Darrieux was born in", "Rome", id="4")
    model = tiny("gpt2", dtype=torch.float64)
    work = bench(model, "emmet", neighbours=100)
    K = torch.stack([v.keys.mean(0) for v in work.values([YASUDA, other])], dim=1)
    found = clearing.stay_clear(work, 1, [YASUDA, other], K)
    assert found is not None and sorted(found.names) == sorted(set(POOL) - {"Toko"})


def test_the_search_is_shared_with_rome(monkeypatch: pytest.MonkeyPatch) -> None:
    model, shared = tiny("gpt2"), {}
    rome = bench(model, "rome", neighbours=0)
    dataclasses.replace(rome, value_cache=shared).each(FACTS)
    assert len(shared) == 3
    monkeypatch.setattr("goldenlayers.editors.values.optimise_values", lambda *_a, **_k: 1 / 0)
    work = bench(model, "clear-rome")
    with pytest.raises(ZeroDivisionError):
        work.each(FACTS[:1])
    monkeypatch.setattr(
        "goldenlayers.editors.values.optimise_values", lambda _model, facts, *_a, **_k: [*facts]
    )
    assert len(dataclasses.replace(work, value_cache=shared).each(FACTS)) == 3


def close(found: Tensor, wanted: Tensor) -> bool:
    """Whether keys are the same but for the batch; those of another name differ by a tenth."""
    return bool((found - wanted).norm() < 1e-3 * wanted.norm())


def test_a_cache_that_does_not_fit_shows_in_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", dtype=torch.float64)
    whole = [key_of(model, 1, DARRIEUX, name) for name in POOL]
    monkeypatch.setattr(name_keys, "_BATCH", 4)
    honest = partial_forward.growing_cache

    def read() -> tuple[Tensor, bool]:
        agreed: list[bool] = []

        def agree(again: Tensor, first: Tensor) -> bool:
            agreed.append(partial_forward.agree(again, first))
            return agreed[-1]

        monkeypatch.setattr(name_keys, "agree", agree)
        return clearing._names_of(bench(model, "clear-rome"), 1, DARRIEUX).keys, agreed == [True]

    keys, reused = read()
    assert reused
    assert close(keys, torch.stack(whole))

    def spoiled(keys_values: Any = ()) -> Any:
        return honest([(k * 1.1, v) for k, v in keys_values])

    monkeypatch.setattr(partial_forward, "growing_cache", spoiled)
    keys, reused = read()
    assert not reused
    assert close(keys, torch.stack(whole))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "falcon", "opt", "bloom"])
def test_layer_after_layer_the_same_keys_from_fewer_blocks(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, dtype=torch.float64)
    monkeypatch.setattr(name_keys, "_BATCH", 4)
    ran: list[int] = []
    for block in model.layers.blocks:
        block.down.module.register_forward_pre_hook(lambda *_, i=block.index: ran.append(i))
    work = bench(model, "clear-rome")
    top = len(model.layers) - 1
    for layer in (0, 1, 1, top, 1):
        whole = [key_of(model, layer, DARRIEUX, name) for name in POOL]
        ran.clear()
        found = clearing._names_of(work.at(layer), layer, DARRIEUX)
        again = {i for i in ran if ran.count(i) > 2}
        assert (layer in again or not ran) and (layer != top or 0 not in again)
        assert close(found.keys, torch.stack(whole))
    assert not ran  # the keys of this layer were still known


def test_what_cannot_be_done_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("gpt2")
    work = bench(model, "clear-rome", names=["Oz"])
    with monkeypatch.context() as patch:
        patch.setattr(clearing, "ALIKE", -1.0)
        with pytest.raises(UserError, match=r"'Oz'.*the key of the edited fact.*Leave it out"):
            work.each([FRANCE])
        with pytest.raises(UserError, match=r"no name to stay clear of.*of 15 in the pool, 6"):
            bench(model, "clear-rome").each([FRANCE])
    with monkeypatch.context() as patch:
        patch.setattr(clearing, "LEAST_LEFT", 2.0)
        with pytest.raises(UserError, match=r"clear of 5 names leaves.*fact '1'; the nearest is"):
            work.each([FRANCE])
    dead = tiny("gpt2")
    for parameter in dead.layers[1].module.mlp.c_fc.parameters():  # type: ignore[union-attr]
        parameter.data.zero_()
    with pytest.raises(UserError, match="The key at the lookup token is zero"):
        bench(dead, "clear-rome").each([FRANCE])
    with pytest.raises(UserError, match=r"ft-m cannot stay clear of names.*clear-rome"):
        edit(model, FRANCE, "ft-m", layer=1, names=["Italy"])
    for names in ("Italy", [""], ["a" * 201], [3]):
        with pytest.raises(UserError, match="name"):
            Editing(model, make_editor("rome"), 1, names=names)  # type: ignore[arg-type]
    for name, value in (("neighbours", -1), ("neighbours", 1.5), ("clear_weight", 0.0)):
        with pytest.raises(UserError, match=name):
            make_editor("clear-rome", **{name: value})


def test_the_pool_is_of_many_kinds_and_says_where_it_comes_from() -> None:
    file = clearing.importlib.resources.files("goldenlayers.editors") / "names.json"
    record = json.loads(file.read_text("utf-8"))
    assert "Apache-2.0" in record["about"] and "general knowledge" in record["about"]
    names = [name for kind in record["names"].values() for name in kind]
    assert len(record["names"]) > 20 and 1000 < len(names) < 2000
    assert len({clearing.words(name) for name in names}) == len(names)
    assert all(name == name.strip() and clearing.words(name).strip() for name in names)
    assert EDITORS["clear-rome"]().neighbours < len(names) / 4  # type: ignore[attr-defined]
