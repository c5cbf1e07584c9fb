"""Causal mediation analysis (CMA): which layer's state brings the old answer back.

The subject's token embeddings are corrupted with noise; then one layer's state is restored to what
it was without noise, and the probability of the old answer tells how much of it passes there.
Source: causal tracing, Meng et al. 2022, arXiv 2202.05262, section 2.

Shapes: B facts, S noise samples, T tokens, D model width, L layers, R rows run together (a row is
a fact with one noise sample and one place restored), K restored places.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor, nn

from goldenlayers.facts import Fact
from goldenlayers.hooks import capture, final_hidden, observe, override, resume_from, token_nll
from goldenlayers.locating.base import Kind, Row, Work
from goldenlayers.locating.grid import TracingGrid
from goldenlayers.locating.lga import _row, backing_off, old_text
from goldenlayers.locating.methods import CMA
from goldenlayers.tokens import Encoding, pad_ids, subject_tokens

if TYPE_CHECKING:
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Matrix


def tracing_rows(work: Work, how: CMA) -> Iterator[list[Row]]:
    """Yield, batch by batch, one row per fact with the indirect effect of every layer.

    phi_L = p(answer | layer L restored at the lookup token) − p(answer | corrupted), each a mean
    over the noise samples. p(answer) is the joint probability of all the old answer's tokens under
    teacher forcing, exp(Σ_t log p(K_t | Q, K_<t)): of one token for a one-token answer. What is
    restored is the block's output; or the output of the MLP's down projection, or of the
    attention's output projection, in all blocks of the window. The noise is keyed by the seed and
    the fact's id, so that batches and order do not matter; it is measured in the embeddings of all
    the facts' subjects.

    Yields:
        Rows {"fact", "phi", "restored" (L numbers), "clean", "corrupted" (probabilities), …}.

    Raises:
        UserError: a fact without old answer.
    """
    model, todo, n_layers = work.model, work.facts, len(work.model.layers)
    encoded = [old_text(model, fact) for fact in todo]
    noise = Noise(noise_sigma(model, todo, how.noise), how.samples, work.seed)
    sites = restored_modules(model, how.kind)
    samples, places = how.samples, windows(n_layers, how.kind, how.window_in(n_layers))

    def run(members: list[int]) -> list[Row]:
        part = [encoded[i] for i in members]
        traces = Traces(model, [todo[i] for i in members], part, sites, noise, how.batch_size)
        rows = torch.arange(len(members) * samples)
        lookup = torch.tensor([cast(int, e.lookup) for e in part]).repeat_interleave(samples)
        restored = torch.stack(
            [
                traces.probability(rows, layers, (rows, lookup)).view(-1, samples).mean(1)
                for layers in places
            ],
            dim=1,
        )  # (B, L)
        corrupted = traces.corrupted.mean(1)
        phi = restored - corrupted[:, None]
        return [
            _row(todo[i])
            | {
                "phi": phi[b].tolist(),
                "restored": restored[b].tolist(),
                "clean": float(traces.clean[b]),
                "corrupted": float(corrupted[b]),
            }
            for b, i in enumerate(members)
        ]

    yield from backing_off([len(e) for e in encoded], max(1, how.batch_size // samples), run)


def tracing_grid(
    model: Model, fact: Fact, how: CMA, *, seed: int = 0, sigma: float | None = None
) -> TracingGrid:
    """The indirect effect of every token of the prompt at every layer.

    As :func:`tracing_rows`, whose phi is the grid's row of the lookup token. Give ``sigma`` (see
    :func:`noise_sigma`) to have one noise for several facts; None takes it from this fact alone.

    Raises:
        UserError: a fact without old answer.
    """
    n_layers, samples = len(model.layers), how.samples
    encoding = old_text(model, fact)
    sigma = noise_sigma(model, [fact], how.noise) if sigma is None else sigma
    noise, sites = Noise(sigma, samples, seed), restored_modules(model, how.kind)
    traces = Traces(model, [fact], [encoding], sites, noise, how.batch_size)
    start, end = subject_tokens(fact, encoding)
    # Before the subject every state is clean already: restoring it changes nothing.
    tokens = torch.arange(start, encoding.n_prompt)
    rows = torch.arange(samples).repeat(len(tokens))
    places = (torch.arange(len(rows)), tokens.repeat_interleave(samples))
    effect = np.zeros((encoding.n_prompt, n_layers))
    corrupted = float(traces.corrupted.mean())
    window = how.window_in(n_layers)
    for layer, layers in enumerate(windows(n_layers, how.kind, window)):
        restored = traces.probability(rows, layers, places).view(-1, samples).mean(1)
        effect[start:, layer] = restored.numpy() - corrupted
    return TracingGrid(
        tokens=_labels(model, encoding),
        effect=effect,
        subject=(start, end),
        lookup=cast(int, encoding.lookup),
        clean=float(traces.clean[0]),
        corrupted=corrupted,
        kind=how.kind,
        window=window,
        samples=samples,
        sigma=sigma,
        answer=fact.target_old or "",
        model=model.name,
    )


def windows(n_layers: int, kind: Kind, window: int) -> list[range]:
    """The layers restored together for each layer L: [L − ⌊w/2⌋, L + ⌈w/2⌉) within the model."""
    if kind == "block":
        window = 1
    below, above = window // 2, window - window // 2
    return [range(max(0, layer - below), min(n_layers, layer + above)) for layer in range(n_layers)]


def noise_sigma(model: Model, facts: Sequence[Fact], noise: float = 3.0) -> float:
    """``noise`` × the standard deviation of all numbers in the facts' subject token embeddings."""
    ids: list[int] = []
    for fact in facts:
        encoding = model.encoder.fact(fact)
        start, end = subject_tokens(fact, encoding)
        ids += encoding.ids[start:end]
    with torch.no_grad():
        embedded = model.layers.embedding(torch.tensor([ids], device=model.device))
    return noise * float(embedded.double().std(correction=0)) if noise else 0.0


@dataclass(frozen=True)
class Noise:
    """Gaussian noise of a standard deviation: ``samples`` per fact, the same on any device."""

    sigma: float
    samples: int
    seed: int

    def of(self, model: Model, fact: Fact, encoding: Encoding) -> tuple[int, Tensor]:
        """The subject's first token, and its noise (S, subject tokens, D)."""
        start, end = subject_tokens(fact, encoding)
        with torch.no_grad():
            one = model.layers.embedding(torch.tensor([encoding.ids[:1]], device=model.device))
        key = hashlib.sha256(f"{self.seed}\n{fact.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8]) >> 1)
        shape = (self.samples, end - start, one.shape[-1])
        return start, self.sigma * torch.randn(shape, generator=generator)


class Traces:
    """Facts run clean and with corrupted subjects once, ready to have states restored.

    ``sites`` are the modules whose output can be restored, by layer (see :func:`restored_modules`).

    Attributes:
        clean: p(answer) of the clean run, (B,) float64.
        corrupted: p(answer) of each noise sample, (B, S) float64.
    """

    def __init__(
        self,
        model: Model,
        facts: Sequence[Fact],
        encodings: Sequence[Encoding],
        sites: Mapping[int, nn.Module],
        noise: Noise,
        batch_size: int,
    ) -> None:
        self.model, self.encodings, self.samples = model, encodings, noise.samples
        self.batch_size = batch_size
        self.sites = sites
        self.ids = pad_ids([e.ids for e in encodings], model.device).ids  # (B, T)
        with torch.no_grad(), capture(self.sites) as states:
            hidden = final_hidden(model, self.ids)
        self.states = {i: y.reshape(*self.ids.shape, -1) for i, y in states.items()}  # (B, T, D)
        self.clean = self._answer_probability(hidden, list(range(len(facts))))
        self.entering: dict[int, Tensor] = {}  # of every block, corrupted: (B S, T, D)
        pairs = zip(facts, encodings, strict=True)
        self._corrupt([noise.of(model, fact, encoding) for fact, encoding in pairs])

    def _corrupt(self, noises: Sequence[tuple[int, Tensor]]) -> None:
        """Run every fact with every noise sample; keep what each block is given."""
        blocks = {block.index: block.module for block in self.model.layers.blocks}
        parts: dict[int, list[Tensor]] = {i: [] for i in blocks}
        found: list[Tensor] = []
        n_rows = len(noises) * self.samples
        for first in range(0, n_rows, self.batch_size):
            rows = list(range(first, min(first + self.batch_size, n_rows)))
            owners = [row // self.samples for row in rows]

            def add(y: Tensor, rows: list[int] = rows) -> Tensor:
                y = y.clone()
                for r, row in enumerate(rows):
                    start, noise = noises[row // self.samples]
                    part = noise[row % self.samples].to(y)
                    y[r, start : start + len(part)] += part
                return y

            def keep(layer: int, x: Tensor, _y: Tensor) -> None:
                parts[layer].append(x.clone())

            with torch.no_grad(), override(self.model.layers.embedding, add), observe(blocks, keep):
                hidden = final_hidden(self.model, self.ids[owners])
            found.append(self._answer_probability(hidden, owners))
        self.entering = {i: torch.cat(xs) for i, xs in parts.items()}
        self.corrupted = torch.cat(found).view(-1, self.samples)

    def probability(
        self, rows: Tensor, layers: Sequence[int], places: tuple[Tensor, Tensor]
    ) -> Tensor:
        """p(answer) (R,) of corrupted rows with the states of ``layers`` restored at ``places``.

        Args:
            rows: (R,) which corrupted run each row repeats, fact × S + sample.
            layers: the layers restored in every row; none leaves the rows corrupted.
            places: row (an index into ``rows``) and token of each restored state, both (K,).
        """
        parts = []
        for first in range(0, len(rows), self.batch_size):
            end = min(first + self.batch_size, len(rows))
            here = (places[0] >= first) & (places[0] < end)
            inside = (places[0][here] - first, places[1][here])
            parts.append(self._restored(rows[first:end], layers, inside))
        return torch.cat(parts)

    def _restored(
        self, rows: Tensor, layers: Sequence[int], places: tuple[Tensor, Tensor]
    ) -> Tensor:
        owners = rows // self.samples
        ids = self.ids[owners]
        cells, tokens = places
        start = min(layers, default=0)

        def restore(layer: int, _x: Tensor, y: Tensor) -> Tensor:
            shaped = y.reshape(*ids.shape, -1).clone()  # OPT runs its MLP on all tokens in one row
            shaped[cells, tokens] = self.states[layer][owners[cells], tokens]
            return shaped.reshape(y.shape)

        with torch.no_grad(), ExitStack() as stack:
            # Below the first restored block nothing differs from the corrupted run.
            stack.enter_context(resume_from(self.model, start, self.entering[start][rows]))
            stack.enter_context(
                observe({i: self.sites[i] for i in layers if i in self.sites}, restore)
            )
            hidden = final_hidden(self.model, ids)
        return self._answer_probability(hidden, owners.tolist())

    def _answer_probability(self, hidden: Tensor, owners: Sequence[int]) -> Tensor:
        """exp(Σ log p) of the answer of each row's fact, (R,) float64; hidden (R, T, D)."""
        encodings = [self.encodings[owner] for owner in owners]
        places = [(r, t) for r, e in enumerate(encodings) for t in range(e.n_prompt, len(e))]
        rows, tokens = (torch.tensor(part) for part in zip(*places, strict=True))
        targets = self.ids[torch.tensor(owners)[rows], tokens]
        with torch.no_grad():
            nll = token_nll(self.model.layers, hidden[rows, tokens - 1], targets).double().cpu()
        return torch.exp(-torch.zeros(len(owners), dtype=torch.float64).index_add(0, rows, nll))


def restored_modules(model: Model, kind: Kind) -> dict[int, nn.Module]:
    """Per layer, the module whose output is the state that is restored.

    For attention it is the matrix that writes the output, as the down projection is the MLP's: the
    attention module of some families (BLOOM) adds the residual to what it returns. It is the matrix
    that runs last, which a forward pass over two tokens tells; the order in which modules are
    registered does not (Phi-3 names its output projection first).
    """
    blocks = model.layers.blocks
    if kind == "block":
        return {b.index: b.module for b in blocks}
    if kind == "mlp":
        return {b.index: b.mlp_writer for b in blocks if b.mlp_matrices}
    found = {b.index: b.attention for b in blocks if b.mixer is not None}
    matrices = {(b.index, m.path): m for b in blocks for m in b.attention_matrices}
    last: dict[int, Matrix] = {}

    def ran(key: tuple[int, str], _x: Tensor, _y: Tensor) -> None:
        last[key[0]] = matrices[key]

    with torch.no_grad(), observe({key: m.module for key, m in matrices.items()}, ran):
        final_hidden(model, torch.tensor([[1, 1]], device=model.device))
    width = model.layers.d_model
    return found | {i: m.module for i, m in last.items() if m.out_features == width}


def _labels(model: Model, encoding: Encoding) -> tuple[str, ...]:
    """The prompt's tokens in words: white space shown as ␣, special tokens by their names."""
    named = model.tokenizer.convert_ids_to_tokens(list(encoding.ids[: encoding.n_prompt]))
    shown = [encoding.text[a:b] for a, b in encoding.spans[: encoding.n_prompt]]
    return tuple(
        text.strip() or "␣" * bool(text) or str(name)
        for text, name in zip(shown, named, strict=True)
    )
