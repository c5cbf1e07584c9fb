"""Key transfer analysis (KTA): how far a rank-one edit at each layer carries, and where it spills.

A rank-one edit at block L adds (v* − W k)·ρ_L(k') to the MLP's output at every token whose key is
k', with ρ_L(k') = (k'ᵀ C⁻¹ k) / (kᵀ C⁻¹ k), k the edited fact's key at the lookup token. So forward
passes alone tell how far the edit carries to rephrasings and how much it spills on other prompts.
Source: this project's own method; the update it reads is ROME's (Meng et al. 2022, arXiv
2202.05262, equation 2).

Shapes: B texts of a batch, T tokens, D model width, F MLP width, L layers, N facts, P pairs of a
text and a fact that asks for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import final_hidden, observe
from goldenlayers.locating.base import Row, Work
from goldenlayers.locating.lga import _row, backing_off
from goldenlayers.locating.methods import Transfer
from goldenlayers.locating.reach import Weights
from goldenlayers.prompts import find_subject
from goldenlayers.tokens import Encoding, TooLongError, pad_ids

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance

# Sampled texts that stand before a prompt, and their tokens: as many as the editors put there.
_PREFIXES, _PREFIX_TOKENS = 5, 8
# So many batches are sorted by length together: little padding, and rows still come as they are
# done instead of all at the end.
_STRETCH = 8


@dataclass(frozen=True, slots=True)
class _Probes:
    """The texts that speak for one fact, tokenised, and what had to be left out."""

    rephrasings: tuple[Encoding, ...]
    locality: tuple[Encoding, ...]
    without_subject: int
    too_long: int
    prefixed: bool
    borrowed: bool


@dataclass(slots=True)
class _Tally:
    """Sums over one fact's texts so far, each (L,) float64, and how many are still to come."""

    waiting: int
    transfer: list[Tensor] = field(default_factory=list)
    interference: list[Tensor] = field(default_factory=list)


def transfer_rows(work: Work, how: Transfer) -> Iterator[list[Row]]:
    """Yield rows with each fact's transfer and interference at every layer, as they are done.

    transfer_L = mean over rephrasings of ρ_L at the rephrasing's lookup token; 1 carries fully.
    Rephrasings that do not hold the subject are left out; if none holds it (or the data has none)
    the prompt behind each of the prefixes stands in for them.
    interference_L = mean over locality probes of the maximum of |ρ_L| over the prompt's tokens, the
    first one left out; 0 means no spill. Without probes in the data other facts' prompts that do
    not mention the subject stand in.
    phi_L = transfer_L − interference_L.

    With ``how.reach``, one backward pass adds what the two do not see, whether an edit at L can
    bring the answer about: reach_L = ‖∂ℓ/∂v_L‖ · clamp · ‖v_L‖, in nats, is the first-order change
    of the new answer's loss ℓ (mean NLL per token) by a change of the MLP's output v_L at the
    lookup token within the radius that ROME allows. Then phi_L = transfer_L · min(1, reach_L / ℓ) −
    interference_L: an edit that cannot move the loss by ℓ carries as much less.

    With ``how.align``, one more backward pass over the rephrasings tells whether they want the
    change that the prompt wants: transfer_L = mean over rephrasings of ρ_L · cos(∂ℓ/∂v_L,
    ∂ℓ'/∂v'_L), and phi_L = share_L · (1 + transfer_L) − min(1, share_L · interference_L) with
    share_L = min(1, reach_L / ℓ). But for constants that is the Overall to be expected: rewrite as
    far as the answer can be reached, rephrase as far as that carries, locality as far as it does
    not spill.

    The draw among too many locality probes is keyed by the seed and the fact, whatever the batches.

    Yields:
        Rows {"fact", "phi", "transfer", "interference", "reach" and "alignment" (None without
        them), …}, lists of L numbers. A fact that has nothing to measure by has NaN. "rephrasings"
        and "locality" count the texts used, "without_subject" the rephrasings left out for want of
        the subject and "too_long" the texts beyond the model's context; "prefixed" and "borrowed"
        tell of stand-ins for rephrasings and for locality probes.

    Raises:
        UserError: a layer without covariance or with one of another width; no fact that has both
            a rephrasing (or prefix) and a locality probe (or another fact); a setting out of range.
    """
    model, facts, batch_size = work.model, work.facts, how.batch_size
    _check(model, facts, work.statistics)
    encoded = [model.encoder.fact(fact) for fact in facts]
    probes = _all_probes(work, how)
    queries = _queries(model, encoded, work.statistics, batch_size)
    weights = Weights.measure(model, facts, [p.rephrasings for p in probes], how)

    needs: dict[tuple[int, ...], list[tuple[int, int | None, Tensor | None]]] = {}
    for i, mine in enumerate(probes):
        for text, weight in zip(mine.rephrasings, weights.of(i), strict=True):
            # Causal attention: what follows the lookup token does not change the key there.
            needs.setdefault(text.until_lookup.ids, []).append((i, text.lookup, weight))
        for text in mine.locality:
            needs.setdefault(text.ids, []).append((i, None, None))
    tallies = [_Tally(len(p.rephrasings) + len(p.locality)) for p in probes]

    def finished(i: int) -> Row:
        transfer, interference = (
            torch.stack(parts).mean(0) if parts else torch.full((len(queries),), torch.nan)
            for parts in (tallies[i].transfer, tallies[i].interference)
        )
        return _row(facts[i]) | {
            "phi": weights.phi(i, transfer, interference).tolist(),
            "transfer": transfer.tolist(),
            "interference": interference.tolist(),
            **weights.columns(i),
            "rephrasings": len(probes[i].rephrasings),
            "without_subject": probes[i].without_subject,
            "prefixed": probes[i].prefixed,
            "locality": len(probes[i].locality),
            "borrowed": probes[i].borrowed,
            "too_long": probes[i].too_long,
            "unscored": _lacking(probes[i]),
        }

    if unheard := [finished(i) for i, tally in enumerate(tallies) if not tally.waiting]:
        yield unheard
    texts = list(needs)
    for start in range(0, len(texts), _STRETCH * batch_size):
        stretch = texts[start : start + _STRETCH * batch_size]

        def run(members: list[int], stretch: list[tuple[int, ...]] = stretch) -> list[Row]:
            part = [stretch[m] for m in members]
            asked = [(b, *need) for b, ids in enumerate(part) for need in needs[ids]]
            found = _carried(model, part, [pair[:3] for pair in asked], queries)
            return [
                {"fact": i, "lookup": lookup, "rho": rho if weight is None else rho * weight}
                for (_, i, lookup, weight), rho in zip(asked, found, strict=True)
            ]

        for measured in backing_off([len(ids) for ids in stretch], batch_size, run):
            done = []
            for one in measured:
                tally = tallies[one["fact"]]
                kind = tally.interference if one["lookup"] is None else tally.transfer
                kind.append(one["rho"])
                tally.waiting -= 1
                if not tally.waiting:
                    done.append(finished(one["fact"]))
            if done:
                yield done


def _lacking(probes: _Probes) -> str | None:
    """Why a fact has nothing to measure by; None if it has."""
    if not probes.rephrasings:
        return "no rephrasing that holds the subject"
    return None if probes.locality else "no locality probe"


def _check(model: Model, facts: Sequence[Fact], covariances: Mapping[int, Covariance]) -> None:
    if not facts:
        raise UserError("there are no facts to measure key transfer with", expected="at least one")
    held = set(covariances)  # iterating reads no matrix; asking `in` a mapping may
    lacking = [block for block in model.layers.blocks if block.index not in held]
    for block in lacking:
        _ = block.down  # which says it where there is no one matrix
    missing = [block.index for block in lacking]
    if missing:
        raise UserError(
            "the key statistics do not hold layer"
            + ("s " if len(missing) > 1 else " ")
            # A long list says no more than its ends.
            + (f"{missing[0]} to {missing[-1]}" if len(missing) > 8 else str(missing).strip("[]")),
            expected=f"every layer from 0 to {len(model.layers) - 1}",
            fix="Collect the statistics of all layers: one pass gives them all",
        )


def _all_probes(work: Work, how: Transfer) -> list[_Probes]:
    facts, finder = work.facts, _ProbeFinder(work, how)
    probes = [finder.of(fact) for fact in facts]
    if not any(p.rephrasings for p in probes):
        lacks = "a rephrasing that holds the subject"
        fix = "Use data with rephrasings, or give prefixes to put before the prompts"
    elif not any(p.locality for p in probes):
        lacks = "a locality probe, nor are there prompts of other facts to stand in"
        fix = "Use data with locality probes, or facts about more than one subject"
    elif not any(p.rephrasings and p.locality for p in probes):
        lacks = "both a rephrasing and a locality probe"
        fix = "Use data with both kinds of probes, or give prefixes to put before the prompts"
    else:
        return probes
    raise UserError(f"none of the {len(facts)} facts has {lacks}", fix=fix)


class _ProbeFinder:
    """Finds the probes of each fact."""

    def __init__(self, work: Work, how: Transfer) -> None:
        self.work, self.how = work, how
        # Sorted, so that what is drawn does not hang on the order of the facts.
        self.prompts = sorted({fact.prompt for fact in work.facts})

    @cached_property
    def prefixes(self) -> list[str]:
        """Those given, else sampled when a fact first needs them."""
        from goldenlayers.editors.lookup_states import sample_prefixes

        if self.how.prefixes is not None:
            found: Sequence[str] = self.how.prefixes
        else:
            found = sample_prefixes(self.work.model, _PREFIXES, _PREFIX_TOKENS, self.work.seed)
        return [prefix for prefix in found if prefix.strip()]

    def of(self, fact: Fact) -> _Probes:
        """The fact's probes; rephrasings have the new answer behind them for the alignment."""
        too_long = 0

        def encode(text: str, subject: str | None = None, prefix: str = "") -> Encoding | None:
            nonlocal too_long
            answer = fact.target if self.how.align and subject is not None else ""
            joint = fact.joint_of(text, answer)
            try:
                return self.work.model.encoder.encode(prefix + text, answer, subject, joint)
            except TooLongError:
                too_long += 1
                return None

        asked = [encode(text, fact.subject) for text in fact.rephrasings]
        whole = [e for e in asked if e is not None]
        rephrasings = [e for e in whole if e.lookup is not None]
        without_subject = len(whole) - len(rephrasings)
        prefixed = not rephrasings
        if prefixed:
            behind = (encode(fact.prompt, fact.subject, prefix) for prefix in self.prefixes)
            rephrasings = [e for e in behind if e is not None and e.lookup is not None]

        borrowed = not fact.must_stay
        pool = (
            [p for p in self.prompts if find_subject(fact.subject, p) is None]
            if borrowed
            else [probe.prompt for probe in fact.must_stay]
        )
        if len(pool) > self.how.max_probes:
            draw = random.Random(f"{self.work.seed}:{fact.id}")
            pool = draw.sample(pool, self.how.max_probes)
        # A text of one token has nothing behind its first.
        locality = [e for e in map(encode, pool) if e is not None and len(e) > 1]
        return _Probes(
            tuple(rephrasings), tuple(locality), without_subject, too_long, prefixed, borrowed
        )


def _queries(
    model: Model,
    encoded: Sequence[Encoding],
    covariances: Mapping[int, Covariance],
    batch_size: int,
) -> list[Tensor]:
    """Per layer (N, F), u = C⁻¹k / (kᵀC⁻¹k) of every fact: then ρ(k') = k'·u.

    They take as much memory as the facts' keys: 4 L F bytes a fact (2 MB for a 7B model).
    """
    keys = _keys(model, encoded, batch_size)
    for block in model.layers.blocks:
        covariance, K = covariances[block.index], keys[block.index]  # (N, F)
        if covariance.size != K.shape[1]:
            raise UserError(
                f"the key statistics of layer {block.index} are for keys of width "
                f"{covariance.size}",
                expected=f"width {K.shape[1]}, the input of {block.down.path}",
                fix="Collect the statistics with this model",
            )
        solved = covariance.solve(K.T)  # (F, N), float64 as a rule
        scale = (solved * K.T.to(solved)).sum(0)  # kᵀC⁻¹k, (N,)
        keys[block.index] = (solved / scale).T.to(K)
    return keys


def _keys(model: Model, encoded: Sequence[Encoding], batch_size: int) -> list[Tensor]:
    """The facts' keys at their lookup tokens, per layer (N, F), one forward pass per batch."""
    dtype = torch.promote_types(model.dtype, torch.float32)
    downs = {block.index: block.down for block in model.layers.blocks}
    keys = [torch.empty(len(encoded), down.in_features, dtype=dtype) for down in downs.values()]

    def run(members: list[int]) -> list[Row]:
        batch = pad_ids([encoded[i].ids for i in members], model.device)
        lookup = torch.tensor([encoded[i].lookup for i in members])

        def keep(layer: int, x: Tensor, _y: Tensor) -> None:
            x = x.reshape(*batch.ids.shape, -1)  # OPT runs its MLP on all tokens in one row
            keys[layer][members] = x[torch.arange(len(members)), lookup].to("cpu", dtype)

        _forward(model, batch.ids, keep)
        return []

    for _ in backing_off([len(e) for e in encoded], batch_size, run):
        pass
    return keys


def _carried(
    model: Model,
    texts: Sequence[tuple[int, ...]],
    pairs: Sequence[tuple[int, int, int | None]],
    queries: Sequence[Tensor],
) -> Tensor:
    """ρ at the lookup token, or the largest |ρ| behind the first token, of each pair: (P, L).

    ``pairs`` are (row of ``texts``, fact, lookup token or None for the largest).
    """
    batch = pad_ids(texts, model.device)
    facts = sorted({fact for _, fact, _ in pairs})
    column = {fact: c for c, fact in enumerate(facts)}
    rows = torch.tensor([b for b, _, _ in pairs])
    columns = torch.tensor([column[fact] for _, fact, _ in pairs])
    is_lookup = torch.tensor([lookup is not None for _, _, lookup in pairs])
    lookups = torch.tensor([lookup or 0 for _, _, lookup in pairs])
    counted = batch.mask.cpu().clone()
    counted[:, 0] = False
    found = torch.empty(len(pairs), len(queries), dtype=torch.float64)

    def measure(layer: int, x: Tensor, _y: Tensor) -> None:
        u = queries[layer][facts].to(x.device)  # (facts, F)
        x = x.reshape(*batch.ids.shape, -1).to(u.dtype)
        rho = (x @ u.T).cpu()[rows, :, columns].double()  # (B, T, facts) -> (P, T)
        at_lookup = rho.gather(1, lookups[:, None])[:, 0]
        largest = rho.abs().masked_fill(~counted[rows], 0.0).amax(1)
        found[:, layer] = torch.where(is_lookup, at_lookup, largest)

    _forward(model, batch.ids, measure)
    return found


def _forward(model: Model, ids: Tensor, on_keys: Callable[[int, Tensor, Tensor], None]) -> None:
    downs = {block.index: block.down.module for block in model.layers.blocks}
    with torch.no_grad(), observe(downs, on_keys):
        final_hidden(model, ids)
