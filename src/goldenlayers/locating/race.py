"""The race as a layer method: the layer is chosen by real edits of a few facts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError, check_number
from goldenlayers.locating.base import LayerMethod, Scoring, Work, published_layer

if TYPE_CHECKING:
    from goldenlayers.locating.ranking import Evidence, LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.progress import Progress
    from goldenlayers.racing import Contest
    from goldenlayers.racing.rule import Raced

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_LONGEST = 1e9  # seconds


@dataclass(frozen=True, kw_only=True)
class Race(LayerMethod):
    """Full edits of some facts with the editor that is to edit later, at a few layers: the
    published depth, and one and two thirds of the depth (by fine-tuning two thirds and the last
    layer). All are edited on the same facts, and the
    published depth is left only for a layer that is clearly ahead. See
    :mod:`goldenlayers.racing.rule`.

    An edit's score is the mean of the hits and of those that its probabilities let expect, of
    answers and of what must stay.

    Raises:
        UserError: an option out of its range, or an unknown editor.
    """

    name = "race"
    axis = ("score: worth of\nreal edits", "points")

    editor: Any = "clear-rome"
    """The editor that is to edit later: a name, or an object with its settings."""

    budget: Any = None
    """The time that the edits may take: seconds, or a text such as "90s", "3m" or "1h"; None for
    as long as they take."""

    edits: int = 96
    """How many edits are made at most, whatever the depth: 32 at each of three layers."""

    subject: float = 1.0
    """Weight of what must stay about the edited subject."""

    neighbour: float = 1.0
    """Weight of what must stay about others."""

    def __post_init__(self) -> None:
        from goldenlayers.editors import make_editor
        from goldenlayers.racing.worth import Worth

        super().__post_init__()
        check_number("the number of edits", self.edits, 1, 1_000_000)
        editor = make_editor(self.editor)
        worth = Worth(subject=self.subject, neighbour=self.neighbour, by="both")
        budget = None if self.budget is None else seconds_of(self.budget)
        # Frozen, but not from itself.
        object.__setattr__(self, "editor", editor)
        object.__setattr__(self, "budget", budget)
        object.__setattr__(self, "worth", worth)

    @property
    def scoring(self) -> Scoring:
        return Scoring(fence=None, reduce="mean", enough=6)

    @property
    def label(self) -> str:
        changed = [
            f"{f.name} {getattr(self, f.name):g}"
            for f in dataclasses.fields(self)
            if f.name in ("budget", "edits", "subject", "neighbour")
            and getattr(self, f.name) != f.default
        ]
        return " ".join([self.name, self.editor.name, *changed])

    def layers(self, model: Model) -> list[int]:
        """The layers that race on a model, the published depth first.

        Raises:
            UserError: it has none with an MLP.
        """
        from goldenlayers.racing import few_layers

        depth = len(model.layers)
        places = [published_layer(depth), *few_layers(depth, self.editor.race_depths)]
        if not model.layers.with_mlp:
            raise UserError("there is no layer to race", expected="a layer with an MLP")
        return list(dict.fromkeys(model.layers.nearest(i) for i in places))

    def statistics_layers(self, model: Model) -> list[int]:
        from goldenlayers.editors.base import needed_layers

        return needed_layers(self.editor, self.layers(model))

    def ranking(self, work: Work, tell: Progress, top_k: int) -> LayerRanking:
        """Race, and rank the layers that were tried."""
        from goldenlayers.racing import Contest

        contest = Contest(
            work.model,
            work.facts,
            self.editor,
            self.layers(work.model),
            edits=self.edits,
            seconds=self.budget,
            worth=vars(self)["worth"],
            statistics=work.statistics or None,
            seed=work.seed,
            on_progress=tell.on_progress,
            on_note=tell.on_note,
        )
        found = contest.run()
        facts = contest.drawn[: len(found.table)]
        tell.rows(
            [
                {"fact": fact.id, "phi": [None if math.isnan(s) else s for s in scores]}
                for fact, scores in zip(facts, found.table.tolist(), strict=True)
            ]
        )
        return _ranking(contest, found, top_k)


def seconds_of(budget: object) -> float:
    """Seconds, from a number of them or a text such as "90s", "3m" or "1.5h".

    Raises:
        UserError: neither, or no time at all.
    """
    if isinstance(budget, str):
        read = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) ?(s|m|min|h)", budget.strip())
        if read is None:
            raise UserError(f"the budget is '{budget}'", expected="a time such as 90s, 3m or 1h")
        budget = float(read[1]) * _SECONDS[read[2]]
    check_number("the budget in seconds", budget, 0, _LONGEST, whole=False, above=True)
    return float(budget)  # type: ignore[arg-type]  # held by the check


def _ranking(contest: Contest, found: Raced, top_k: int) -> LayerRanking:
    from goldenlayers.locating.ranking import LayerRanking, LayerScore
    from goldenlayers.racing.rule import RESAMPLES

    seed = contest.seed
    scores, wins = found.scores().tolist(), found.wins(seed).tolist()
    counts = (found.table == found.table).sum(axis=0).tolist()  # NaN is not itself
    layers = tuple(
        LayerScore(
            i,
            None if math.isnan(scores[i]) else scores[i],
            kept=not math.isnan(scores[i]),
            wins=wins[i],
            facts=counts[i],
        )
        for i in range(len(scores))
    )
    tried = [one.layer for one in layers if one.kept and one.layer != found.place]
    tried.sort(key=lambda i: (-wins[i], -counts[i], -scores[i]))
    return LayerRanking(
        method=Race.name,
        golden_layer=found.place,
        candidates=(found.place, *tried)[:top_k],
        layers=layers,
        n_facts=len(found.table),
        reduce="mean",
        bootstrap=RESAMPLES,
        seed=seed,
        warnings=tuple(_warnings(contest, found)),
        interrupted=found.interrupted,
        evidence=_evidence(contest, found),
    )


def _evidence(contest: Contest, found: Raced) -> Evidence:
    from goldenlayers.locating.ranking import Evidence
    from goldenlayers.truth.table import plain

    value = low = high = None
    if found.tried[contest.home] and found.tried[found.place]:
        gain = found.gain(contest.home, contest.seed)
        value, low, high = (plain(v) for v in (gain.value, gain.low, gain.high))
    sorts = [dataclasses.replace(contest.worth, subject=s, neighbour=1 - s) for s in (1.0, 0.0)]
    subject, neighbour = (contest.layer_by(found, worth) for worth in sorts)
    metrics = {row["metric"] for row in contest.rows}
    asked = tuple(s for s in ("subject", "neighbour") if f"locality_{s}" in metrics)
    return Evidence(
        editor=contest.editor.name,
        published=contest.home,
        edits=found.edits,
        gain=(value, low, high),
        alike=tuple(found.alike(contest.seed)),
        why=found.why,
        subject=subject,
        neighbour=neighbour,
        asked=asked,
    )


def _warnings(contest: Contest, found: Raced) -> list[str]:
    facts = contest.drawn[: max(1, len(found.table))]
    probes = {
        "rephrasings": sum(not fact.rephrasings for fact in facts),
        "locality probes": sum(not fact.must_stay for fact in facts),
    }
    lacking = [(name, count) for name, count in probes.items() if count]
    said = [f"{count} of the {len(facts)} facts have no {name}." for name, count in lacking]
    failed = Counter(str(error) for error in contest.failures)
    if failed:
        text, _ = failed.most_common(1)[0]
        said.append(f"{sum(failed.values())} edits failed, most with: {text}")
    if found.tried.sum() < 2 < len(contest.model.layers):
        said.append(
            f"No layer was compared with the published depth: {found.why}. Give the race more time "
            "(--budget) or edits."
        )
    return said
