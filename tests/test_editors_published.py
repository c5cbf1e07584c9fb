"""Each editor is held to its derivation from the paper; another reading is another update."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import pytest
import torch
from editors_published import Published
from families import tiny
from torch import Tensor

from goldenlayers.delta import WeightDelta
from goldenlayers.editors import Editing, ValueSearch, make_editor
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.models import Model
from goldenlayers.statistics.moments import Covariance

FACTS = [
    Fact("France", "The capital of France is", "Rome by night", id="1"),
    Fact("Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "Thai", id="2"),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano in town", id="3"),
]
LAYERS = (1, 2)
# Transposed weights and everything in float64; norms computed in float32 whatever the weights are.
KINDS = {"gpt2": 1e-6, "llama": 1e-5}
ROME = {
    "steps": 4, "lr": 0.5, "adam": True, "lr_absolute": True, "clamp": 4.0, "kl_factor": 0.0625,
    "weight_decay": 0.5, "prefixes": 3, "prefix_tokens": 4,
}  # fmt: skip
MEMIT = {
    **ROME, "clamp": 0.75, "block_norm": True, "layers_before": 1,
}  # fmt: skip
LAMBDA = {"memit_lambda": 20.0, "memit_lambda_absolute": True}
SETTINGS: dict[str, dict[str, float | int | bool]] = {
    "rome": ROME,
    "r-rome": ROME,
    "memit": {**MEMIT, **LAMBDA},
    "emmet": {**MEMIT, "emmet_lambda": 0.1},
    "alphaedit": {
        **MEMIT, "null_space": 1.0, "null_space_absolute": True,
        "l2": 10.0, "l2_absolute": True,
    },
    "pmet": {**MEMIT, **LAMBDA, "block_norm": False, "lr": 0.2, "kl_factor": 1.0},
    "ft-l": {
        "steps": 6, "ft_lr": 5e-3, "lr_absolute": True, "epsilon": 1e-2, "prompt_last": True,
        "stop_loss": 0.01,
    },
    "ft-m": {"steps": 6, "ft_lr": 5e-3, "lr_absolute": True, "stop_loss": 0.01},
}  # fmt: skip


# What the slow value searches found, by model and settings: MEMIT, EMMET and AlphaEdit share it.
FOUND: dict[tuple[Any, ...], dict[tuple[str, ...], dict[str, Tensor]]] = {}


@cache
def subject(kind: str) -> tuple[Model, dict[int, Tensor]]:
    """A tiny model and the second moment of keys at each layer, materialised."""
    model = tiny(kind, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    moments = {}
    for layer in LAYERS:
        keys = torch.randn(300, model.layers.d_mlp, generator=generator, dtype=torch.float64)
        moments[layer] = keys.T @ keys / len(keys)
    return model, moments


def bench(kind: str, method: str, **changes: float | int | bool) -> Editing:
    model, moments = subject(kind)
    editor = make_editor(method, **{**SETTINGS[method], **changes})
    statistics = {layer: Covariance.from_matrix(C, ridge=0.0) for layer, C in moments.items()}
    return Editing(model, editor, LAYERS[-1], statistics=statistics)


def derived(work: Editing, kind: str, **controls: bool) -> Published:
    s: Any = work.editor
    if not isinstance(s, ValueSearch):
        made = Published(work.model, work.prefixes, subject(kind)[1], steps=s.steps)
        return dataclasses.replace(made, **controls)
    shared = FOUND.setdefault((kind, *s.of_values, *controls), {})
    made = Published(
        work.model, work.prefixes, subject(kind)[1], lr=s.lr, steps=s.steps, clamp=s.clamp,
        kl_factor=s.kl_factor, weight_decay=s.weight_decay, found=shared,
    )  # fmt: skip
    return dataclasses.replace(made, **controls)


def expected(slow: Published, method: str, work: Editing, facts: list[Fact]) -> dict[int, Tensor]:
    """ΔW by layer, from the paper."""
    s: Any = work.editor
    top, layers = work.layer, s.layers(work.layer)
    if method == "rome":
        return {top: slow.rome(facts[0], top)}
    if method == "r-rome":
        return {top: slow.r_rome(facts[0], top)}
    if method == "memit":
        return slow.memit(facts, layers, s.memit_lambda)
    if method == "pmet":
        return slow.pmet(facts, layers, s.memit_lambda)
    if method == "emmet":
        return slow.emmet(facts, layers, s.emmet_lambda)
    if method == "alphaedit":
        return slow.alphaedit(facts, layers, s.null_space, s.l2)
    bound = s.epsilon if method == "ft-l" else None
    last = method == "ft-l" and s.prompt_last
    change = slow.fine_tune(
        facts, top, lr=s.ft_lr, bound=bound, prompt_last=last, stop_loss=s.stop_loss
    )
    return {top: change}


def gap(delta: WeightDelta, model: Model, wanted: dict[int, Tensor]) -> float:
    """The largest relative difference of a layer's ΔW."""
    found = {layer: delta.changes[model.layers[layer].down.parameter_name] for layer in wanted}
    assert len(delta.changes) == len(wanted)
    gaps = []
    for layer, change in wanted.items():
        ours = found[layer].dense.double()
        ours = ours if ours.shape == change.shape else ours.T
        gaps.append(float((ours - change).norm() / change.norm()))
    return max(gaps)


def facts_of(method: str) -> list[Fact]:
    return FACTS[:1] if method in ("rome", "r-rome") else FACTS


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", SETTINGS)
def test_the_update_is_the_papers(method: str, kind: str) -> None:
    work = bench(kind, method)
    facts = facts_of(method)
    delta = work.together(facts)
    wanted = expected(derived(work, kind), method, work, facts)
    assert gap(delta, work.model, wanted) < KINDS[kind]


@pytest.mark.parametrize("method", ["memit", "emmet", "alphaedit", "pmet"])
def test_the_update_is_the_papers_at_one_layer(method: str) -> None:
    work = bench("gpt2", method, layers_before=0)
    delta = work.together(FACTS)
    wanted = expected(derived(work, "gpt2"), method, work, FACTS)
    assert gap(delta, work.model, wanted) < 1e-6


def test_alphaedit_keeps_clear_of_the_batch_before() -> None:
    """Two batches: the second on the model with the first, the first's keys in the cache."""
    work = bench("gpt2", "alphaedit")
    slow = derived(work, "gpt2")
    first = work.together(FACTS[:1])
    assert gap(first, work.model, expected(slow, "alphaedit", work, FACTS[:1])) < 1e-6
    found = []
    for keys in (work.previous_keys, {}):
        again = bench("gpt2", "alphaedit")
        again.previous_keys.update(keys)
        with first.applied(work.model):
            found.append(again.together(FACTS[1:]))
    wanted = expected(slow, "alphaedit", work, FACTS[1:])
    # The first batch's factors were kept in float32, and the second builds on them.
    assert gap(found[0], work.model, wanted) < 1e-5
    assert gap(found[1], work.model, wanted) > 1e-2  # without the cache


@pytest.mark.parametrize(
    ("method", "control", "least"),
    [
        ("rome", "kl_reversed", 0.003),
        ("pmet", "kl_reversed", 0.01),
        ("memit", "keys_alike", 0.1),
        ("pmet", "block_residual", 0.1),
    ],
)
def test_another_reading_is_another_update(method: str, control: str, least: float) -> None:
    work = bench("gpt2", method)
    facts = facts_of(method)
    delta = work.together(facts)
    wanted = expected(derived(work, "gpt2", **{control: True}), method, work, facts)
    assert gap(delta, work.model, wanted) > least


def test_ft_l_with_the_answers_own_loss_is_another_update() -> None:
    work = bench("gpt2", "ft-l")
    wanted = expected(derived(work, "gpt2"), "ft-l", work, FACTS)
    own = bench("gpt2", "ft-l", prompt_last=False).together(FACTS)
    assert gap(own, work.model, wanted) > 0.1
    with pytest.raises(UserError, match=r"ft-m has no setting 'prompt_last'.*ft-l"):
        make_editor("ft-m", prompt_last=True)  # it has one loss only
