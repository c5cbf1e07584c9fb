"""What every editor shares: the workbench it works on, and how it hands back a ``WeightDelta``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from goldenlayers.covariance import Covariance
from goldenlayers.delta import Dense, LowRank, WeightDelta
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.editors.prefixes import sample_prefixes
from goldenlayers.editors.settings import EditSettings
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact

if TYPE_CHECKING:
    from goldenlayers.editors.values import Value
    from goldenlayers.models.model import Model


@dataclass(eq=False)
class Workbench:
    """A model with what editors need beside it: key statistics, prefixes, settings.

    ``previous_keys`` (F, m) per layer are the keys of earlier batches that AlphaEdit keeps clear
    of; ``base_fingerprint`` names the untouched weights also while earlier deltas are applied.
    ``value_cache`` keeps what the value optimisation found on the untouched weights: editors that
    differ in the solve alone (ROME, R-ROME, MEMIT, EMMET, AlphaEdit) share it when they share the
    dictionary.
    """

    model: Model
    settings: EditSettings = field(default_factory=EditSettings)
    statistics: Mapping[int, Covariance] | None = None
    seed: int = 0
    on_done: Callable[[int], None] | None = None
    previous_keys: dict[int, Tensor] = field(default_factory=dict)
    value_cache: dict[tuple[Any, ...], Value] = field(default_factory=dict)

    @cached_property
    def prefixes(self) -> list[str]:
        """The empty prefix and the sampled ones: the same for every fact of this workbench."""
        s = self.settings
        return sample_prefixes(self.model, s.prefixes, s.prefix_tokens, self.seed)

    @cached_property
    def base_fingerprint(self) -> str:
        """Fingerprint of the weights as they were when the workbench was first asked."""
        return self.model.fingerprint()

    def covariance(self, layer: int) -> Covariance:
        """The key statistics of a layer.

        Raises:
            UserError: there are none for it.
        """
        if self.statistics is None or layer not in self.statistics:
            raise UserError(
                f"there are no key statistics for layer {layer}",
                fix="Collect them with key_statistics(model, [layer])",
            )
        return self.statistics[layer]

    def values(
        self, facts: Sequence[Fact], layer: int, *, with_attention: bool = False
    ) -> list[Value]:
        """:func:`optimise_values`, computed once for facts asked for again on the same weights."""
        from goldenlayers.editors.values import optimise_values

        clean = not deltas_in_force(self.model)
        keys = [(layer, with_attention, self.settings.of_values, self.seed, f) for f in facts]
        todo = [i for i, key in enumerate(keys) if not clean or key not in self.value_cache]
        already, on_done = len(facts) - len(todo), self.on_done
        computed = optimise_values(
            self.model,
            [facts[i] for i in todo],
            layer,
            self.prefixes,
            self.settings,
            with_attention=with_attention,
            on_done=None if on_done is None else lambda done: on_done(already + done),
        )
        fresh = dict(zip(todo, computed, strict=True))
        if clean:
            self.value_cache.update({keys[i]: value for i, value in fresh.items()})
        return [fresh[i] if i in fresh else self.value_cache[keys[i]] for i in range(len(facts))]

    def delta(
        self,
        changes: Mapping[str, LowRank | Dense],
        method: str,
        layers: Sequence[int],
        facts: Sequence[Fact],
        values: Sequence[Value] = (),
    ) -> WeightDelta:
        """The delta with its record: what was edited, how, and how the optimisation went."""
        rows: list[dict[str, Any]] = [
            {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target": f.target}
            for f in facts
        ]
        for row, value in zip(rows, values, strict=False):
            row |= {
                "steps": value.steps,
                "nll_before": round(value.nll_before, 6),
                "nll_after": round(value.nll_after, 6),
            }
        return WeightDelta(
            changes,
            base_fingerprint=self.base_fingerprint,
            base_name=self.model.name,
            base_dtype=str(self.model.dtype).removeprefix("torch."),
            method=method,
            layers=list(layers),
            facts=rows,
            settings=dataclasses.asdict(self.settings) | {"seed": self.seed},
        )


class Editor(Protocol):
    """An editor: facts in, ``WeightDelta`` out; the model is never changed."""

    @property
    def name(self) -> str:
        """The name it is called by."""
        ...

    @property
    def needs_statistics(self) -> bool:
        """Whether it reads the key statistics of its layers."""
        ...

    @property
    def edits_together(self) -> bool:
        """Whether it can write many facts in one solve."""
        ...

    def each(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> list[WeightDelta]:
        """One delta per fact, each made on the model as it is, all computed together."""
        ...

    def together(self, bench: Workbench, facts: Sequence[Fact], layer: int) -> WeightDelta:
        """One delta that holds all facts."""
        ...


def edited_layers(layer: int, settings: EditSettings) -> list[int]:
    """The layers a multi-layer editor writes: ``layers_before`` more, ending with ``layer``."""
    return list(range(max(0, layer - settings.layers_before), layer + 1))
