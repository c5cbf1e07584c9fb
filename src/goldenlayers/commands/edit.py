"""``golden edit``: facts in, a small reversible change out, with the answers before and after."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import UseAppendAction, arg

from goldenlayers.commands import shared
from goldenlayers.commands.auto_layer import check_budget
from goldenlayers.commands.deciding import editor_of, settle, with_lines
from goldenlayers.commands.making import check_strength, make, with_usual
from goldenlayers.commands.options import (
    FACTS,
    RARE,
    JointOptions,
    ModelOptions,
    Out,
    OutputOptions,
    Role,
    Statistics,
    Under,
)
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact, Probe
from goldenlayers.prompts import plain_subject
from goldenlayers.shown import result, say, warn

if TYPE_CHECKING:
    from goldenlayers.checking import Check
    from goldenlayers.datasets import FactSet
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import Editor
    from goldenlayers.models import Model
    from goldenlayers.report import tables

Texts = Annotated[UseAppendAction[list[str]], arg(metavar="TEXT"), Under("Check")]


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

    method: str = ""
    """clear-rome, rome, r-rome, memit, emmet, alphaedit, pmet, ft-m or ft-l (default: that of
    --preset, else clear-rome); auto: for each fact the best of clear-rome, rome and alphaedit."""

    layer: str = "auto"
    """Layer to edit (-1 is the last); published, the depth of published settings; the folder of a
    run of `golden locate` or `golden sweep`; auto: chosen for this editor by a race of real edits
    of starter facts, once, and kept; or each: for each fact the best of seven."""

    strength: Annotated[str, arg(metavar="FACTOR")] = "1"
    """What the change is multiplied by; auto: for each fact the best of 0.5, 0.75, 1 and 1.2."""

    budget: Annotated[str | None, arg(metavar="TIME")] = None
    """--layer auto: the time that the race may take, such as 90s or 3m (default: 96 edits')."""

    mode: Literal["auto", "batch", "sequential"] = "auto"
    """All facts in one solve, or one after another (auto: batch, if the editor can)."""

    step: Annotated[int, RARE] = 1
    """In sequence: how many facts to edit at a time (memit, emmet, alphaedit, pmet, ft-m, ft-l)."""

    preset: Annotated[str | None, RARE] = None
    """Published settings by name, such as rome/gpt2-xl; checked against the model."""

    set: dict[str, str] = dataclasses.field(default_factory=dict)
    """Settings of the editor as NAME VALUE pairs (steps 30 clamp 2.5 ...); see `golden editors`."""

    clear_of: Annotated[list[str], arg(metavar="NAME ...")] = dataclasses.field(
        default_factory=list
    )
    """More names that must get nothing of the edit."""

    clear_of_file: Annotated[Path | None, arg(metavar="FILE"), Role.SOURCE, RARE] = None
    """More such names, one a line."""

    rephrase: Texts = dataclasses.field(default_factory=list)
    """A fact by flags: its question in other words, which the check asks; {} stands for the
    subject. May repeat. Without any, they are made."""

    keep: Texts = dataclasses.field(default_factory=list)
    """A prompt whose answer must stay, which the check asks; {} stands for the subject. May repeat.
    Without any, prompts about other names are made."""

    keep_file: Annotated[Path | None, arg(metavar="FILE"), Role.SOURCE, RARE] = None
    """More such prompts, one a line."""

    no_check: bool = False
    """Do not check what the edit does to rephrasings and to other prompts."""

    statistics: Statistics = "package"
    """Text for the key statistics: package (English text that comes with goldenlayers), model
    (sampled from the model itself: slow), a text or JSONL file, hub:NAME, or none (identity:
    another algorithm, only for comparison)."""

    seed: Annotated[int, RARE] = 0
    """Seed of the sampled prefixes and statistics."""

    out: Out = None
    """Run folder to write: delta.safetensors, delta.json, check.json, config.yaml, log.txt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.method:
            of_preset = (self.preset or "").partition("/")[0]
            object.__setattr__(self, "method", of_preset or "clear-rome")
        check_budget(self)
        check_strength(self)
        if self.step != 1 and self.mode == "batch":
            raise UserError("--step is for edits in sequence", fix="Add --mode sequential")
        by_flags = [self.subject, self.prompt, self.target]
        if self.facts is not None and any(part is not None for part in by_flags):
            raise UserError("both --facts and a fact by flags are given", fix="Give one of them")
        if self.facts is not None and self.rephrase:
            raise UserError(
                "--rephrase is for a fact by flags",
                fix="Give the rephrasings of --facts in their file",
            )
        if self.facts is None and (self.limit is not None or self.skip_invalid):
            name = "--skip-invalid" if self.limit is None else "--limit"
            raise UserError(f"{name} is for --facts", fix="Leave it out, or give --facts")
        if self.no_check and (self.rephrase or self.keep or self.keep_file):
            raise UserError("--no-check asks no prompts", fix="Leave it out")
        if self.facts is None and any(part is None for part in by_flags):
            raise UserError(
                "there is no fact to edit",
                expected="--subject, --prompt and --target, or --facts FILE",
            )


def run(config: EditConfig) -> int:
    """Edit, show what changed, save."""
    from goldenlayers.checking import FILE
    from goldenlayers.choosing import FILE as TRIES
    from goldenlayers.editors import check_step
    from goldenlayers.export import write_card
    from goldenlayers.report import tables

    # A run records the layer that was meant by a word.
    found = () if re.fullmatch("[0-9]{1,18}", config.layer) else ("layer", "budget")
    shared.refuse_out(config, "edit", ignore=("device", *found))
    config = dataclasses.replace(with_lines(with_usual(config)), method=config.method)
    check_step(editor_of(with_usual(config)), config.step)
    facts, source = _facts(config)
    model = shared.load_model(config)
    config, (facts,) = settle(config, model, facts)
    facts, before = _worth_editing(model, facts, strict=config.facts is None)
    dropped: list[DataError] = []
    config, editor, layer, delta, tried = make(config, model, facts, dropped)
    if dropped:
        shared.tell_dropped(dropped)
        held = delta.holds(facts)
        facts, before = list(compress(facts, held)), list(compress(before, held))
    after, checked, cut = [], None, None
    try:
        with delta.applied(model):
            after = tables.greedy_answers(model, facts)
        if not config.no_check:
            checked = _checked(model, delta, facts)
    except UserError:
        raise
    except BaseException as error:  # Ctrl-C, or no memory: what is made is kept
        if config.out is None:
            raise
        cut = error
    # Opened last: an edit that fails leaves nothing behind, and none can be gone on with.
    with shared.run_folder(config, "edit", model=model, facts=source, ignore=("device",)) as folder:
        if folder is not None:
            delta.save(folder.path)
            if checked is not None:
                folder.write_json(FILE, checked.to_json())
            if tried is not None:
                folder.write_json(TRIES, tried.to_json())
            write_card(folder.path, delta)
            folder.finish()
    if cut is not None:
        warn(f"the edit was not checked; it is saved to {config.out}")
        raise cut
    result(
        model=model.name,
        method=delta.method if tried else editor.name,
        layer=None if config.layer == "each" else layer,
        facts=[
            {name: getattr(fact, name) for name in ("id", "subject", "prompt", "target")}
            | {"before": _said(old), "after": _said(new), "took": new.is_new}
            for fact, old, new in zip(facts, before, after, strict=True)
        ],
        took=sum(answer.is_new for answer in after),
        dropped=[str(error) for error in dropped],
        changes=delta.summary(model),
        check=checked and checked.to_json(),
        tried=tried and tried.to_json(),
    )
    tables.show_answers(model, facts, before, after)
    _show_change(model, delta)
    _show_overlap(delta)
    if checked is not None:
        tables.show_check(checked)
    told = checked is not None and checked.verdict == "did not take"
    _warn(model, facts, after, delta, editor, told=told)
    if folder is not None:
        size = sum(f.stat().st_size for f in folder.path.glob("delta.*"))
        say(f"Saved to {folder.path} ({size / 1024:.0f} KB)")
    else:
        say("Not saved: add --out DIR to keep the edit")
    return 0


def _checked(model: Model, delta: WeightDelta, facts: Sequence[Fact]) -> Check | None:
    from goldenlayers.checking import check

    try:
        return check(model, delta, facts)
    except UserError as error:  # such as a prompt that is too long: the edit is there
        warn(f"the edit was not checked: {error}")
        return None


def _facts(config: EditConfig) -> tuple[list[Fact], FactSet | None]:
    if config.facts is None:
        # Held by the config; that none is empty the fact itself checks.
        assert None not in (config.subject, config.prompt, config.target)
        subject, prompt, target = config.subject or "", config.prompt or "", config.target or ""
        rephrased = tuple(config.rephrase)
        fact = Fact(subject, prompt, target, rephrasings=rephrased, id="edit", joint=config.joint)
        return [_keeping(fact, config.keep)], None
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
    return [_keeping(fact, config.keep) for fact in found], found


def _keeping(fact: Fact, prompts: Sequence[str]) -> Fact:
    """The fact with more prompts that must stay.

    Raises:
        UserError: one of them is to change.
    """
    edited = {" ".join(text.split()) for text in (fact.prompt, *fact.rephrasings)}
    prompts = [prompt.replace("{}", fact.subject) for prompt in prompts]
    for prompt in prompts:
        if " ".join(prompt.split()) in edited:
            raise UserError(
                f"the answer to '{prompt}' is edited, and --keep keeps it", fix="Leave one out"
            )
    more = tuple(Probe(prompt, contradicts=False) for prompt in dict.fromkeys(prompts))
    return dataclasses.replace(fact, locality=fact.locality + more)


def _worth_editing(
    model: Model, facts: list[Fact], *, strict: bool
) -> tuple[list[Fact], list[tables.Answer]]:
    """The facts with what the model answers, but for those whose new answer it gives already; one
    by flags is an error.
    """
    from goldenlayers.report.tables import greedy_answers

    before = greedy_answers(model, facts)
    errors = [
        DataError(
            f"the model answers '{fact.prompt}' with '{fact.target}' already",
            field="target",
            fix="There is nothing to edit",
        )
        for fact, answer in zip(facts, before, strict=True)
        if answer.is_new
    ]
    if errors and (strict or len(errors) == len(facts)):
        raise errors[0]
    if errors:
        shared.tell_dropped(errors)
    new = [not answer.is_new for answer in before]
    return list(compress(facts, new)), list(compress(before, new))


def _said(answer: tables.Answer) -> dict[str, Any]:
    """An answer as ``--json`` tells it: with the probability of the new answer."""
    return {"text": answer.text, "probability": answer.probability}


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
    *,
    told: bool,
) -> None:
    """Say what a careful user would want to know before using this edit.

    ``told``: what to try where it did not take was said already.
    """
    from goldenlayers.checking import stronger

    failed = [fact for fact, answer in zip(facts, after, strict=True) if not answer.is_new]
    if failed:
        some = "; ".join(f"'{fact.prompt}'" for fact in failed[:3])
        about = Counter(plain_subject(fact.subject) for fact in facts)
        rivals = [fact for fact in failed if about[plain_subject(fact.subject)] > 1]
        advice = f"Try {', or '.join(stronger(delta.settings))}."
        if rivals:
            advice = (
                f"{len(rivals)} of them share their subject with another edit here "
                f"('{rivals[0].subject}'), and the two may be at odds: leave one out"
                + (f". For the others: {advice}" if len(rivals) < len(failed) else ".")
            )
        elif told:
            advice = ""
        warn(f"{len(failed)} of {len(facts)} edits did not take ({some}). {advice}".rstrip())
    for name, norm in delta.norms(model).items():
        if norm.is_large:
            warn(
                f"the change of {name} is {norm.relative:.2f} times as long as the matrix "
                "itself; other answers are likely to suffer. Try another --layer"
                + (" or r-rome." if editor.name == "rome" else ".")
            )
    for fact in facts:
        problem = _odd_subject(model, fact)
        if problem:
            warn(problem)


def _odd_subject(model: Model, fact: Fact) -> str:
    """A sentence if the subject's last token holds more than the subject."""
    encoding = model.encoder.fact(fact)
    assert encoding.lookup is not None  # held by encoder.fact
    start, end = encoding.spans[encoding.lookup]
    if end > encoding.start + fact.subject_span[1]:
        token = encoding.text[start:end]
        return (
            f"the tokenizer joins the end of the subject '{fact.subject}' with what follows "
            f"('{token}'), so the edit is tied to that spelling"
        )
    return ""
