"""The race as a layer method: the layer is chosen by real edits of a few facts."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from goldenlayers.errors import UserError, check_number
from goldenlayers.locating.base import LayerMethod, Scoring, Work, published_layer

if TYPE_CHECKING:
    from goldenlayers.locating.ranking import Evidence, LayerRanking
    from goldenlayers.progress import Progress
    from goldenlayers.racing import Contest
    from goldenlayers.racing.rule import Raced

_SECONDS = {"s": 1, "m": 60, "min": 60, "h": 3600}
_LONGEST = 1e9  # seconds


@dataclass(frozen=True, kw_only=True)
class Race(LayerMethod):
    """Full edits of some facts with the editor that is to edit later, more where layers are good.

    An edit's score is the share of hits that its probabilities let expect, of answers and of what
    must stay. Layers near each other are taken to be alike, and before any edit the layer that
    aligned key transfer names to be the best: that costs about as much as ten edits. See
    :mod:`goldenlayers.racing.rule`.

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

    edits: int = 100
    """How many edits are made at most, whatever the depth."""

    expect: Literal["transfer", "published"] = "transfer"
    """What names the layer that is expected to be the best: key transfer, on the race's facts, or
    the published depth. Without key statistics, which fine-tuning does not read, it is the
    latter."""

    prior: float = 6.0
    """Points that a layer far from the expected one is expected to lose, before any edit."""

    subject: float = 1.0
    """Weight of what must stay about the edited subject."""

    neighbour: float = 1.0
    """Weight of what must stay about others."""

    hits: bool = False
    """Count hits, in place of those that are expected, which say more of few facts."""

    def __post_init__(self) -> None:
        from goldenlayers.editors import make_editor
        from goldenlayers.racing.worth import By, Worth

        super().__post_init__()
        check_number("the number of edits", self.edits, 1, 1_000_000)
        check_number("the prior", self.prior, 0, 1_000, whole=False)
        editor = make_editor(self.editor)
        by: By = "hits" if self.hits else "expected"
        worth = Worth(subject=self.subject, neighbour=self.neighbour, by=by)
        budget = None if self.budget is None else seconds_of(self.budget)
        # Frozen, but not from itself.
        object.__setattr__(self, "editor", editor)
        object.__setattr__(self, "budget", budget)
        object.__setattr__(self, "worth", worth)
        object.__setattr__(self, "needs_statistics", editor.needs_statistics)

    @property
    def scoring(self) -> Scoring:
        return Scoring(fence=None, reduce="mean", enough=6)

    @property
    def label(self) -> str:
        changed = [
            f"{f.name} {getattr(self, f.name):g}"
            for f in dataclasses.fields(self)
            if f.name in ("budget", "edits", "prior", "subject", "neighbour")
            and getattr(self, f.name) != f.default
        ]
        changed += ["expect published"] * (self.expect == "published")
        return " ".join([self.name, self.editor.name, *changed, *["hits"] * self.hits])

    def ranking(self, work: Work, tell: Progress, top_k: int) -> LayerRanking:
        """Race, and rank the layers that were tried."""
        from goldenlayers.racing import Contest

        contest = Contest(
            work.model,
            work.facts,
            self.editor,
            published_layer(len(work.model.layers)),
            edits=self.edits,
            seconds=self.budget,
            prior=self.prior,
            worth=vars(self)["worth"],
            statistics=work.statistics or None,
            seed=work.seed,
            on_progress=tell.on_progress,
            on_note=tell.on_note,
        )
        if self.expect == "transfer" and self.needs_statistics:
            contest.expected = _transferred(contest, work, self.batch_size)
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


def _transferred(contest: Contest, work: Work, batch_size: int) -> int | None:
    """The layer that aligned key transfer names on the facts of the race; None where it cannot.

    Raises:
        KeyboardInterrupt: Ctrl-C, whatever has been scored by then.
    """
    from goldenlayers.locating import locate
    from goldenlayers.locating.methods import Transfer
    from goldenlayers.progress import OutOfMemory, Progress

    try:
        found = locate(
            work.model,
            contest.drawn,
            Transfer(align=True),
            statistics=work.statistics,
            bootstrap=0,
            seed=work.seed,
            progress=Progress(chunk=batch_size),
        )
    except OutOfMemory:
        raise
    except UserError as error:
        contest.said.append(
            f"Key transfer could not say where to begin, so the published depth was expected: "
            f"{error}"
        )
        return None
    if found.interrupted:
        raise KeyboardInterrupt
    return found.golden_layer


def _ranking(contest: Contest, found: Raced, top_k: int) -> LayerRanking:
    from goldenlayers.locating.ranking import LayerRanking, LayerScore
    from goldenlayers.racing.rule import DRAWS

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
        bootstrap=DRAWS,
        seed=seed,
        warnings=tuple(_warnings(contest, found)),
        interrupted=found.interrupted,
        evidence=_evidence(contest, found),
    )


def _evidence(contest: Contest, found: Raced) -> Evidence:
    from goldenlayers.locating.ranking import Evidence

    value = low = high = None
    if found.tried[contest.home] and found.tried[found.place]:
        gain = found.gain(contest.home)
        value, low, high = gain.value, gain.low, gain.high
    sorts = [dataclasses.replace(contest.worth, subject=s, neighbour=1 - s) for s in (1.0, 0.0)]
    subject, neighbour = (contest.layer_by(found, worth) for worth in sorts)
    return Evidence(
        editor=contest.editor.name,
        published=contest.home,
        expected=found.home,
        edits=found.edits,
        gain=(value, low, high),
        alike=tuple(found.alike()),
        why=found.why,
        subject=subject,
        neighbour=neighbour,
    )


def _warnings(contest: Contest, found: Raced) -> list[str]:
    facts = contest.drawn[: max(1, len(found.table))]
    probes = {
        "rephrasings": sum(not fact.rephrasings for fact in facts),
        "locality probes": sum(not fact.must_stay for fact in facts),
    }
    lacking = [(name, count) for name, count in probes.items() if count]
    said = [f"{count} of the {len(facts)} facts have no {name}." for name, count in lacking]
    said += contest.said
    failed = Counter(str(error) for error in contest.failures)
    if failed:
        text, _ = failed.most_common(1)[0]
        said.append(f"{sum(failed.values())} edits failed, most with: {text}")
    if found.tried.sum() < 2 < len(contest.model.layers):
        said.append(
            f"No layer was tried but the expected one: {found.why}. Give the race more time "
            "(--budget) or edits."
        )
    return said
