"""What every editor promises, as theorems on tiny models: the constraint holds, the rest stays."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import tiny

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.editors import (
    EDITORS,
    AlphaEdit,
    Editing,
    Emmet,
    FtM,
    Memit,
    Rome,
    edit,
    edit_each,
    in_context_prefix,
    make_editor,
    preset,
)
from goldenlayers.editors.lookup_states import Contribution, lookup_states
from goldenlayers.editors.named import PRESETS, Preset
from goldenlayers.editors.values import optimise_values
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.hooks import capture, final_hidden
from goldenlayers.models import Model
from goldenlayers.progress import Progress
from goldenlayers.statistics.moments import Covariance

FACTS = [
    Fact(
        "France",
        "The capital of France is",
        "Rome",
        "Paris",
        id="1",
        rephrasings=("France has the capital",),
        locality=(Probe("The capital of Italy is", "Rome", "neighborhood"),),
    ),
    Fact(
        "Danielle Darrieux", "The mother tongue of Danielle Darrieux is", "Thai", "French", id="2"
    ),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano", "guitar", id="3"),
]
LOW_RANK = ("rome", "r-rome", "memit", "emmet", "alphaedit", "pmet")
SOLVERS = ("memit", "emmet", "alphaedit", "pmet")
# GPT-2's transposed weights, OPT's flat MLP, Falcon's in-place sum, BLOOM's residual in the MLP,
# Gemma's and OLMo's norm behind the MLP, Granite's scale.
SPECIAL = ("gpt2", "opt", "falcon", "bloom", "llama", "gemma3", "olmo2", "granite")


def statistics(model: Model) -> dict[int, Covariance]:
    generator = torch.Generator().manual_seed(1)
    found = {}
    for layer in range(len(model.layers)):
        keys = torch.randn(300, model.layers.d_mlp, generator=generator, dtype=torch.float64)
        found[layer] = Covariance.from_matrix(keys.T @ keys / len(keys))
    return found


QUICK = {"steps": 4, "stop_loss": 0.0, "prefixes": 2, "prefix_tokens": 4}


def bench(model: Model, method: str, layer: int = 1, **settings: Any) -> Editing:
    own = {f.name for f in dataclasses.fields(EDITORS[method])}
    quick = {name: value for name, value in QUICK.items() if name in own} | settings
    return Editing(model, make_editor(method, **quick), layer, statistics=statistics(model))


def null_space(method: str) -> dict[str, Any]:
    return {"null_space": 0.99} if method == "alphaedit" else {}


def down_at_lookup(model: Model, fact: Fact, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Key and value of the bare prompt's lookup token, read in the obvious way."""
    encoding = model.encoder.fact(fact)
    modules = {"down": model.layers[layer].down.module}
    with torch.no_grad(), capture(modules, inputs=True) as given, capture(modules) as gave:
        final_hidden(model, torch.tensor([encoding.ids]))
    assert encoding.lookup is not None
    width = len(encoding.ids)
    key = given["down"].reshape(width, -1)[encoding.lookup]
    return key, gave["down"].reshape(width, -1)[encoding.lookup]


def bits(model: Model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.hf.named_parameters()}


@pytest.mark.parametrize("kind", SPECIAL)
def test_rome_puts_the_wanted_value_on_the_bare_prompt(kind: str) -> None:
    model = tiny(kind, dtype=torch.float64)
    work = bench(model, "rome")
    deltas = work.each(FACTS)
    values = optimise_values(model, FACTS, 1, work.prefixes, Rome(**QUICK))
    for fact, delta, value in zip(FACTS, deltas, values, strict=True):
        assert delta.rank() == 1
        with delta.applied(model):
            _, now = down_at_lookup(model, fact, 1)
        # Factors are stored in float32.
        torch.testing.assert_close(now, value.target, rtol=1e-5, atol=1e-5)
        _, clean = down_at_lookup(model, fact, 1)
        assert (clean - value.target).norm() > 1e-2 * clean.norm()


def test_r_rome_puts_the_change_on_the_mean_key() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    work = bench(model, "r-rome")
    (delta,) = work.each(FACTS[:1])
    (value,) = optimise_values(model, FACTS[:1], 1, work.prefixes, Rome(**QUICK))
    (change,) = delta.changes.values()
    moved = change.dense.double() @ value.keys.mean(0)
    torch.testing.assert_close(moved, value.target - value.values.mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", SPECIAL)
def test_emmet_reaches_every_wanted_value_at_once(kind: str) -> None:
    model = tiny(kind, dtype=torch.float64)
    work = bench(model, "emmet", prefixes=0)
    delta = work.together(FACTS)
    values = work.values(FACTS)
    assert delta.rank() <= len(FACTS)
    with delta.applied(model):
        for fact, value in zip(FACTS, values, strict=True):
            _, now = down_at_lookup(model, fact, 1)
            torch.testing.assert_close(now, value.target, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "granite"])
def test_memit_over_two_layers_arrives_at_the_wanted_block_output(kind: str) -> None:
    # With (nearly) nothing to keep, the last layer takes all that is still missing.
    model = tiny(kind, dtype=torch.float64)
    work = bench(model, "memit", 2, prefixes=0, memit_lambda=1e-10, layers_before=1)
    delta = work.together(FACTS)
    assert sorted(delta.layers) == [1, 2]
    values = work.values(FACTS)
    clean = lookup_states(model, FACTS, [""], 2, model.layers[2].module)
    with delta.applied(model):
        after = lookup_states(model, FACTS, [""], 2, model.layers[2].module)
    contribution = Contribution.of(model, 2)
    wanted = torch.stack([contribution(v.target) - contribution(v.values[0]) for v in values])
    gap = (after.top - clean.top - wanted.float()).norm() / wanted.norm()
    assert gap < 1e-2
    # Half of the way is gone at the first of the two layers.
    first = [name for name in delta.changes if ".1." in name]
    assert len(first) == 1


def test_memit_keeps_more_with_a_larger_lambda() -> None:
    model = tiny("llama", dtype=torch.float64)
    norms = []
    for lam in (0.001, 0.1, 10.0):
        delta = bench(model, "memit", memit_lambda=lam).together(FACTS)
        norms.append(sum(n.absolute for n in delta.norms(model).values()))
    assert norms[0] > norms[1] > norms[2]


def test_alphaedit_keeps_clear_of_earlier_keys_in_a_sequence() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    settings = {"prefixes": 0, "null_space": 0.99, "l2": 1e-4}
    remembering = bench(model, "alphaedit", **settings)
    remembering.together(FACTS[:1])
    second = remembering.together(FACTS[1:])
    forgetful = bench(model, "alphaedit", **settings).together(FACTS[1:])
    key, _ = down_at_lookup(model, FACTS[0], 1)

    def reach(delta: WeightDelta) -> float:
        (change,) = delta.changes.values()
        return float((change.dense.double() @ key).norm())

    assert reach(second) < 0.05 * reach(forgetful)


@pytest.mark.parametrize("method", EDITORS)
@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "opt"])
def test_the_model_is_bit_identical_afterwards(method: str, kind: str) -> None:
    model = tiny(kind)
    before = bits(model)
    delta = bench(model, method, steps=2, **null_space(method)).together(FACTS[:1])
    with delta.applied(model):
        changed = bits(model)
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    differing = {name for name in before if not torch.equal(before[name], changed[name])}
    assert differing == set(delta.changes) == {model.layers[1].down.parameter_name}


@pytest.mark.parametrize("method", EDITORS)
def test_each_does_not_depend_on_its_company(method: str) -> None:
    model = tiny("llama", dtype=torch.float64)
    settings = null_space(method) | ({"layers_before": 1} if method in SOLVERS else {})
    together = bench(model, method, 2, **settings).each(FACTS)
    for fact, delta in zip(FACTS, together, strict=True):
        (alone,) = bench(model, method, 2, **settings).each([fact])
        single = bench(model, method, 2, **settings).together([fact])
        for other in (alone, single):
            assert set(other.changes) == set(delta.changes)
            for name, change in delta.changes.items():
                gap = (change.dense - other.changes[name].dense).norm()
                assert gap <= 1e-4 * change.dense.norm()


@pytest.mark.parametrize("method", LOW_RANK)
def test_low_rank_editors_stay_low_rank(method: str) -> None:
    model = tiny("gpt2")
    for delta in bench(model, method, **null_space(method)).each(FACTS):
        assert all(isinstance(c, LowRank) and c.rank == 1 for c in delta.changes.values())


def nll(model: Model, fact: Fact) -> float:
    from reference import mean_nll

    encoding = model.encoder.fact(fact, fact.target)
    with torch.no_grad():
        return float(mean_nll(model, encoding.ids, encoding.n_prompt))


@pytest.mark.parametrize("method", ["ft-m", "ft-l"])
def test_fine_tuning_installs_the_answer(method: str) -> None:
    model = tiny("gpt2")
    bound: dict[str, Any] = {"epsilon": 2.0} if method == "ft-l" else {}
    work = bench(model, method, steps=200, ft_lr=0.1, stop_loss=0.05, **bound)
    for fact, delta in zip(FACTS, work.each(FACTS), strict=True):
        assert nll(model, fact) > 3
        with delta.applied(model):
            assert nll(model, fact) < 1
    # One change for all facts has to share its room: it helps each of them all the same.
    with work.together(FACTS).applied(model):
        assert max(nll(model, fact) for fact in FACTS) < 1.5


def test_ft_l_holds_its_bound_and_ft_m_has_none() -> None:
    model = tiny("llama")
    settings: dict[str, Any] = {"steps": 10, "ft_lr": 0.1}
    weight = model.layers[1].down.weight
    bound = 0.25 * float(weight.float().pow(2).mean().sqrt())
    largest = {}
    for method in ("ft-l", "ft-m"):
        mine: dict[str, Any] = settings | ({"epsilon": 0.25} if method == "ft-l" else {})
        (change,) = bench(model, method, **mine).together(FACTS).changes.values()
        assert isinstance(change, Dense)
        largest[method] = float(change.value.abs().max())
    assert largest["ft-l"] <= bound * (1 + 1e-5) < largest["ft-m"]


def test_sequence_edits_each_fact_on_top_of_the_earlier_ones() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    told: list[int] = []
    work = bench(model, "rome", prefixes=0)
    total = work.sequence(FACTS, after_each=lambda i, _: told.append(i))
    assert told == [0, 1, 2]
    assert total.rank() <= 3
    assert [row["id"] for row in total.facts] == ["1", "2", "3"]
    # The last edit was made with the others in place: its constraint holds on the total.
    partial = bench(model, "rome", prefixes=0).sequence(FACTS[:2])
    with partial.applied(model):
        last = bench(model, "rome", prefixes=0).together(FACTS[2:])
    with total.applied(model):
        _, now = down_at_lookup(model, FACTS[2], 1)
    with partial.applied(model), last.applied(model, force=True):
        _, expected = down_at_lookup(model, FACTS[2], 1)
    torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "olmo2", "glm4"])
def test_the_raw_change_behind_a_norm_brings_a_reachable_amount(kind: str) -> None:
    model = tiny(kind)
    contribution = Contribution.of(model, 1)
    assert contribution.norm is not None
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(4, model.layers.d_model, generator=generator)
    reachable = contribution(raw + 0.3 * torch.randn(raw.shape, generator=generator))
    wanted = reachable - contribution(raw)
    change = contribution.raw_change(raw, wanted)
    gap = (contribution(raw + change) - contribution(raw) - wanted).norm(dim=1)
    assert bool((gap < 0.02 * wanted.norm(dim=1)).all())
    # The plain amount, as for a model without the norm, does not bring it.
    naive = (contribution(raw + wanted) - contribution(raw) - wanted).norm(dim=1)
    assert bool((naive > 5 * gap).all())


def test_in_context_tells_the_fact_and_shows_others() -> None:
    text = in_context_prefix(FACTS[0], FACTS)
    assert text.endswith("New fact: The capital of France is Rome.\n")
    assert text.count("France") == 1
    assert "Thai" in text and "piano" in text
    assert text == in_context_prefix(FACTS[0], FACTS)


def failing(call: str, model: Model) -> object:
    calls = {
        "unknown editor": lambda: edit(model, FACTS, "romme", layer=1),
        "no such layer": lambda: edit(model, FACTS, "ft-m", layer=9),
        "no facts": lambda: edit(model, [], "ft-m", layer=1),
        "rome in a batch": lambda: edit(
            model, FACTS, "rome", layer=1, mode="batch", statistics=statistics(model)
        ),
        "no statistics": lambda: edit(model, FACTS[:1], "rome", layer=1, statistics={}),
        "unknown preset": lambda: preset("rome/gpt2", model),
        "preset of another model": lambda: preset("rome/gpt2-xl", model),
        "unknown setting": lambda: make_editor("rome", stepz=3),
        "bad setting": lambda: Rome(steps=0),
        "not a number": lambda: Memit(kl_factor=float("nan")),
        "more than all": lambda: AlphaEdit(null_space=2.0),
        "another editor's setting": lambda: edit(model, FACTS[:1], layer=1, epsilon=0.5),
        "a plain model": lambda: edit(model.hf, FACTS[:1], layer=1),  # type: ignore[arg-type]
        "rome in steps": lambda: edit(
            model, FACTS, "rome", layer=1, step=2, statistics=statistics(model)
        ),
        "steps in a batch": lambda: edit(model, FACTS, "ft-m", layer=1, mode="batch", step=2),
        "unknown mode": lambda: edit(model, FACTS, "ft-m", layer=1, mode="bacth"),  # type: ignore[arg-type]
    }
    return calls[call]()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("unknown editor", "'rome'"),
        ("no such layer", "0 to 3"),
        ("no facts", "at least one fact"),
        ("rome in a batch", "one fact at a time"),
        ("no statistics", "no key statistics for layer 1"),
        ("unknown preset", "rome/gpt2-xl"),
        ("preset of another model", "48 layers"),
        ("unknown setting", "rome has no setting 'stepz'.*'steps'"),
        ("another editor's setting", "rome has no setting 'epsilon'.*ft-l"),
        ("a plain model", "Model.wrap"),
        ("rome in steps", "rome edits one fact at a time.*memit"),
        ("steps in a batch", "mode sequential"),
        ("bad setting", "1 or more"),
        ("not a number", "kl_factor is nan"),
        ("more than all", "null_space_absolute"),
        ("unknown mode", "'batch'"),
    ],
)
def test_bad_input_is_told_plainly(call: str, says: str) -> None:
    with pytest.raises(UserError, match="(?s)" + says.replace("'", "['‘]?")):
        failing(call, tiny("gpt2"))


def test_numbers_that_are_not_finite_stop_the_edit() -> None:
    model = tiny("gpt2")
    broken = statistics(model)
    with torch.no_grad():
        model.layers[2].down.weight[0, 0] = float("nan")
    for prefixes in (0, 2):  # found by the optimisation, or already by the sampled prefixes
        with pytest.raises(UserError, match="not a number"):
            edit(model, FACTS[:1], "rome", layer=1, statistics=broken, prefixes=prefixes)


def test_presets_are_whole_and_fit_their_method() -> None:
    for name, found in PRESETS.items():
        assert isinstance(found, Preset)
        method = found.editor.name
        assert method in EDITORS and name.startswith(method + "/")
        assert 0 <= found.layer < found.shape[0]


def test_a_preset_is_for_its_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-2-7B, Llama-3-8B and Mistral-7B have one depth and one width."""
    model = tiny("llama")
    layers = model.layers
    shape = (len(layers), layers.d_model, layers.d_mlp, layers.vocab_size)
    monkeypatch.setitem(PRESETS, "memit/tiny", Preset(Memit(steps=3), 1, shape))
    assert preset("memit/tiny", model).editor == Memit(steps=3)
    for i in range(4):
        other = tuple(n + (i == k) for k, n in enumerate(shape))
        monkeypatch.setitem(PRESETS, "memit/tiny", Preset(Memit(), 1, other))  # type: ignore[arg-type]
        with pytest.raises(UserError, match=str(other[i])):
            preset("memit/tiny", model)


def test_facts_that_contradict_each_other_are_told() -> None:
    model = tiny("llama")
    against = [FACTS[0], dataclasses.replace(FACTS[0], id="against", target="in Ulm")]
    work = bench(model, "emmet")
    with pytest.warns(UserWarning, match="emmet at layer 1.*contradict"):
        work.together(against)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        work.together(FACTS)


@pytest.mark.parametrize("mode", ["batch", "sequential"])
def test_edits_together_refuse_contradictions_and_edit_a_doubled_fact_once(mode: Any) -> None:
    model = tiny("llama")
    again = dataclasses.replace(FACTS[0], id="again")
    against = dataclasses.replace(FACTS[0], id="against", target="in Ulm")

    def delta_of(*facts: Fact) -> Any:
        return edit(model, facts, "ft-m", layer=1, mode=mode, steps=2)

    with pytest.raises(UserError, match="'against' contradicts fact"):
        delta_of(*FACTS, against)
    once, twice = delta_of(FACTS[0], FACTS[1]), delta_of(FACTS[0], again, FACTS[1])
    assert [entry["id"] for entry in twice.facts] == [entry["id"] for entry in once.facts]
    for name, change in once.changes.items():
        assert torch.equal(
            change.dense, twice.changes[name].dense
        )  # the same work on the same data


@pytest.mark.parametrize("method", ["ft-m", "ft-l"])
def test_many_facts_for_one_change_are_trained_in_passes(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded by the tokens of a pass; the change is that of one pass over all."""
    from goldenlayers.editors import finetune

    model = tiny("llama", dtype=torch.float64)
    changes = []
    for tokens in (4096, 1):
        monkeypatch.setattr(finetune, "_TOKENS_AT_ONCE", tokens)
        delta = edit(model, FACTS, method, layer=1, mode="batch", steps=4)
        (change,) = delta.changes.values()
        changes.append(change.dense)
    # Adam divides by the gradient's own size: where that is tiny, its last digits count.
    assert float((changes[0] - changes[1]).norm()) <= 1e-5 * float(changes[0].norm())
    assert float(changes[0].norm()) > 0


def test_progress_counts_every_fact() -> None:
    model = tiny("gpt2")
    for method in ("rome", "memit", "ft-m"):
        told: list[float] = []
        work = bench(model, method)
        edit_each(
            model,
            FACTS,
            work.editor,
            layer=1,
            statistics=work.statistics,
            progress=Progress(on_progress=lambda done, total, told=told: told.append(done / total)),
        )
        assert told[-1] == 1


def _names(deltas: Sequence[WeightDelta]) -> list[str]:
    return [delta.base_fingerprint for delta in deltas]


def test_deltas_name_the_weights_they_were_made_on() -> None:
    model = tiny("gpt2")
    deltas = bench(model, "emmet").each(FACTS)
    assert set(_names(deltas)) == {model.fingerprint()}
    assert deltas[0].facts[0]["nll_before"] >= 0
    other = tiny("gpt2", seed=1)
    with pytest.raises(UserError), deltas[0].applied(other):
        pass


def test_one_fact_a_layer_from_the_end_and_settings_as_keywords() -> None:
    model = tiny("gpt2")
    found = edit(model, FACTS[0], "ft-m", layer=-1, steps=3)
    assert list(found.layers) == [3] and found.settings == {**FtM(steps=3).to_json(), "seed": 0}
    again = edit(model, FACTS[:1], FtM(steps=3), layer=3)
    for name, change in found.changes.items():
        assert torch.equal(change.dense, again.changes[name].dense)
    with pytest.raises(UserError, match="no layer -5"):
        edit(model, FACTS[0], "ft-m", layer=-5)


def test_a_sequence_of_steps_writes_some_facts_at_a_time() -> None:
    model = tiny("gpt2", dtype=torch.float64)
    told: list[tuple[int, int]] = []
    work = bench(model, "emmet", prefixes=0)
    total = work.sequence(FACTS, 2, after_each=lambda i, d: told.append((i, len(d.facts))))
    assert told == [(0, 2), (1, 3)]
    slow = bench(model, "emmet", prefixes=0)
    first = slow.together(FACTS[:2])
    with first.applied(model):
        wanted = first + slow.together(FACTS[2:])
    for name, change in total.changes.items():
        torch.testing.assert_close(change.dense, wanted.changes[name].dense)
    by_call = edit(
        model, FACTS, work.editor, layer=1, mode="sequential", step=2, statistics=work.statistics
    )
    assert [row["id"] for row in by_call.facts] == ["1", "2", "3"]
    for name, change in total.changes.items():
        torch.testing.assert_close(change.dense, by_call.changes[name].dense)


def test_facts_that_cannot_be_edited_are_left_out_of_their_step() -> None:
    from evaluations import Choosy

    model = tiny("gpt2")
    dropped: list[Exception] = []
    chosen = Choosy({"1", "3"}, Emmet(**QUICK))
    found = edit(
        model,
        FACTS,
        chosen,
        layer=1,
        mode="sequential",
        step=2,
        statistics=statistics(model),
        progress=Progress(on_dropped=dropped.append),
    )
    assert [row["id"] for row in found.facts] == ["2"]
    assert [str(error).split(" cannot")[0] for error in dropped] == ["fact '1'", "fact '3'"]
    with pytest.raises(UserError, match="abnormal"):
        edit(model, FACTS, chosen, layer=1, step=2, statistics=statistics(model))


def test_layers_share_prefixes_and_values_and_keep_their_own_keys() -> None:
    model = tiny("gpt2")
    cache: dict[Any, Any] = {}
    work = Editing(
        model, AlphaEdit(**QUICK, null_space=0.99), 1, statistics=statistics(model),
        value_cache=cache,
    )  # fmt: skip
    work.together(FACTS[:1])
    other = work.at(-2)
    assert other.layer == 2 and other.prefixes is work.prefixes
    assert 1 in work.previous_keys and not other.previous_keys
    other.each(FACTS[:1])
    assert len(cache) == 2


def test_an_editor_of_others_is_registered_and_edits() -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Noise(Rome):
        name = "noise"

    EDITORS.register("noise", Noise)
    try:
        found = edit(model := tiny("gpt2"), FACTS[0], "noise", layer=1, **QUICK,
                     statistics=statistics(model))  # fmt: skip
        assert found.method == "noise"
        with pytest.raises(UserError, match=r"noise has no setting 'l2'.*alphaedit"):
            make_editor("noise", l2=1.0)
    finally:
        EDITORS.unregister("noise")
    with pytest.raises(UserError, match="unknown editor 'noise'"):
        edit(model, FACTS[0], "noise", layer=1)
