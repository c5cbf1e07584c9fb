"""locate(): rows, back-off, interruption, known and missing old answers, baselines."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from alike import alike
from families import shared
from reference import full_logits, inner, slow_greedy, weight_gradients
from tokenizers_built import TOKENIZERS

from goldenlayers.datasets import FactSet
from goldenlayers.decoding import end_ids
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact
from goldenlayers.locating import lga, locate, published_layer
from goldenlayers.locating.known import blank_ids, fill_old_answers, known_facts
from goldenlayers.locating.lga import backing_off, lga_rows, saliency_rows
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.models import Model
from goldenlayers.progress import Progress, out_of_memory

FACTS = [
    Fact("Italy", "The capital of Italy is", "Paris", id="italy", target_old="Rome"),
    Fact("Toko Yasuda", "Toko Yasuda plays the", "piano", id="toko", target_old="guitar"),
    Fact("gold", "The chemical symbol of gold is", "Fe", id="gold", target_old="Au"),
    Fact("Japan", "Japan pays with the", "euro", id="japan", target_old="yen"),
    Fact("Albert", "Albert was born in the city of", "Rome", id="ulm", target_old="Ulm"),
]
# Of float64 models: their norms are taken in float32, and its last bits differ between batches.
NEAR = 1e-5


@cache
def wrapped(
    name: str = "llama", dtype: torch.dtype = torch.float32, tokenizer: str = "byte_level_bpe"
) -> Model:
    return Model.wrap(shared(name, dtype), TOKENIZERS[tokenizer]())


def by_fact(batches: Any) -> dict[str, dict[str, Any]]:
    return {row["fact"]: row for rows in batches for row in rows}


def test_rows_do_not_depend_on_the_batch() -> None:
    model = wrapped(dtype=torch.float64)
    one = by_fact(lga_rows(model, FACTS, batch_size=1))
    many = by_fact(lga_rows(model, FACTS, batch_size=4))
    assert set(one) == set(many) == {f.id for f in FACTS}
    for fact in FACTS:
        row = one[fact.id]
        assert row["old"] == fact.target_old and row["new"] == fact.target
        assert not row["old_is_generated"]
        for name in ("phi", "cosine", "norm_old", "norm_new"):
            assert len(row[name]) == 4
            assert row[name] == pytest.approx(many[fact.id][name], rel=NEAR)
        for phi, cosine, a, b in zip(
            row["phi"], row["cosine"], row["norm_old"], row["norm_new"], strict=True
        ):
            assert cosine == pytest.approx(phi / (a * b)) and -1 <= cosine <= 1


@pytest.mark.parametrize("name", ["gpt2", "bloom", "gemma3"])
@pytest.mark.parametrize("loss", ["sequence", "answer"])
def test_saliency_is_the_mean_absolute_gradient(name: str, loss: Any) -> None:
    model = wrapped(name, torch.float64)
    rows = by_fact(saliency_rows(model, FACTS[:3], loss=loss, batch_size=2))
    for fact in FACTS[:3]:
        e = model.encoder.fact(fact, fact.target)
        first = 1 if loss == "sequence" else e.n_prompt
        slow = weight_gradients(model, e.ids, "mlp", first)
        expected = [
            float(sum(g.abs().sum() for g in gs)) / sum(g.numel() for g in gs) for gs in slow
        ]
        assert rows[fact.id]["phi"] == pytest.approx(expected, rel=NEAR)


def test_the_ranking_is_the_sum_over_facts() -> None:
    model = wrapped(dtype=torch.float64)
    ranking = locate(model, FactSet(tuple(FACTS), name="mine"), fence="none", bootstrap=10)
    expected = [0.0] * 4
    for fact in FACTS:
        old = weight_gradients(model, model.encoder.fact(fact, fact.target_old or "").ids, "mlp")
        new = weight_gradients(model, model.encoder.fact(fact, fact.target).ids, "mlp")
        expected = [s + inner(a, b) for s, a, b in zip(expected, old, new, strict=True)]
    assert [layer.score for layer in ranking.layers] == pytest.approx(expected, rel=NEAR)
    assert ranking.golden_layer == max(range(4), key=lambda i: expected[i])
    assert ranking.n_facts == 5 and ranking.data == "mine" and ranking.method == "lga"
    assert ranking.seconds is not None and ranking.peak_memory_bytes


def test_locating_changes_no_weight() -> None:
    model = wrapped()
    before = model.fingerprint()
    locate(model, FACTS, bootstrap=0)
    locate(model, FACTS, "saliency", bootstrap=0)
    model.forget_fingerprint()
    assert model.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())


def test_seeds_batches_and_order_do_not_change_the_ranking() -> None:
    model = wrapped(dtype=torch.float64)
    a = locate(model, FACTS, bootstrap=50, batch_size=16)
    b = locate(model, FACTS[::-1], bootstrap=50, batch_size=2)
    scores = [[layer.score for layer in ranking.layers] for ranking in (a, b)]
    assert scores[0] == alike(scores[1], rel=NEAR) and a.candidates == b.candidates
    assert [layer.wins for layer in a.layers] == [layer.wins for layer in b.layers]


def test_progress_and_rows_are_told() -> None:
    model = wrapped()
    done: list[tuple[int, int]] = []
    rows: list[dict[str, Any]] = []
    locate(
        model,
        FACTS,
        bootstrap=0,
        progress=Progress(
            on_rows=rows.extend, on_progress=lambda a, b: done.append((a, b)), chunk=2
        ),
    )
    assert done == [(0, 5), (2, 5), (4, 5), (5, 5)]
    assert sorted(row["fact"] for row in rows) == sorted(f.id for f in FACTS)


# --- memory


def hungry(limit: int, error: BaseException) -> tuple[list[list[int]], Any]:
    tried: list[list[int]] = []

    def run(members: list[int]) -> list[dict[str, Any]]:
        tried.append(members)
        if len(members) > limit:
            raise error
        return [{"fact": str(i)} for i in members]

    return tried, run


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("MPS backend out of memory"),
    ],
)
def test_the_batch_is_halved_until_it_fits(error: BaseException) -> None:
    tried, run = hungry(3, error)
    lengths = [5, 9, 7, 1, 3, 8, 2, 6, 4, 10, 11]
    batches = list(backing_off(lengths, 8, run))
    assert sorted(int(row["fact"]) for rows in batches for row in rows) == list(range(11))
    assert [len(t) for t in tried] == [8, 4, 2, 2, 2, 2, 2, 1]  # halved for good
    assert [len(rows) for rows in batches] == [2, 2, 2, 2, 2, 1]


def test_a_single_fact_too_large_is_the_users_error() -> None:
    tried, run = hungry(0, torch.OutOfMemoryError("out of memory"))
    with pytest.raises(UserError, match=r"single fact of 9 tokens.*--dtype"):
        list(backing_off([3, 9], 4, run))
    assert [len(t) for t in tried] == [2, 1]


def test_other_errors_pass_through() -> None:
    for error in (RuntimeError("shapes do not fit"), KeyError("x"), KeyboardInterrupt()):
        tried, run = hungry(0, error)
        with pytest.raises(type(error)):
            list(backing_off([1, 2, 3], 2, run))
        assert len(tried) == 1
    assert not out_of_memory(ValueError("out of memory"))
    with pytest.raises(UserError, match="batch size is 0"):
        list(backing_off([1], 0, lambda _m: []))


def test_rows_are_whole_after_backing_off(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(dtype=torch.float64)
    expected = by_fact(lga_rows(model, FACTS, batch_size=5))
    whole = lga.pair_products

    def tight(model: Model, old: Sequence[Any], new: Sequence[Any], **kwargs: Any) -> Any:
        if len(old) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return whole(model, old, new, **kwargs)

    monkeypatch.setattr(lga, "pair_products", tight)
    found = by_fact(lga_rows(model, FACTS, batch_size=5))
    assert set(found) == set(expected)
    for name, row in found.items():
        assert row["phi"] == pytest.approx(expected[name]["phi"], rel=NEAR)


# --- Ctrl-C


def test_an_interruption_leaves_what_is_done() -> None:
    model = wrapped()
    kept: list[dict[str, Any]] = []

    def interrupt(done: int, _total: int) -> None:
        if done >= 4:
            raise KeyboardInterrupt

    progress = Progress(on_progress=interrupt, on_rows=kept.extend)
    ranking = locate(model, FACTS, batch_size=2, bootstrap=0, progress=progress)
    assert ranking.n_facts == 4 == len(kept)
    assert any("Interrupted after 4 of 5 facts" in text for text in ranking.warnings)
    some = [f for f in FACTS if f.id in {row["fact"] for row in kept}]
    whole = locate(model, some, bootstrap=0)
    assert [x.score for x in ranking.layers] == pytest.approx(
        [x.score for x in whole.layers], rel=1e-4
    )
    assert not any("Interrupted" in text for text in whole.warnings)


def test_an_interruption_before_the_first_batch_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_args: Any, **_kwargs: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(lga, "pair_products", interrupt)
    with pytest.raises(KeyboardInterrupt):
        locate(wrapped(), FACTS)


def test_warned_keeps_the_rest() -> None:
    ranking = LayerRanking.fixed("middle", 4, 2)
    more = ranking.warned("Look out.")
    assert more.warnings == (*ranking.warnings, "Look out.")
    assert dataclasses.replace(more, warnings=ranking.warnings) == ranking


# --- old answers


def own_answer(model: Model, prompt: str, n: int) -> str:
    ids = model.encoder.encode(prompt).ids
    return str(model.tokenizer.decode(slow_greedy(model, ids, n, end_ids(model))))


def test_known_facts_are_those_the_model_answers() -> None:
    model = wrapped()
    known: list[Fact] = []
    for fact in FACTS[:3]:
        answer = own_answer(model, fact.prompt, 3)
        try:
            made = dataclasses.replace(fact, target_old=answer)
            e = model.encoder.fact(made, made.target_old or "")
        except (DataError, UserError):
            continue
        # What is decoded may be tokenised in another way; then greedy tokens are not the answer's.
        if slow_greedy(model, e.ids[: e.n_prompt], len(e.answer_ids)) == list(e.answer_ids):
            known.append(made)
    assert known, "the tiny model has no answer that can be written back"
    rest = [dataclasses.replace(f, id=f.id + "-no") for f in FACTS]
    missing = [Fact("Italy", "The capital of Italy is", "Ulm", id="none")]
    mixed = [*rest, *known, *missing]
    assert known_facts(model, mixed, batch_size=2) == known
    ranking = locate(model, mixed, known=True, bootstrap=0)
    assert ranking.n_facts == len(known)
    with pytest.raises(UserError, match=r"none of the 5 facts.*--known"):
        locate(model, rest, known=True)
    with pytest.raises(UserError, match="none of the 1 facts"):
        locate(model, missing, known=True)


@pytest.mark.parametrize("tokenizer", ["byte_level_bpe", "sentencepiece_bpe", "bytes"])
def test_missing_old_answers_are_the_models_own(tokenizer: str) -> None:
    model = wrapped("gemma3", tokenizer=tokenizer)
    missing = [dataclasses.replace(f, target_old=None) for f in FACTS[:4]]
    facts, dropped = fill_old_answers(model, [*missing, FACTS[4]], batch_size=2)
    assert len(facts) + len(dropped) == 5 and facts[-1] is FACTS[4]
    blank = set(blank_ids(model))
    for fact in facts[:-1]:
        assert fact.target_old and fact.target_old.strip() and fact.target_old_is_generated
        assert "\n" not in fact.target_old
        e = model.encoder.fact(fact)
        wanted = len(model.encoder.fact(fact, fact.target).answer_ids)
        order = full_logits(model, e.ids)[-1].argsort(descending=True).tolist()
        start = next(i for i in order if i not in blank)
        more = slow_greedy(model, [*e.ids, start], wanted - 1, end_ids(model))
        text = str(model.tokenizer.decode([start, *more], skip_special_tokens=True))
        assert fact.target_old == text.split("\n")[0].strip()
    assert not FACTS[4].target_old_is_generated


def test_blank_first_tokens_are_passed_over() -> None:
    """A model that wants a line break after every question still gives an answer."""
    model = wrapped("llama")
    newline = model.tokenizer.encode("\n")[0]
    blank = blank_ids(model)
    assert newline in blank and model.tokenizer.encode(" ")[0] in blank
    assert set(model.tokenizer.all_special_ids) <= set(blank)
    shown = [t for t in model.tokenizer.encode("Paris") if t in blank]
    assert not shown
    pieces = wrapped("llama", tokenizer="sentencepiece_bpe")
    names = pieces.tokenizer.convert_ids_to_tokens(blank_ids(pieces))
    assert {"▁", "<0x0A>", "<s>", "</s>"} <= set(names)

    class Breaking(torch.nn.Module):
        def __init__(self, head: Any) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            logits = self.head(hidden).clone()
            logits[..., newline] += 1e4  # whatever was asked
            return logits

    import copy

    own = copy.copy(model)
    own.hf = copy.deepcopy(model.hf)
    own.hf.lm_head = Breaking(own.hf.lm_head)
    own.layers = dataclasses.replace(type(model.layers).of(model.hf), head=own.hf.lm_head)
    fact = dataclasses.replace(FACTS[0], target_old=None)
    facts, dropped = fill_old_answers(own, [fact])
    assert not dropped and facts[0].target_old and facts[0].target_old.strip()


def answered_already() -> tuple[Model, Fact]:
    """A tiny model and a fact whose new answer is what the model says anyway."""
    for name in ("gemma3", "llama", "gpt2", "opt", "qwen2"):
        model = wrapped(name, tokenizer="sentencepiece_bpe")
        for fact in FACTS:
            base = dataclasses.replace(fact, target_old=None)
            for filled in fill_old_answers(model, [base])[0]:
                same = dataclasses.replace(base, id="same", target=str(filled.target_old))
                e = model.encoder.fact(same, same.target)
                n = len(e.answer_ids)
                if slow_greedy(model, e.ids[: e.n_prompt], n) == list(e.answer_ids):
                    return model, same
    raise AssertionError("no tiny model's answer can be written back")


def test_a_fact_the_model_already_answers_so_is_no_edit() -> None:
    model, same = answered_already()
    facts, dropped = fill_old_answers(model, [same, *FACTS])
    assert [f.id for f in facts] == [f.id for f in FACTS]
    assert len(dropped) == 1 and "same" in str(dropped[0]) and "no edit" in str(dropped[0])
    told: list[DataError] = []
    progress = Progress(on_dropped=told.append)
    ranking = locate(model, [same, *FACTS], bootstrap=0, progress=progress)
    assert ranking.n_facts == 5 and len(told) == 1
    with pytest.raises(DataError, match="same"):
        locate(model, [same])


def test_generated_old_answers_are_counted() -> None:
    model = wrapped()
    missing = [dataclasses.replace(f, target_old=None) for f in FACTS[:2]]
    ranking = locate(model, [*missing, *FACTS[2:]], bootstrap=0)
    assert ranking.n_generated == 2 and ranking.n_facts == 5
    # Saliency looks at the new text only: nothing is generated, nothing missing.
    assert locate(model, missing, "saliency", bootstrap=0).n_generated == 0


# --- baselines and errors


def test_choices_that_look_at_no_fact() -> None:
    model = wrapped()
    assert locate(model, FACTS, "middle").golden_layer == 2
    assert locate(model, FACTS, "published").golden_layer == published_layer(4)
    assert published_layer(28) == published_layer(32) == 5
    assert published_layer(48) == 17  # GPT-2 XL
    assert published_layer(1) == 0


def test_bad_input() -> None:
    model = wrapped()
    with pytest.raises(UserError, match=r"unknown method 'lag'.*lga"):
        locate(model, FACTS, "lag")
    with pytest.raises(UserError, match="no facts"):
        locate(model, [])
    with pytest.raises(UserError, match="no old answer"):
        list(lga_rows(model, [dataclasses.replace(FACTS[0], target_old=None)]))


def test_a_fact_longer_than_the_context_is_left_out_with_its_name() -> None:
    model = wrapped()
    long = dataclasses.replace(FACTS[0], id="too-long", prompt="Italy " + "x y z " * 400)
    told: list[DataError] = []
    ranking = locate(model, [*FACTS, long], progress=Progress(on_dropped=told.append))
    assert ranking == dataclasses.replace(
        locate(model, FACTS),
        seconds=ranking.seconds,
        peak_memory_bytes=ranking.peak_memory_bytes,
        n_given=ranking.n_facts + 1,
        dropped={"too long for the model's context": 1},
        warnings=ranking.warnings,
    )
    assert f"Only {ranking.n_facts} of the {ranking.n_facts + 1} facts" in ranking.warnings[0]
    assert "too-long" in str(told[0]) and "at most 512" in str(told[0])
    with pytest.raises(UserError, match=r"too-long.*at most 512"):
        locate(model, [long])
