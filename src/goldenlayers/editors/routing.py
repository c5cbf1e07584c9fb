"""Edits in layers where tokens have experts of their own, and none that all tokens pass.

Such an edit changes the down projection of one expert: the one that weighs most at the fact's
lookup token. The change counts there by the routing weight, which the value search sees, since it
moves that expert's output and lets the model weigh it. Its key statistics are over the tokens that
go to it; others, which the change cannot touch, count as zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from goldenlayers.delta.apply import untouched
from goldenlayers.editors.base import Editor, needed_layers
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.hooks import input_of
from goldenlayers.statistics.moments import Covariance
from goldenlayers.tokens import length_batches, pad_ids

if TYPE_CHECKING:
    from goldenlayers.editors.editing import Editing
    from goldenlayers.models import Model
    from goldenlayers.models.layers import Block

_BATCH = 32  # rows per forward pass


def is_routed(block: Block) -> bool:
    """Whether an edit of the layer changes an expert that the fact chooses."""
    return block.routed is not None and block.written is None


@dataclass(frozen=True, eq=False)
class RoutedStatistics(Mapping[int, Covariance]):
    """Key statistics of layers some of which have experts: those are collected expert by expert.

    ``plain`` are of the other layers, all in one pass.
    """

    plain: Mapping[int, Covariance]
    text: str = "package"
    seed: int = 0
    cache_dir: Path | None = None

    def __getitem__(self, layer: int) -> Covariance:
        return self.plain[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.plain)

    def __len__(self) -> int:
        return len(self.plain)

    def collect(self, model: Model, layer: int) -> Mapping[int, Covariance]:
        """Those of one layer of a model whose expert is chosen."""
        from goldenlayers.statistics import key_statistics

        how = {"text": self.text, "seed": self.seed, "cache_dir": self.cache_dir}
        return key_statistics(model, [layer], **how)


def check_layers(model: Model, editor: Editor, layer: int) -> None:
    """Refuse an edit that the layers it would write to do not allow, before any work.

    Raises:
        UserError: a layer has no MLP; or has experts, and the editor spreads an edit over several
            layers or remembers keys from one batch to the next.
    """
    blocks = [model.layers[at] for at in editor.layers(layer)]
    for block in blocks:
        if not block.mlp_matrices:
            _ = block.down  # which says so
    mixtures = [block.index for block in blocks if block.n_experts]
    if len(blocks) > 1 and mixtures:
        raise UserError(
            f"{editor.name} would spread the edit over layers {blocks[0].index} to "
            f"{blocks[-1].index}, and layer {mixtures[0]} has experts, of which each token sees "
            "its own: what is missing in the stream cannot be told from one of them",
            fix="Edit one layer (--set layers_before=0), or use rome",
        )
    if getattr(editor, "remembers_keys", False) and is_routed(blocks[-1]):
        raise UserError(
            f"{editor.name} remembers the keys of earlier batches, and layer {layer} has an expert "
            "for each token and none that all pass: there is no one matrix whose keys these are",
            fix="Use rome, clear-rome or memit",
        )


@torch.no_grad()
def experts_of(model: Model, layer: int, facts: Sequence[Fact]) -> list[int]:
    """Of each fact the expert that weighs most at its lookup token, in the bare prompt.

    Raises:
        UserError: the token goes to none.
    """
    taps = model.layers[layer].routed
    assert taps is not None
    texts = [model.encoder.fact(fact, "") for fact in facts]
    found = [0] * len(facts)
    for members in length_batches([len(text) for text in texts], _BATCH):
        batch = pad_ids([texts[i].ids for i in members], model.device)
        input_of(model, taps.down, batch.ids)
        shape = (*batch.ids.shape, taps.per_token)
        index, weights = taps.index.reshape(shape), taps.weights.reshape(shape)
        for row, i in enumerate(members):
            at = texts[i].lookup
            assert at is not None  # encoder.fact holds this
            there = weights[row, at].masked_fill(index[row, at] >= taps.n_experts, -1.0)
            if float(there.max()) <= 0:
                raise UserError(
                    f"fact '{facts[i].id}': the subject's last token goes to no expert at layer "
                    f"{layer}",
                    fix="Choose another layer",
                )
            found[i] = int(index[row, at, there.argmax()])
    return found


def statistics_for(
    model: Model,
    editor: Editor,
    layers: Sequence[int],
    *,
    seed: int = 0,
    text: str = "package",
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[int, Covariance] | None:
    """Key statistics for edits at ``layers``: from the cache, or collected now in one pass.

    None where the editor reads none.
    """
    if not editor.needs_statistics:
        return None
    for layer in layers:
        check_layers(model, editor, layer)
    needed = needed_layers(editor, layers)
    return layer_statistics(
        model, needed, seed=seed, text=text, cache_dir=cache_dir, progress=progress
    )


def layer_statistics(
    model: Model,
    layers: Sequence[int] | None = None,
    *,
    seed: int = 0,
    text: str = "package",
    cache_dir: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Mapping[int, Covariance]:
    """Key statistics of layers (default: all with an MLP), whoever reads them.

    Those of layers with experts alone are collected when an expert's are asked for.
    """
    from goldenlayers.statistics import key_statistics

    some = model.layers.with_mlp if layers is None else layers
    plain = [layer for layer in some if not is_routed(model.layers[layer])]
    how: dict[str, Any] = {"text": text, "seed": seed, "cache_dir": cache_dir}
    if len(plain) == len(some):
        return key_statistics(model, some, progress=progress, **how)
    return RoutedStatistics(
        key_statistics(model, plain, progress=progress, **how) if plain else {}, **how
    )


def seen_by(model: Model, layer: int, fact: Fact) -> Model:
    """The model with the matrix that an edit of a fact changes at a layer."""
    if not is_routed(model.layers[layer]):
        return model
    return model.through(layer, experts_of(model, layer, [fact])[0])


def by_expert(work: Editing, facts: Sequence[Fact]) -> Iterator[tuple[Editing, list[int]]]:
    """The facts that one matrix takes, by their places, and the editing of that matrix.

    All of them and ``work``, unless its layer has experts and none that all tokens pass.
    """
    everyone = list(range(len(facts)))
    if not facts or not is_routed(work.model.layers[work.layer]):
        yield from [(work, everyone)] if facts else []
        return
    chosen, told, already = experts_of(work.model, work.layer, facts), work.on_done, 0
    for expert in sorted(set(chosen)):
        places = [i for i in everyone if chosen[i] == expert]
        tell = None if told is None else partial(_further, told, already)
        model = work.model.through(work.layer, expert)
        kept = work.kept.setdefault(("expert", work.layer, expert), {})
        kept |= {"prefixes": work.prefixes, "fingerprint": work.base_fingerprint}
        statistics = _statistics_of(work, model, kept)
        more = {"model": model, "statistics": statistics, "on_done": tell, "kept": kept}
        yield replace(work, **more), places
        already += len(places)


def _further(told: Callable[[int], None], already: int, done: int) -> None:
    told(already + done)


def _statistics_of(
    work: Editing, model: Model, kept: dict[Any, Any]
) -> Mapping[int, Covariance] | None:
    given = work.read_statistics() if work.editor.needs_statistics else None
    if not isinstance(given, RoutedStatistics):
        return given
    if "statistics" not in kept:
        with untouched(model):
            kept["statistics"] = given.collect(model, work.layer)
    return kept["statistics"]
