"""Slow, obvious versions of what the package computes cleverly. Nothing here is shared with src."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from goldenlayers.models import Model


def mean_nll(model: Model, ids: tuple[int, ...], first_target: int = 1) -> Tensor:
    """Mean −log p of tokens ``first_target``.. of one unpadded text, by the model's own logits."""
    row = torch.tensor([ids], device=model.device)
    logits = model.hf(input_ids=row, use_cache=False).logits[0]
    return cross_entropy(logits[first_target - 1 : -1], row[0, first_target:])


def weight_gradients(
    model: Model, ids: tuple[int, ...], scope: str, first_target: int = 1
) -> list[list[Tensor]]:
    """Materialised gradients of every matrix of the scope, per layer, by plain autograd."""
    weights = [[m.weight for m in block.matrices(scope)] for block in model.layers.blocks]
    flat = [w for layer in weights for w in layer]
    for weight in flat:
        weight.requires_grad_(True)
    try:
        gradients = iter(torch.autograd.grad(mean_nll(model, ids, first_target), flat))
    finally:
        for weight in flat:
            weight.requires_grad_(False)
    return [[next(gradients) for _ in layer] for layer in weights]


def inner(left: list[Tensor], right: list[Tensor]) -> float:
    """Sum of element-wise products, in float64."""
    return sum(float((a.double() * b.double()).sum()) for a, b in zip(left, right, strict=True))


def full_logits(model: Model, ids: Any) -> Tensor:
    """Logits (T, V) of one unpadded text."""
    with torch.no_grad():
        return model.hf(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]


def slow_greedy(
    model: Model, ids: Any, max_new_tokens: int, ends: frozenset[int] = frozenset()
) -> list[int]:
    """Arg-max continuation without a cache: the whole text anew for every token."""
    text, new = list(ids), []
    for _ in range(max_new_tokens):
        token = int(full_logits(model, text)[-1].argmax())
        if token in ends:
            break
        new.append(token)
        text.append(token)
    return new


def slow_value(
    model: Model,
    rows: list[tuple[tuple[int, ...], int, int]],
    kl_row: tuple[tuple[int, ...], int],
    sites: dict[str, nn.Module],
    *,
    steps: int,
    lr: float,
    kl_factor: float,
    weight_decay: float,
    clamp: float,
    stop_loss: float = 0.0,
    lr_absolute: bool = False,
    kl_reversed: bool = False,
) -> tuple[dict[str, Tensor], list[float], list[float]]:
    """The value optimisation of one fact by whole-model passes, one text at a time.

    ``rows`` are (ids, first answer token, lookup token) of the prompt behind each prefix, the bare
    one first; ``kl_row`` (ids, lookup). δ is added to the output of each of ``sites``: the down
    projection for ROME, the block for MEMIT, the down projection and the attention for PMET. Its
    bound and its decay count in lengths of that output. ``kl_reversed`` takes the KL term the other
    way round, as a control. Returns δ (D,) per site, and loss and NLL at every step.
    """

    def run(ids: tuple[int, ...], lookup: int, delta: dict[str, Tensor]) -> tuple[Tensor, Any]:
        seen: dict[str, Tensor] = {}

        def hook(name: str) -> Any:
            def change(_module: Any, _args: Any, output: Any) -> Any:
                y = output[0] if isinstance(output, tuple) else output
                flat = y.reshape(-1, y.shape[-1])
                seen[name] = flat[lookup].detach()
                added = torch.zeros_like(flat)
                added[lookup] = 1.0
                y = (flat + added * delta[name]).reshape(y.shape) if delta else y
                return (y, *output[1:]) if isinstance(output, tuple) else y

            return change

        handles = [site.register_forward_hook(hook(name)) for name, site in sites.items()]
        try:
            logits = model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        return logits, seen

    with torch.no_grad():
        clean = run(rows[0][0], rows[0][2], {})[1]
        kl_clean = run(*kl_row, {})[0][kl_row[1]].log_softmax(-1)
    norms = {name: float(v.norm()) for name, v in clean.items()}
    delta = {name: torch.zeros_like(v, requires_grad=True) for name, v in clean.items()}
    groups = [
        {"params": [d], "lr": lr if lr_absolute else lr * norms[name] / d.shape[0] ** 0.5}
        for name, d in delta.items()
    ]
    adam = torch.optim.Adam(groups)
    losses: list[float] = []
    nlls: list[float] = []
    for step in range(steps):
        parts = []
        for ids, first, lookup in rows:
            logits = run(ids, lookup, delta)[0]
            parts.append(cross_entropy(logits[first - 1 : -1], torch.tensor(ids[first:])))
        nll = torch.stack(parts).mean()
        now = run(*kl_row, delta)[0][kl_row[1]].log_softmax(-1)
        edited_from_clean = (now.exp() * (now - kl_clean)).sum()
        clean_from_edited = (kl_clean.exp() * (kl_clean - now)).sum()
        kl = clean_from_edited if kl_reversed else edited_from_clean
        loss = nll + kl_factor * kl
        for name, d in delta.items():
            loss = loss + weight_decay * d.norm() / norms[name] ** 2
        losses.append(float(loss.detach()))
        nlls.append(float(nll.detach()))
        if losses[-1] < stop_loss or step == steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for name, d in delta.items():
                d *= min(1.0, clamp * norms[name] / max(float(d.norm()), 1e-30))
    return {name: d.detach() for name, d in delta.items()}, losses, nlls
