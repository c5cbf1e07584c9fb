"""``golden ask``: what a model answers, with and without edits, side by side."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from goldenlayers.commands import shared
from goldenlayers.commands.deciding import lines_of
from goldenlayers.commands.options import RARE, Chat, Consent, ModelOptions, Role, Sources
from goldenlayers.errors import UserError
from goldenlayers.progress import progress
from goldenlayers.shown import put, result, say, warn

if TYPE_CHECKING:
    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model

_AT_ONCE = 32  # prompts that are answered, and shown, together
STDIN = "-"


@dataclass(frozen=True, kw_only=True)
class AskConfig(ModelOptions):
    """Ask a model, with and without edits. Without a prompt it asks you for one after another.

    golden ask smollm2-135m "The capital of Italy is" "The capital of Spain is"
    golden ask smollm2-135m --prompts-file prompts.txt --delta my-edit other-edit
    """

    chat: Chat = False
    """Ask prompts by the model's own chat template."""

    prompts: Annotated[Positional[list[str]], arg(metavar="PROMPT ...")] = dataclasses.field(
        default_factory=list
    )
    """What the model is to continue; - reads prompts from standard input, one a line."""

    prompts_file: Annotated[Path | None, arg(metavar="FILE"), Role.SOURCE] = None
    """More prompts, one a line."""

    delta: Annotated[Sources, arg(metavar="RUN ...")] = dataclasses.field(default_factory=list)
    """Run folders of `golden edit`: each is tried alone, and several also all together."""

    tokens: int = 20
    """Most tokens of the answer."""

    top: int = 5
    """How many candidates for the next token to show."""

    force: Annotated[Consent, RARE] = False
    """Apply a delta although it was made on other weights."""


@dataclass(frozen=True)
class Version:
    """The model with some edits: how it is called, the runs of the edits, and they themselves."""

    label: str
    runs: tuple[str, ...]
    deltas: tuple[WeightDelta, ...]


def run(config: AskConfig) -> int:
    """Answer every prompt in every version of the model."""
    from goldenlayers.delta import WeightDelta

    prompts = _prompts(config)
    shared.refuse_twice(config.delta, "to golden ask")
    deltas = [WeightDelta.load(path) for path in config.delta]
    model = shared.load_model(config)
    for delta in deltas:
        delta.check(model, force=config.force)
        shared.tell_use(delta, model)
    _tell_contradictions(deltas)
    versions = _versions([str(path) for path in config.delta], deltas)
    found: list[dict[str, Any]] = []
    if prompts is None:
        for prompt in _typed():
            try:
                found += _show(_answers(model, [prompt], versions, config), typed=True)
            except UserError as error:  # such as one that is too long: the next may be shorter
                warn(error)
    else:
        for start in range(0, len(prompts), _AT_ONCE):
            some = prompts[start : start + _AT_ONCE]
            with progress("asking", "prompts") as bar:
                bar(start, len(prompts))
                answers = _answers(model, some, versions, config)
            found += _show(answers)
    result(model=model.name, prompts=found)
    return 0


def _prompts(config: AskConfig) -> list[str] | None:
    """The prompts that are given; None where they are to be typed.

    Raises:
        UserError: there are none, and nobody who could type them; a file that cannot be read.
    """
    prompts: list[str] = []
    for one in config.prompts:
        prompts += lines_of(STDIN, "standard input", "prompts") if one == STDIN else [one]
    if config.prompts_file is not None:
        prompts += lines_of(config.prompts_file, "--prompts-file", "prompts")
    if not config.chat and any(prompt.endswith(" ") for prompt in prompts):
        say(
            "A prompt that ends in a space is asked so; most models expect the space as a part "
            "of the next word, and answer better without it."
        )
    if prompts:
        return prompts
    if sys.stdin is None or not sys.stdin.isatty():
        raise UserError(
            "there is no prompt",
            expected="prompts behind the model, --prompts-file FILE, or - for standard input",
        )
    return None


def _typed() -> Iterator[str]:
    """Prompts typed one after another, until the end of input (Ctrl-D)."""
    with suppress(ImportError):
        import readline  # noqa: F401 - gives the line its history

    say("Type a prompt and press Enter; Ctrl-D ends.")
    with suppress(EOFError):
        while True:
            if (prompt := input("> ")).strip():
                yield prompt


def _versions(runs: Sequence[str], deltas: Sequence[WeightDelta]) -> list[Version]:
    """The model as it is, with each edit alone, and with all of them."""
    found = [Version("as it is", (), ())]
    if len(deltas) == 1:
        return [*found, Version("edited", tuple(runs), tuple(deltas))]
    found += [Version(run, (run,), (delta,)) for run, delta in zip(runs, deltas, strict=True)]
    return [*found, Version("all together", tuple(runs), tuple(deltas))] if deltas else found


def _tell_contradictions(deltas: Sequence[WeightDelta]) -> None:
    """Say it where two of the edits give one prompt different answers."""
    answers: dict[object, object] = {}
    for delta in deltas:
        for fact in delta.facts:
            if fact.get("undone"):
                continue
            prompt, target = fact.get("prompt"), fact.get("target")
            before = answers.setdefault(prompt, target)
            if prompt and before != target:
                warn(f"two of the edits contradict: '{prompt}' → '{before}' and '{target}'")


def _answers(
    model: Model, prompts: Sequence[str], versions: Sequence[Version], config: AskConfig
) -> list[dict[str, Any]]:
    """For each prompt, by the order of the versions: continuation and likeliest next tokens."""
    from goldenlayers.decoding import answers

    rows = [model.encoder.verbatim(prompt).ids for prompt in prompts]
    room = model.encoder.max_length
    counts = [config.tokens if room is None else min(config.tokens, room - len(r)) for r in rows]
    for count in (count for count in counts if count < config.tokens):
        say(f"Only {max(0, count)} tokens: the model's context ends there")
    found: list[dict[str, Any]] = [{"prompt": prompt, "answers": []} for prompt in prompts]
    for version in versions:
        with ExitStack() as stack:
            for delta in version.deltas:
                stack.enter_context(delta.applied(model, force=config.force))
            said = answers(model, rows, counts, config.top)
        for one, answer in zip(found, said, strict=True):
            following = [{"token": token, "probability": p} for token, p in answer.next]
            one["answers"].append(
                {
                    "label": version.label,
                    "edits": version.runs,
                    "text": answer.text,
                    "next": following,
                }
            )
    return found


def _show(found: list[dict[str, Any]], *, typed: bool = False) -> list[dict[str, Any]]:
    """Print prompts (unless they were typed, and so are seen) and answers, which it hands back.

    No line of theirs can pass for one of ours.
    """
    for one in found:
        first, *others = one["prompt"].split("\n")
        if not typed:
            put(f"> {first}", *(f"  | {line}" for line in others), limit=None)
        room = max(len(answer["label"]) for answer in one["answers"])
        for answer in one["answers"]:
            first, *others = answer["text"].split("\n")
            put(f"  {answer['label'] + ':':{room + 1}} {first}", limit=None)
            put(*(f"    | {line}" for line in others), limit=None)
            if answer["next"]:
                tokens = (f"{n['token']!r} {n['probability']:.3f}" for n in answer["next"])
                put("    next: " + "  ".join(tokens))
    return found
