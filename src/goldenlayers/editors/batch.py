"""Many facts in one delta, in one solve or one by one, without those that cannot be edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

from goldenlayers.delta import WeightDelta
from goldenlayers.editors.base import Editor, Workbench
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.memory import OutOfMemory

if TYPE_CHECKING:
    from torch import Tensor


def edit_together(
    bench: Workbench, chosen: Editor, facts: Sequence[Fact], layer: int
) -> tuple[WeightDelta, dict[str, UserError]]:
    """One delta of all facts that can be edited; the others by id, each with its error.

    The facts at fault are found by halving: a few of them cost about as much as two edits more.

    Raises:
        UserError: the editor takes one fact at a time; no fact can be edited; or those that can be
            edited by themselves cannot be together.
    """
    keys = dict(bench.previous_keys)
    try:
        return chosen.together(bench, facts, layer), {}
    except UserError as error:
        set_keys(bench, keys)
        if isinstance(error, OutOfMemory):  # no fact's fault
            raise
        if len(facts) == 1 or not chosen.edits_together:
            raise
        failed = _failures(bench, chosen, facts, layer)
        kept = [fact for fact in facts if fact.id not in failed]
        if not failed or not kept:
            raise
    return chosen.together(bench, kept, layer), failed


def _failures(
    bench: Workbench, chosen: Editor, facts: Sequence[Fact], layer: int
) -> dict[str, UserError]:
    """The facts that cannot be edited by themselves, of some that cannot be edited together."""
    found: dict[str, UserError] = {}
    half = len(facts) // 2
    for part in (facts[:half], facts[half:]):
        error = failure(bench, chosen, part, layer)
        if error is not None:
            alone = len(part) == 1
            found |= {part[0].id: error} if alone else _failures(bench, chosen, part, layer)
    return found


def failure(
    bench: Workbench, chosen: Editor, facts: Sequence[Fact], layer: int
) -> UserError | None:
    """Why the facts cannot be edited together; None if they can."""
    keys = dict(bench.previous_keys)
    try:
        chosen.together(bench, facts, layer)
    except UserError as error:
        return error
    finally:
        set_keys(bench, keys)  # a try is no edit for later ones to keep clear of
    return None


def set_keys(bench: Workbench, keys: Mapping[int, Tensor]) -> None:
    """Make ``keys`` the ones that later edits keep clear of."""
    bench.previous_keys.clear()
    bench.previous_keys.update(keys)


def sequence(
    bench: Workbench,
    chosen: Editor,
    facts: Sequence[Fact],
    layer: int,
    *,
    after_each: Callable[[int, WeightDelta], None] | None = None,
    on_failed: Callable[[Fact, UserError], None] | None = None,
) -> WeightDelta:
    """Edit one fact after another, each on the model with all earlier edits in place.

    ``after_each`` is called with the fact's number and the total so far, while that is applied.
    ``on_failed`` is told of each fact that cannot be edited, which is then left out.

    Raises:
        UserError: a fact that cannot be edited, if there is no ``on_failed``, or if none can be.
    """
    _ = bench.base_fingerprint  # named before anything is applied
    _ = bench.prefixes  # and so are the prefixes: the same throughout
    total: WeightDelta | None = None
    last: UserError | None = None
    done, bench.on_done = bench.on_done, None
    try:
        for i, fact in enumerate(facts):
            try:
                total = edit_next(bench, chosen, fact, layer, total)
            except UserError as error:
                if on_failed is None or isinstance(error, OutOfMemory):
                    raise
                last = error
                on_failed(fact, error)
            else:
                if after_each is not None:
                    with total.applied(bench.model):
                        after_each(i, total)
            if done is not None:
                done(i + 1)
    finally:
        bench.on_done = done
    if total is None:
        assert last is not None  # facts is not empty
        raise last
    return total


def edit_next(
    bench: Workbench, chosen: Editor, fact: Fact, layer: int, total: WeightDelta | None
) -> WeightDelta:
    """``total`` with one more edit, made while it is applied.

    Raises:
        UserError: the fact cannot be edited; then it leaves no keys to keep clear of.
    """
    keys = dict(bench.previous_keys)
    try:
        with nullcontext() if total is None else total.applied(bench.model):
            step = chosen.together(bench, [fact], layer)
    except UserError:
        set_keys(bench, keys)  # it may have come as far as to leave some
        raise
    return step if total is None else total + step
