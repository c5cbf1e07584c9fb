"""Every editor derived anew from its paper, in float64: slow, one text at a time, whole matrices.

The model is run by its own forward with plain hooks; C is a whole matrix and is inverted; ΔW is a
whole matrix. Nothing is shared with the editors but the way in which a text is split into tokens.
What the formulas stand for: methods of Meng et al. 2022 (arXiv 2202.05262), Gupta et al. 2024
(2403.07175), Meng et al. 2023 (2210.07229), Gupta et al. 2024 (2403.14236), Fang et al. 2025
(2410.02355), Li et al. 2024 (2308.08742), Zhu et al. 2020 (2012.00363).

Shapes: B facts, P prompts of a fact (the bare one first), D model width, F MLP width. Keys are
columns (F, B), changes of a weight (D, F).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from reference import slow_value
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from goldenlayers.facts import Fact
from goldenlayers.models import Model


@dataclass
class Published:
    """A private copy of a model and what its editors are told."""

    model: Model
    prefixes: Sequence[str]
    C: dict[int, Tensor]
    lr: float = 0.5
    steps: int = 6
    clamp: float = 4.0
    kl_factor: float = 0.0625
    weight_decay: float = 0.5
    # Controls: what is not published.
    kl_reversed: bool = False
    keys_alike: bool = False
    block_residual: bool = False
    cache: dict[int, Tensor] = field(default_factory=dict)
    # What the value search found on the untouched model; may be shared where all else is equal.
    found: dict[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict)
    edited: bool = False

    def __post_init__(self) -> None:
        hf = copy.deepcopy(self.model.hf)
        self.model = Model.wrap(hf, self.model.tokenizer, name=self.model.name)

    # --- what the model does

    def texts(self, fact: Fact, answer: str) -> list[Any]:
        """The fact's prompt and answer behind each prefix, as tokens."""
        encode = self.model.encoder.encode
        return [encode(prefix + fact.prompt, answer, fact.subject) for prefix in self.prefixes]

    def read(self, module: nn.Module, text: Any) -> tuple[Tensor, Tensor]:
        """Input and output of a module at the text's lookup token."""
        seen: list[tuple[Tensor, Tensor]] = []

        def keep(_module: Any, given: Any, output: Any) -> None:
            out = output[0] if isinstance(output, tuple) else output
            x = given[0] if given else out
            seen.append((x.reshape(-1, x.shape[-1]), out.reshape(-1, out.shape[-1])))

        handle = module.register_forward_hook(keep)
        try:
            with torch.no_grad():
                self.model.hf(input_ids=torch.tensor([text.ids]), use_cache=False)
        finally:
            handle.remove()
        ((x, y),) = seen
        return x[text.lookup].clone(), y[text.lookup].clone()

    def down(self, layer: int) -> nn.Module:
        return self.model.layers[layer].down.module

    def keys(self, fact: Fact, layer: int) -> Tensor:
        """The down projection's input at the lookup token of every prompt, (P, F)."""
        return torch.stack([self.read(self.down(layer), t)[0] for t in self.texts(fact, "")])

    def bare(self, module: nn.Module, fact: Fact) -> Tensor:
        """A module's output at the bare prompt's lookup token, (D,)."""
        return self.read(module, self.texts(fact, "")[0])[1]

    def weight(self, layer: int) -> Tensor:
        """The down projection's matrix (D, F), as a view."""
        raw = self.down(layer).weight
        assert isinstance(raw, Tensor)
        return raw.T if type(self.down(layer)).__name__ == "Conv1D" else raw

    def add(self, layer: int, change: Tensor) -> None:
        self.edited = True
        with torch.no_grad():
            self.weight(layer).add_(change)

    # --- the value search

    def delta(self, fact: Fact, sites: dict[str, nn.Module]) -> dict[str, Tensor]:
        """δ at each site."""
        key = (fact.id, *sites)
        if not self.edited and key in self.found:
            return self.found[key]
        kl = self.model.encoder.encode(f"{fact.subject} is a", "", fact.subject)
        assert kl.lookup is not None
        rows = [(t.ids, t.n_prompt, t.lookup) for t in self.texts(fact, fact.target)]
        delta, _, _ = slow_value(
            self.model,
            rows,
            (kl.ids, kl.lookup),
            sites,
            steps=self.steps,
            lr=self.lr,
            kl_factor=self.kl_factor,
            weight_decay=self.weight_decay,
            clamp=self.clamp,
            stop_loss=0.05,
            lr_absolute=True,
            kl_reversed=self.kl_reversed,
        )
        if not self.edited:
            self.found[key] = delta
        return delta

    # --- one fact

    def rome(self, fact: Fact, layer: int) -> Tensor:
        """ΔW = (v0 + δ − W k_b) uᵀ / (k_b·u), u = C⁻¹k*; k* the plain mean over prompts."""
        keys, down = self.keys(fact, layer), self.down(layer)
        v = self.bare(down, fact)
        v_star = v + self.delta(fact, {"mlp": down})["mlp"]
        u = torch.linalg.inv(self.C[layer]) @ keys.mean(0)
        return torch.outer(v_star - v, u) / (keys[0] @ u)

    def r_rome(self, fact: Fact, layer: int) -> Tensor:
        """The same with k* and the mean value in place of the bare prompt's."""
        keys, down = self.keys(fact, layer), self.down(layer)
        values = torch.stack([self.read(down, t)[1] for t in self.texts(fact, "")])
        v_star = values[0] + self.delta(fact, {"mlp": down})["mlp"]
        k_star = keys.mean(0)
        u = torch.linalg.inv(self.C[layer]) @ k_star
        return torch.outer(v_star - values.mean(0), u) / (k_star @ u)

    # --- many facts, one layer or several

    def mean_keys(self, facts: Sequence[Fact], layer: int) -> Tensor:
        """Keys (F, B): the mean of the bare prompt's and of the others' mean."""
        found = []
        for fact in facts:
            keys = self.keys(fact, layer)
            half = torch.stack([keys[:1].mean(0), keys[1:].mean(0)]).mean(0)
            found.append(keys.mean(0) if self.keys_alike else half)
        return torch.stack(found, dim=1)

    def spread(
        self,
        facts: Sequence[Fact],
        layers: Sequence[int],
        solve: Callable[[int, Tensor, Tensor], Tensor],
        share: Callable[[int], float] = float,
        pmet: bool = False,
    ) -> dict[int, Tensor]:
        """Layer by layer, ``solve(layer, K, R)`` on the model as edited so far; R (D, B)."""
        top = self.model.layers[layers[-1]]
        if pmet:
            sites: dict[str, nn.Module] = {"mlp": top.down.module, "attention": top.attention}
        else:
            sites = {"block": top.module}
        written = top.module if self.block_residual or not pmet else top.down.module
        wanted = []
        for fact in facts:
            delta = self.delta(fact, sites)["mlp" if pmet else "block"]
            wanted.append(self.bare(written, fact) + delta)
        z = torch.stack(wanted, dim=1)
        changes = {}
        for i, layer in enumerate(layers):
            now = torch.stack([self.bare(written, fact) for fact in facts], dim=1)
            K = self.mean_keys(facts, layer)
            changes[layer] = solve(layer, K, (z - now) / share(len(layers) - i))
            self.add(layer, changes[layer])
        return changes

    def memit(self, facts: Sequence[Fact], layers: Sequence[int], lam: float) -> dict[int, Tensor]:
        """ΔW = R Kᵀ(λC + KKᵀ)⁻¹."""

        def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
            return R @ K.T @ torch.linalg.inv(lam * self.C[layer] + K @ K.T)

        return self.spread(facts, layers, solve)

    def pmet(self, facts: Sequence[Fact], layers: Sequence[int], lam: float) -> dict[int, Tensor]:
        """MEMIT's solve; a share is one over the root of the layers that are left."""

        def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
            return R @ K.T @ torch.linalg.inv(lam * self.C[layer] + K @ K.T)

        return self.spread(facts, layers, solve, math.sqrt, pmet=True)

    def emmet(self, facts: Sequence[Fact], layers: Sequence[int], lam: float) -> dict[int, Tensor]:
        """ΔW = R (KᵀC⁻¹K + λI)⁻¹KᵀC⁻¹."""

        def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
            inverse = torch.linalg.inv(self.C[layer])
            inside = K.T @ inverse @ K + lam * torch.eye(K.shape[1], dtype=K.dtype)
            return R @ torch.linalg.inv(inside) @ K.T @ inverse

        return self.spread(facts, layers, solve)

    def alphaedit(
        self, facts: Sequence[Fact], layers: Sequence[int], threshold: float, l2: float
    ) -> dict[int, Tensor]:
        """[P(KKᵀ + cache) + l2·I] ΔWᵀ = P K Rᵀ; afterwards the keys join the cache."""

        def solve(layer: int, K: Tensor, R: Tensor) -> Tensor:
            values, vectors = torch.linalg.eigh(self.C[layer])
            small = vectors[:, values < threshold]
            assert 0 < small.shape[1] < len(values)
            P = small @ small.T
            cache = self.cache.get(layer, torch.zeros_like(P))
            left = P @ (K @ K.T + cache) + l2 * torch.eye(len(P), dtype=P.dtype)
            return torch.linalg.solve(left, P @ K @ R.T).T

        changes = self.spread(facts, layers, solve)
        for layer in layers:
            K = self.mean_keys(facts, layer)
            self.cache[layer] = self.cache.get(layer, torch.zeros_like(K @ K.T)) + K @ K.T
        return changes

    # --- fine-tuning

    def fine_tune(
        self,
        facts: Sequence[Fact],
        layer: int,
        *,
        lr: float,
        bound: float | None,
        prompt_last: bool,
        stop_loss: float,
    ) -> Tensor:
        """Adam on the matrix itself; each step is brought back to the bound."""
        weight = self.down(layer).weight
        assert isinstance(weight, Tensor)
        start = weight.detach().clone()
        weight.requires_grad_(True)
        adam = torch.optim.Adam([weight], lr=lr)
        for _ in range(self.steps):
            losses = []
            for fact in facts:
                text = self.model.encoder.encode(fact.prompt, fact.target, fact.subject)
                answer = torch.tensor(text.answer_ids)
                if prompt_last:
                    prompt = torch.tensor([text.ids[: text.n_prompt]])
                    last = self.model.hf(input_ids=prompt, use_cache=False).logits[0, -1]
                    losses.append(-last.log_softmax(-1)[answer].mean())
                else:
                    ids = torch.tensor([text.ids])
                    logits = self.model.hf(input_ids=ids, use_cache=False).logits[0]
                    losses.append(cross_entropy(logits[text.n_prompt - 1 : -1], answer))
            loss = torch.stack(losses).mean()
            if float(loss.detach()) < stop_loss:
                break
            adam.zero_grad()
            loss.backward()
            adam.step()
            if bound is not None:
                with torch.no_grad():
                    weight.copy_(weight.clamp(start - bound, start + bound))
        weight.requires_grad_(False)
        change = weight.detach() - start
        return change.T if type(self.down(layer)).__name__ == "Conv1D" else change
