"""Staying clear of neighbours: what an edit's own prompt would ask of other names is kept still.

A rank-one edit along u adds (v* − v)·ρ(n) where the key is n, ρ(n) = (n·u) / (k·u). ROME's
u = C⁻¹k* keeps ρ small over the keys of a text, but the prompt's own keys with *other* subjects
are few among those, and near k*. Here they are added: A = C + λ Σ n̂n̂ᵀ and u = A⁻¹k*, so ρ falls
at the names in the sum and, since keys of names lie alike, at those that are not.

The names are the nearest, by |nᵀC⁻¹k*| / k*ᵀC⁻¹k* (ROME's ρ), of a pool that comes with the package
(``names.json``: written for this project, its licence), and the user's own. No name of the pool is
used that stands in a prompt of the edited facts or of their probes, or that holds the subject: an
edit is judged on what it was not told.

Source: this project's own method; the update is ROME's (Meng et al. 2022, arXiv 2202.05262) in
another metric.

Shapes: B facts, M names of the pool and the user's own, n names to stay clear of, F MLP width.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.editors.base import Clearing
from goldenlayers.editors.name_keys import Names, Reader, reader, template
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.prompts import plain_words
from goldenlayers.statistics.moments import Beside

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing

ALIKE = 0.98
"""Whitened cosine of two keys from which a name is the fact's own: an alias of its subject."""

LEAST_LEFT = 0.01
"""Smallest k*ᵀA⁻¹k* / k*ᵀC⁻¹k* accepted: what is left of the fact's key clear of the names."""

_KEPT = 4  # prompts and layers whose names' keys are remembered
_STATES = 1 << 30  # bytes of what readers go on from


@cache
def kinds() -> dict[str, tuple[str, ...]]:
    """The names that come with the package, by their kind."""
    file = importlib.resources.files("goldenlayers.editors") / "names.json"
    found: dict[str, list[str]] = json.loads(file.read_text("utf-8"))["names"]
    return {kind: tuple(names) for kind, names in found.items()}


@cache
def pool() -> tuple[str, ...]:
    """The names that come with the package, of all kinds."""
    return tuple(name for names in kinds().values() for name in names)


def words(text: str) -> str:
    """The words of a text, without case and accents, with one space around each."""
    return f" {plain_words(text)} "


def usable(facts: tuple[Fact, ...]) -> frozenset[str]:
    """The names of the pool that say nothing of some facts: see the head of this module."""
    return _usable(pool(), facts)


@lru_cache(maxsize=8)
def _usable(names: tuple[str, ...], facts: tuple[Fact, ...]) -> frozenset[str]:
    return unsaid(names, facts)


def unsaid(names: Iterable[str], facts: Iterable[Fact]) -> frozenset[str]:
    """Those of ``names`` that stand in no prompt of the facts or of their probes, nor hold a
    subject.
    """
    facts = tuple(facts)
    subjects = {plain for fact in facts if (plain := words(fact.subject)).strip()}
    texts = {
        words(text)
        for fact in facts
        for text in (
            fact.prompt,
            *fact.rephrasings,
            *fact.generation_prompts,
            *(probe.prompt for probe in (*fact.locality, *fact.portability)),
        )
    }
    said = "\n".join(texts)
    return frozenset(
        name
        for name in names
        if (plain := words(name)) not in said and not any(s in plain for s in subjects)
    )


@dataclass(frozen=True, eq=False)
class Near:
    """The names that an edit stays clear of, nearest first, their keys (F, n), and the metric A.

    ``others`` (F, m): keys of the names of the pool that come next, as many again.
    """

    names: tuple[str, ...]
    keys: Tensor
    metric: Beside
    others: Tensor

    def overlap(self, direction: Tensor, key: Tensor) -> float:
        """Mean |ρ| at ``others`` of an edit along ``direction`` (F,) that writes on ``key``."""
        arrives = (self.others.T @ direction).abs().mean()
        return round(float(arrives / (key.to(direction) @ direction).abs()), 6)


def stay_clear(work: Editing, layer: int, facts: Sequence[Fact], K: Tensor) -> Near | None:
    """The names that one edit of ``facts``, with keys K (F, B), is to stay clear of at a layer.

    None where the editor's settings and the user name none.

    Raises:
        UserError: no name can be used, a name of the user's has the fact's own key, or the names
            leave too little of a fact's key.
    """
    editor = work.editor
    assert isinstance(editor, Clearing)  # who asks has its settings
    if not editor.neighbours and not work.names:
        return None
    covariance = work.covariance(layer)
    K = K.to(covariance.moment.device).to(covariance.moment.dtype)
    solved = covariance.solve(K)  # (F, B)
    energies = (K * solved).sum(0)
    if not bool((energies > 0).all()):
        return None  # a dead key: the solve will say so
    allowed = usable(tuple(facts)) & usable(tuple(work.judged))
    subjects = {words(fact.subject) for fact in facts}
    own = {name for name in work.names if words(name) not in subjects}
    used: dict[tuple[int, ...], tuple[float, str, Tensor]] = {}
    unused: dict[tuple[int, ...], Tensor] = {}
    for fact, query in zip(facts, (solved / energies).T, strict=True):
        names = _names_of(work, layer, fact)
        shares = (names.keys.to(query) @ query).abs()  # (M,)
        left = editor.neighbours
        for m in shares.argsort(descending=True, stable=True).tolist():
            name, ids = names.names[m], names.ids[m]
            take = name in allowed and name not in own and left > 0
            left -= take
            # Copies: a row of a view would keep the keys of all names in memory.
            if take or name in own:
                used.setdefault(ids, (float(shares[m]), name, names.keys[m].clone()))
            elif name in allowed and len(unused) < editor.neighbours:
                unused[ids] = names.keys[m].clone()
    near = _metric(work, layer, list(used.values()), solved / energies.sqrt())
    if near is None:
        if editor.neighbours or own:
            raise _none_usable(facts, len(pool()), len(allowed))
        return None
    kept, keys, metric = near
    left = (K * metric.solve(K)).sum(0) / energies
    if float(left.min()) < LEAST_LEFT:
        raise UserError(
            f"staying clear of {len(kept)} names leaves {float(left.min()):.2g} of the key of fact "
            f"'{facts[int(left.argmin())].id}'; the nearest is '{kept[0]}'",
            expected=f"at least {LEAST_LEFT:g}",
            fix="Use fewer names (--set neighbours 32), a smaller weight (--set clear_weight 1), "
            "or another layer",
        )
    rest = [key for ids, key in unused.items() if ids not in used]
    others = torch.stack(rest, dim=1) if rest else keys[:, :0]
    return Near(kept, keys, metric, others.to(keys))


def _metric(
    work: Editing,
    layer: int,
    used: list[tuple[float, str, Tensor]],
    whitened: Tensor,
) -> tuple[tuple[str, ...], Tensor, Beside] | None:
    """Names, keys and metric of those of ``used`` whose keys are neither zero nor a fact's own.

    ``used`` are ρ, name and key; ``whitened`` (F, B) is C⁻¹k / √(kᵀC⁻¹k) of the facts' keys k.
    """
    editor, covariance = work.editor, work.covariance(layer)
    assert isinstance(editor, Clearing)
    ranked = sorted((one for one in used if bool(one[2].any())), key=lambda one: -one[0])
    if not ranked:
        return None
    keys = torch.stack([key for _, _, key in ranked], dim=1).to(whitened)
    metric = covariance.beside(keys, editor.clear_weight)
    alike = (metric.rows.T @ whitened).abs().amax(1) > ALIKE  # (n,)
    for m in alike.nonzero().flatten().tolist():
        if ranked[m][1] in work.names:
            raise UserError(
                f"the name '{ranked[m][1]}' to stay clear of has the key of the edited fact itself "
                f"at layer {layer}",
                expected="other things than the fact's subject",
                fix="Leave it out",
            )
    if bool(alike.any()):
        kept = (~alike).nonzero().flatten().tolist()
        if not kept:
            return None
        ranked, keys = [ranked[m] for m in kept], keys[:, kept]
        metric = covariance.beside(keys, editor.clear_weight)
    return tuple(name for _, name, _ in ranked), keys, metric


def _none_usable(facts: Sequence[Fact], n_pool: int, n_allowed: int) -> UserError:
    return UserError(
        f"there is no name to stay clear of for the prompt '{facts[0].prompt}': of {n_pool} in the "
        f"pool, {n_pool - n_allowed} stand in the fact's prompts or its probes', and the others "
        "have no key of their own there",
        fix="Give names (--clear-of), or --set neighbours 0",
    )


_Prompt = tuple[str, str, tuple[str, ...], bool]
"""A prompt before and behind the name, the user's names, and whether the pool's are read."""


def _names_of(work: Editing, layer: int, fact: Fact) -> Names:
    """The keys of the pool's names and the user's in the fact's prompt, on the model as it is."""
    editor = work.editor
    assert isinstance(editor, Clearing)
    prompt: _Prompt = (*template(fact), tuple(work.names), editor.neighbours > 0)
    keys: dict[tuple[int, _Prompt], Names] = work.kept.setdefault("names", {})
    readers: dict[_Prompt, Reader] = work.kept.setdefault("readers", {})
    before, behind, own, pooled = prompt
    listed = (*own, *(pool() if pooled else ()))
    if deltas_in_force(work.model):
        return reader(work.model, (before, behind), listed).read(layer)
    if (layer, prompt) not in keys:
        if prompt not in readers:
            readers[prompt] = reader(work.model, (before, behind), listed)
        keys[layer, prompt] = readers[prompt].read(layer)
        if len(keys) > _KEPT:
            del keys[next(iter(keys))]
        if _bytes(readers) > _STATES:
            del readers[next(iter(readers))]
    return keys[layer, prompt]


def _bytes(readers: Mapping[Any, Reader]) -> int:
    return sum(state.nbytes for one in readers.values() for state in one.states)


def by_template(groups: Sequence[Sequence[int]], facts: Sequence[Fact]) -> list[int]:
    """The places of ``groups`` of facts in an order in which those with one prompt stand together.

    So the names' keys are read once for each prompt.
    """
    return sorted(range(len(groups)), key=lambda g: template(facts[groups[g][0]]))
