"""Gram products of factors = inner products of materialised weight gradients, on every family."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from families import shared
from reference import inner, mean_nll, weight_gradients
from tokenizers_built import TOKENIZERS
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating.base import Tokens
from goldenlayers.locating.lga import Loss, Scope, observe_factors, pair_products, saliency_rows
from goldenlayers.models import Model
from goldenlayers.tokens import Encoding

SCOPES: tuple[Scope, ...] = ("mlp", "down", "attention", "block")
LOSSES: tuple[Loss, ...] = ("sequence", "answer")
# Old and new answers of different lengths, so that rows are padded; the second pair shares no
# prompt token at all.
PAIRS = [
    (("The capital of Italy is", "Rome"), ("The capital of Italy is", "Paris and Ulm")),
    (("Toko plays the", "guitar"), ("An opera of", "x")),
]
# Some families' norms and attention work in float32 whatever their weights are.
NEAR = 1e-4


@cache
def wrapped(name: str, dtype: torch.dtype = torch.float64) -> Model:
    return Model.wrap(shared(name, dtype), TOKENIZERS["byte_level_bpe"]())


def encoded(model: Model) -> tuple[list[Encoding], list[Encoding]]:
    old = [model.encoder.encode(*a) for a, _ in PAIRS]
    new = [model.encoder.encode(*b) for _, b in PAIRS]
    return old, new


def first_target(encoding: Encoding, loss: Loss) -> int:
    return 1 if loss == "sequence" else encoding.n_prompt


def materialised(model: Model, encoding: Encoding, loss: Loss) -> list[dict[str, Tensor]]:
    """The gradient of every matrix of every block, by path."""
    gradients = weight_gradients(model, encoding.ids, "block", first_target(encoding, loss))
    return [
        {m.path: g for m, g in zip(block.matrices("block"), layer, strict=True)}
        for block, layer in zip(model.layers.blocks, gradients, strict=True)
    ]


@pytest.mark.parametrize("loss", LOSSES)
def test_products_equal_materialised_gradients(family: str, loss: Loss) -> None:
    model = wrapped(family)
    old, new = encoded(model)
    slow_old = [materialised(model, e, loss) for e in old]
    slow_new = [materialised(model, e, loss) for e in new]
    for scope in SCOPES:
        products = pair_products(model, old, new, scope=scope, loss=loss)
        assert products.inner.shape == (2, len(model.layers))
        assert products.inner.dtype == torch.float64
        crossed: list[float] = []
        for b in range(2):
            for block in model.layers.blocks:
                i, paths = block.index, [m.path for m in block.matrices(scope)]
                go = [slow_old[b][i][p] for p in paths]
                gn = [slow_new[b][i][p] for p in paths]
                norms = math.sqrt(inner(go, go)) * math.sqrt(inner(gn, gn))
                assert norms > 0
                assert abs(float(products.inner[b, i]) - inner(go, gn)) <= NEAR * norms
                assert float(products.old_squared[b, i]) == pytest.approx(inner(go, go), rel=NEAR)
                assert float(products.new_squared[b, i]) == pytest.approx(inner(gn, gn), rel=NEAR)
                other = [slow_new[1 - b][i][p] for p in paths]
                crossed.append(abs(float(products.inner[b, i]) - inner(go, other)) / norms)
        # The control: the old text of one fact with the new text of the other does not agree.
        assert max(crossed) > 1e-2, (family, scope)
    products = pair_products(model, old, new, loss=loss)
    for b in range(2):
        nll = float(mean_nll(model, new[b].ids, first_target(new[b], loss)))
        assert float(products.new_nll[b]) == pytest.approx(nll, rel=NEAR)


@pytest.mark.parametrize("tokens", ["no-sink", "lookup"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3"])
def test_the_share_of_some_tokens_equals_that_of_the_materialised_gradient(
    name: str, loss: Loss, tokens: Tokens
) -> None:
    """Σ_t g_t x_tᵀ over the tokens that count, formed matrix by matrix, one text at a time."""
    model = wrapped(name)
    facts = [
        Fact("Rome", "The mayor of Rome is", "big", "small", id="a"),
        Fact("Paris", "Paris, the old town, is in", "Chile", "Peru", id="b"),
    ]
    old = [model.encoder.fact(fact, fact.target_old or "") for fact in facts]
    new = [model.encoder.fact(fact, fact.target) for fact in facts]

    def slow(text: Encoding) -> list[list[Tensor]]:
        lookup = text.lookup
        assert lookup is not None
        found: list[list[Tensor]] = [[] for _ in model.layers.blocks]

        def form(layer: int, _matrix: Any, source: Any, g: Tensor) -> None:
            x = source.x.reshape(1, g.shape[1], -1)
            counted = [lookup] if tokens == "lookup" else range(1, g.shape[1])
            found[layer].append(sum(torch.outer(g[0, t], x[0, t]) for t in counted))  # type: ignore[arg-type]

        observe_factors(model, [text], "mlp", loss, form)
        return found

    products = pair_products(model, old, new, loss=loss, tokens=tokens)
    everything = pair_products(model, old, new, loss=loss)
    rows = [row for part in saliency_rows(model, facts, loss=loss, tokens=tokens) for row in part]
    scores = {row["fact"]: row for row in rows}
    for b, fact in enumerate(facts):
        one, other = slow(old[b]), slow(new[b])
        for i in range(len(model.layers)):
            expected = inner(one[i], other[i])
            norms = math.sqrt(inner(one[i], one[i]) * inner(other[i], other[i]))
            # The last block's output at the lookup token says nothing of the answer.
            assert norms > 0 or (i, loss, tokens) == (len(one) - 1, "answer", "lookup")
            assert abs(float(products.inner[b, i]) - expected) <= NEAR * norms
            size = sum(g.numel() for g in other[i])
            mean = sum(float(g.abs().sum()) for g in other[i]) / size
            assert scores[fact.id]["phi"][i] == pytest.approx(mean, rel=NEAR)
    # The control: all tokens give something else.
    assert not torch.allclose(products.inner, everything.inner, rtol=1e-3)


def test_stored_gradients_of_conv1d_are_the_transpose() -> None:
    """What the products are compared with really is stored the other way round, and square."""
    model = wrapped("gpt2_square")
    down = model.layers[0].down
    assert down.transposed and down.in_features == down.out_features
    old, new = encoded(model)
    right = weight_gradients(model, old[0].ids, "down")[0][0]
    wrong = [right.T.contiguous()]
    gn = weight_gradients(model, new[0].ids, "down")[0]
    product = float(pair_products(model, old, new, scope="down").inner[0, 0])
    assert product == pytest.approx(inner([right], gn), rel=1e-9)
    assert abs(product - inner(wrong, gn)) > 1e-3 * abs(product)


def test_tied_embeddings_get_no_part_in_it() -> None:
    model = wrapped("llama_tied")
    assert model.layers.tied
    old, new = encoded(model)
    pair_products(model, old, new, scope="block")
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bloom"])
def test_nll_is_the_models_own_loss(name: str) -> None:
    model = wrapped(name, torch.float32)
    old, new = encoded(model)
    products = pair_products(model, old, new)
    for e, nll in zip([*old, *new], [*products.old_nll, *products.new_nll], strict=True):
        ids = torch.tensor([e.ids])
        with torch.no_grad():
            expected = model.hf(input_ids=ids, labels=ids).loss
        assert float(nll) == pytest.approx(float(expected), rel=NEAR)
    answer = pair_products(model, old, new, loss="answer")
    for e, nll in zip(old, answer.old_nll, strict=True):
        ids = torch.tensor([e.ids])
        labels = ids.clone()
        labels[:, : e.n_prompt] = -100
        with torch.no_grad():
            expected = model.hf(input_ids=ids, labels=labels).loss
        assert float(nll) == pytest.approx(float(expected), rel=NEAR)


def test_batched_equals_single(family: str) -> None:
    """float32, with padding in the batch and none alone."""
    model = wrapped(family, torch.float32)
    old, new = encoded(model)
    together = pair_products(model, old, new)
    for b in range(2):
        alone = pair_products(model, [old[b]], [new[b]])
        scale = (alone.old_squared * alone.new_squared).sqrt()
        assert bool(((together.inner[b] - alone.inner[0]).abs() <= NEAR * scale[0]).all())
        assert float(together.old_nll[b]) == pytest.approx(float(alone.old_nll[0]), rel=NEAR)


@pytest.mark.parametrize("loss", LOSSES)
def test_sharing_the_prompt_changes_nothing(loss: Loss, monkeypatch: pytest.MonkeyPatch) -> None:
    from goldenlayers.locating import lga as gradients

    model = wrapped("gemma2")
    prompt = "The capital of Italy is"
    old = [model.encoder.encode(prompt, "Rome")]
    new = [model.encoder.encode(prompt, "Rome and Ulm")]
    asked: list[int] = []
    whole = gradients.token_nll

    def spy(layers: object, hidden: Tensor, targets: Tensor, same_as: Tensor) -> Tensor:
        asked.append(len(torch.unique(same_as)))
        return whole(model.layers, hidden, targets, same_as)

    monkeypatch.setattr(gradients, "token_nll", spy)
    shared_rows = pair_products(model, old, new, loss=loss)
    monkeypatch.setattr(gradients, "_common_prefix", lambda a, b: 0)
    plain = pair_products(model, old, new, loss=loss)
    n_shared = asked[1] - asked[0]
    # Shared: predictions of the prompt's tokens, and of the answers' common beginning.
    prefix = len(old[0])
    assert new[0].ids[:prefix] == old[0].ids
    assert n_shared == (prefix - 1 if loss == "sequence" else prefix - old[0].n_prompt)
    assert n_shared > 0
    for name in ("inner", "old_squared", "new_squared", "old_nll", "new_nll"):
        a, b = getattr(shared_rows, name), getattr(plain, name)
        assert torch.allclose(a, b, rtol=NEAR, atol=1e-9), name


def factors(model: Model, encodings: list[Encoding]) -> dict[str, tuple[Tensor, Tensor]]:
    """x (B, T, in) and g (B, T, out) of every MLP matrix, as the model's own dtype gave them."""
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(_layer: int, matrix: object, source: object, g: Tensor) -> None:
        x = source.x.reshape(g.shape[0], g.shape[1], -1)  # pyright: ignore
        found[matrix.path] = (x.detach().clone(), g.clone())  # pyright: ignore

    observe_factors(model, encodings, "mlp", "sequence", keep)
    return found


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "opt"])
def test_bfloat16_products_are_those_of_its_factors(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32 Gram products of bfloat16 factors against their float64 outer products."""
    from goldenlayers.locating import lga as gradients

    # Both passes compute the same rows, or bfloat16 would round them otherwise.
    monkeypatch.setattr(gradients, "_common_prefix", lambda a, b: 0)
    model = wrapped(name, torch.bfloat16)
    old, new = encoded(model)
    products = pair_products(model, old, new)
    pairs = [e for both in zip(old, new, strict=True) for e in both]
    rows = factors(model, pairs)
    for block in model.layers.blocks:
        for b in range(2):
            grads = []
            for r in (2 * b, 2 * b + 1):
                grads.append(
                    [g[r].double().T @ x[r].double() for x, g in
                     (rows[m.path] for m in block.mlp_matrices)]
                )  # fmt: skip
            norms = math.sqrt(inner(grads[0], grads[0]) * inner(grads[1], grads[1]))
            expected = inner(grads[0], grads[1])
            assert abs(float(products.inner[b, block.index]) - expected) <= 1e-3 * norms


def test_float16_does_not_underflow() -> None:
    """The loss is scaled by a power of two: as near to float32 as float16 can be."""
    half, full = wrapped("llama", torch.float16), wrapped("llama", torch.float32)
    old, new = encoded(full)
    a, b = pair_products(half, old, new), pair_products(full, old, new)
    scale = (b.old_squared * b.new_squared).sqrt()
    assert bool(((a.inner - b.inner).abs() <= 0.05 * scale).all())


def test_factors_are_zero_at_padding() -> None:
    model = wrapped("llama")
    old, new = encoded(model)
    rows = sorted([*old, *new], key=len)
    for _, g in factors(model, rows).values():
        for r, e in enumerate(rows):
            assert not g[r, len(e) - 1 :].any() and g[r, : len(e) - 1].any()


def test_a_matrix_used_twice_is_refused() -> None:
    import copy

    hf = copy.deepcopy(shared("llama", torch.float64))
    model = Model.wrap(hf, TOKENIZERS["byte_level_bpe"]())
    block = model.layers[1]
    mlp = block.mlp
    assert mlp is not None
    inside = mlp.forward
    mlp.forward = lambda x: inside(inside(x))
    old, new = encoded(model)
    with pytest.raises(UserError, match=r"layers\.1\..*twice"):
        pair_products(model, old, new, scope="down")
