"""What an edit changed, as a value: small factors per weight matrix, to apply, undo, add, save and
share. A ``WeightDelta`` never holds or changes a model by itself.

Shapes: R rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import goldenlayers
import goldenlayers.delta.apply as _apply
import goldenlayers.delta.files as files
from goldenlayers.delta.apply import Selection, applied_per_example
from goldenlayers.delta.factors import Dense, LowRank, hf_of
from goldenlayers.delta.targets import find_targets
from goldenlayers.errors import UserError

if TYPE_CHECKING:
    from goldenlayers.facts import Fact
    from goldenlayers.models import Model


__all__ = ["Dense", "LowRank", "Norms", "Selection", "WeightDelta", "applied_per_example"]


class Norms(NamedTuple):
    """Frobenius norm of ΔW, and its ratio to the norm of the matrix it changes."""

    absolute: float
    relative: float

    @property
    def is_large(self) -> bool:
        """Longer than half of its matrix, so that other answers are likely to suffer: ROME edits of
        healthy facts lie around 0.02 to 0.2.
        """
        return self.relative > 0.5


@dataclass(frozen=True, eq=False)
class WeightDelta:
    """Changes of some weight matrices of one model.

    ``changes`` maps parameter names as in ``hf_model.named_parameters()`` (module path +
    ".weight") to ``LowRank`` or ``Dense``, always out × in. ``base_fingerprint`` names the weights
    it was made on ("": none, any model of the right shapes will do), ``base_dtype`` the number
    format in which they were worked with. ``method``, ``layers``, ``facts`` (one dict per fact) and
    ``settings`` say where it came from; they must fit in JSON.
    """

    changes: Mapping[str, LowRank | Dense]
    base_fingerprint: str = ""
    base_name: str = ""
    method: str = ""
    layers: Sequence[int] = ()
    facts: Sequence[Mapping[str, Any]] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    created_with: str = field(default_factory=lambda: goldenlayers.__version__)
    base_dtype: str = ""

    def __post_init__(self) -> None:
        for name, change in self.changes.items():
            if not isinstance(change, LowRank | Dense):
                raise UserError(
                    f"the change of '{name}' is a {type(change).__name__}",
                    expected="LowRank or Dense",
                )
        object.__setattr__(self, "changes", MappingProxyType(dict(self.changes)))
        object.__setattr__(self, "settings", MappingProxyType(dict(self.settings)))
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "facts", tuple(self.facts))

    def __repr__(self) -> str:
        return (
            f"WeightDelta({self.method or 'no method'}, layers {list(self.layers)}, "
            f"{len(self.facts)} facts, {len(self.changes)} matrices, rank {self.rank()}, "
            f"{self.nbytes / 1024:.1f} KB)"
        )

    @property
    def in_chat(self) -> bool:
        """Whether its prompts stood in a chat template; of a sum, those of any part."""
        parts = (part for part in _parts(self) if isinstance(part, Mapping))
        return any(part.get("chat") is True for part in parts)

    # --- algebra ---------------------------------------------------------------------------

    def __add__(self, other: WeightDelta) -> WeightDelta:
        """Both changes at once. Factors are put side by side; see ``compress``.

        Raises:
            UserError: the two were made on different weights, or differ in a matrix's shape.
        """
        if not isinstance(other, WeightDelta):
            return NotImplemented
        return self._joined(other, (*self.facts, *other.facts))

    def __radd__(self, other: object) -> WeightDelta:
        """``sum(deltas)`` begins with 0."""
        return self if isinstance(other, int) and other == 0 else NotImplemented

    def __sub__(self, other: WeightDelta) -> WeightDelta:
        """Take ``other`` away again; its facts leave the list, or stand in it as ``undone``."""
        if not isinstance(other, WeightDelta):
            return NotImplemented
        kept = tuple(fact for fact in self.facts if fact not in other.facts)
        gone = tuple({**f, "undone": True} for f in other.facts if f not in self.facts)
        return self._joined(-other, kept + gone)

    def __neg__(self) -> WeightDelta:
        return self * -1.0

    def __mul__(self, factor: float) -> WeightDelta:
        """Scaled by a number; ``settings["scale"]`` keeps the product of all factors."""
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            return NotImplemented
        if not math.isfinite(factor):
            raise UserError(f"a delta cannot be scaled by {factor}", expected="a finite number")
        scale = float(self.settings.get("scale", 1.0)) * factor
        return replace(
            self,
            changes={name: change.scaled(factor) for name, change in self.changes.items()},
            settings={**self.settings, "scale": scale},
        )

    __rmul__ = __mul__

    def _joined(self, other: WeightDelta, facts: Sequence[Mapping[str, Any]]) -> WeightDelta:
        if self.base_fingerprint != other.base_fingerprint:
            raise UserError(
                f"the deltas were made on different weights: '{self.base_name}' "
                f"({self.base_fingerprint[:12]}) and '{other.base_name}' "
                f"({other.base_fingerprint[:12]})",
                fix="Add only deltas of one and the same model",
            )
        changes = dict(self.changes)
        for name, change in other.changes.items():
            mine = changes.get(name)
            if mine is not None and mine.shape != change.shape:
                raise UserError(
                    f"the deltas change '{name}' in different shapes: {mine.shape} "
                    f"and {change.shape}",
                    fix="Add only deltas of one and the same model",
                )
            changes[name] = change if mine is None else mine.plus(change)
        methods = f"{self.method}+{other.method}".split("+")
        same = dict(self.settings) == dict(other.settings)
        settings = dict(self.settings) if same else {"parts": [*_parts(self), *_parts(other)]}
        return replace(
            self,
            changes=changes,
            base_dtype=self.base_dtype if self.base_dtype == other.base_dtype else "",
            method="+".join(dict.fromkeys(part for part in methods if part)),
            layers=tuple(sorted({*self.layers, *other.layers})),
            facts=facts,
            settings=settings,
        )

    def compress(self, tol: float = 1e-6) -> WeightDelta:
        """The same change in as few factors as possible.

        Singular values up to ``tol`` times the largest of their matrix are dropped, found by QR
        of both factors and an SVD of the small core in float64. Dense changes stay as they are.
        """
        return replace(self, changes={n: c.compressed(tol) for n, c in self.changes.items()})

    def to(self, device: str | torch.device) -> WeightDelta:
        """The same delta with its tensors on ``device``."""
        moved = {
            name: replace(change, left=change.left.to(device), right=change.right.to(device))
            if isinstance(change, LowRank)
            else Dense(change.value.to(device))
            for name, change in self.changes.items()
        }
        return replace(self, changes=moved)

    # --- size ------------------------------------------------------------------------------

    @property
    def nbytes(self) -> int:
        """Bytes of all factors in memory (on disk: these plus names and facts)."""
        return sum(change.nbytes for change in self.changes.values())

    def dense(self, name: str) -> Tensor:
        """ΔW (out, in) of one matrix, at least float32."""
        return self._change(name).dense

    def rank(self, name: str | None = None) -> int:
        """Columns of one matrix's factors, a bound on its rank; without a name the largest."""
        if name is not None:
            return self._change(name).rank
        return max((change.rank for change in self.changes.values()), default=0)

    def numerical_rank(self, name: str | None = None, *, rtol: float = 1e-6) -> int:
        """Singular values above ``rtol`` times the largest; without a name the most of any."""
        if name is None:
            return max((self.numerical_rank(n, rtol=rtol) for n in self.changes), default=0)
        values = self._change(name).singular_values()
        return int((values > rtol * values.max()).sum()) if values.numel() else 0

    def norms(self, model: Model | nn.Module) -> dict[str, Norms]:
        """‖ΔW‖ and ‖ΔW‖ / ‖W‖ (Frobenius) per matrix; W is the untouched weight."""
        hf = hf_of(model)
        norms = {}
        for name, target in find_targets(hf, self.changes).items():
            weight = _apply.base_weight(hf, target)
            size = float(torch.linalg.vector_norm(weight, dtype=torch.float64))
            absolute = self.changes[name].norm()
            norms[name] = Norms(absolute, absolute / size if size else math.inf)
        return norms

    def summary(self, model: Model | nn.Module | None = None) -> list[dict[str, Any]]:
        """One row per matrix; with a model, ``relative_norm`` (to the untouched weight) too."""
        norms = self.norms(model) if model is not None else {}
        rows = []
        for name, change in self.changes.items():
            row = {
                "parameter": name,
                "kind": "low-rank" if isinstance(change, LowRank) else "dense",
                "shape": list(change.shape),
                "rank": change.rank,
                "norm": norms[name].absolute if norms else change.norm(),
                "bytes": change.nbytes,
            }
            if norms:
                row["relative_norm"] = norms[name].relative
            rows.append(row)
        return rows

    def _change(self, name: str) -> LowRank | Dense:
        if name not in self.changes:
            raise UserError(
                f"the delta does not change '{name}'", fix="It changes: " + ", ".join(self.changes)
            )
        return self.changes[name]

    def holds(self, facts: Iterable[Fact]) -> list[bool]:
        """Which facts it was made for: those of the same subject, prompt and new answer."""
        held = {
            (row.get("subject"), row.get("prompt"), row.get("target"))
            for row in self.facts
            if not row.get("undone")
        }
        return [(fact.subject, fact.prompt, fact.target) in held for fact in facts]

    # --- use -------------------------------------------------------------------------------

    def check(
        self, model: Model | nn.Module, *, force: bool = False, verify: bool = False
    ) -> str | None:
        """Refuse a model this delta does not belong to; see ``applied`` for the arguments.

        Returns the model's fingerprint where it is known.
        """
        found = _apply.check_base(
            model, self.base_fingerprint, name=self.base_name, force=force, verify=verify
        )
        find_targets(hf_of(model), self.changes)
        if not isinstance(model, nn.Module):
            of_blocks = {name for block in model.layers for name in block.editable_names}
            for name in self.changes:
                if name not in of_blocks:
                    raise UserError(
                        f"the delta changes '{name}', which is no matrix of a layer",
                        expected="matrices of the decoder blocks (golden models --inspect)",
                        fix="Apply it to the transformers model itself (delta.applied(model.hf))",
                    )
        return found

    @contextmanager
    def applied(
        self, model: Model | nn.Module, *, force: bool = False, verify: bool = False
    ) -> Iterator[None]:
        """The model with this delta, inside a ``with`` block; every bit returns on the way out.

        Also after an exception. Deltas nest: inside two blocks the model carries their sum. What
        the block itself writes into a touched weight is lost with it.

        Args:
            model: a ``Model``, whose fingerprint must be the delta's, or a plain transformers
                model, of which only names and shapes are checked.
            force: apply although the fingerprints differ.
            verify: check the fingerprint of a plain transformers model too.

        Raises:
            UserError: on entering: another model, a missing or tied or quantised parameter, a
                wrong shape, or a sum too large for the weight's dtype. The model is untouched.
        """
        fingerprint = self.check(model, force=force, verify=verify)
        with _apply.apply(model, self.changes, fingerprint):
            yield

    def merge(self, model: Model | nn.Module, *, force: bool = False, verify: bool = False) -> None:
        """Add the delta to the weights for good (no way back to the same bits); see ``applied``."""
        self.check(model, force=force, verify=verify)
        _apply.merge(model, self.changes)

    # --- files -----------------------------------------------------------------------------

    def save(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write ``delta.safetensors`` and ``delta.json`` into ``folder``, each whole or not at all.

        Raises:
            UserError: the folder holds a delta already, or cannot be written.
        """
        fields = {name: getattr(self, name) for name in files.FIELDS}
        return files.write(Path(folder), self.changes, fields, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | Path) -> WeightDelta:
        """Read a delta from a run folder, its ``delta.safetensors`` or its ``delta.json``.

        Raises:
            UserError: not there, not a delta, torn, altered since it was saved, or holding NaN.
        """
        changes, fields = files.read(Path(path))
        return cls(changes, **fields)


def _parts(delta: WeightDelta) -> list[Any]:
    """The settings a sum was made with, one entry per summand, flat."""
    settings = dict(delta.settings)
    if set(settings) == {"parts"}:
        return list(settings["parts"])
    return [{"method": delta.method, **settings}]
