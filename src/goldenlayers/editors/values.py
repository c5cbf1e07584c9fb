"""The value each fact's lookup token should have: found by gradient steps, many facts together.

For each fact a change δ of the MLP's output at the lookup token (the down projection's output) is
optimised so that the prompt, bare and behind sampled prefixes, is answered with the new answer.
Only the blocks from the edited one on are run, only from the lookup token on, and logits are
taken at the answer's positions only. Finished facts leave the batch.

Source: ROME, Meng et al. 2022 (arXiv 2202.05262), section 3.1 step 2 and its released settings;
for models without a norm behind the MLP, δ at the output of the last of MEMIT's layers is the same
as MEMIT's δ on the block's output (arXiv 2210.07229, section 4.2). PMET (arXiv 2308.08742) also
moves the attention's output, and writes only the MLP's part.

Shapes: B facts, N rows (prompts) of those facts, P prefixes (the bare prompt is the first), D model
width, F MLP width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from goldenlayers.editors.settings import EditSettings
from goldenlayers.editors.tails import Tails
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.losses import token_nll
from goldenlayers.tokens import Encoding, length_batches

if TYPE_CHECKING:
    from goldenlayers.models.layers import LayerMap
    from goldenlayers.models.model import Model

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


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of some facts: the prompts with the new answer, and the KL prompt of each."""

    encodings: list[Encoding]
    fact: list[int]  # of each row
    is_kl: list[bool]


def fact_prompts(model: Model, fact: Fact, prefixes: Sequence[str], answer: str) -> list[Encoding]:
    """The fact's prompt with ``answer`` behind each prefix; their lookup tokens found."""
    encoder = model.encoder
    found = []
    for prefix in prefixes:
        encoding = encoder.encode(prefix + fact.prompt, answer, fact.subject)
        if encoding.lookup is None:
            encoding = encoder.fact(fact, answer)  # raises, naming the fact
        found.append(encoding)
    return found


def optimise_values(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    prefixes: Sequence[str],
    settings: EditSettings,
    *,
    with_attention: bool = False,
    group_tokens: int = GROUP_TOKENS,
    reuse: bool = True,
    on_done: Callable[[int], None] | None = None,
) -> list[Value]:
    """Find every fact's value at ``layer``, each fact on the model as it is.

    The result does not depend on which facts share a batch. ``with_attention`` also moves the
    attention's output (PMET). ``reuse=False`` runs whole rows each step (the same result, slower).
    ``on_done`` is told how many facts have been finished.

    Raises:
        UserError: a prompt is too long, or a loss is not finite.
    """
    prompts = [fact_prompts(model, fact, prefixes, fact.target_new) for fact in facts]
    kl = [model.encoder.encode(f"{fact.subject} is a", "", fact.subject) for fact in facts]
    results: list[Value | None] = [None] * len(facts)
    done = 0
    for members in _groups(prompts, group_tokens):
        rows = _Rows([], [], [])
        for b, i in enumerate(members):
            rows.encodings.extend(prompts[i])
            rows.fact.extend([b] * len(prompts[i]))
            rows.is_kl.extend([False] * len(prompts[i]))
            if settings.kl_factor > 0:
                rows.encodings.append(kl[i])
                rows.fact.append(b)
                rows.is_kl.append(True)
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
        rows: _Rows,
        settings: EditSettings,
        with_attention: bool,
        reuse: bool,
    ) -> None:
        self.layers: LayerMap = model.layers
        self.settings = settings
        block = model.layers[layer]
        self.sites: dict[str, nn.Module] = {"mlp": block.down.module}
        if with_attention:
            self.sites["attention"] = block.attention
        asking = [e.asking for e in rows.encodings]
        self.tails = Tails(model, asking, layer, self.sites, reuse=reuse)
        device = self.tails.ids.device
        self.fact = torch.tensor(rows.fact, device=device)  # (N,)
        self.is_kl = torch.tensor(rows.is_kl, device=device)
        self.n_answer = torch.tensor([len(e.answer_ids) for e in rows.encodings], device=device)
        self.first_answer = torch.tensor(
            [e.n_prompt for e in rows.encodings], device=device
        ) - self.tails.start.to(device)
        longest = int(self.n_answer.max())
        self.answers = torch.tensor(  # (N, longest answer), padded with zeros that are never read
            [[*e.answer_ids, *[0] * (longest - len(e.answer_ids))] for e in rows.encodings],
            device=device,
        )
        self.kl_clean = self._kl_log_probs(self.tails.clean)

    def _kl_log_probs(self, hidden: Tensor) -> Tensor:
        """Log-probabilities after the KL prompts' lookup token, (facts with one, V)."""
        rows = torch.nonzero(self.is_kl).flatten()
        column = self.tails.column.to(rows.device)[rows]
        return _wide(self.layers.logits(hidden[rows, column])).log_softmax(-1)

    def _nll(self, hidden: Tensor, n_facts: int) -> Tensor:
        """Mean over prefixes of the mean NLL of the new answer's tokens, (B,)."""
        rows = torch.nonzero(~self.is_kl).flatten()
        counts = self.n_answer[rows]
        row = torch.repeat_interleave(rows, counts)
        step = torch.arange(len(row), device=rows.device) - torch.repeat_interleave(
            counts.cumsum(0) - counts, counts
        )
        column = self.first_answer[row] + step - 1
        nll = token_nll(self.layers, hidden[row, column], self.answers[row, step])
        weight = 1.0 / self.n_answer[row]
        per_fact = torch.zeros(n_facts, dtype=nll.dtype, device=nll.device)
        n_prefixes = per_fact.index_add(0, self.fact[rows], torch.ones_like(rows, dtype=nll.dtype))
        return per_fact.index_add(0, self.fact[row], nll * weight) / n_prefixes

    def _loss(self, delta: dict[str, Tensor], base: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss and NLL of every active fact, each (B,)."""
        s = self.settings
        n_facts = len(delta["mlp"])
        hidden = self.tails.run(
            {self.sites[name]: change[self.fact] for name, change in delta.items()}
        )
        nll = self._nll(hidden, n_facts)
        loss = nll
        if s.kl_factor > 0:
            now = self._kl_log_probs(hidden)
            # KL(clean ‖ edited), the clean prediction being what is to be kept.
            kl = (self.kl_clean.exp() * (self.kl_clean - now)).sum(-1)
            loss = loss.index_add(0, self.fact[self.is_kl], s.kl_factor * kl.to(loss.dtype))
        for name, change in delta.items():
            length = change.norm(dim=1)
            loss = loss + s.weight_decay * (length / base[name] ** 2).to(loss.dtype)
        return loss, nll.detach()

    def optimise(self, facts: Sequence[Fact]) -> Iterator[tuple[int, Value]]:
        """Yield (place in the group, value) as facts are done."""
        s = self.settings
        bare = [int(torch.nonzero((self.fact == b) & ~self.is_kl)[0]) for b in range(len(facts))]
        keys, values = self.tails.inputs["mlp"], self.tails.outputs["mlp"]
        rows_of = [
            torch.nonzero((self.fact == b) & ~self.is_kl).flatten() for b in range(len(facts))
        ]
        keys_of = [keys[rows].cpu() for rows in rows_of]
        values_of = [values[rows].cpu() for rows in rows_of]
        clean = {name: _wide(out[bare]) for name, out in self.tails.outputs.items()}
        base = {name: out.norm(dim=1).clamp_min(1e-30) for name, out in clean.items()}
        width = next(iter(clean.values())).shape[1]
        rate = {
            name: torch.full_like(norm, s.lr) if s.lr_absolute else s.lr * norm / width**0.5
            for name, norm in base.items()
        }
        delta = {name: torch.zeros_like(out) for name, out in clean.items()}
        first = {name: torch.zeros_like(out) for name, out in clean.items()}
        second = {name: torch.zeros_like(out) for name, out in clean.items()}
        nll_before: list[float] = []
        place = list(range(len(facts)))  # of each active fact in the group
        for step in range(s.steps):
            for change in delta.values():
                change.requires_grad_(True)
            loss, nll = self._loss(delta, base)
            if not bool(torch.isfinite(loss).all()):
                bad = facts[place[int(torch.nonzero(~torch.isfinite(loss))[0])]]
                raise UserError(
                    f"the value optimisation of fact '{bad.id}' gives a loss that is not a number",
                    fix="Load the model with --dtype float32 (or bfloat16 in place of float16)",
                )
            if step == 0:
                nll_before = nll.tolist()
            last = step == s.steps - 1
            finished = (loss.detach() < s.stop_loss) | last
            for b in torch.nonzero(finished).flatten().tolist():
                i = place[b]
                yield (
                    i,
                    Value(
                        facts[i],
                        delta["mlp"][b].detach().cpu(),
                        keys_of[i],
                        values_of[i],
                        nll_before[i],
                        float(nll[b]),
                        float(loss[b].detach()),
                        step,
                    ),
                )
            if last or bool(finished.all()):
                return
            gradients = torch.autograd.grad(loss.sum(), list(delta.values()))
            with torch.no_grad():
                for (name, change), g in zip(delta.items(), gradients, strict=True):
                    # Adam (betas 0.9, 0.999), written out so that facts can leave the batch.
                    first[name].lerp_(g, 0.1)
                    second[name].lerp_(g * g, 0.001)
                    mean = first[name] / (1 - 0.9 ** (step + 1))
                    square = second[name] / (1 - 0.999 ** (step + 1))
                    moved = change - rate[name][:, None] * mean / (square.sqrt() + 1e-8)
                    # Projected on the ball ‖δ‖ ≤ clamp·‖v0‖.
                    length = moved.norm(dim=1).clamp_min(1e-30)
                    moved *= (s.clamp * base[name] / length).clamp_max(1.0)[:, None]
                    delta[name] = moved
            if bool(finished.any()):
                keep = torch.nonzero(~finished).flatten()
                place = [place[b] for b in keep.tolist()]
                for store in (delta, first, second, base, rate):
                    for name in store:
                        store[name] = store[name][keep]
                self._keep(keep)

    def _keep(self, facts: Tensor) -> None:
        """Drop the rows of every fact but ``facts`` (places among the active ones, ascending)."""
        renumber = torch.full((int(self.fact.max()) + 1,), -1, device=self.fact.device)
        renumber[facts] = torch.arange(len(facts), device=self.fact.device)
        kept = torch.nonzero(renumber[self.fact] >= 0).flatten()
        had_kl = renumber[self.fact[self.is_kl]] >= 0
        self.kl_clean = self.kl_clean[had_kl]
        self.tails = self.tails.select(kept.cpu())
        self.fact = renumber[self.fact[kept]]
        self.is_kl = self.is_kl[kept]
        self.n_answer = self.n_answer[kept]
        self.first_answer = self.first_answer[kept]
        self.answers = self.answers[kept]


def _wide(x: Tensor) -> Tensor:
    """Half-precision numbers as float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
