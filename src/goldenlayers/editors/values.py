"""The value each fact's lookup token should have: found by gradient steps, many facts together.

For each fact a change δ of the MLP's output at the lookup token (the down projection's output) is
optimised so that the prompt, bare and behind sampled prefixes, is answered with the new answer.
Only the blocks from the edited one on are run, only from the lookup token on, and logits are
taken at the answer's positions only. Finished facts leave the batch. Rows of similar length run
together (:mod:`goldenlayers.editors.prompt_batches`), so that little time goes into padding.

Source: ROME, Meng et al. 2022 (arXiv 2202.05262), section 3.1 step 2 and its released settings;
for models without a norm behind the MLP, δ at the output of the last of MEMIT's layers is the same
as MEMIT's δ on the block's output (arXiv 2210.07229, section 4.2). PMET (arXiv 2308.08742) also
moves the attention's output, and writes only the MLP's part.

Shapes: B facts, N rows (prompts) of those facts, P prefixes (the bare prompt is the first), D model
width, F MLP width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.editors.base import ValueSearch
from goldenlayers.editors.descent import Adam, Descent, QuasiNewton
from goldenlayers.editors.prompt_batches import Part, Row, parts_of
from goldenlayers.facts import Fact
from goldenlayers.hooks import wide
from goldenlayers.models.weights import not_a_number
from goldenlayers.tokens import Encoding, length_batches

if TYPE_CHECKING:
    from goldenlayers.models import Model

# Tokens (whole rows, counted with their prefixes) that one group of facts may hold: bounds memory
# to some 1.5 GB on a 135M model; on a CPU more gains nothing.
GROUP_TOKENS = 4096


@dataclass(frozen=True, eq=False)
class Value:
    """What the optimisation found for one fact.

    ``delta`` (D,) is the wanted change of the MLP's output at the lookup token; ``keys`` (P, F) and
    ``values`` (P, D) are the clean down projection's input and output there, the bare prompt's
    first; ``nll_before`` and ``nll_after`` the mean NLL of the new answer over the prefixes.
    """

    fact: Fact
    delta: Tensor
    keys: Tensor
    values: Tensor
    nll_before: float
    nll_after: float
    loss: float
    steps: int

    @property
    def target(self) -> Tensor:
        """v* = v0 + δ, (D,)."""
        return self.values[0] + self.delta


def fact_prompts(model: Model, fact: Fact, prefixes: Sequence[str], answer: str) -> list[Encoding]:
    """The fact's prompt with ``answer`` behind each prefix; their lookup tokens found."""
    encoder = model.encoder
    joint = fact.joint_of(fact.prompt, answer)
    found = []
    for prefix in prefixes:
        encoding = encoder.encode(prefix + fact.prompt, answer, fact.subject, joint)
        if encoding.lookup is None:
            encoding = encoder.fact(fact, answer)  # raises, naming the fact
        found.append(encoding)
    return found


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    prefixes: Sequence[str],
    settings: ValueSearch,
    *,
    with_attention: bool = False,
    group_tokens: int = GROUP_TOKENS,
    reuse: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Value]:
    """Find every fact's value at ``layer``, each fact on the model as it is.

    The result does not depend on which facts share a batch. ``with_attention`` also moves the
    attention's output (PMET). ``reuse=False`` runs whole rows each step (the same result, slower).
    ``on_done`` is called with how many facts are done.

    Raises:
        UserError: a prompt is too long, or a loss is not finite.
    """
    prompts = [fact_prompts(model, fact, prefixes, fact.target) for fact in facts]
    kl = [model.encoder.encode(f"{fact.subject} is a", "", fact.subject) for fact in facts]
    results: list[Value | None] = [None] * len(facts)
    done = 0
    for members in _groups(prompts, group_tokens):
        rows: list[Row] = []
        for b, i in enumerate(members):
            rows += [Row(e, b, p) for p, e in enumerate(prompts[i])]
            if settings.kl_factor > 0:
                rows.append(Row(kl[i], b, None))
        group = _Group(model, layer, rows, settings, with_attention, reuse)
        for b, value in group.optimise([facts[i] for i in members]):
            results[members[b]] = value
            done += 1
            if on_done is not None:
                on_done(done)
    return [value for value in results if value is not None]


def _groups(prompts: Sequence[Sequence[Encoding]], limit: int) -> Iterator[list[int]]:
    """Facts with tails of similar length whose rows together hold at most ``limit`` tokens."""
    lengths = [max(len(e) for e in rows) for rows in prompts]
    tails = [max(len(e) - (e.lookup or 0) for e in rows) for rows in prompts]
    group: list[int] = []
    widest = 0
    for (i,) in length_batches(tails, 1):
        widest = max(widest, lengths[i])
        if group and (len(group) + 1) * (len(prompts[i]) + 1) * widest > limit:
            yield group
            group, widest = [], lengths[i]
        group.append(i)
    if group:
        yield group


class _Group:
    """Facts optimised together. A fact's numbers never touch another's."""

    def __init__(
        self,
        model: Model,
        layer: int,
        rows: Sequence[Row],
        settings: ValueSearch,
        with_attention: bool,
        reuse: bool,
    ) -> None:
        self.settings = settings
        self.model = model
        self.is_last_block = layer == len(model.layers) - 1
        block = model.layers[layer]
        sites: dict[str, nn.Module] = {"mlp": block.down.module}
        if with_attention:
            sites["attention"] = block.attention
        self.sites = tuple(sites)
        self.n_prefixes = sum(row.fact == 0 and row.prompt is not None for row in rows)
        beside = {"block": block.module} if settings.block_norm else {}
        self.parts = parts_of(model, layer, rows, sites, beside, reuse=reuse)

    def _loss(self, delta: dict[str, Tensor], limit: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and NLL (mean over prefixes) of every active fact, each (B,)."""
        s = self.settings
        nll, kl = (torch.zeros_like(limit["mlp"]) for _ in range(2))
        for part in self.parts:
            part.add_losses(delta, nll, kl)
        nll = nll / self.n_prefixes
        # KL(edited ‖ clean): equation 4 of the paper, and what the released code computes.
        loss = nll + s.kl_factor * kl
        for name, change in delta.items():
            loss = loss + s.weight_decay * change.norm(dim=1) / limit[name] ** 2
        return loss, nll

    def _at(
        self, delta: dict[str, Tensor], limit: dict[str, Tensor], *, slopes: bool
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Loss and NLL of every active fact, and if wanted the loss's gradient at each change."""
        for change in delta.values():
            change.requires_grad_(slopes)
        loss, nll = self._loss(delta, limit)
        found = torch.autograd.grad(loss.sum(), list(delta.values())) if slopes else ()
        return loss.detach(), nll.detach(), found

    def _out_of_reach(self, delta: dict[str, Tensor], limit: dict[str, Tensor]) -> Tensor:
        """Facts (B,) whose answer no change can touch: in the last block, a subject in mid-prompt.

        Their NLL has no gradient at all, and the KL term is at its minimum. What is left of the
        loss's gradient is rounding, which Adam would blow up.
        """
        _, nll = self._loss(delta, limit)
        slopes = torch.autograd.grad(nll.sum(), list(delta.values()))
        return ~torch.stack([g.ne(0).any(dim=1) for g in slopes]).any(dim=0)

    def _by_fact(self, states: Callable[[Part], Tensor], n_facts: int) -> list[Tensor]:
        """``states`` (N, ·) of each part's prompt rows, by fact: (P, ·), the bare prompt first."""
        found: list[dict[int, Tensor]] = [{} for _ in range(n_facts)]
        for part in self.parts:
            for row, state in zip(part.rows, states(part), strict=True):
                if row.prompt is not None:
                    found[row.fact][row.prompt] = state
        return [torch.stack([of[p] for p in sorted(of)]) for of in found]

    def optimise(self, facts: Sequence[Fact]) -> Iterator[tuple[int, Value]]:
        """Yield (place in the group, value) as facts are done."""
        s = self.settings
        keys_of = [x.cpu() for x in self._by_fact(lambda p: p.tails.inputs["mlp"], len(facts))]
        outputs = {
            name: self._by_fact(lambda p, name=name: p.tails.outputs[name], len(facts))
            for name in self.parts[0].tails.outputs
        }
        values_of = [x.cpu() for x in outputs["mlp"]]
        bare = {name: wide(torch.stack([y[0] for y in out])) for name, out in outputs.items()}
        norms = {name: out.norm(dim=1).clamp_min(1e-30) for name, out in bare.items()}
        clean, base = ({name: x[name] for name in self.sites} for x in (bare, norms))
        # What clamp and weight decay count in.
        limit = {name: norms["block" if s.block_norm else name] for name in self.sites}
        width = next(iter(clean.values())).shape[1]
        longest = {name: s.clamp * limit[name] for name in self.sites}
        walk: Descent
        if s.adam:
            rate = {
                name: torch.full_like(norm, s.lr) if s.lr_absolute else s.lr * norm / width**0.5
                for name, norm in base.items()
            }
            walk = Adam(rate, longest, width)
        else:
            walk = QuasiNewton(base, longest, width)
        nll_before: list[float] = []
        place = list(range(len(facts)))  # of each active fact in the group
        for step in range(s.steps):
            last = step == s.steps - 1
            trial = walk.trial
            loss, nll, slopes = self._at(trial, limit, slopes=not last)
            # Later ones of quasi-Newton steps are tried again, shorter.
            if (step == 0 or s.adam) and not bool(torch.isfinite(loss).all()):
                bad = facts[place[int(torch.nonzero(~torch.isfinite(loss))[0])]]
                raise not_a_number(
                    self.model.hf,
                    f"the value optimisation of fact '{bad.id}' gives a loss that is not a number",
                    otherwise="Lower the learning rate of the value optimisation",
                )
            if step == 0:
                nll_before = nll.tolist()
            lost = torch.zeros_like(loss, dtype=torch.bool)
            if step == 0 and self.is_last_block and not last:
                lost = self._out_of_reach(trial, limit)
            walk.take(loss, nll, slopes)
            finished = (walk.loss < s.stop_loss) | lost | last
            for b in torch.nonzero(finished).flatten().tolist():
                i = place[b]
                yield (
                    i,
                    Value(
                        facts[i],
                        walk.best["mlp"][b].detach().cpu(),
                        keys_of[i],
                        values_of[i],
                        nll_before[i],
                        float(walk.nll[b]),
                        float(walk.loss[b]),
                        step,
                    ),
                )
            if last or bool(finished.all()):
                return
            if bool(finished.any()):
                keep = torch.nonzero(~finished).flatten()
                place = [place[b] for b in keep.tolist()]
                walk.keep(keep)
                limit = {name: length[keep] for name, length in limit.items()}
                new = {old: b for b, old in enumerate(keep.tolist())}
                self.parts = [part for part in self.parts if part.keep(new)]
