"""EleutherAI's lm-evaluation-harness on a model, with and without an edit. An optional extra.

The harness asks the very weights that are in memory, so whatever deltas are applied at the moment
are measured; nothing is saved or loaded in between.
"""

from __future__ import annotations

import copy
import difflib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedTokenizerBase

    from goldenlayers.delta import WeightDelta
    from goldenlayers.models import Model


@dataclass(frozen=True)
class Change:
    """One metric of one task before and after an edit.

    Attributes:
        task: the harness's name of the task or group.
        metric: the harness's name of the metric, e.g. ``acc``.
        filter: what was done to the answers before scoring; ``none`` in most tasks.
        before, after: the values; ``after`` is None when no delta was given.
        stderr_before, stderr_after: the harness's standard errors, None where it gives none.
    """

    task: str
    metric: str
    filter: str
    before: float
    after: float | None
    stderr_before: float | None
    stderr_after: float | None


@dataclass(frozen=True)
class HarnessResult:
    """What the harness found, as it returned it (``results``, ``samples``, ``configs``, ...).

    Attributes:
        before: the model as it came.
        after: the same with the delta applied; None when no delta was given.
    """

    before: Mapping[str, Any]
    after: Mapping[str, Any] | None

    def changes(self) -> list[Change]:
        """Every metric of every task, in the harness's order."""
        later = self.after["results"] if self.after is not None else {}
        found = []
        for task, values in self.before["results"].items():
            after = later.get(task, {})
            for key, value in values.items():
                metric, comma, filtered = key.partition(",")
                if not comma or metric.endswith("_stderr") or _number(value) is None:
                    continue
                spread = f"{metric}_stderr,{filtered}"
                found.append(
                    Change(
                        task,
                        metric,
                        filtered,
                        float(value),
                        _number(after.get(key)),
                        _number(values.get(spread)),
                        _number(after.get(spread)),
                    )
                )
        return found


def _number(value: object) -> float | None:
    # The harness writes "N/A" for what it did not compute.
    return float(value) if isinstance(value, Real) else None


def harness_model(model: Model, *, batch_size: int = 8) -> HFLM:
    """``model`` as the harness's own ``HFLM``, for ``lm_eval.simple_evaluate(model=...)``.

    It shares the weights with ``model``: asked inside ``with delta.applied(model):`` it answers
    with the edit, asked outside without. The tokenizer is a copy, since the harness gives
    tokenizers a padding token. Do not use the harness's ``use_cache`` with it: that cache knows
    the question, not the weights.

    Args:
        model: a loaded model.
        batch_size: requests per forward pass.

    Raises:
        UserError: lm-eval is not installed, a batch size below 1, or a tokenizer that ends every
            text with a special token (the harness would score the answers after it).
    """
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}", expected="1 or more")
    _installed()
    from lm_eval.models.huggingface import HFLM

    build: Any = HFLM  # its decorators hide its parameters from type checkers
    with _quiet("lm_eval.models.huggingface"):  # warns that a model in memory is no path
        return build(
            pretrained=model.hf,
            tokenizer=_tokenizer_for_harness(model),
            backend="causal",
            batch_size=batch_size,
            max_length=model.encoder.max_length,
        )


def harness_evaluate(
    model: Model,
    tasks: str | Sequence[str | dict[str, Any] | Any],
    *,
    delta: WeightDelta | None = None,
    batch_size: int = 8,
    task_manager: TaskManager | None = None,
    **options: Any,
) -> HarnessResult:
    """Run harness tasks on ``model``, and again with ``delta`` applied; same documents, same shots.

    The harness seeds Python's, numpy's and torch's global generators before each of the two runs.

    Args:
        model: a loaded model; left bit-identical.
        tasks: names of the harness's tasks or groups, paths of its YAML files, its configurations
            as dictionaries, or its task objects.
        delta: the edit; without one only ``before`` is measured.
        batch_size: requests per forward pass.
        task_manager: an ``lm_eval.tasks.TaskManager`` that knows further tasks. By default one
            that knows those of the harness; reading their names takes some seconds.
        options: further arguments of ``lm_eval.simple_evaluate``, but not ``use_cache``: ``limit``,
            documents per task, or below 1 their share, for trying things out; ``num_fewshot``,
            shots in place of each task's own number; ...

    Raises:
        UserError: as ``harness_model``; a delta of another model, no task, a task that is not
            known or cannot be loaded (its data set is not there), a limit that is not positive.
    """
    if "use_cache" in options:
        raise UserError(
            "use_cache would hand the answers from before the edit on to after it",
            fix="Leave use_cache out",
        )
    limit = options.get("limit")
    if limit is not None and not (limit > 0 and (limit < 1 or limit == int(limit))):
        raise UserError(
            f"limit is {limit}", expected="a number of documents, or a share between 0 and 1"
        )
    wanted = [tasks] if isinstance(tasks, str | dict) else list(tasks)
    if not wanted:
        raise UserError("no task was given", fix="Name at least one, e.g. tasks=['lambada_openai']")
    if delta is not None:
        delta.check(model)  # before the first run, not after it
    lm = harness_model(model, batch_size=batch_size)

    import lm_eval
    from lm_eval.tasks import TaskManager

    evaluate: Any = lm_eval.simple_evaluate  # decorated as well
    manager = task_manager or TaskManager()
    loaded = _load(manager, wanted)

    def run() -> Mapping[str, Any]:
        found = evaluate(model=lm, tasks=loaded, task_manager=manager, **options)
        assert found is not None  # only processes other than the first get None
        return found

    before = run()
    if delta is None:
        return HarnessResult(before, None)
    with delta.applied(model):
        return HarnessResult(before, run())


def _installed() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"lm-eval is needed for the evaluation harness ({error})",
            fix="pip install 'goldenlayers[harness]'",
        ) from error


def _tokenizer_for_harness(model: Model) -> PreTrainedTokenizerBase:
    whole: Any = model.tokenizer("a", verbose=False)["input_ids"]
    if len(whole) != len(model.encoder.tokens("a")[0]):
        raise UserError(
            f"the tokenizer of '{model.name}' puts a special token behind every text, which the "
            "harness takes for part of it: its scores would be wrong",
            fix="Load the tokenizer with add_eos_token=False",
        )
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer.pad_token is None and tokenizer.unk_token is None and tokenizer.eos_token is None:
        # The harness would add a token that the model has no embedding for. Padding is masked:
        # any token serves.
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    return tokenizer


def _load(manager: TaskManager, wanted: Sequence[Any]) -> list[Any]:
    """Tasks and groups as objects; what the harness or its data library raises as a UserError."""
    known = set(manager.all_tasks)
    for task in wanted:
        if isinstance(task, str) and task not in known and not Path(task).is_file():
            near = difflib.get_close_matches(task, known, n=3, cutoff=0.7)
            raise UserError(
                f"the harness has no task '{task}' and there is no such file",
                fix=f"Did you mean {' or '.join(near)}?" if near else "lm-eval ls tasks lists them",
            )
    found: list[Any] = []
    try:
        for spec in wanted:
            parts = manager.load([spec])
            outermost = list(parts.get("groups", {}).values())[:1]
            found.extend(outermost or parts["tasks"].values())
        manager.load(found)  # raises where one task came twice
    except Exception as error:  # whatever the data library, the hub or a YAML file brings forth
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the harness could not load its tasks ({reason})") from error
    return found


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
