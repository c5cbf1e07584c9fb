"""``Editing``: a model, an editor and a layer, ready to edit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.editors.base import Editor, ValueSearch
from goldenlayers.editors.lookup_states import sample_prefixes
from goldenlayers.editors.named import check_step, checked_names, make_editor, one_at_a_time
from goldenlayers.editors.routing import by_expert, check_layers, statistics_for
from goldenlayers.errors import UserError, check_seed
from goldenlayers.facts import Fact
from goldenlayers.models import check_model
from goldenlayers.progress import OutOfMemory
from goldenlayers.statistics.moments import Covariance

if TYPE_CHECKING:
    from goldenlayers.editors.values import Value
    from goldenlayers.models import Model


@dataclass(frozen=True, kw_only=True)
class Options:
    """What few calls have to say of editing.

    Attributes:
        seed: of the sampled prefixes and statistics.
        statistics: key statistics per layer; collected when left out and needed.
        value_cache: shared between calls, see :class:`Editing`.
        names: to stay clear of, see :class:`Editing`.
    """

    seed: int = 0
    statistics: Mapping[int, Covariance] | None = None
    value_cache: dict[tuple[Any, ...], Value] | None = None
    names: Sequence[str] = ()

    def __post_init__(self) -> None:
        check_seed(self.seed)

    @classmethod
    def split(cls, given: Mapping[str, Any]) -> tuple[Self, dict[str, Any]]:
        """The options among some keywords, and the rest: the editor's settings."""
        names = {f.name for f in dataclasses.fields(cls)}
        options = {name: value for name, value in given.items() if name in names}
        return cls(**options), {n: value for n, value in given.items() if n not in names}

    def editing(self, model: Model, editor: Editor, layer: int) -> Editing:
        """An :class:`Editing` with these options."""
        return Editing(
            model,
            editor,
            layer,
            seed=self.seed,
            statistics=self.statistics,
            value_cache=self.value_cache,
            names=self.names,
        )


@dataclass(eq=False)
class Editing:
    """Edits a model's facts with one editor at one layer; the model is left as it is.

    Attributes:
        model: a loaded model.
        editor: the editor, with its settings.
        layer: where to edit, from the end if negative; for editors over several layers the last.
        statistics: key statistics per layer; collected when they are first needed if left out.
        seed: of the sampled prefixes and statistics.
        value_cache: what the value search found on the untouched weights. Editors that differ in
            the solve alone (ROME, R-ROME, MEMIT, EMMET, AlphaEdit) share it by sharing this.
        names: that every edit stays clear of, whatever the probes say, beside the ``neighbours`` of
            the package's pool; at most 10,000.
        judged: facts with whose probes the edits will be judged beside those of the edited facts:
            no name that stands in them is used, unless it is one of ``names``.
        on_done: called with the number of facts done.
        previous_keys: (F, m) per layer, the keys of earlier batches that AlphaEdit leaves alone.

    Raises:
        UserError: no model of ours, a layer that it does not have, or names for an editor that
            uses none.
    """

    model: Model
    editor: Editor
    layer: int
    _: KW_ONLY
    statistics: Mapping[int, Covariance] | None = None
    seed: int = 0
    value_cache: dict[tuple[Any, ...], Value] | None = None
    names: Sequence[str] = ()
    judged: Sequence[Fact] = ()
    on_done: Callable[[int], None] | None = None
    previous_keys: dict[int, Tensor] = field(default_factory=dict, repr=False)
    kept: dict[Any, Any] = field(default_factory=dict, repr=False)  # shared by all layers

    def __post_init__(self) -> None:
        self.editor = make_editor(self.editor)
        self.layer = check_model(self.model).layers[self.layer].index
        check_layers(self.model, self.editor, self.layer)
        self._values = {} if self.value_cache is None else self.value_cache
        self.names = checked_names(self.editor, self.names)

    def at(self, layer: int) -> Editing:
        """The same at another layer; prefixes, statistics and a value cache are shared."""
        return dataclasses.replace(self, layer=layer, previous_keys={})

    # --- editing

    def each(self, facts: Sequence[Fact]) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is, all computed side by side."""
        found: dict[int, WeightDelta] = {}
        for work, places in by_expert(self, facts):
            made = work.editor.each(work, [facts[i] for i in places])
            found |= dict(zip(places, made, strict=True))
        return [found[i] for i in range(len(facts))]

    def each_safely(self, facts: Sequence[Fact]) -> list[WeightDelta | UserError]:
        """As :meth:`each`; where the edit of a fact fails, its error.

        Raises:
            UserError: every one of several facts fails, and all alike: the fault is not the facts'.
        """
        try:
            return list(self.each(facts))
        except UserError as error:
            if len(facts) == 1:
                return [error]
            results = [one for fact in facts for one in self.each_safely([fact])]
            failed = {str(one) for one in results if isinstance(one, UserError)}
            if len(failed) == 1 and all(isinstance(one, UserError) for one in results):
                raise
            return results

    def together(self, facts: Sequence[Fact]) -> WeightDelta:
        """One delta that holds all facts, from one solve. A failure leaves nothing behind.

        Raises:
            UserError: the editor takes one fact at a time, or a fact cannot be edited.
        """
        if len(facts) > 1 and not self.editor.edits_together:
            raise one_at_a_time(self.editor, len(facts))
        keys = dict(self.previous_keys)
        try:
            parts = [
                work.editor.together(work, [facts[i] for i in places])
                for work, places in by_expert(self, facts)
            ]
            return sum(parts[1:], parts[0])  # each in a matrix of its own
        except BaseException:
            self._set_keys(keys)
            raise

    def together_safely(self, facts: Sequence[Fact]) -> tuple[WeightDelta, dict[str, UserError]]:
        """As :meth:`together`, of the facts that can be edited; the others by id, with their error.

        The facts at fault are found by halving: a few of them cost about as much as two edits more.

        Raises:
            UserError: no fact can be edited, or those that can be by themselves cannot together.
        """
        try:
            return self.together(facts), {}
        except UserError as error:
            lone = len(facts) == 1 or not self.editor.edits_together
            if lone or isinstance(error, OutOfMemory):  # memory is no fact's fault
                raise
            failed = self._failures(facts)
            kept = [fact for fact in facts if fact.id not in failed]
            if not failed or not kept:
                raise
        return self.together(kept), failed

    def failure(self, facts: Sequence[Fact]) -> UserError | None:
        """Why the facts cannot be edited together; None if they can. Nothing is kept."""
        keys = dict(self.previous_keys)
        try:
            self.together(facts)
        except UserError as error:
            return error
        finally:
            self._set_keys(keys)
        return None

    def sequence(
        self,
        facts: Sequence[Fact],
        step: int = 1,
        *,
        after_each: Callable[[int, WeightDelta], None] | None = None,
        on_failed: Callable[[Fact, UserError], None] | None = None,
    ) -> WeightDelta:
        """Edit ``step`` facts after the others, each step on the model with all earlier edits.

        Args:
            facts: at least one.
            step: how many facts are written in one solve.
            after_each: called with the step's number and the delta so far, while it is applied.
            on_failed: called with each fact that cannot be edited, which is then left out.

        Raises:
            UserError: a fact that cannot be edited, if there is no ``on_failed``, or if none can
                be; more than one fact a step with an editor that takes one at a time.
        """
        check_step(self.editor, step)
        self.prepare()
        total: WeightDelta | None = None
        last: UserError | None = None
        done, self.on_done = self.on_done, None
        judged, self.judged = self.judged, (*self.judged, *facts)
        try:
            for number, start in enumerate(range(0, len(facts), step)):
                part = facts[start : start + step]
                try:
                    total, failed = self.onto(total, part)
                except UserError as error:
                    if isinstance(error, OutOfMemory):
                        raise
                    failed = {fact.id: error for fact in part}
                for fact in part:
                    if fact.id in failed:
                        last = failed[fact.id]
                        if on_failed is None:
                            raise last
                        on_failed(fact, last)
                if after_each is not None and total is not None and len(failed) < len(part):
                    with total.applied(self.model):
                        after_each(number, total)
                if done is not None:
                    done(start + len(part))
        finally:
            self.on_done, self.judged = done, judged
        if total is None:
            assert last is not None  # facts is not empty
            raise last
        return total

    def onto(
        self, total: WeightDelta | None, facts: Sequence[Fact]
    ) -> tuple[WeightDelta, dict[str, UserError]]:
        """``total`` with more facts, written while it is applied; and those that cannot be edited.

        Raises:
            UserError: see :meth:`together_safely`.
        """
        with nullcontext() if total is None else total.applied(self.model):
            more, failed = self.together_safely(facts)
        return (more if total is None else total + more), failed

    def _failures(self, facts: Sequence[Fact]) -> dict[str, UserError]:
        """The facts that fail by themselves, of some that cannot be edited together."""
        found: dict[str, UserError] = {}
        half = len(facts) // 2
        for part in (facts[:half], facts[half:]):
            error = self.failure(part)
            if error is not None:
                alone = len(part) == 1
                found |= {part[0].id: error} if alone else self._failures(part)
        return found

    def _set_keys(self, keys: Mapping[int, Tensor]) -> None:
        self.previous_keys.clear()
        self.previous_keys.update(keys)

    # --- what editors work with

    def prepare(self) -> None:
        """Find what belongs to the untouched model, before anything is applied to it."""
        _ = self.base_fingerprint, self.prefixes
        if self.editor.needs_statistics:
            self.read_statistics()

    @property
    def prefixes(self) -> list[str]:
        """The empty prefix and the sampled ones: the same for every fact and layer."""
        s = self.editor
        if not isinstance(s, ValueSearch):
            return [""]
        if "prefixes" not in self.kept:
            self.kept["prefixes"] = sample_prefixes(
                self.model, s.prefixes, s.prefix_tokens, self.seed
            )
        return self.kept["prefixes"]

    @property
    def base_fingerprint(self) -> str:
        """Fingerprint of the weights as they were when this was first asked for."""
        return self.kept.setdefault("fingerprint", self.model.fingerprint())

    def covariance(self, layer: int) -> Covariance:
        """The key statistics of a layer.

        Raises:
            UserError: there are none for it.
        """
        statistics = self.read_statistics()
        if layer not in statistics:
            raise UserError(
                f"there are no key statistics for layer {layer}",
                fix="Collect them with key_statistics(model, [layer])",
            )
        return statistics[layer]

    def read_statistics(self) -> Mapping[int, Covariance]:
        if self.statistics is not None:
            return self.statistics
        place = "statistics", self.layer
        if place not in self.kept:
            self.kept[place] = statistics_for(self.model, self.editor, [self.layer], seed=self.seed)
        found = self.kept[place]
        return {} if found is None else found

    def values(self, facts: Sequence[Fact], *, with_attention: bool = False) -> list[Value]:
        """:func:`optimise_values` at the layer, once for facts asked for again on clean weights."""
        from goldenlayers.editors.values import optimise_values

        search = self.editor
        assert isinstance(search, ValueSearch)  # who asks for values has its settings
        clean = not deltas_in_force(self.model)
        keys = [(self.layer, with_attention, search.of_values, self.seed, f) for f in facts]
        todo = [i for i, key in enumerate(keys) if not clean or key not in self._values]
        already, on_done = len(facts) - len(todo), self.on_done
        computed = optimise_values(
            self.model,
            [facts[i] for i in todo],
            self.layer,
            self.prefixes,
            search,
            with_attention=with_attention,
            on_done=None if on_done is None else lambda done: on_done(already + done),
        )
        fresh = dict(zip(todo, computed, strict=True))
        if clean:
            self._values.update({keys[i]: value for i, value in fresh.items()})
        return [fresh[i] if i in fresh else self._values[keys[i]] for i in range(len(facts))]

    def delta(
        self,
        changes: Mapping[str, LowRank | Dense],
        facts: Sequence[Fact],
        values: Sequence[Value] = (),
        told: Mapping[str, Any] | None = None,
        clear_of: Sequence[str] = (),
    ) -> WeightDelta:
        """The delta with its record: what was edited, how, and how the optimisation went.

        ``told`` is what else to say of each fact, ``clear_of`` the names that their solve stayed
        clear of: they stand with the first fact of it.
        """
        rows: list[dict[str, Any]] = [
            {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target": f.target}
            for f in facts
        ]
        for row, value in zip(rows, values, strict=False):
            row |= {
                "steps": value.steps,
                "nll_before": round(value.nll_before, 6),
                "nll_after": round(value.nll_after, 6),
                **(told or {}),
            }
        asked = {"chat": True} if self.model.chat else {}
        if rows and clear_of:
            rows[0]["clear_of"] = list(dict.fromkeys(clear_of))
        return WeightDelta(
            changes,
            base_fingerprint=self.base_fingerprint,
            base_name=self.model.name,
            base_dtype=str(self.model.dtype).removeprefix("torch."),
            method=self.editor.name,
            layers=self.editor.layers(self.layer),
            facts=rows,
            settings=self.editor.to_json() | {"seed": self.seed} | asked,
        )
