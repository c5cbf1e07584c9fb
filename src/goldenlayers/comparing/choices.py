"""What a comparison finds: each choice of a layer judged, and all of them together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from goldenlayers.comparing.rules import SizeCurve
from goldenlayers.truth import Interval, TransferMatrix
from goldenlayers.truth.numbers import plain

SCHEMA = 1


@dataclass(frozen=True)
class Choice:
    """One choice and how it does on the test facts; NaN and None where something is unknown.

    Attributes:
        name: tells the choice apart from all others.
        method: "lga", "transfer", "golden", "oracle", "random", ...
        variant: "tukey", "raw", "cosine", ... ; "" for methods without variants.
        layer: the chosen one; None for the oracle and the expected random layer.
        score: mean score there, in the unit of the sweep's rows.
        regret: golden layer's score minus this one's, over ``regret.n`` facts, with its 95 %
            bootstrap interval over test facts.
        golden_rank: place of the golden layer (of the best of them, if layers tie) in the choice's
            own order, from 1; None if it is not in it.
        hit_at: k → 1.0 if a golden layer is among the first k, else 0.0; a probability for random.
        spearman: rank correlation of the choice's layer scores with the truth's layer means.
        seconds: what the choice cost (key statistics not counted, neither here nor in the sweep).
        speed_up: the sweep's seconds over these.
        n_proxy: facts it looked at.
        run: folder of the run it came from.
    """

    name: str
    method: str
    layer: int | None
    score: float
    regret: Interval
    variant: str = ""
    golden_rank: int | None = None
    hit_at: Mapping[int, float] = field(default_factory=dict)
    spearman: float = math.nan
    seconds: float | None = None
    speed_up: float | None = None
    n_proxy: int = 0
    scope: str | None = None
    loss: str | None = None
    fence: str | None = None
    run: str = ""
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The choice's entry in ``compare.json``; NaN becomes None."""
        numbers = {name: plain(getattr(self, name)) for name in ("score", "spearman")}
        return (
            vars(self)
            | numbers
            | {
                "regret": plain(self.regret.value),
                "regret_interval": [plain(self.regret.low), plain(self.regret.high)],
                "hit_at": {str(k): value for k, value in self.hit_at.items()},
            }
        )


@dataclass(frozen=True)
class Comparison:
    """All choices, the yardsticks first, and how the rules do with fewer proxy facts.

    ``transfer`` has the golden layer of every sweep judged on every other, this one first; None
    where no other sweep was given.
    """

    golden_layer: int
    golden_score: float
    oracle: Interval
    choices: tuple[Choice, ...]
    proxy_sizes: tuple[SizeCurve, ...]
    layers: tuple[int, ...]
    means: tuple[float, ...]
    metric: str
    n_facts: int
    sweep_seconds: float | None
    warnings: tuple[str, ...] = ()
    transfer: TransferMatrix | None = None

    def to_json(self) -> dict[str, Any]:
        """The value of ``compare.json``."""
        return {
            "schema": SCHEMA,
            "golden_layer": self.golden_layer,
            "golden_score": plain(self.golden_score),
            "oracle": self.oracle.to_json(),
            "metric": self.metric,
            "n_facts": self.n_facts,
            "sweep_seconds": self.sweep_seconds,
            "layers": list(self.layers),
            "means": [plain(value) for value in self.means],
            "choices": [choice.to_json() for choice in self.choices],
            "proxy_sizes": [curve.to_json() for curve in self.proxy_sizes],
            "transfer": self.transfer.to_json() if self.transfer else None,
            "warnings": list(self.warnings),
        }
