"""What commands print: tables and the prose beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import CONTRADICTING
from goldenlayers.facts import Fact
from goldenlayers.prompts import join
from goldenlayers.report import show, table
from goldenlayers.shown import put, warn

if TYPE_CHECKING:
    from goldenlayers.checking import Check
    from goldenlayers.checking.probes import Part
    from goldenlayers.comparing import Choice, Comparison
    from goldenlayers.evaluation import Estimate, Evaluation
    from goldenlayers.models import Model
    from goldenlayers.truth import TransferMatrix, Truth

_SHOWN = 20


@dataclass(frozen=True)
class Answer:
    """Greedy continuation with its leading space, p(new answer | prompt), and whether greedy
    decoding gives it.
    """

    text: str
    probability: float
    is_new: bool


def greedy_answers(model: Model, facts: Sequence[Fact]) -> list[Answer]:
    """The model's answer to every fact's prompt, as it is right now."""
    from goldenlayers.decoding import greedy
    from goldenlayers.evaluation.reading import Pass, Reading, read

    encoder = model.encoder
    prompts = [encoder.fact(fact).ids for fact in facts]
    readings = [Reading.of_answer(encoder.fact(fact, fact.target)) for fact in facts]
    return [
        Answer(
            encoder.continuation(prompt, new),
            math.exp(-len(one.targets) * (math.inf if one.nll is None else one.nll)),
            one.tokens == one.targets,
        )
        for prompt, new, one in zip(
            prompts, greedy(model, prompts, 10), read(model, readings, Pass()), strict=True
        )
    ]


def show_answers(
    model: Model, facts: Sequence[Fact], before: Sequence[Answer], after: Sequence[Answer]
) -> None:
    """A table of answers before and after, for up to 20 facts."""

    # In quotes, so that a space before an answer, or none, is seen.
    def said(answer: Answer) -> str:
        return f"{answer.text!r} ({answer.probability:.3f})"

    def wanted(fact: Fact) -> str:
        joint = fact.joint_of(fact.prompt, fact.target)
        text, end = join(fact.prompt, fact.target, joint)
        return repr(text[end:])

    rows = [
        (fact.prompt, wanted(fact), said(old), said(new), "yes" if new.is_new else "NO")
        for fact, old, new in list(zip(facts, before, after, strict=True))[:_SHOWN]
    ]
    more = f" (first {_SHOWN} of {len(facts)})" if len(facts) > _SHOWN else ""
    columns = ("prompt", "new answer", "before (p of new)", "after (p of new)", "took")
    show(table(f"Answers of {model.name}{more}", columns, rows))
    if len(facts) > 1:
        took = sum(answer.is_new for answer in after)
        put(f"{took} of {len(facts)} edits took")


_WORST = 5


def show_check(found: Check) -> None:
    """What else an edit did: how many answers follow it and how many stay, the worst of them, and
    the verdict in a line.
    """
    parts: dict[Part, tuple[str, str]] = {
        "rephrase": ("rephrasings", "give the new answer"),
        "neighbours": ("neighbours", "keep their answers"),
        "unrelated": ("unrelated prompts", "keep their answers"),
    }
    rows = []
    for part, (name, how) in parts.items():
        share = found.share(part)
        own = sum(one.by_model for one in found.probes if one.part == part)
        made = f" (made, {own} by the model)" if own else " (made)" * share.made
        rows.append((name + made, f"{share.ok} of {share.n} {how}"))
    checked = found.share("prompt").n
    some = f" of {checked} of {found.n_edited} facts" if checked < found.n_edited else ""
    show(table(f"Check{some}", ("asked", "after the edit"), rows))
    if worst := found.worst[:_WORST]:

        def said(text: str, chance: float | None) -> str:
            return f"{text!r} ({'-' if chance is None else f'{chance:.3f}'})"

        columns = ("the worst", "before (p of new)", "after (p of new)")
        moved = [
            (one.prompt, said(one.before, one.p_before), said(one.after, one.p_after))
            for one in worst
        ]
        show(table("", columns, moved))
    put(f"Verdict: {found.sentence()}")


def show_comparison(found: Comparison, title: str, data: str) -> None:
    """Print the choices, best first below the yardsticks, and the curves over proxy facts."""
    marks = [one for one in found.choices if one.method in ("golden", "oracle", "random")]
    rest = [one for one in found.choices if one not in marks]
    rest.sort(key=lambda one: (one.regret.value != one.regret.value, one.regret.value))
    score = _titled(found.metric)
    columns = ("choice", "facts", "layer", score, "gain", "harmonic", "regret", "at", "rho", "cost")
    facts = f"{found.n_facts} facts" + (f" of {data}" if data else "")
    show(table(f"{title}: {facts}", columns, [_line(one) for one in [*marks, *rest]]))
    put(
        "gain: Overall above the untouched model's; harmonic: mean of rewrite, rephrase, locality",
        "regret: points below the golden layer, with the 95 % interval over the facts; by luck the "
        f"truly best layer would show {found.noise_floor:.1f} on as many other facts",
        "at: the golden layer's place in the choice's own order",
        "rho: rank correlation of its layer scores with the sweep's",
        "cost: seconds, and how many times as long the sweep takes",
    )
    if curves := [one for one in found.proxy_sizes if len(one.points) > 1]:
        sizes = sorted({point.n for one in curves for point in one.points})
        rows = []
        for one in curves:
            at = {p.n: f"{_number(p.regret)} {100 * p.wins:.0f}%" for p in one.points}
            rows.append((_short(one.name), *(at.get(n) for n in sizes)))
        heading = "Mean regret with N proxy facts, and how often the golden layer is chosen"
        show(table(heading, ("choice", *map(str, sizes)), rows))
    if found.transfer is not None:
        show(_matrix(found.transfer))
    for one in found.choices:
        if one.note and one.method not in ("oracle", "random"):
            put(f"{_short(one.name)}: {one.note}.")
    for warning in found.warnings:
        warn(f"{warning}.")


def _matrix(found: TransferMatrix) -> Any:
    """Rows: whose golden layer. Columns: on which sweep it is judged."""
    letters = [chr(ord("A") + i) if i < 26 else str(i + 1) for i in range(len(found.names))]
    rows = [
        (f"{letter}: {name}", layer, *(_number(one.value) for one in regrets))
        for letter, name, layer, regrets in zip(
            letters, found.names, found.golden, found.regret, strict=True
        )
    ]
    heading = "Regret of each sweep's golden layer, judged by each sweep"
    return table(heading, ("chosen on", "layer", *(f"on {x}" for x in letters)), rows)


def _line(one: Choice) -> tuple[Any, ...]:
    regret = _number(one.regret.value)
    if one.regret.low == one.regret.low and one.method != "golden":
        regret = f"{regret} ({one.regret.low:.1f} to {one.regret.high:.1f})"
    cost = None if one.seconds is None else f"{one.seconds:.1f} s"
    if cost is not None and one.speed_up is not None and one.method not in ("golden", "oracle"):
        cost = f"{cost}, {one.speed_up:.0f}x"
    correlation = None if one.spearman != one.spearman else f"{one.spearman:.2f}"
    name, facts = _short(one.name), one.n_proxy or None
    scores = (_number(value) for value in (one.score, one.gain, one.harmonic))
    return name, facts, one.layer, *scores, regret, one.golden_rank, correlation, cost


def _short(name: str) -> str:
    """A name without the settings that are the default."""
    return name.replace(" mlp", "").replace(" sequence", "").replace("+", " + ")


def _number(value: float) -> str | None:
    return None if value != value else f"{value:.1f}"


_ORACLE = "Oracle: each fact at its own best layer. A fact with k best layers counts 1/k at each."


_AGES = ("facts", "rewrite right after it", "rewrite in the end")


def show_evaluation(found: Evaluation, data: str) -> None:
    """Print the figures: mean, standard error, interval, scored and unscored rows, reasons.

    After a sequence of edits, what the later ones left of the earlier ones, too.
    """
    from goldenlayers.evaluation import retention

    where = f" at layer {found.layer}" if found.layer is not None else ""
    title = f"{found.method}{where}, {found.mode}: {found.n_facts} facts of {data}"
    summary = found.summary
    rows = []
    for name, one in summary.metrics.items():
        rows.append(_metric_line(name, one))
        kinds = summary.kinds.get(name, {})
        rows += [_metric_line(f"  {kind}", part) for kind, part in kinds.items() if len(kinds) > 1]
    if summary.counterfact_score is not None:
        rows.append(_metric_line("counterfact score", summary.counterfact_score))
    for name, one in (
        ("Overall", summary.overall),
        ("gain", summary.gain),
        ("harmonic", summary.harmonic),
    ):
        if one is not None:
            rows.append(_metric_line(name, one))
    show(table(title, ("metric", "mean", "± se", "95 % interval", "scored", "unscored"), rows))
    if summary.overall is not None:
        put(f"Overall: mean of {', '.join(summary.overall_of)}.")
    _tell_yardsticks(summary.gain is not None, summary.harmonic_of)
    if (left_out := summary.metrics.get(CONTRADICTING)) is not None:
        _tell_left_out(left_out.scored + left_out.unscored)
    if found.mode == "sequential" and len(curve := retention(found.rows)) > 1:
        show(table("What is left of an edit", ("edits after it", *_AGES), _ages(curve)))
    for name, one in summary.metrics.items():
        for reason, count in one.reasons.items():
            put(f"{name}: {count} unscored: {reason}.")


def _tell_yardsticks(gain: bool, harmonic_of: Sequence[str]) -> None:
    if gain:
        put("gain: Overall above that of the untouched model.")
    if harmonic_of:
        put(f"harmonic: mean of {', '.join(harmonic_of)}; low where one of them is.")


def _tell_left_out(count: int) -> None:
    """Say that probes do not count as locality, and how they can."""
    many = "s" if count != 1 else ""
    put(
        f"{count} locality probe{many} left out: they ask what the edit changes "
        f"({CONTRADICTING}; --all-probes counts them in)."
    )


def _ages(curve: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    rows = []
    for one in curve:
        least, most = one["age"]
        age = str(least) if least == most else f"{least} to {most}"
        rows.append((age, one["facts"], f"{one['rewrite_at_once']:.1f}", f"{one['rewrite']:.1f}"))
    return rows


def _metric_line(name: str, one: Estimate) -> tuple[Any, ...]:
    def number(value: float) -> str | None:
        return (
            None if value != value else f"{value:.4f}" if 0 < abs(value) < 0.1 else f"{value:.1f}"
        )

    low, high = number(one.low), number(one.high)
    interval = None if low is None else f"{low} to {high}"
    return name, number(one.mean), number(one.se), interval, one.scored, one.unscored


def show_sweep(truth: Truth, summary: dict[str, Any]) -> None:
    """Print the golden layers, the oracle and its gap, the best layers, where facts differ."""
    names = [name for name in ("overall", *summary["metrics"]) if truth.scored(name).any()]
    names = [name for name in names if name != CONTRADICTING]
    if not names:
        raise UserError(
            "no edit of the sweep could be scored, so there is no golden layer",
            fix="The reasons are in scores.jsonl",
        )
    title = f"{summary['method']} on {summary['model']}: {facts_of(summary)}"
    rows, without = [], []
    for name in dict.fromkeys(names):
        one = summary["metrics"][name]
        if one["golden_layer"] is None:
            without.append(name)
            continue
        place = truth.layers.index(one["golden_layer"])
        rows.append(
            (
                _titled(name),
                one["golden_layer"],
                f"{one['mean'][place]:.1f}",
                _from_to(one["low"][place], one["high"][place]),
                f"{one['oracle']['value']:.1f}",
                f"{one['gap']['value']:.1f}",
                _from_to(one["gap"]["low"], one["gap"]["high"]),
            )
        )
    if line := _harmonic_line(truth):
        rows.append(line)
    columns = ("metric", "golden", "score", "95 % interval", "oracle", "gap", "95 % interval")
    if rows:
        show(table(title, columns, rows))
    for name in without:
        means = [f"{value:.3g}" for value in truth.means(name)]
        lines = list(zip(truth.layers, means, truth.scored(name).tolist(), strict=True))
        show(table(f"{name} (no golden layer by it)", ("layer", "mean", "facts"), lines))
    if truth.leading is not None:
        _show_best(truth, truth.leading)
    if "overall" in names:
        put(f"Overall: mean of {', '.join(truth.overall_of)}.")
    _tell_yardsticks("gain" in names, truth.harmonic_of)
    if CONTRADICTING in truth.scores and (facts := int(truth.scored(CONTRADICTING).max())):
        of = f"{facts} of {len(truth.facts)} facts"
        put(
            f"Locality probes of {of} are left out: they ask what the edit changes "
            f"({CONTRADICTING}; --all-probes counts them in)."
        )
    if rows:
        put(_ORACLE)
    if split := summary["split_half"]:
        regret = split["regret"]
        put(
            f"A layer chosen on {split['n_proxy']} of the facts loses {regret['value']:.1f} points "
            f"({_from_to(regret['low'], regret['high'])}) on the other {split['n_test']}, and is "
            f"the best there in {100 * split['hit']:.0f} % of {regret['n']} random halves."
        )
    for warning in truth.warnings:
        warn(f"{warning}.")


def _harmonic_line(truth: Truth) -> tuple[Any, ...] | None:
    means, ends = truth.harmonic(), truth.harmonic_intervals()
    if all(value != value for value in means):
        return None
    best = max(range(len(means)), key=lambda i: (means[i] == means[i], round(means[i], 9), -i))
    low, high = ends[best]
    interval = _from_to(low, high)
    return "harmonic", truth.layers[best], f"{means[best]:.1f}", interval, None, None, None


def show_finished(truth: Truth, summary: Any, path: Path) -> None:
    """As :func:`show_sweep`, of a summary that was read back.

    Raises:
        UserError: it is not what a sweep writes.
    """
    try:
        show_sweep(truth, summary)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error})",
            fix="Put it back as it was, or make the run again",
        ) from error


def _show_best(truth: Truth, metric: str) -> None:
    """The best layers by a metric, and those of single facts."""
    means, wins = dict(zip(truth.layers, truth.means(metric), strict=True)), truth.wins(metric)
    best = [
        (layer, f"{means[layer]:.1f}", f"{100 * wins[layer]:.0f} %")
        for layer in truth.ranking(metric)[:5]
    ]
    columns = ("layer", "score", "golden in resamples")
    show(table(f"Best layers by {_titled(metric)}", columns, best))
    rows = _histogram(truth, metric)
    show(table("Best layers of single facts", ("layer", "facts", ""), rows))


def _titled(metric: str) -> str:
    # The parts of a metric stand under it.
    return "Overall" if metric == "overall" else metric.replace("locality_", "  ")


def _histogram(truth: Truth, metric: str) -> list[tuple[Any, ...]]:
    counts = truth.histogram(metric)
    most = max(counts.max(), 1e-9)
    return [
        (layer, f"{count:.1f}", "#" * round(30 * count / most))
        for layer, count in zip(truth.layers, counts, strict=True)
    ]


def _from_to(low: float | None, high: float | None) -> str | None:
    known = low is not None and high is not None and low == low
    return f"{low:.1f} to {high:.1f}" if known else None


def facts_of(summary: dict[str, Any]) -> str:
    """How many facts of what, and how many layers, of a sweep's summary."""
    return f"{summary['n_facts']} facts of {summary['data']}, {len(summary['layers'])} layers"
