"""The editors by name, how settings given by name become an editor, and the published settings.

Sources of the presets: the hyper-parameter files released with ROME (arXiv 2202.05262; FT-L's stand
beside it), MEMIT (arXiv 2210.07229), PMET (arXiv 2308.08742) and AlphaEdit (arXiv 2410.02355), and
for EMMET and for Llama 2 those of EasyEdit. ``layer`` is the single published layer, or the last of
the published range.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from goldenlayers.editors.base import Clearing, Editor, Settings
from goldenlayers.editors.finetune import FtL, FtM
from goldenlayers.editors.locate_then_edit import (
    AlphaEdit,
    ClearRome,
    Emmet,
    Memit,
    Pmet,
    Rome,
    RRome,
)
from goldenlayers.errors import UserError, check_number, near_matches, read_value, shortened
from goldenlayers.facts import Fact
from goldenlayers.prompts import join
from goldenlayers.registry import Registry

if TYPE_CHECKING:
    from goldenlayers.models import Model


@dataclass(frozen=True, kw_only=True)
class InContext(Settings):
    """The baseline that changes no weights."""

    name: ClassVar[str] = "in-context"

    demonstrations: int = 8
    """Worked examples put before the prompt."""

    def prefix(self, fact: Fact, pool: Sequence[Fact], seed: int) -> str:
        """What to put before a fact's probes, its examples drawn from other subjects' facts."""
        subject = fact.subject.casefold()
        free = [one for one in pool if one.subject.casefold() != subject and one.id != fact.id]
        count = min(self.demonstrations, len(free))
        drawn = random.Random(f"{seed}/demonstrations/{fact.id}").sample(free, count)
        return in_context_prefix(fact, drawn, seed=seed)


def in_context_prefix(fact: Fact, demonstrations: Sequence[Fact], *, seed: int = 0) -> str:
    """What to put before a probe's prompt so that the model knows ``fact``.

    Args:
        fact: the edit.
        demonstrations: other facts, whose new answers, rephrasings and locality probes make the
            worked examples; the fact itself is passed over.
        seed: of the order of the examples.
    """
    examples: list[str] = []
    for i, other in enumerate(d for d in demonstrations if d.id != fact.id):
        told = _told(other, other.prompt, other.target)
        keeps = [p for p in other.must_stay if p.answer]
        if i % 3 == 1 and other.rephrasings:
            asked, answer = other.rephrasings[0], other.target
        elif i % 3 == 2 and keeps:
            asked, answer = keeps[0].prompt, keeps[0].answer or ""
        else:
            asked, answer = other.prompt, other.target
        examples.append(f"New fact: {told}.\n{_told(other, asked, answer)}.\n\n")
    random.Random(f"{seed}/{fact.id}").shuffle(examples)
    told = _told(fact, fact.prompt, fact.target)
    return "".join(examples) + f"New fact: {told}.\n"


def _told(fact: Fact, prompt: str, answer: str) -> str:
    return join(prompt, answer, fact.joint_of(prompt, answer))[0]


@dataclass(frozen=True)
class Preset:
    """An editor with the settings published for one model, and the published layer.

    ``shape`` tells which model: layers, width, MLP width and vocabulary.
    """

    editor: Editor
    layer: int
    shape: tuple[int, int, int, int]


_GPT2_XL = (48, 1600, 6400, 50257)
_GPT_J = (28, 4096, 16384, 50400)
_LLAMA_2_7B = (32, 4096, 11008, 32000)
_LLAMA_3_8B = (32, 4096, 14336, 128256)

_ADAM: dict[str, Any] = {"adam": True, "steps": 25, "lr": 0.5, "lr_absolute": True}
_ROME: dict[str, Any] = {**_ADAM, "prefixes": 20}
_SPREAD: dict[str, Any] = {
    **_ADAM,
    "weight_decay": 0.5,
    "block_norm": True,
    "prefix_tokens": 10,
    "clamp": 0.75,
    "layers_before": 4,
}
_MEMIT = {**_SPREAD, "memit_lambda": 15000.0, "memit_lambda_absolute": True}
_FT_L: dict[str, Any] = {
    "ft_lr": 5e-4,
    "lr_absolute": True,
    "prompt_last": True,
    "stop_loss": 0.01,
}

PRESETS: dict[str, Preset] = {
    "rome/gpt2-xl": Preset(Rome(**{**_ROME, "steps": 20}, weight_decay=0.5), 17, _GPT2_XL),
    "rome/gpt-j-6b": Preset(Rome(**{**_ROME, "steps": 20}, weight_decay=0.5), 5, _GPT_J),
    "rome/llama-2-7b": Preset(Rome(**_ROME), 5, _LLAMA_2_7B),
    "memit/gpt2-xl": Preset(
        Memit(**{**_MEMIT, "steps": 20, "memit_lambda": 20000.0}), 17, _GPT2_XL
    ),
    "memit/gpt-j-6b": Preset(Memit(**{**_MEMIT, "layers_before": 5}), 8, _GPT_J),
    "memit/llama-2-7b": Preset(
        Memit(**{**_MEMIT, "weight_decay": 1e-3, "clamp": 4.0}), 8, _LLAMA_2_7B
    ),
    "emmet/gpt2-xl": Preset(Emmet(**{**_SPREAD, "steps": 20}, emmet_lambda=0.1), 17, _GPT2_XL),
    "pmet/gpt-j-6b": Preset(
        Pmet(
            **{
                **_MEMIT,
                "steps": 30,
                "lr": 0.2,
                "kl_factor": 1.0,
                "block_norm": False,
                "layers_before": 5,
                "memit_lambda": 6000.0,
            }
        ),
        8,
        _GPT_J,
    ),
    "alphaedit/llama-3-8b": Preset(
        AlphaEdit(
            **{**_SPREAD, "lr": 0.1},
            null_space=0.02,
            null_space_absolute=True,
            l2=10.0,
            l2_absolute=True,
        ),
        8,
        _LLAMA_3_8B,
    ),
    "ft-l/gpt2-xl": Preset(FtL(**_FT_L, epsilon=5e-4), 0, _GPT2_XL),
    "ft-l/gpt-j-6b": Preset(FtL(**_FT_L, epsilon=5e-5), 0, _GPT_J),
}


def preset(name: str, model: Model) -> Preset:
    """A published preset, checked against the model it is to be used on.

    Raises:
        UserError: unknown preset, or one for a model of another shape.
    """
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'", fix=near_matches(name, PRESETS))
    found = PRESETS[name]
    layers = model.layers
    have = (len(layers), layers.d_model, layers.d_mlp, layers.vocab_size)
    if have != found.shape:
        raise UserError(
            f"preset '{name}' is for a model of {_said(found.shape)}; '{model.name}' has "
            f"{_said(have)}",
            fix="Leave the preset out: the defaults scale with the model's own norms",
        )
    return found


def _said(shape: tuple[int, int, int, int]) -> str:
    n_layers, d_model, d_mlp, vocabulary = shape
    return f"{n_layers} layers, width {d_model}, MLP width {d_mlp}, vocabulary {vocabulary}"


S = TypeVar("S", bound=Settings)

EDITORS: Registry[type[Editor]] = Registry("editor", "goldenlayers.editors")
for _kind in (Rome, RRome, ClearRome, Memit, Emmet, AlphaEdit, Pmet, FtM, FtL):
    EDITORS.register(_kind.name, _kind)


def make_editor(method: str | Editor, **settings: Any) -> Editor:
    """The editor of a name, or the one given, with some settings changed.

    Raises:
        UserError: an unknown editor, with near matches; a setting that it does not have, with the
            editors that have it; a value out of range.
    """
    if isinstance(method, str):
        if method == InContext.name and method not in EDITORS:
            raise UserError(
                f"unknown editor '{method}' (in-context changes no weights)",
                fix=near_matches(method, EDITORS),
            )
        method = EDITORS[method]()
    return with_settings(method, settings)


def with_settings(one: S, settings: Mapping[str, Any]) -> S:
    """``one`` with some settings changed.

    Raises:
        UserError: see :func:`make_editor`.
    """
    own = {f.name for f in dataclasses.fields(one)}
    for name in settings:
        if name not in own:
            having = [
                n for n, kind in _kinds() if name in {f.name for f in dataclasses.fields(kind)}
            ]
            raise UserError(
                f"{one.name} has no setting '{name}'",
                fix=f"It is one of {', '.join(having)}" if having else near_matches(name, own),
            )
    return dataclasses.replace(one, **settings) if settings else one


def read_settings(one: S, texts: Mapping[str, str], flag: str = "--set") -> S:
    """``one`` with settings that a flag gives as text, by NAME VALUE pairs.

    Raises:
        UserError: no such setting, or no value for it.
    """
    values: dict[str, Any] = dict(texts)
    for f in dataclasses.fields(one):
        if f.name in texts and type(f.default) in (bool, int, float):
            values[f.name] = read_value(texts[f.name], type(f.default), f"{flag} {f.name}")
    return with_settings(one, values)


def _kinds() -> Iterable[tuple[str, type[Settings]]]:
    for name in EDITORS:
        try:
            yield name, EDITORS[name]
        except UserError:  # a broken package: for who asks for this editor
            continue
    yield InContext.name, InContext


def one_at_a_time(
    editor: Editor, n_facts: int, instead: str = "Use --mode sequential"
) -> UserError:
    """The error of many facts in one solve, where the editor takes one."""
    able = [name for name, kind in _kinds() if issubclass(kind, Editor) and kind.edits_together]
    return UserError(
        f"{editor.name} edits one fact at a time, not {n_facts} together",
        fix=f"{instead}, or another --method: {', '.join(able)}",
    )


def check_step(editor: Editor, step: int) -> None:
    """Refuse a number of facts per step that the editor cannot write.

    Raises:
        UserError: below 1, or above 1 where it takes one fact at a time.
    """
    check_number("the step", step, 1, 1_000_000)
    if step > 1 and not editor.edits_together:
        raise one_at_a_time(editor, step, "Leave --step out")


_NAMES, _NAME = 10_000, 200  # most names, and characters of one


def checked_names(editor: Editor, names: Sequence[str]) -> tuple[str, ...]:
    """Names that an editor is to stay clear of, each once.

    Raises:
        UserError: the editor uses none, one is no text or empty or long, or there are too many.
    """
    if isinstance(names, str):
        raise UserError(f"the names are '{shortened(names)}'", expected="a list of names")
    if names and not isinstance(editor, Clearing):
        able = [name for name, kind in _kinds() if issubclass(kind, Clearing)]
        raise UserError(
            f"{editor.name} cannot stay clear of names",
            fix=f"Use another editor: {', '.join(able)}",
        )
    if len(names) > _NAMES:
        raise UserError(f"{len(names)} names to stay clear of", expected=f"at most {_NAMES}")
    for name in names:
        if not isinstance(name, str) or not name.strip() or len(name) > _NAME or "\0" in name:
            raise UserError(
                f"a name to stay clear of is {shortened(repr(name))}",
                expected=f"text of 1 to {_NAME} characters",
            )
    return tuple(dict.fromkeys(name.strip() for name in names))
