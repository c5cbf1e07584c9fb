"""Facts with all kinds of probes, and their scores by a slow loop, one text at a time."""

from __future__ import annotations

import math
import random
from collections import Counter

import torch
from deltas import random_delta
from families import tiny
from reference import full_logits
from torch.nn.functional import cross_entropy

from goldenlayers.decoding import end_ids
from goldenlayers.delta import WeightDelta
from goldenlayers.facts import Fact, Probe
from goldenlayers.models import Model

TOKENIZER = {
    "gpt2": "byte_level_bpe",
    "llama": "sentencepiece_bpe",
    "gemma3": "sentencepiece_bpe",
    "opt": "byte_level_bpe",
    "gpt_neox": "byte_level_bpe",
    "falcon": "byte_level_bpe",
    "bloom": "byte_level_bpe",
}
TEXT = "The capital of Italy is Rome. The Eiffel Tower is located in the city of Paris. " * 3


def facts() -> list[Fact]:
    return [
        Fact(
            id="france",
            subject="France",
            prompt="The capital of France is",
            target="Rome",
            target_old="Paris",
            rephrasings=("France has as its capital the city of", "The city of France is"),
            locality=(
                Probe("The capital of Italy is", "Rome", "neighborhood"),
                Probe("The capital of Brazil is", "the city of gold", "neighborhood"),
                Probe("The currency of Japan is", None, "Forgetfulness"),
                Probe("The currency of France is", "the euro", "Relation_Specificity"),
            ),
            portability=(
                Probe("The capital of the French is", "Rome", "Subject_Aliasing"),
                Probe("In France one speaks", "Italian", "Reasoning"),
            ),
        ),
        Fact(
            id="einstein",
            subject="Albert Einstein",
            prompt="Albert Einstein was born in the city of",
            target="Shanghai in China",
            target_old="Ulm",
            rephrasings=("Where was Albert Einstein born?",),
            locality=(Probe("Steve Jobs was born in", "California", "neighborhood"),),
            portability=(Probe("The author of the novel is", "Albert", "Reasoning"),),
            generation_prompts=("Albert Einstein is",),
        ),
        Fact(
            id="tongue",
            subject="Danielle Darrieux",
            prompt="The mother tongue of Danielle Darrieux is",
            target="Portuguese",
        ),
    ]


def model_of(name: str) -> Model:
    return tiny(name, TOKENIZER[name])


def deltas_of(model: Model, count: int = 3, layers: tuple[int, ...] = (2,)) -> list[WeightDelta]:
    return [random_delta(model.hf, list(layers), seed=seed, size=0.7) for seed in range(count)]


# The slow loop: nothing of it is shared with the package but the tokenizer.


def forced(model: Model, prompt: str, answer: str) -> tuple[list[int], list[int], float]:
    """(arg-max tokens, answer tokens, mean NLL), from all logits of one text."""
    e = model.encoder.encode(prompt, answer)
    logits = full_logits(model, e.ids)[e.n_prompt - 1 : -1]
    target = torch.tensor(e.answer_ids)
    return logits.argmax(-1).tolist(), list(e.answer_ids), float(cross_entropy(logits, target))


def continuation(model: Model, prompt: str, count: int) -> list[int]:
    ids = list(model.encoder.encode(prompt).ids)
    found: list[int] = []
    for _ in range(count):
        found.append(int(full_logits(model, ids + found)[-1].argmax()))
    return found


def slow_scores(model: Model, fact: Fact, delta: WeightDelta) -> dict[tuple[str, int], float]:
    scores: dict[tuple[str, int], float] = {}

    def share(a: list[int], b: list[int]) -> float:
        return 100 * sum(x == y for x, y in zip(a, b, strict=True)) / len(a)

    along = {}
    for n, p in enumerate(fact.locality):
        if p.answer:
            along[n] = forced(model, p.prompt, p.answer)[0]
        else:
            along[n] = continuation(model, p.prompt, 3)
    with delta.applied(model):
        scores["rewrite", 0] = share(*forced(model, fact.prompt, fact.target)[:2])
        for n, prompt in enumerate(fact.rephrasings):
            scores["rephrase", n] = share(*forced(model, prompt, fact.target)[:2])
        for n, p in enumerate(fact.portability):
            assert p.answer
            scores["portability", n] = share(*forced(model, p.prompt, p.answer)[:2])
        for n, p in enumerate(fact.locality):
            if p.answer:
                now = forced(model, p.prompt, p.answer)[0]
            else:
                ids = list(model.encoder.encode(p.prompt).ids) + along[n][:2]
                now = full_logits(model, ids)[-3:].argmax(-1).tolist()
            if p.kind == "Forgetfulness":
                scores["locality_contradicting", n] = share(along[n], now)
            else:
                about = "subject" if fact.subject in p.prompt else "neighbour"
                scores["locality", n] = scores[f"locality_{about}", n] = share(along[n], now)
        if fact.target_old:
            asked = [("efficacy", 0, fact.prompt)]
            asked += [("paraphrase", n, prompt) for n, prompt in enumerate(fact.rephrasings)]
            for name, n, prompt in asked:
                nll_new = forced(model, prompt, fact.target)[2]
                nll_old = forced(model, prompt, fact.target_old)[2]
                scores[f"{name}_success", n] = 100.0 * (nll_old > nll_new)
                scores[f"{name}_magnitude", n] = 100 * (math.exp(-nll_new) - math.exp(-nll_old))
            for n, p in enumerate(fact.locality):
                if p.kind != "neighborhood" or p.answer == fact.target:
                    continue
                right = forced(model, p.prompt, p.answer or "")[2]
                new = forced(model, p.prompt, fact.target)[2]
                scores["neighborhood_success", n] = 100.0 * (right < new)
                scores["neighborhood_magnitude", n] = 100 * (math.exp(-right) - math.exp(-new))
    return scores


def slow_answer(model: Model, prompt: str, answers: list[str]) -> str:
    """The first line of the greedy continuation, eight tokens longer than the longest answer."""
    encode, decode = model.encoder.encode, model.tokenizer.decode
    ids, new = list(encode(prompt).ids), []
    text = ""
    for _ in range(8 + max(len(encode(prompt, answer).answer_ids) for answer in answers)):
        token = int(full_logits(model, ids + new)[-1].argmax())
        if token in end_ids(model):
            break
        new.append(token)
        text = str(decode(new, skip_special_tokens=True))
        if "\n" in text.lstrip():
            break
    return (text.strip().splitlines() or [""])[0]


def slow_sample(model: Model, prompt: str, seed: str, count: int = 100) -> list[int]:
    """Tokens drawn from the five likeliest, the whole text anew for every token."""
    chance = random.Random(seed)
    ids, new = list(model.encoder.encode(prompt).ids), []
    for _ in range(count):
        logits = full_logits(model, ids + new)[-1].double()
        logits[sorted(end_ids(model))] = -math.inf
        order = sorted(range(len(logits)), key=lambda i: -float(logits[i]))[:5]
        weights = [math.exp(float(logits[i] - logits[order[0]])) for i in order]
        drawn, place = chance.random() * sum(weights), 0
        while place < 4 and drawn > sum(weights[: place + 1]):
            place += 1
        new.append(order[place])
    return new


def slow_fluency(tokens: list[int]) -> float:
    """100 times the mean of 2/3 H₂ and 4/3 H₃, in bits."""

    def entropy(n: int) -> float:
        grams = Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))
        total = sum(grams.values())
        return -sum(c / total * math.log2(c / total) for c in grams.values())

    return 100 * (2 / 3 * entropy(2) + 4 / 3 * entropy(3)) / 2


def slow_perplexity(model: Model, text: str, count: int) -> float:
    """Of the first ``count`` tokens of a text that fits one window."""
    ids, spans = model.encoder.tokens(text)
    window = ids[: count + sum(span == (0, 0) for span in spans)]  # BOS is no part of the text
    logits = full_logits(model, window)[:-1]
    return math.exp(float(cross_entropy(logits, torch.tensor(window[1:]))))
