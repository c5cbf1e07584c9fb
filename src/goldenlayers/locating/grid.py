"""What causal tracing finds token by token: a value to save, average and draw (no torch here).

Shapes: T tokens of the prompt, L layers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from goldenlayers.errors import UserError

SCHEMA = 1
# The rows of a mean over prompts, as in ROME's figure 2 (Meng et al. 2022, arXiv 2202.05262).
ROLES = (
    "first subject token",
    "middle subject tokens",
    "last subject token",
    "first token after it",
    "further tokens",
    "last token",
)


@dataclass(frozen=True, eq=False)
class TracingGrid:
    """The indirect effect of every token and layer: p(answer | restored) − p(answer | corrupted).

    Attributes:
        tokens: (T) what each row is: a token's text, or a role of tokens.
        effect: (T, L) float64, a difference of probabilities; NaN where no token has the role.
        subject: rows [first, end) that are the subject's.
        lookup: row of the subject's last token.
        clean, corrupted: probability of the answer without noise, and with it (mean of samples).
        kind, window: what was restored: "mlp", "attention" or "block", over how many layers.
        samples: noise samples per fact.
        sigma: standard deviation of the noise.
        answer: the answer whose probability it is; empty in a mean over facts.
        n_facts: facts in the mean, 1 for one prompt.
        model: the model's name.
    """

    tokens: tuple[str, ...]
    effect: NDArray[np.float64]
    subject: tuple[int, int]
    lookup: int
    clean: float
    corrupted: float
    kind: str
    window: int
    samples: int
    sigma: float
    answer: str = ""
    n_facts: int = 1
    model: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values that ``json.dumps(..., allow_nan=False)`` accepts; NaN becomes None."""
        effect = [[None if np.isnan(v) else float(v) for v in row] for row in self.effect]
        plain = asdict(self) | {"effect": effect}
        return {"schema": SCHEMA, **json.loads(json.dumps(plain))}

    @classmethod
    def from_json(cls, value: Mapping[str, Any] | str | bytes) -> TracingGrid:
        """The grid that ``to_json`` wrote.

        Raises:
            UserError: not a grid, or a damaged one.
        """
        try:
            raw = json.loads(value) if isinstance(value, str | bytes) else dict(value)
            if raw.pop("schema") != SCHEMA:
                raise ValueError("another schema")
            raw["effect"] = np.array(raw["effect"], dtype=np.float64)
            raw["tokens"], raw["subject"] = tuple(raw["tokens"]), tuple(raw["subject"])
            grid = cls(**raw)
            if grid.effect.ndim != 2 or len(grid.effect) != len(grid.tokens):
                raise ValueError(f"{len(grid.tokens)} tokens, effects {grid.effect.shape}")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"this is not a tracing grid ({type(error).__name__}: {error})",
                expected="what a causal tracing run wrote",
            ) from error
        return grid


def mean_by_role(grids: Sequence[TracingGrid]) -> TracingGrid:
    """The mean over facts, with the tokens of a prompt gathered by their role.

    Within a prompt the tokens of one role are averaged first, so that every prompt counts once. A
    subject of one token has only a last token; a prompt that ends with its subject has only that.
    Tokens before the subject are left out: their states are clean in every run.

    Raises:
        UserError: no grid, or grids of different models, kinds or windows.
    """
    if not grids:
        raise UserError("there is no tracing grid to average", expected="at least one")
    first = grids[0]
    if any(
        (g.model, g.kind, g.window, g.effect.shape[1])
        != (first.model, first.kind, first.window, first.effect.shape[1])
        for g in grids
    ):
        raise UserError("the tracing grids differ in model, kind, window or number of layers")
    total = np.zeros((len(ROLES), first.effect.shape[1]))
    count = np.zeros((len(ROLES), 1))
    for grid in grids:
        roles = [_role(grid, t) for t in range(len(grid.tokens))]
        for r in range(len(ROLES)):
            mine = [t for t, role in enumerate(roles) if role == r]
            if mine:
                total[r] += grid.effect[mine].mean(axis=0)
                count[r] += 1
    effect = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    return TracingGrid(
        tokens=ROLES,
        effect=effect,
        subject=(0, 3),
        lookup=2,
        clean=float(np.mean([g.clean for g in grids])),
        corrupted=float(np.mean([g.corrupted for g in grids])),
        kind=first.kind,
        window=first.window,
        samples=first.samples,
        sigma=float(np.mean([g.sigma for g in grids])),
        n_facts=len(grids),
        model=first.model,
    )


def _role(grid: TracingGrid, token: int) -> int | None:
    start, last = grid.subject[0], grid.lookup
    if token < start:
        return None
    if token <= last:
        return 2 if token == last else 0 if token == start else 1
    if token == len(grid.tokens) - 1:
        return 5
    return 3 if token == last + 1 else 4
