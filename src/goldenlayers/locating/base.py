"""What every layer method is, and what it is given. Nothing heavy is imported here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from goldenlayers.errors import UserError, check_number, near_matches

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.locating.grid import TracingGrid
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.progress import Progress
    from goldenlayers.statistics.moments import Covariance

# Published ROME/MEMIT settings edit layer 5 of 28-32 layer models and 17 of 48 for GPT-2 XL; as a
# fraction of depth: 5/28 .. 5/32 and 17/48.
_PUBLISHED_DEPTH = 5 / 30
_PUBLISHED_DEEP = (48, 17 / 48)

Row = dict[str, Any]
Scope = Literal["mlp", "down", "attention", "block"]
Loss = Literal["sequence", "answer"]
Tokens = Literal["all", "no-sink", "lookup"]
Fence = Literal["tukey", "last", "none"]
Kind = Literal["mlp", "attention", "block"]
Reduce = Literal["sum", "mean"]


@dataclass(frozen=True)
class Scoring:
    """How the scores of facts become one per layer, and a choice.

    Args:
        fence: "tukey" leaves out layers whose score lies outside the Tukey fences, "last" the last
            block alone, "none" nothing; None for methods that have no fences.
        kappa: the Tukey fences' width in interquartile ranges, 0 or more.
        reduce: a layer's score is the "sum" of the facts' scores or their "mean".
        enough: with fewer facts than this the ranking warns.

    Raises:
        UserError: a value out of its range.
    """

    fence: Fence | None = "tukey"
    kappa: float = 1.0
    reduce: Reduce = "sum"
    enough: int = 100

    def __post_init__(self) -> None:
        refuse_unknown("fence", self.fence, (None, *get_args(Fence)))
        refuse_unknown("way to reduce", self.reduce, get_args(Reduce))
        check_number("kappa", self.kappa, 0, 1e6, whole=False)


@dataclass(frozen=True)
class Work:
    """What a method works on.

    Attributes:
        model: a loaded model; it is not to be changed.
        facts: those that fit the model's context, known or with old answers as the method asks.
        seed: of all that is drawn at random.
        statistics: key statistics of the layers that the method reads them of.
    """

    model: Model
    facts: Sequence[Fact]
    seed: int = 0
    statistics: Mapping[int, Covariance] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LayerMethod:
    """A way to score layers; its options are its fields.

    A method of your own derives from this, is a frozen dataclass, has :meth:`rows`, and is
    registered: ``METHODS.register("mine", Mine)``, or by an entry point in the group
    ``goldenlayers.methods``. An option ``known`` keeps only facts whose old answer the model gives.

    Attributes:
        name: what rankings and tables call it; the name it is registered by.
        axis: what its scores are and their unit, for figures.
        fills_old_answers: whether facts without old answer get the model's own.
        traces_tokens: whether it has :meth:`grids`.
        verdict: what edits have shown of its choices, in a sentence or two; "" where nothing.
        scoring: how the scores of facts become a choice.
    """

    name: ClassVar[str]
    axis: ClassVar[tuple[str, str]] = ("", "")
    fills_old_answers: ClassVar[bool] = False
    traces_tokens: ClassVar[bool] = False
    verdict: ClassVar[str] = ""
    joined_with: ClassVar[tuple[str, ...]] = ()
    """Methods whose ranks a comparison also averages with this one's."""

    batch_size: int = 16
    """The most facts per batch; halved by itself when memory runs out."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for f in dataclasses.fields(self):
            value, hint = getattr(self, f.name), hints[f.name]
            if get_origin(hint) is Literal:
                refuse_unknown(f.name, value, get_args(hint))
            if hint is bool and not isinstance(value, bool):
                raise UserError(f"{f.name} is {value!r}", expected="True or False")
        check_number("the batch size", self.batch_size, 1, 10**6)

    @property
    def scoring(self) -> Scoring:
        """How the scores of facts become a choice: by their mean, without fences."""
        return Scoring(fence=None, reduce="mean", enough=10)

    @property
    def known_only(self) -> bool:
        """Whether it keeps only facts whose old answer the model gives."""
        return bool(getattr(self, "known", False))

    @property
    def label(self) -> str:
        """The name with the options that are not the default; what runs are told apart by."""
        parts = [self.name]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name not in ("batch_size", "known"):
                parts.append(f.name if value is True else f"{f.name} {value}")
        return " ".join(parts)

    def fixed_layer(self, n_layers: int) -> int | None:
        """The layer that it names without looking at any fact; None if it scores facts."""
        del n_layers

    def statistics_layers(self, model: Model) -> list[int]:
        """Layers whose key statistics it reads; none by default."""
        del model
        return []

    def unscored(self, model: Model) -> list[int]:
        """Layers that take no part: those where nothing could be edited."""
        return model.layers.without_mlp

    def rows(self, work: Work) -> Iterator[list[Row]]:
        """Score facts: yield rows {"fact": id, "phi": one number per layer}, batch by batch.

        A row may hold more: "unscored" says why its fact has no score (NaN), "cosine", "norm_old"
        and "norm_new" (one number per layer) are averaged in the ranking.
        """
        raise NotImplementedError(f"{type(self).__name__} scores no facts")

    def ranking(self, work: Work, tell: Progress, top_k: int) -> LayerRanking | None:
        """The layers ranked, by a method that tries some facts at some layers only; its rows go to
        ``tell``. None: the method scores every fact at every layer by :meth:`rows`.
        """
        del work, tell, top_k

    def warnings(self, n_layers: int, rows: Sequence[Row]) -> Iterable[str]:
        """Whole sentences on what to know of the rows (here without their lists)."""
        del n_layers, rows
        return ()

    def grids(self, work: Work, chosen: Sequence[Fact]) -> Iterator[TracingGrid]:
        """The effect of every token at every layer, of some of the facts that are scored."""
        raise NotImplementedError(f"{self.name} traces no tokens")


def refuse_unknown(name: str, value: Any, known: Sequence[Any]) -> None:
    """Refuse a value that is not among those known.

    Raises:
        UserError: with the values that are near.
    """
    if value not in known:
        raise UserError(
            f"unknown {name} '{value}'", fix=near_matches(str(value), filter(None, known))
        )


def published_layer(n_layers: int) -> int:
    """The layer that published configurations copy from one another, at this depth."""
    deep, fraction = _PUBLISHED_DEEP
    depth = fraction if n_layers >= deep else _PUBLISHED_DEPTH
    return min(n_layers - 1, round(depth * n_layers))


def published_on(model: Model) -> int:
    """The layer at that depth, or the nearest one with an MLP."""
    return model.layers.nearest(published_layer(len(model.layers)))
