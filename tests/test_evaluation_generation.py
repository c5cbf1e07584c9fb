"""Free answers, sampled text, divergence and perplexity, one text at a time beside the plan's."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from evaluation_slow import (
    TEXT,
    continuation,
    deltas_of,
    facts,
    model_of,
    slow_answer,
    slow_fluency,
    slow_perplexity,
    slow_sample,
)
from reference import full_logits

from goldenlayers.evaluation.generation import matches_answer, normalise_answer
from goldenlayers.evaluation.plan import EvaluationPlan
from goldenlayers.evaluation.scoring import fluency
from goldenlayers.evaluation.summary import summarise
from goldenlayers.evaluation.tokenised import HeldOut
from goldenlayers.facts import Probe


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_kl_generation_fluency_and_perplexity_against_slow_loops(name: str) -> None:
    model = model_of(name)
    data, deltas = facts(), deltas_of(model)
    asked = ["kl", "generation", "fluency", "perplexity"]
    plan = EvaluationPlan(model, data, asked, text=HeldOut(model, TEXT, 80))
    rows = plan.score(deltas)
    found = {(r["fact"], r["metric"], r["probe"]): r for r in rows}
    clean = slow_perplexity(model, TEXT, 80)
    moved = 0
    for fact, delta in zip(data, deltas, strict=True):
        for row in [r for r in rows if r["fact"] == fact.id and r["metric"] == "kl"]:
            prompt = model.encoder.encode(row["evidence"]["prompt"]).ids
            before = full_logits(model, prompt)[-1].double().log_softmax(-1)
            with delta.applied(model):
                after = full_logits(model, prompt)[-1].double().log_softmax(-1)
            kl = float((before.exp() * (before - after)).sum())
            assert row["score"] == pytest.approx(kl, rel=1e-3, abs=1e-5) and kl > 0
            assert fact.subject not in row["evidence"]["prompt"]
        probes: list[tuple[str, int, str, str]] = [("rewrite", 0, fact.prompt, fact.target)]
        probes += [("rephrase", n, p, fact.target) for n, p in enumerate(fact.rephrasings)]
        probes += [
            ("portability", n, p.prompt, p.answer or "") for n, p in enumerate(fact.portability)
        ]
        fluent = fact.generation_prompts or (fact.prompt,)
        for kind, n, prompt, answer in probes:
            row = found[fact.id, f"generation_{kind}", n]
            assert row["evidence"]["before"] == slow_answer(model, prompt, [answer])
            with delta.applied(model):
                said = slow_answer(model, prompt, [answer])
            assert row["evidence"]["after"] == said
            assert row["score"] == 100.0 * matches_answer(said, answer)
            moved += said != row["evidence"]["before"]
        with delta.applied(model):
            perplexity = slow_perplexity(model, TEXT, 80)
            for n, prompt in enumerate(fluent):
                tokens = slow_sample(model, prompt, f"0/{fact.id}/{n}")
                row = found[fact.id, "fluency", n]
                assert row["evidence"]["after"] == model.tokenizer.decode(tokens)
                assert row["score"] == pytest.approx(slow_fluency(tokens), abs=1e-4)
        assert found[fact.id, "perplexity", 0]["score"] == pytest.approx(perplexity, rel=1e-4)
        assert found[fact.id, "perplexity_before", 0]["score"] == pytest.approx(clean, rel=1e-4)
    assert sum(r["metric"] == "kl" for r in rows) >= 6 and moved


def test_an_alias_of_the_answer_is_as_good_as_the_answer() -> None:
    model = model_of("llama")
    prompt = "The mother tongue is"
    alias = normalise_answer(slow_answer(model, prompt, ["Italian"]))[0]  # what it says, garbled
    assert alias.isalpha()

    def rows(*aliases: str) -> list[dict[str, Any]]:
        probes = (Probe(prompt, "Italian", "Reasoning", aliases), Probe("The city is", "Rome", "x"))
        fact = dataclasses.replace(facts()[0], portability=probes)
        return EvaluationPlan(model, [fact], ["portability", "generation"]).score_applied()

    def of(found: list[dict[str, Any]], metric: str) -> Any:
        return next(r for r in found if r["metric"] == metric and r["probe"] == 0)

    with_alias, without = rows("Langobardic", alias), rows()
    assert of(without, "generation_portability")["score"] == 0
    row = of(with_alias, "generation_portability")
    assert row["score"] == 100 and row["evidence"]["aliases"] == ["Langobardic", alias]
    assert of(rows("Langobardic"), "generation_portability")["score"] == 0
    # Teacher forcing takes the answer alone.
    assert of(with_alias, "portability") == of(without, "portability")
    # The mean is over the kinds, as portability's.
    kinds = summarise(with_alias).kinds["generation_portability"]
    assert kinds["Reasoning"].mean == 100 and set(kinds) == {"Reasoning", "x"}


def test_a_long_alias_is_waited_for() -> None:
    model = model_of("llama")
    prompt = "In France one speaks"
    new = continuation(model, prompt, 60)
    decode = model.tokenizer.decode
    whole = str(decode(new, skip_special_tokens=True)).strip().splitlines()[0]
    assert len(model.encoder.encode(prompt, whole).answer_ids) > 20
    fact = dataclasses.replace(facts()[0], portability=(Probe(prompt, "so", "", (whole,)),))
    rows = EvaluationPlan(model, [fact], ["generation"]).score_applied()
    assert rows[-1]["metric"] == "generation_portability" and rows[-1]["score"] == 100


def test_fluency_counts_n_grams_of_the_sampled_tokens() -> None:
    model = model_of("gpt2")
    plan = EvaluationPlan(model, facts()[:1], ["fluency"])
    (before,) = plan.baseline().values()
    (row,) = plan.score_applied()
    assert len(before.tokens) == 100
    assert row["score"] == pytest.approx(fluency(before.tokens), abs=1e-5)
    again = EvaluationPlan(model, facts()[::-1], ["fluency"], batch_size=1).baseline()
    again = dict(reversed(again.items()))
    assert next(iter(again.values())).tokens == before.tokens
    other = EvaluationPlan(model, facts()[:1], ["fluency"], seed=1).baseline()
    assert next(iter(other.values())).tokens != before.tokens
