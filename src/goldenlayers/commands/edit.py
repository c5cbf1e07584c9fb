"""``golden edit``: facts in, a small reversible change out, with the answers before and after."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from goldenlayers.commands import shared
from goldenlayers.commands.auto_layer import check_budget, open_settings, with_layer
from goldenlayers.commands.deciding import (
    editor_and_layer,
    editor_of,
    refuse_batch,
    settle,
    statistics_of,
    with_names,
)
from goldenlayers.commands.options import (
    FACTS,
    RARE,
    JointOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Statistics,
)
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact
from goldenlayers.prompts import plain_subject
from goldenlayers.report import tables
from goldenlayers.shown import progress, say

if TYPE_CHECKING:
    from goldenlayers.datasets import FactSet
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import Editor
    from goldenlayers.models import Model

# A change longer than this share of the matrix it is added to is out of the ordinary: ROME edits of
# healthy facts lie around 0.02-0.2.
_LARGE = 0.5


@dataclass(frozen=True, kw_only=True)
class EditConfig(JointOptions, ModelOptions, OutputOptions):
    """Edit facts at one layer and save the small change; the model itself is left as it is.

    golden edit smollm2-135m --subject Italy --prompt "The capital of {} is" --target Paris
    golden edit smollm2-135m --facts facts.jsonl --method memit --layer 6 --out my-edit
    """

    heading = "Method"

    subject: Annotated[str | None, FACTS] = None
    """One fact by flags: its subject, letter for letter as in --prompt."""

    prompt: Annotated[str | None, FACTS] = None
    """One fact by flags: the prompt that the new answer follows; {} stands for the subject."""

    target: Annotated[str | None, FACTS] = None
    """One fact by flags: the new answer."""

    facts: Annotated[str | None, Role.SOURCE, FACTS] = None
    """Many facts: a registered name, a file, or FORMAT:FILE."""

    limit: Annotated[int | None, FACTS] = None
    """Use a random sample of this many of --facts."""

    skip_invalid: Annotated[bool, FACTS] = False
    """Leave out invalid rows of --facts, and say how many and why."""

    method: str = "rome"
    """rome, r-rome, clear-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l."""

    layer: str = "auto"
    """Layer to edit (-1 is the last); published, the depth of published settings; the folder of a
    run of `golden locate` or `golden sweep`; or auto: chosen for this editor by a race of real
    edits of starter facts, once, and kept (see --budget)."""

    budget: Annotated[str | None, arg(metavar="TIME")] = None
    """--layer auto: the time that the race may take, such as 90s or 3m (default: 120 edits')."""

    mode: Literal["auto", "batch", "sequential"] = "auto"
    """All facts in one solve, or one after another; auto takes batch where the editor can."""

    step: Annotated[int, RARE] = 1
    """In sequence: how many facts to edit at a time (memit, emmet, alphaedit, pmet, ft-m, ft-l)."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor as NAME VALUE pairs (steps 30 clamp 2.5 ...); see `golden editors`."""

    clear_of: Annotated[list[str], arg(metavar="NAME ...")] = dataclasses.field(
        default_factory=list
    )
    """Names that must get nothing of the edit, beside those of clear-rome's own pool."""

    clear_of_file: Annotated[Path | None, arg(metavar="FILE"), Role.SOURCE, RARE] = None
    """More such names, one a line."""

    statistics: Statistics = "package"
    """Text for the key statistics: package (English text that comes with goldenlayers), model
    (sampled from the model itself: slow), a text or JSONL file, hub:NAME, or none (identity:
    another algorithm, only for comparison)."""

    seed: Annotated[int, RARE] = 0
    """Seed of the sampled prefixes and statistics."""

    out: Out = None
    """Run folder to write: delta.safetensors, delta.json, config.yaml, log.txt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self)
        if self.step != 1 and self.mode == "batch":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        by_flags = [self.subject, self.prompt, self.target]
        if self.facts is not None and any(part is not None for part in by_flags):
            raise UserError("both --facts and a fact by flags are given", fix="Give one of them")
        if self.facts is None and any(part is None for part in by_flags):
            raise UserError(
                "there is no fact to edit",
                expected="--subject, --prompt and --target, or --facts FILE",
            )


def run(config: EditConfig) -> int:
    """Edit, show what changed, save."""
    from goldenlayers.editors import check_step, edit
    from goldenlayers.progress import Progress

    shared.refuse_out(config, "edit", ignore=("device", *open_settings(config)))
    config = with_names(config)
    check_step(editor_of(config), config.step)
    facts, source = _facts(config)
    model = shared.load_model(config)
    config, (facts,) = settle(config, model, facts)
    facts = _worth_editing(model, facts, strict=config.facts is None)
    refuse_batch(editor_of(config), config.mode, len(facts))
    editor, layer = editor_and_layer(config, model, facts)
    config = with_layer(config, layer)
    statistics = statistics_of(config, model, editor, [layer])
    dropped: list[DataError] = []
    with progress(f"editing with {config.method}", "facts") as bar:
        delta = edit(
            model,
            facts,
            editor,
            layer=layer,
            mode=None if config.mode == "auto" else config.mode,
            step=config.step,
            statistics=statistics,
            seed=config.seed,
            names=config.clear_of,
            progress=Progress(on_progress=bar, on_dropped=dropped.append),
        )
    if dropped:
        shared.tell_dropped(dropped)
        facts = [fact for fact, held in zip(facts, delta.holds(facts), strict=True) if held]
    before = tables.greedy_answers(model, facts)
    with delta.applied(model):
        after = tables.greedy_answers(model, facts)
    # Opened last: an edit that fails leaves nothing behind, and none can be gone on with.
    with shared.run_folder(config, "edit", model=model, facts=source, ignore=("device",)) as folder:
        if folder is not None:
            delta.save(folder.path)
            folder.finish()
    tables.show_answers(model, facts, before, after)
    _show_change(model, delta)
    _show_overlap(delta)
    _warn(model, facts, after, delta, editor)
    if folder is not None:
        size = sum(f.stat().st_size for f in folder.path.glob("delta.*"))
        say(f"Saved to {folder.path} ({size / 1024:.0f} KB)")
    else:
        say("Not saved: add --out DIR to keep the edit")
    return 0


def _facts(config: EditConfig) -> tuple[list[Fact], FactSet | None]:
    if config.facts is None:
        # Held by the config; that none is empty the fact itself checks.
        assert None not in (config.subject, config.prompt, config.target)
        subject, prompt, target = config.subject or "", config.prompt or "", config.target or ""
        return [Fact(subject, prompt, target, id="edit", joint=config.joint)], None
    from goldenlayers.datasets import load_facts

    found = load_facts(
        config.facts,
        limit=config.limit,
        seed=config.seed,
        skip_invalid=config.skip_invalid,
        joint=config.joint,
    )
    shared.tell_data(found)
    shared.tell_fewer(len(found), config.limit)
    found = shared.agreeing(found, skip_invalid=config.skip_invalid, drop_doubled=True)
    return list(found), found


def _worth_editing(model: Model, facts: list[Fact], *, strict: bool) -> list[Fact]:
    """Leave out facts whose new answer the model gives already; one by flags is an error."""
    from goldenlayers.decoding import forced_predictions

    encodings = [model.encoder.fact(fact, fact.target) for fact in facts]
    given = [
        tuple(tokens) == encoding.answer_ids
        for tokens, encoding in zip(forced_predictions(model, encodings), encodings, strict=True)
    ]
    errors = [
        DataError(
            f"the model answers '{fact.prompt}' with '{fact.target}' already",
            field="target",
            fix="There is nothing to edit",
        )
        for fact, already in zip(facts, given, strict=True)
        if already
    ]
    if errors and (strict or len(errors) == len(facts)):
        raise errors[0]
    if errors:
        shared.tell_dropped(errors)
    return [fact for fact, already in zip(facts, given, strict=True) if not already]


def _show_change(model: Model, delta: WeightDelta) -> None:
    from goldenlayers.report import show, table

    norms = delta.norms(model)
    rows = [
        (name.removesuffix(".weight"), delta.rank(name), f"{norm.relative:.4f}")
        for name, norm in norms.items()
    ]
    show(table("What changed", ("matrix", "rank", "length relative to the matrix"), rows))


def _show_overlap(delta: WeightDelta) -> None:
    """How many names the edit keeps clear of, and what arrives at the ones that come next."""
    told = [row for row in delta.facts if "neighbours" in row]
    if not told:
        return
    counts = sorted({row["neighbours"] for row in told})
    many = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else f"{counts[0]}"
    text = f"Kept clear of {many} names."
    if next_ones := [row for row in told if "overlap" in row]:
        now, rome = (mean(row[name] for row in next_ones) for name in ("overlap", "overlap_rome"))
        text += (
            f" Of the edit, {now:.0%} arrive at the names that come next (without it {rome:.0%})."
        )
    say(text)


def _warn(
    model: Model,
    facts: Sequence[Fact],
    after: Sequence[tables.Answer],
    delta: WeightDelta,
    editor: Editor,
) -> None:
    """Say what a careful user would want to know before using this edit."""
    failed = [fact for fact, answer in zip(facts, after, strict=True) if not answer.is_new]
    if failed:
        some = "; ".join(f"'{fact.prompt}'" for fact in failed[:3])
        about = Counter(plain_subject(fact.subject) for fact in facts)
        rivals = [fact for fact in failed if about[plain_subject(fact.subject)] > 1]
        # What is followed already is no advice.
        more = [
            f"--set {name} {value}"
            for name, value in (("steps", 50), ("clamp", 8))
            if getattr(editor, name, value) < value
        ]
        advice = f"Try {', or '.join(['another --layer', *more])}."
        if rivals:
            advice = (
                f"{len(rivals)} of them share their subject with another edit here "
                f"('{rivals[0].subject}'), and the two may be at odds: leave one out"
                + (f". For the others: {advice}" if len(rivals) < len(failed) else ".")
            )
        say(f"Warning: {len(failed)} of {len(facts)} edits did not take ({some}). {advice}")
    for name, norm in delta.norms(model).items():
        if norm.relative > _LARGE:
            say(
                f"Warning: the change of {name} is {norm.relative:.2f} times as long as the matrix "
                "itself; other answers are likely to suffer. Try another --layer"
                + (" or r-rome." if editor.name == "rome" else ".")
            )
    for fact in facts:
        problem = _odd_subject(model, fact)
        if problem:
            say(f"Warning: {problem}")


def _odd_subject(model: Model, fact: Fact) -> str:
    """A sentence if the subject's last token holds more than the subject."""
    encoding = model.encoder.fact(fact)
    assert encoding.lookup is not None  # held by encoder.fact
    start, end = encoding.spans[encoding.lookup]
    if end > fact.subject_span[1]:
        token = encoding.text[start:end]
        return (
            f"the tokenizer joins the end of the subject '{fact.subject}' with what follows "
            f"('{token}'), so the edit is tied to that spelling"
        )
    return ""
