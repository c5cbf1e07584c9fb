"""``golden evaluate``: facts under an edit, scored probe by probe."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from goldenlayers.commands import shared
from goldenlayers.commands.auto_layer import check_budget, with_layer
from goldenlayers.commands.deciding import (
    editor_and_layer,
    editor_of,
    refuse_batch,
    settle,
    statistics_of,
)
from goldenlayers.commands.options import (
    RARE,
    DataOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Statistics,
    default_settings,
)
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.progress import Progress, progress
from goldenlayers.shown import result, say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import Editor, InContext

ROWS, SUMMARY = "scores.jsonl", "summary.json"
# These change how fast the work is done, not what comes out.
_FREE = ("batch_size", "device")


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataOptions, ModelOptions, OutputOptions):
    """Score facts under an edit (or none), probe by probe; run again after a kill to go on.

    golden evaluate smollm2-135m facts.jsonl --method rome --layer 6 --limit 30
    golden evaluate smollm2-135m facts.jsonl --delta my-edit --out scores
    """

    heading = "Method"

    delta: Annotated[Path | None, arg(metavar="RUN"), Role.SOURCE] = None
    """Judge a saved change on the facts it was made for: the run folder of `golden edit`. With
    RUN/check.json as the data, by what its check asked."""

    method: str = "none"
    """none (the base rate), in-context (told in the prompt), or an editor: rome, r-rome,
    clear-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit, as for `golden edit` (but not each); auto chooses it with facts about other
    subjects."""

    budget: Annotated[str | None, arg(metavar="TIME")] = None
    """--layer auto: the time that the race may take, such as 90s or 3m (default: 96 edits')."""

    mode: Literal["single", "batch", "sequential"] = "single"
    """single: each fact by itself on the untouched model. batch: all edited together. sequential:
    one after another, each also scored right after its own edit."""

    step: int = 1
    """--mode sequential: how many facts to edit at a time, where the editor can edit several."""

    metrics: list[str] = dataclasses.field(default_factory=list)
    """rewrite, rephrase, locality, portability (these four if none is named), generation,
    counterfact, fluency, kl, perplexity."""

    text: Annotated[Path | None, Role.SOURCE, RARE] = None
    """Held-out text file for perplexity."""

    text_tokens: Annotated[int, RARE] = 1024
    """Tokens of --text that are read."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor, as NAME VALUE pairs (steps 30 ...); see `golden editors`."""

    statistics: Statistics = "package"
    """Text for the key statistics, as for `golden edit`."""

    batch_size: Annotated[str, RARE] = "auto"
    """Texts per forward pass, or auto."""

    out: Out = None
    """Run folder to write: scores.jsonl, summary.json, config.yaml, log.txt (delta.* in the modes
    batch and sequential)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)
        if self.step != 1 and self.mode != "sequential":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        if self.delta is not None and self.method != "none":
            raise UserError("both --delta and --method are given", fix="Give one of them")
        if self.method in ("none", "in-context"):
            usual = default_settings(type(self))
            mine = ("layer", "preset", "budget", *(("set",) if self.method == "none" else ()))
            for name in mine:
                if getattr(self, name) != usual[name]:
                    raise UserError(
                        f"--{name} is for an editor, and nothing is edited here",
                        fix=f"Add --method NAME, or leave --{name} out",
                    )


def run(config: EvaluateConfig) -> int:
    """Evaluate, print the table, and write the run folder if one is asked for."""
    from goldenlayers.editors import Editor, check_step
    from goldenlayers.evaluation import DEFAULT_METRICS, evaluate
    from goldenlayers.evaluation.metrics import check_metrics, need_text
    from goldenlayers.evaluation.rows import Expected, each_once
    from goldenlayers.studying.folders import resumed

    shared.refuse_out(config, "evaluate", resume=True)
    metrics = check_metrics(config.metrics) if config.metrics else DEFAULT_METRICS
    method = method_of(config)
    text = _text(config.text) if need_text(metrics) else None
    delta = _delta(config)
    facts = shared.load_facts(config) if delta is None else _held_by(delta, config)
    if isinstance(method, Editor):
        check_step(method, config.step)
        refuse_batch(method, config.mode, len(facts))
    if config.mode != "single" and config.method != "none":
        facts = shared.agreeing(facts, skip_invalid=config.skip_invalid, drop_doubled=False)
    others = _others(config, facts)
    model = shared.load_model(config)
    if delta is not None:
        delta.check(model)
        shared.tell_use(delta, model)
    config, (settled, free) = settle(config, model, facts, others)
    facts, others = dataclasses.replace(facts, facts=tuple(settled)), free or None
    layer, statistics = None, None
    if isinstance(method, Editor):
        method, layer = editor_and_layer(config, model, facts, facts.sha256)
        config = with_layer(config, layer)
        statistics = statistics_of(config, model, method, [layer])
    with shared.run_folder(
        config, "evaluate", model=model, facts=facts, resume=True, ignore=_FREE
    ) as folder:
        in_turn = config.mode == "sequential" and isinstance(method, Editor)
        step = config.step if in_turn else 0
        expected = Expected(facts, metrics, others=others, seed=config.seed, step=step)
        done = resumed(folder, ROWS, each_once(expected.problem))
        with progress("evaluating", "facts") as bar:
            found = evaluate(
                model,
                facts,
                method if delta is None else delta,
                layer=layer,
                mode=config.mode,
                metrics=metrics,
                step=config.step,
                statistics=statistics,
                others=others,
                text=text,
                text_tokens=config.text_tokens,
                seed=config.seed,
                batch_size="auto" if config.batch_size == "auto" else int(config.batch_size),
                progress=Progress(
                    done=done,
                    work=None if folder is None else folder.path,
                    on_rows=None if folder is None else partial(folder.append_rows, ROWS),
                    on_progress=bar,
                ),
            )
        result(data=facts.name, **found.to_json())
        if folder is not None:
            folder.write_json(SUMMARY, found.to_json())
            folder.finish()
    from goldenlayers.report.tables import show_evaluation

    show_evaluation(found, facts.name)
    shared.tell_written(folder, SUMMARY, ROWS)
    return 0


def method_of(config: EvaluateConfig) -> Editor | InContext | str:
    """What is judged, before a preset: an editor, in-context, or "none".

    Raises:
        UserError: an unknown method or setting.
    """
    from goldenlayers.editors import InContext, read_settings
    from goldenlayers.errors import near_matches
    from goldenlayers.evaluation import methods

    if config.method not in (known := methods()):
        raise UserError(f"unknown method '{config.method}'", fix=near_matches(config.method, known))
    if config.method == "none":
        return "none"
    if config.method == InContext.name:
        return read_settings(InContext(), config.set)
    return editor_of(config)


def _others(config: EvaluateConfig, facts: FactSet) -> list[Fact] | None:
    """Facts of the same data outside the judged ones; None if there are hardly any."""
    if config.limit is None:
        return None
    from goldenlayers.datasets import load_facts
    from goldenlayers.studying.cell import others_of

    found = load_facts(config.data, skip_invalid=config.skip_invalid, joint=config.joint)
    return others_of(found, facts, config.limit, config.seed)


def _delta(config: EvaluateConfig) -> WeightDelta | None:
    if config.delta is None:
        return None
    from goldenlayers.delta import WeightDelta

    return WeightDelta.load(config.delta)


def _held_by(delta: WeightDelta, config: EvaluateConfig) -> FactSet:
    """The facts that the delta was made for: the others would be judged as edited, and are not.

    Raises:
        UserError: none of them is among the data.
    """
    facts = shared.load_facts(dataclasses.replace(config, limit=None))
    if not delta.facts:
        say("The delta does not say which facts it holds: all are judged as edited")
        kept = facts
    else:
        held = zip(facts, delta.holds(facts), strict=True)
        kept = dataclasses.replace(facts, facts=tuple(fact for fact, is_held in held if is_held))
        if not kept:
            raise UserError(
                f"the delta holds none of the {len(facts)} facts of {facts.name}, but others: "
                + "; ".join(f"'{row.get('prompt', '')}'"[:80] for row in delta.facts[:3]),
                expected="facts that were edited: of the same subject, prompt and new answer",
                fix="Give the data that was edited, or leave out --delta",
            )
        if len(kept) < len(facts):
            say(
                f"The delta holds {len(kept)} of the {len(facts)} facts of {facts.name}: "
                "only these are judged"
            )
    return kept if config.limit is None else kept.sample(config.limit, config.seed)


def _text(path: Path | None) -> str:
    if path is None:
        raise UserError("perplexity needs a held-out text", fix="Give one with --text FILE")
    try:
        with path.open(encoding="utf-8") as file:
            return file.read(1 << 22)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text ({error})") from error
