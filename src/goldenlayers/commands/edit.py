"""``golden edit``: facts in, a small reversible change out, with the answers before and after."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.commands import answers, shared
from goldenlayers.commands.joints import settle
from goldenlayers.config import EditConfig, whole_number
from goldenlayers.errors import DataError, UserError
from goldenlayers.facts import Fact, plain_subject
from goldenlayers.models.sources import DTYPES

if TYPE_CHECKING:
    from goldenlayers.covariance import Covariance
    from goldenlayers.datasets import FactSet
    from goldenlayers.delta import WeightDelta
    from goldenlayers.editors import EditSettings
    from goldenlayers.models.model import Model

# A change longer than this share of the matrix it is added to is out of the ordinary: ROME edits of
# healthy facts lie around 0.02-0.2.
_LARGE = 0.5


def run(config: EditConfig) -> int:
    """Edit, show what changed, save."""
    from goldenlayers.editors import edit, edited_layers, editor

    shared.refuse_out(config, "edit", ignore=("device",))
    editor(config.method)
    facts, source = _facts(config)
    model = shared.load_model(config)
    config, (facts,) = settle(config, model, facts)
    facts = _worth_editing(model, facts, strict=config.facts is None)
    refuse_batch(config.method, config.mode, len(facts))
    settings, layer = settings_and_layer(config, model)
    layers = edited_layers(model.layers[layer].index, settings)
    statistics = key_statistics_for(
        config.method, model, layers, config.statistics, config.seed, config.cache_dir
    )
    failed: dict[str, UserError] = {}
    with shared.progress(f"editing with {config.method}", "facts") as bar:
        delta = edit(
            model,
            facts,
            config.method,
            layer=layer,
            mode=None if config.mode == "auto" else config.mode,
            settings=settings,
            statistics=statistics,
            seed=config.seed,
            on_done=lambda done: bar(done, len(facts)),
            on_failed=lambda fact, error: failed.update({fact.id: error}),
        )
    if failed:
        shared.tell_dropped(
            [DataError(f"fact '{name}' cannot be edited: {e}") for name, e in failed.items()]
        )
        facts = [fact for fact in facts if fact.id not in failed]
    before = answers.greedy_answers(model, facts)
    with delta.applied(model):
        after = answers.greedy_answers(model, facts)
    # Opened last: an edit that fails leaves nothing behind, and none can be gone on with.
    with shared.run_folder(config, "edit", model=model, facts=source, ignore=("device",)) as folder:
        if folder is not None:
            delta.save(folder.path)
            folder.finish()
    answers.show(model, facts, before, after)
    _show_change(model, delta)
    _warn(model, facts, after, delta)
    if folder is not None:
        size = sum(f.stat().st_size for f in folder.path.glob("delta.*"))
        shared.say(f"Saved to {folder.path} ({size / 1024:.0f} KB)")
    else:
        shared.say("Not saved: add --out DIR to keep the edit")
    return 0


def refuse_batch(method: str, mode: str, n_facts: int) -> None:
    """Refuse many facts in one solve by an editor of single facts: before the work, not after.

    Raises:
        UserError: that is what is asked for.
    """
    from goldenlayers.editors import EDITORS

    if mode != "batch" or n_facts == 1 or method not in EDITORS or EDITORS[method].edits_together:
        return
    able = [name for name, one in EDITORS.items() if one.edits_together]
    raise UserError(
        f"{method} edits one fact at a time, not {n_facts} together",
        fix=f"Use --mode sequential, or for a batch another --method: {', '.join(able)}",
    )


def key_statistics_for(
    method: str,
    model: Model,
    layers: Sequence[int],
    text: str,
    seed: int,
    cache_dir: Path | None = None,
) -> Mapping[int, Covariance] | None:
    """The key statistics ``method`` needs, from the cache or collected now with a progress bar."""
    from goldenlayers.editors import editor
    from goldenlayers.statistics import key_statistics

    if not editor(method).needs_statistics:
        return None
    with shared.progress("key statistics", "tokens") as bar:
        return key_statistics(
            model, layers, text=text, seed=seed, cache_dir=cache_dir, progress=bar
        )


def pick_layer(config: Any, model: Model) -> int:
    """The layer ``--layer`` names; for auto the golden layer by LGA, found once and kept.

    Raises:
        UserError: not a number, or no layer of the model.
    """
    if config.layer != "auto":
        layer = whole_number(config.layer)
        if layer is None:
            raise UserError(f"--layer is '{config.layer}'", expected="a layer number, or auto")
        return model.layers[layer].index
    from goldenlayers.commands.auto_layer import golden_layer

    return golden_layer(model, cache_dir=config.cache_dir)


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


def settings_and_layer(config: EditConfig, model: Model) -> tuple[EditSettings, int]:
    """The editor's settings, and the layer to edit: a preset's own where none is named."""
    settings, published = editor_settings(config, model)
    if published is not None and config.layer == "auto":
        return settings, published
    return settings, pick_layer(config, model)


def editor_settings(config: Any, model: Model) -> tuple[EditSettings, int | None]:
    """The settings of ``--preset`` and ``--set``, and the layer that the preset names, if any."""
    from goldenlayers.editors import EditSettings, preset

    settings = EditSettings()
    layer: int | None = None
    if config.preset is not None:
        found, settings = preset(config.preset, model)
        if found.method != config.method:
            raise UserError(
                f"preset '{config.preset}' is for {found.method}, not {config.method}",
                fix=f"Add --method {found.method}",
            )
        layer = found.layer
    return changed(settings, config.set), layer


def changed(
    settings: EditSettings, changes: Mapping[str, str], flag: str = "--set"
) -> EditSettings:
    """The settings with those changed that a flag names, by NAME VALUE pairs.

    Raises:
        UserError: no such setting, or no value for it.
    """
    values = {name: _value(settings, name, text, flag) for name, text in changes.items()}
    return settings.replace(**values)


def _value(settings: EditSettings, name: str, text: str, flag: str) -> float | int | bool:
    """The setting's text as a value of the setting's own type."""
    known: dict[str, float | int | bool] = dataclasses.asdict(settings)
    if name not in known:
        settings.replace(**{name: 0})  # raises, with the names that are near
    current = known[name]
    try:
        if isinstance(current, bool):
            return {"true": True, "false": False}[text.lower()]
        return int(text) if isinstance(current, int) else float(text)
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number"}.get(type(current), "a number")
        raise UserError(f"{flag} {name} is '{text}'", expected=kind) from None


def _show_change(model: Model, delta: WeightDelta) -> None:
    from goldenlayers.report.terminal import show, table

    norms = delta.norms(model)
    rows = [
        (name.removesuffix(".weight"), delta.rank(name), f"{norm.relative:.4f}")
        for name, norm in norms.items()
    ]
    show(table("What changed", ("matrix", "rank", "length relative to the matrix"), rows))


def _warn(
    model: Model, facts: Sequence[Fact], after: Sequence[answers.Answer], delta: WeightDelta
) -> None:
    """Say what a careful user would want to know before using this edit."""
    failed = [fact for fact, answer in zip(facts, after, strict=True) if not answer.is_new]
    if failed:
        some = "; ".join(f"'{fact.prompt}'" for fact in failed[:3])
        about = Counter(plain_subject(fact.subject) for fact in facts)
        rivals = [fact for fact in failed if about[plain_subject(fact.subject)] > 1]
        advice = "Try another --layer, or --set steps 50, or --set clamp 8."
        if rivals:
            advice = (
                f"{len(rivals)} of them share their subject with another edit here "
                f"('{rivals[0].subject}'), and the two may be at odds: leave one out"
                + (f". For the others: {advice}" if len(rivals) < len(failed) else ".")
            )
        shared.say(f"Warning: {len(failed)} of {len(facts)} edits did not take ({some}). {advice}")
    for name, norm in delta.norms(model).items():
        if norm.relative > _LARGE:
            shared.say(
                f"Warning: the change of {name} is {norm.relative:.2f} times as long as the matrix "
                "itself; other answers are likely to suffer. Try another --layer or r-rome."
            )
    for fact in facts:
        problem = _odd_subject(model, fact)
        if problem:
            shared.say(f"Warning: {problem}")


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


def saved_delta(path: Path) -> WeightDelta:
    """The delta of a run folder of ``golden edit``."""
    from goldenlayers.delta import WeightDelta

    return WeightDelta.load(path)


def tell_rounding(delta: WeightDelta, model: Model) -> None:
    """Say it where an edit is used in a number format too narrow for the one it was made in."""
    import torch

    made = getattr(torch, delta.base_dtype, None) if delta.base_dtype in DTYPES else None
    if made is not None and torch.promote_types(made, model.dtype) != model.dtype:
        used = str(model.dtype).removeprefix("torch.")
        shared.say(
            f"The edit was made in {delta.base_dtype} and is used in {used}, which rounds it; "
            f"--dtype {delta.base_dtype} does not"
        )
