"""One model and what is tried on it: a :class:`Workbench` holds the model, a :class:`Session` the
edits of one tab. Neither knows of a page; both may be used from any thread.
"""

from __future__ import annotations

import dataclasses
import io
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from goldenlayers.atlas import found_for
from goldenlayers.checking import FILE, Check, check
from goldenlayers.decoding import Answer, answers, gives_already, settle_joints
from goldenlayers.delta import WeightDelta
from goldenlayers.editors import EDITORS, edit, make_editor
from goldenlayers.editors.routing import statistics_for
from goldenlayers.errors import UserError, check_number, near_matches, shortened
from goldenlayers.export import added_up, export_gguf, export_peft, read_check, write_card
from goldenlayers.facts import Fact
from goldenlayers.locating import locate, published_on
from goldenlayers.progress import Progress
from goldenlayers.records import json_text

if TYPE_CHECKING:
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.models import Model
    from goldenlayers.statistics.moments import Covariance

Tell = Callable[[str], object]
"""What is told of the work that is under way, in a few words."""
Kind = Literal["delta", "peft", "gguf"]

LONGEST = {"subject": 200, "prompt": 1000, "new answer": 200}
"""Characters of what may be typed."""
STRONGEST = 3.0
EDITS, SESSIONS, WAITING = 40, 100, 12
"""The most edits of a session, sessions of a workbench, and calls that may wait for the model."""
TOKENS, LIKELIEST = 16, 5
"""Tokens of an answer, and likeliest next tokens shown with it."""


@dataclass(eq=False)
class Edit:
    """One edit of a session, made on the untouched model, so that it stands by itself.

    Attributes:
        number: from 1, and never given twice in a session.
        fact: that was edited.
        method: the editor's name.
        layer: that was written.
        strength: what the change was multiplied by.
        delta: the change, with the strength in it.
        notes: what a careful user would want to know, whole sentences.
        check: what it did to other prompts; None until it is asked for.
        on: whether the edited model has it.
    """

    number: int
    fact: Fact
    method: str
    layer: int
    strength: float
    delta: WeightDelta
    notes: tuple[str, ...] = ()
    check: Check | None = None
    on: bool = True


class Workbench:
    """A model that one call at a time may use; who comes later waits, first come, first served.

    Args:
        model: a loaded model.
        statistics: text for the key statistics, as for ``golden edit``.
        cache_dir: where they are kept.
    """

    def __init__(
        self, model: Model, *, statistics: str = "package", cache_dir: Path | None = None
    ) -> None:
        self.model, self.statistics, self.cache_dir = model, statistics, cache_dir
        self.values: dict[tuple[Any, ...], Any] = {}  # found once for editors that share them
        self._sessions: dict[str, Session] = {}
        self._line: list[object] = []
        self._moved = threading.Condition()

    @contextmanager
    def turn(self, tell: Tell) -> Iterator[Model]:
        """The model for one call; until it is free, ``tell`` hears how many are before.

        Raises:
            UserError: too many wait already.
        """
        me = object()
        with self._moved:
            if len(self._line) > WAITING:
                raise UserError(
                    f"{WAITING} calls wait for the model already", fix="Try again in a while"
                )
            self._line.append(me)
            while (before := self._line.index(me)) > 0:
                tell(f"Waiting for the model: {before} before you")
                self._moved.wait()
        try:
            tell("Beginning")
            yield self.model
        finally:
            with self._moved:
                self._line.remove(me)
                self._moved.notify_all()

    def session(self, key: str) -> Session:
        """The session of a key, a new one if there is none; beyond a number the oldest are gone.

        Raises:
            UserError: the key is empty: the tab has not said its own yet.
        """
        if not key:
            raise UserError("the page is still loading", fix="Try again in a moment")
        with self._moved:
            found = self._sessions.pop(key, None) or Session(self)
            self._sessions[key] = found  # now the youngest
            for old in list(self._sessions)[:-SESSIONS]:
                del self._sessions[old]
            return found

    def advised(self, method: str) -> tuple[int, str]:
        """The layer for an editor without a look at the fact, and why: what was measured on these
        weights, else the published depth.
        """
        known = found_for(self.model, make_editor(method))
        if known is not None:
            return known.advised, known.sentence()
        return published_on(self.model), "the depth of published settings"

    def covariances(self, method: str, layer: int, tell: Tell) -> Mapping[int, Covariance] | None:
        """The key statistics that an editor needs at a layer: kept ones, or collected now."""
        editor = make_editor(method)
        if editor.needs_statistics:
            tell("Looking for the key statistics")

        def on_progress(done: int, total: int) -> None:
            tell(f"Reading text for layer {layer}, once: {done / max(total, 1):.0%}")

        return statistics_for(
            self.model,
            editor,
            [layer],
            text=self.statistics,
            cache_dir=self.cache_dir,
            progress=on_progress,
        )


def make_fact(subject: str, prompt: str, target: str) -> Fact:
    """The fact that was typed.

    Raises:
        UserError: a text is missing or too long, or the subject is not in the prompt.
    """
    for (name, most), text in zip(LONGEST.items(), (subject, prompt, target), strict=True):
        _check_text(name, text, most)
    return Fact(subject.strip(), prompt.strip(), target.strip(), id="edit")


def _check_text(name: str, text: object, most: int) -> None:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"the {name} is empty", fix="Type it in")
    if len(text) > most:
        raise UserError(f"the {name} has {len(text):,} characters", expected=f"{most:,} at most")


@dataclass(eq=False)
class Session:
    """The edits of one tab, and what can be done with them on the shared model.

    Every method that uses the model waits for its turn and hears of it by ``tell``; all raise
    ``UserError`` for what the user can mend.
    """

    bench: Workbench
    edits: list[Edit] = field(default_factory=list)
    _made: int = 0
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def layers(self, fact: Fact, tell: Tell = len) -> LayerRanking:
        """LGA on this one fact: a score per layer, and the golden one of them."""
        with self.bench.turn(tell) as model:
            tell("Scoring the layers")
            return locate(model, [fact], bootstrap=0, progress=Progress())

    def edit(
        self,
        fact: Fact,
        method: str = "clear-rome",
        layer: int | None = None,
        strength: float = 1.0,
        tell: Tell = len,
    ) -> Edit:
        """Make an edit on the untouched model and put it on the list, switched on.

        An earlier edit that answers the same prompt is switched off. ``layer`` None takes the one
        that is advised for the editor; ``strength`` multiplies the change.
        """
        check_number("the strength", strength, 0, STRONGEST, whole=False, above=True)
        if len(self.edits) >= EDITS:
            raise UserError(f"there are {EDITS} edits already", fix="Undo one of them first")
        with self.bench.turn(tell) as model:
            if layer is None:
                layer, _ = self.bench.advised(method)
            layer = model.layers[layer].index
            (fact,) = settle_joints(model, [fact])
            _refuse_known(model, fact)
            statistics = self.bench.covariances(method, layer, tell)
            tell(f"Editing with {method} at layer {layer}")
            delta = edit(
                model,
                fact,
                make_editor(method),
                layer=layer,
                statistics=statistics,
                value_cache=self.bench.values,
            )
            while len(self.bench.values) > EDITS:
                del self.bench.values[next(iter(self.bench.values))]
            delta = delta if strength == 1 else delta * float(strength)
            notes = [
                f"The change is {norm.relative:.2f} times as long as the matrix itself, so other "
                "answers are likely to suffer: try another layer, or less strength."
                for norm in delta.norms(model).values()
                if norm.is_large
            ]
        with self._lock:
            for old in self.edits:
                same = (old.fact.subject, old.fact.prompt) == (fact.subject, fact.prompt)
                if same and old.on:
                    old.on = False
                    notes.append(f"Edit {old.number} answers the same prompt: it is switched off.")
            self._made += 1
            made = Edit(self._made, fact, method, layer, strength, delta, tuple(notes))
            self.edits.append(made)
        return made

    def check(self, number: int, tell: Tell = len) -> Check:
        """What an edit by itself did to rephrasings, neighbours and unrelated prompts."""
        made = self.find(number)
        with self.bench.turn(tell) as model:
            if made.check is None:
                tell("Asking rephrasings and the nearest neighbours, before and after")
                made.check = check(model, made.delta, [made.fact])
        return made.check

    def ask(self, prompt: str, tell: Tell = len) -> tuple[Answer, Answer | None]:
        """The answer of the model as it is, and that with all edits that are on (None of none)."""
        _check_text("prompt", prompt, LONGEST["prompt"])
        deltas = [one.delta for one in self._on()]
        with self.bench.turn(tell) as model:
            tell("Asking the model as it is")
            before = answer(model, prompt)
            if not deltas:
                return before, None
            tell("Asking the edited model")
            with ExitStack() as stack:
                for delta in deltas:
                    stack.enter_context(delta.applied(model))
                return before, answer(model, prompt)

    def switch(self, number: int, on: bool) -> None:
        """Switch an edit on or off."""
        self.find(number).on = bool(on)

    def undo(self, number: int) -> None:
        """Take an edit off the list for good."""
        with self._lock:
            self.edits.remove(self.find(number))

    def find(self, number: int) -> Edit:
        """The edit of a number."""
        with self._lock:
            for one in self.edits:
                if one.number == number:
                    return one
        raise UserError(f"there is no edit {shortened(str(number), 20)} here (any more)")

    def _on(self) -> list[Edit]:
        with self._lock:
            return [one for one in self.edits if one.on]

    def download(self, number: int | None, kind: str, tell: Tell = len) -> tuple[str, bytes]:
        """An edit as a file: its name and content. None stands for the sum of all that are on.

        ``delta`` is a zipped folder for goldenlayers, ``peft`` a zipped adapter folder, ``gguf``
        an adapter for llama.cpp.
        """
        if kind not in get_args(Kind):
            raise UserError(f"'{shortened(kind, 20)}' is no kind of file", fix=near_matches(
                kind, get_args(Kind)))  # fmt: skip
        edits = self._on() if number is None else [self.find(number)]
        if not edits:
            raise UserError("no edit is switched on", fix="Switch one on")
        names = [f"edit {one.number}" for one in edits]
        delta, _ = added_up([one.delta for one in edits], names)
        stem = f"golden-edit-{number}" if number is not None else "golden-edits"
        with tempfile.TemporaryDirectory(prefix="goldenlayers-") as place:
            folder = Path(place) / stem
            checked = edits[0].check if len(edits) == 1 else None
            if kind == "delta":
                _save(delta, folder, checked)
                return f"{stem}.zip", _zipped(folder)
            with self.bench.turn(tell) as model:
                if kind == "gguf":
                    file = Path(place) / f"{stem}.gguf"
                    export_gguf(delta, file, model)
                    return file.name, file.read_bytes()
                _save(delta, Path(place) / "made", checked)
                told = read_check(Path(place) / "made")
                export_peft(delta, folder, model, evidence=[told] if told else [])
            return f"{stem}-peft.zip", _zipped(folder)


def answer(model: Model, prompt: str) -> Answer:
    """What the model says now, as its weights are."""
    row, room = model.encoder.verbatim(prompt).ids, model.encoder.max_length
    count = TOKENS if room is None else min(TOKENS, room - len(row))
    return answers(model, [row], [count], LIKELIEST)[0]


def _refuse_known(model: Model, fact: Fact) -> None:
    if gives_already(model, [fact])[0]:
        raise UserError(
            f"the model answers '{fact.prompt}' with '{fact.target}' already",
            fix="There is nothing to edit: type another answer",
        )


def _save(delta: WeightDelta, folder: Path, checked: Check | None) -> None:
    delta.save(folder)
    if checked is not None:
        (folder / FILE).write_text(json_text(checked.to_json()), encoding="utf-8")
    write_card(folder, delta)


def _zipped(folder: Path) -> bytes:
    found = io.BytesIO()
    with zipfile.ZipFile(found, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return found.getvalue()


def methods() -> Sequence[str]:
    """The editors' names, the default first."""
    return sorted(EDITORS, key=lambda name: name != "clear-rome")


def plain_sentence(found: Check) -> str:
    """The check's sentence without its advice, which names flags of the command line."""
    return dataclasses.replace(found, advice=()).sentence()
