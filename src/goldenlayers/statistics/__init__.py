"""Second moments of keys: C = E[k kᵀ] per layer, all layers in one pass over a text."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor

from goldenlayers.durable import disk_errors
from goldenlayers.errors import UserError, check_seed, near_matches
from goldenlayers.hooks import observe
from goldenlayers.models.weights import not_a_number
from goldenlayers.progress import progress as progress_bar
from goldenlayers.shown import shown
from goldenlayers.statistics.cache import FORMAT, Manifest, StatisticsCache, model_settings
from goldenlayers.statistics.documents import open_documents
from goldenlayers.statistics.moments import (
    DEFAULT_RIDGE,
    KeyStatistics,
    MissingLayerError,
)
from goldenlayers.statistics.sources import (
    SAMPLE_LENGTH,
    TEXT_LENGTH,
    Finished,
    Observer,
    SampledSource,
    Source,
    TextSource,
)
from goldenlayers.statistics.sums import MEMORY_LIMIT, MomentSums

if TYPE_CHECKING:
    from goldenlayers.models import Model


__all__ = ["KeyStatistics", "MissingLayerError", "key_statistics"]

Progress = Callable[[int, int], None]
BUDGET_WIDTHS = 10
# At 10 widths small models stand at 0.15 to 0.25 and use their whole budget; a larger budget is cut
# short once C is known to a tenth.
DEFAULT_SETTLE = 0.1
# Fewer tokens than this many widths never count as settled: the criterion looks at C's large
# directions, C⁻¹ lives on the small ones.
SETTLE_WIDTHS = 4
CHECKPOINT_SECONDS = 30.0
# Keys held back while sampling, where each step gives one token a row: multiplied together.
_PENDING_BYTES = 256 << 20


class KeyCollector(Observer):
    """Feeds the inputs of the wanted down projections to their sums, as hooks see them."""

    def __init__(self, model: Model, layers: Sequence[int], sums: MomentSums, skip: int) -> None:
        self.sums, self.skip = sums, skip
        self.modules = {layer: model.layers[layer].down.module for layer in layers}
        self.of_expert = {layer for layer in layers if model.layers[layer].down.of_expert}
        self.last = max(layers)
        self.pending: dict[int, list[Tensor]] = {layer: [] for layer in layers}
        width = max(model.layers[layer].down.in_features for layer in layers)
        self.pending_tokens = max(1, _PENDING_BYTES // (4 * width * len(layers)))

    def see(self, layer: int, keys: Tensor, _values: Tensor) -> None:
        """Hook: ``keys`` (B, T, F), or (B·T, F) where a family flattens them."""
        keys = keys.detach()
        if layer in self.of_expert:
            # Tokens that go elsewhere count as zero: a change of this expert cannot touch them.
            keys = keys * cast(Tensor, self.modules[layer].routed)[:, None]
        keys = keys.reshape(self.rows, -1, keys.shape[-1])
        keys = keys[:, max(0, self.skip - self.position) :]
        if keys.shape[1]:
            self.pending[layer].append(keys)
            held = self.rows * sum(part.shape[1] for part in self.pending[layer])
            if self.stop_after_last or held >= self.pending_tokens:
                self.flush(layer)
        if self.stop_after_last and layer == self.last:
            raise Finished

    def flush(self, layer: int) -> None:
        """Add what was held back."""
        if parts := self.pending[layer]:
            self.sums.add(layer, parts[0] if len(parts) == 1 else torch.cat(parts, 1))
            parts.clear()

    def end_batch(self, n_tokens: int) -> None:
        """The batch is complete in every layer."""
        for layer in self.pending:
            self.flush(layer)
        self.sums.end_batch(n_tokens)


def collect(
    model: Model,
    source: Source,
    sums: MomentSums,
    stop_rows: int,
    *,
    settled: Callable[[MomentSums], bool] = lambda _sums: False,
    on_batch: Callable[[], None] = lambda: None,
) -> bool:
    """Fill ``sums`` (empty, or as a checkpoint left them) up to ``stop_rows`` rows of ``source``.

    Returns whether it stopped because ``settled`` said so. Batches are the same after a
    checkpoint as without it, so a pass that was killed ends with identical bits.
    """
    collector = KeyCollector(model, list(sums.layers), sums, source.skip)
    if sums.n_rows and settled(sums):
        return True
    with (
        torch.no_grad(),
        observe(collector.modules, collector.see),
        closing(source.run(model, collector, sums.n_rows, stop_rows)) as batches,
    ):
        for n_rows in batches:
            collector.end_batch(n_rows * source.tokens_per_row)
            on_batch()
            if settled(sums):
                return True
    return False


class _Checkpoints:
    """Saves the sums every so many seconds, between two batches, as long as there is room."""

    def __init__(self, store: StatisticsCache, sums: MomentSums, stop_rows: int, pause: float):
        self.store, self.sums, self.stop_rows = store, sums, stop_rows
        self.shortest = self.pause = pause
        self.saved = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self.saved < self.pause or self.sums.n_rows >= self.stop_rows:
            return
        try:
            self.store.save_checkpoint(self.sums, self.stop_rows)
        except (OSError, SafetensorError) as error:
            warnings.warn(shown(f"no checkpoint could be saved ({error})"), stacklevel=3)
            self.pause = math.inf
            return
        self.saved = time.monotonic()
        # Where the sums are so large that saving is slow, save less often.
        self.pause = max(self.shortest, 20 * (self.saved - now)) if self.shortest else 0.0


@dataclass(frozen=True)
class StatisticsSettings:
    """Which text key statistics are made of, how much of it, and how.

    Attributes:
        text: ``"package"``: English text that comes with the package. ``"model"``: sampled from
            the model itself, token by token: slow. A path: a JSON-lines file with a field "text",
            or a plain text file. ``"hub:NAME[@CONFIGURATION][:SPLIT]"``: a data set of the hub
            (extra ``hub``). ``"none"``: no statistics, C = I (another algorithm: it warns).
        tokens: how many tokens at most; 10 × MLP width if None, which keeps 95 % of the quality of
            very long passes (arXiv 2506.04226), or 4 × where the text has no more. Rounded up to
            whole rows.
        seed: of the sampled text, or of the order in which documents are read.
        ridge: added to the diagonal when factorising, as a share of the mean diagonal. Not part
            of what is cached.
        settle: stop before ``tokens`` once the relative error of C (Frobenius, estimated from the
            spread between rows, averaged over the layers) is at most this and at least 4 × MLP
            width tokens are in. 0 never stops early.
        length: tokens per row; 256 for a text, 128 when sampling, or the context if shorter.
        batch_tokens: tokens per forward pass (a text).
        memory_limit: bytes; running sums larger than this are kept on disk.
        checkpoint_seconds: how often the sums so far are saved; 0 for after every batch.

    Raises:
        UserError: a setting out of range.
    """

    text: str | Path = "package"
    tokens: int | None = None
    seed: int = 0
    ridge: float = DEFAULT_RIDGE
    settle: float = DEFAULT_SETTLE
    length: int | None = None
    batch_tokens: int = 4096
    memory_limit: int = MEMORY_LIMIT
    checkpoint_seconds: float = CHECKPOINT_SECONDS

    def __post_init__(self) -> None:
        if not 0 <= self.ridge < math.inf:
            raise UserError(f"the ridge is {self.ridge}", expected="0 or more")
        for name in ("tokens", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}", expected="1 or more")
        if not 0 <= self.settle < math.inf:
            raise UserError(f"settle is {self.settle}", expected="0 (never stop early) or more")
        check_seed(self.seed)

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> StatisticsSettings:
        """Those settings; one that there is not is the user's error."""
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                fix = near_matches(name, known)
                raise UserError(f"key statistics have no setting '{name}'", fix=fix)
        return cls(**settings)

    def source(self, model: Model) -> Source:
        """The source that ``text`` names, with rows that fit the model's context."""
        sampled = self.text == "model"
        context = model.encoder.max_length
        length = self.length
        if length is None:
            length = min(SAMPLE_LENGTH if sampled else TEXT_LENGTH, context or TEXT_LENGTH)
        source: Source
        if sampled:
            source = SampledSource(model, length=length, seed=self.seed)
        else:
            documents = open_documents(self.text)
            source = TextSource(
                documents, model, length=length, batch_tokens=self.batch_tokens, seed=self.seed
            )
        if source.tokens_per_row < 1 or (context is not None and length > context):
            raise UserError(
                f"the length of a row is {length} tokens",
                expected=f"{source.skip + 1} to {context or 'any number of'} tokens",
            )
        return source

    def budget(self, width: int) -> int:
        """Tokens at most."""
        return BUDGET_WIDTHS * width if self.tokens is None else self.tokens

    def settled(self, sums: MomentSums, width: int) -> bool:
        """Whether C is known well enough."""
        enough = self.settle > 0 and sums.n_tokens >= SETTLE_WIDTHS * width
        error = sum(map(sums.error, sums.layers)) / len(sums.layers) if enough else math.inf
        return error <= self.settle


def key_statistics(
    model: Model,
    layers: Sequence[int] | None = None,
    *,
    cache_dir: str | Path | None = None,
    cache: bool = True,
    progress: Progress | None = None,
    **settings: Any,
) -> KeyStatistics:
    """C = E[k kᵀ] of the down projection's input, for all wanted layers in one pass over a text.

    The first position of every row (and every BOS) is left out of the mean; see
    :mod:`goldenlayers.statistics.sources`. Cached on disk by weights, text and settings; only the
    layers that are missing there are collected, from the same text. A pass that was killed goes
    on from its last checkpoint.

    Args:
        model: the model, in evaluation mode as loading leaves it.
        layers: which layers, all that have an MLP if None.
        cache_dir: as for loading models: the folder ``statistics`` in it is used.
        cache: False keeps everything in memory, without checkpoints.
        progress: called with (tokens done, tokens at most) after each batch; a bar on a terminal
            when left out.
        settings: the fields of :class:`StatisticsSettings`: ``text``, ``tokens``, ``seed``, …

    Raises:
        UserError: a layer out of range, a text that is missing, empty or shorter than min(tokens,
            MLP width), a setting out of range or unknown, NaN keys.
        DataError: a row of the text that cannot be read.
    """
    wanted = sorted(set(model.layers.with_mlp if layers is None else layers))
    widths = {layer: model.layers[layer].down.in_features for layer in wanted}
    if not wanted:
        raise UserError("no layers were asked for", expected="at least one layer")
    how = StatisticsSettings.of(settings)
    if how.text == "none":
        warnings.warn(
            "NO KEY STATISTICS: C is the identity. Editors that use it are other algorithms than "
            "published, and usually worse",
            stacklevel=2,
        )
        return KeyStatistics.identity(widths)
    width = _tokens_needed(model, wanted)
    source, budget = how.source(model), how.budget(width)
    about = {
        "format": FORMAT,
        **model_settings(model),
        "text": source.identity,
        "tokens": budget,
        "settle": how.settle,
        "batch_rows": source.batch_rows,
    }
    if experts := [m.path for m in (model.layers[i].down for i in wanted) if m.of_expert]:
        about["experts"] = experts
    store = StatisticsCache(about, cache_dir) if cache else None
    folder = store.folder if store is not None else None
    there = store.whole_layers(model, wanted) if store is not None else []
    manifest = store.manifest() if store is not None else None
    moments: dict[int, Tensor] = {}
    if missing := {layer: widths[layer] for layer in wanted if layer not in there}:
        # Layers that come later are averaged over the very tokens of those that are there.
        again = manifest if manifest is not None and manifest.layers else None
        stop_rows = again.n_rows if again else math.ceil(budget / source.tokens_per_row)
        if folder is not None:
            with disk_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
        limit, at = how.memory_limit, model.device
        sums = MomentSums.empty(missing, memory_limit=limit, folder=folder, device=at)
        saves = store and _Checkpoints(store, sums, stop_rows, how.checkpoint_seconds)

        def enough(sums: MomentSums) -> bool:
            return not again and how.settled(sums, width)

        with closing(sums), ExitStack() as bars:
            if store is not None:
                store.load_checkpoint(sums, stop_rows)
            numbers = ", ".join(map(str, sums.layers))
            which = f"layer {numbers}" if len(sums.layers) < 4 else f"{len(sums.layers)} layers"
            told = progress or bars.enter_context(
                progress_bar(f"key statistics of {model.name}, {which}", "tokens")
            )

            def on_batch() -> None:
                told(sums.n_tokens, stop_rows * source.tokens_per_row)
                if saves is not None:
                    saves()

            settled = collect(model, source, sums, stop_rows, settled=enough, on_batch=on_batch)
            settled = again.settled if again else settled
            _check(model, sums, source, how, settled)
            if store is not None:
                manifest = store.write(model, sums, settled=settled, source=source.description)
            else:
                manifest = Manifest.of(model, sums, settled=settled, source=source.description)
                moments = {layer: sums.mean(layer).float() for layer in sums.layers}
    assert manifest is not None
    return KeyStatistics(
        tuple(wanted),
        store.read if store is not None else moments.__getitem__,
        manifest.n_tokens,
        source.description,
        manifest.settled,
        {layer: float(manifest.layers[str(layer)]["error"]) for layer in wanted},
        how.ridge,
        folder,
    )


def _tokens_needed(model: Model, layers: Sequence[int]) -> int:
    """The MLP width; where an expert is read, times as many as there are for each that it sees."""
    chosen = [model.layers[i].routed for i in layers if model.layers[i].down.of_expert]
    thin = max((taps.n_experts / taps.per_token for taps in chosen if taps), default=1.0)
    return math.ceil(model.layers.d_mlp * thin)


def _check(
    model: Model, sums: MomentSums, source: Source, how: StatisticsSettings, settled: bool
) -> None:
    width = _tokens_needed(model, list(sums.layers))
    needed = min(budget := how.budget(width), width)
    if sums.n_tokens < needed:
        raise UserError(
            f"{source.description} gives only {sums.n_tokens} tokens in rows of {source.length}",
            expected=f"at least {needed}: below the MLP width the second moment is singular",
            fix="Use more text, or have it sampled from the model (--statistics model, "
            "text='model')",
        )
    if sums.n_tokens < (budget if how.tokens else SETTLE_WIDTHS * width) and not settled:
        warnings.warn(
            shown(f"{source.description} ended after {sums.n_tokens} of {budget} tokens"),
            stacklevel=3,
        )
    for layer, mine in sums.layers.items():
        if not torch.isfinite(mine.total.diagonal()).all():
            raise not_a_number(model.hf, f"the keys of layer {layer} hold NaN or infinite values")
