"""The layer methods: the options of each, the facts it needs, and how its scores become a choice.

Nothing heavy is imported here; what a method runs is imported when it runs.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from goldenlayers.errors import UserError, check_number, near_matches, read_value
from goldenlayers.locating.base import (
    Fence,
    Kind,
    LayerMethod,
    Loss,
    Row,
    Scope,
    Scoring,
    Tokens,
    Work,
    published_layer,
    refuse_unknown,
)
from goldenlayers.locating.race import Race
from goldenlayers.registry import Registry

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.models import Model

# What stands in for probes that the data does not have, by the field of a row that tells of it.
_STAND_INS = {
    "prefixed": "no rephrasing that holds the subject; their prompt behind sampled prefixes stood "
    "in",
    "borrowed": "no locality probe; prompts of other facts stood in",
}


@dataclass(frozen=True, kw_only=True)
class _OfGradients(LayerMethod):
    """What the methods by weight gradients share."""

    scope: Scope = "mlp"
    """Which weight matrices of a block the gradients are taken of."""

    loss: Loss = "sequence"
    """Cross-entropy over the whole text (the paper's), or over the answer tokens only."""

    tokens: Tokens = "all"
    """Whose share of the gradients counts: that of all tokens (the paper's), of all but the first
    (no-sink: it draws attention and activations many times the others'), or of the lookup token,
    the subject's last, alone (lookup: where an edit writes)."""

    known: bool = False
    """Keep only facts whose old answer the model gives by itself."""

    def unscored(self, model: Model) -> list[int]:
        """Layers without an MLP, or without a matrix of the scope."""
        bare = [block.index for block in model.layers if not block.matrices(self.scope)]
        return sorted({*model.layers.without_mlp, *bare})

    @property
    def label(self) -> str:
        some = "" if self.tokens == "all" else f" {self.tokens}"
        return f"{self.name} {self.scope} {self.loss}{some}"


@dataclass(frozen=True, kw_only=True)
class LGA(_OfGradients):
    """Layer Gradient Analysis: inner products of the two answers' gradients, summed over facts.

    Source: Datta, Liu, Chhabra, arXiv 2602.20207, section 5.1. Options: see the fields.

    Raises:
        UserError: an unknown value, or a width of fences that are not there.
    """

    name = "lga"
    verdict = (
        "In our studies a layer chosen by lga lost to the published depth "
        "(docs/results/golden-layers.md). --method race makes real edits with your editor."
    )
    axis = ("score: inner product of\nthe two answers' gradients", "nats²")
    fills_old_answers = True
    joined_with = ("transfer",)

    fence: Fence = "tukey"
    """Leave layers with outlying scores out of the choice (Tukey fences, the paper's), or the last
    block alone, or keep all."""

    kappa: float = 1.0
    """Width of the Tukey fences in interquartile ranges."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kappa != 1.0 and self.fence != "tukey":
            raise UserError(
                f"kappa is for the fence tukey, not {self.fence}", fix="Leave out one of them"
            )
        _ = self.scoring  # which checks them

    @property
    def scoring(self) -> Scoring:
        """The sum over facts; with 13 facts LGA chose a layer 32 points worse than with 160."""
        return Scoring(self.fence, self.kappa, "sum", enough=100)

    def rows(self, work: Work) -> Iterator[list[Row]]:
        from goldenlayers.locating.lga import lga_rows

        how = (self.scope, self.loss, self.tokens)
        return lga_rows(work.model, work.facts, *how, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Saliency(_OfGradients):
    """Mean absolute weight gradient of the new answer, the SaLEM-style baseline."""

    name = "saliency"
    axis = ("score: mean size of\nthe new answer's gradient", "nats")

    def rows(self, work: Work) -> Iterator[list[Row]]:
        from goldenlayers.locating.lga import saliency_rows

        how = (self.scope, self.loss, self.tokens)
        return saliency_rows(work.model, work.facts, *how, batch_size=self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Transfer(LayerMethod):
    """Key transfer analysis: how far a rank-one edit carries, and where it spills.

    Source: this project's own; see :mod:`goldenlayers.locating.transfer`.

    Raises:
        UserError: an option out of its range.
    """

    name = "transfer"
    axis = ("score: transfer against interference", "")

    reach: bool = False
    """Weigh by whether an edit can still bring the answer about (one backward pass)."""

    align: bool = False
    """Weigh by that, and by whether rephrasings want the change that the prompt wants (one more
    backward pass)."""

    known: bool = False
    """Keep only facts whose old answer the model gives by itself."""

    prefixes: tuple[str, ...] | None = None
    """Texts that are put before the prompt of a fact without rephrasings; sampled from the model
    when left out."""

    max_probes: int = 10
    """At most so many locality probes per fact."""

    clamp: float = 4.0
    """Radius within which ROME keeps its change, in norms of the clean output (reach)."""

    def statistics_layers(self, model: Model) -> list[int]:
        return model.layers.with_mlp

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("the number of locality probes", self.max_probes, 1, 10**6)
        check_number("the clamp", self.clamp, 0, 1e6, whole=False, above=True)

    @property
    def label(self) -> str:
        # Alignment includes the reach.
        return self.name + (" align" if self.align else " reach" if self.reach else "")

    def rows(self, work: Work) -> Iterator[list[Row]]:
        from goldenlayers.locating.transfer import transfer_rows

        return transfer_rows(work, self)

    def warnings(self, n_layers: int, rows: Sequence[Row]) -> Iterable[str]:
        for name, text in _STAND_INS.items():
            if count := sum(bool(row.get(name)) for row in rows):
                yield f"{count} of the {len(rows)} facts have {text}."


@dataclass(frozen=True, kw_only=True)
class CMA(LayerMethod):
    """Causal mediation analysis: which layer's state brings the old answer back.

    Source: causal tracing, Meng et al. 2022, arXiv 2202.05262, section 2.

    Raises:
        UserError: an option out of its range, or a window of single blocks.
    """

    name = "cma"
    axis = ("score: indirect effect", "probability")
    fills_old_answers = True
    traces_tokens = True

    kind: Kind = "mlp"
    """What is restored: the MLP's output, the attention's, or that of the whole block."""

    window: int | None = None
    """Layers restored together (mlp, attention): 10, or half of them in models of 10 layers or
    fewer."""

    samples: int = 10
    """Noise samples per fact."""

    noise: float = 3.0
    """Size of the noise, in standard deviations of the subject tokens' embeddings."""

    known: bool = True
    """Trace only facts whose old answer the model gives by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None:
            check_number("the window of causal tracing", self.window, 1, 10_000)
            if self.kind == "block" and self.window != 1:
                raise UserError("window is for the kinds mlp and attention", fix="Leave it out")
        check_number("the number of noise samples", self.samples, 1, 10_000)
        check_number("the noise", self.noise, 0, 1e6, whole=False)

    def window_in(self, n_layers: int) -> int:
        """Layers restored together in a model of so many."""
        if self.kind == "block":
            return 1
        # A window as wide as the model would restore the same layers wherever it stands.
        return self.window or (10 if n_layers > 10 else max(1, n_layers // 2))

    def rows(self, work: Work) -> Iterator[list[Row]]:
        from goldenlayers.locating.tracing import tracing_rows

        return tracing_rows(work, self)

    def warnings(self, n_layers: int, rows: Sequence[Row]) -> Iterable[str]:
        del rows
        if n_layers <= 10 and self.window is None and self.kind != "block":
            yield (
                f"Causal tracing restores 10 layers together, but the model has {n_layers}: here "
                f"it restored {self.window_in(n_layers)}."
            )

    def grids(self, work: Work, chosen: Sequence[Fact]) -> Iterator[TracingGrid]:
        from goldenlayers.locating import tracing

        sigma = tracing.noise_sigma(work.model, work.facts, self.noise)
        for fact in chosen:
            yield tracing.tracing_grid(work.model, fact, self, seed=work.seed, sigma=sigma)


@dataclass(frozen=True)
class Fixed(LayerMethod):
    """A layer that is named without looking at any fact.

    Args:
        layer: its number (negative ones count from the end), "middle" for half depth, or
            "published" for the depth that published configurations use.
    """

    name = "fixed"
    axis = ("score: minus the distance\nfrom the layer named", "layers")

    layer: int | Literal["middle", "published"] = "middle"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.layer, str):
            refuse_unknown("layer", self.layer, ("middle", "published"))
            object.__setattr__(self, "name", self.layer)  # frozen, but not from itself

    @property
    def label(self) -> str:
        return self.layer if isinstance(self.layer, str) else f"layer {self.layer}"

    def fixed_layer(self, n_layers: int) -> int:
        """The layer, from 0.

        Raises:
            UserError: the model has no such layer.
        """
        if self.layer == "middle":
            return n_layers // 2
        if self.layer == "published":
            return published_layer(n_layers)
        if self.layer not in range(-n_layers, n_layers):
            raise UserError(
                f"the layer is {self.layer}, and the model has {n_layers} layers",
                expected=f"0 to {n_layers - 1}",
            )
        return range(n_layers)[self.layer]


FLAGS = ("scope", "loss", "tokens", "known", "fence", "kappa", "window", "editor", "budget")
"""Options that have a flag of their own; the others are given by ``--set``."""

METHODS: Registry[Callable[..., LayerMethod]] = Registry("method", "goldenlayers.methods")
"""All layer methods by name: what makes one from its options."""
for _method in (LGA, Transfer, CMA, Saliency, Race):
    METHODS.register(_method.name, _method)
METHODS.register("middle", partial(Fixed, "middle"))
METHODS.register("published", partial(Fixed, "published"))


def make_method(method: str | LayerMethod, **options: Any) -> LayerMethod:
    """The method of a name with these options; of an object, the object with them changed.

    Raises:
        UserError: an unknown method, an option that it does not have, lacks, or cannot take.
    """
    if isinstance(method, LayerMethod):
        name, make = method.name, partial(dataclasses.replace, method)
        own = [f.name for f in dataclasses.fields(method)]
    elif isinstance(method, str):
        name, make, own = method, METHODS[method], options_of(method)
    else:
        raise UserError(
            f"the method is {method!r}", expected="a name such as 'lga', or an object such as LGA()"
        )
    for one in options:
        if one not in own:
            others = [other for other in METHODS if one in options_of(other)]
            if not others:
                near = near_matches(one, own)
                raise UserError(f"the method {name} has no option '{one}'", fix=near)
            raise UserError(
                f"{one} is for the method {' or '.join(others)}, not {name}",
                fix=f"Leave out {one}, or choose another method",
            )
    try:
        inspect.signature(make).bind(**options)
    except TypeError as error:  # one that has no default
        raise UserError(f"the method {name}: {error}") from None
    return make(**options)


def read_options(name: str, texts: Mapping[str, str], flag: str) -> dict[str, Any]:
    """Options of a registered method that are given as text, by NAME VALUE pairs.

    Numbers and true or false are read as such; all else is left as it is, for the method to check.

    Raises:
        UserError: no value for a switch.
    """
    known = {**inspect.signature(METHODS[name]).parameters}
    return {
        one: read_value(text, type(known[one].default), f"{flag} {one}") if one in known else text
        for one, text in texts.items()
    }


def options_of(name: str) -> list[str]:
    """The names of a registered method's options."""
    return list(inspect.signature(METHODS[name]).parameters)


def recorded_method(name: str, settings: Mapping[str, Any]) -> LayerMethod:
    """The method that a finished run names, as its settings have it.

    One that is not installed here has no options: its scores can be shown and compared all the
    same.
    """
    if name not in METHODS:
        return type("Unknown", (LayerMethod,), {"name": name, "label": name})()
    own = options_of(name)
    given = {one: value for one, value in settings.items() if one in own}
    more = settings.get("set")
    if isinstance(more, Mapping):
        texts = {one: str(text) for one, text in more.items() if one in own}
        given |= read_options(name, texts, "set")
    return make_method(name, **given)
