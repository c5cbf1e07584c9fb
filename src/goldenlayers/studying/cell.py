"""One model on one data set: its runs, what of them is finished, and the work on the others."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from goldenlayers.comparing import LocateRun, SweepRun, compare, overlap_warnings
from goldenlayers.comparing.rules import REPEATS, SIZES
from goldenlayers.datasets import FactSet
from goldenlayers.datasets import absolute_name as absolute_data
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating import Fixed, LayerMethod
from goldenlayers.locating.methods import FLAGS
from goldenlayers.models import absolute_name as absolute_model
from goldenlayers.models.cache import sha256_file
from goldenlayers.records import entry
from goldenlayers.shown import say
from goldenlayers.statistics.documents import absolute_name as absolute_text
from goldenlayers.store import RunFolder
from goldenlayers.studying.file import Study, StudyData, StudyEditor, StudyModel
from goldenlayers.studying.folders import COMPARE, SUMMARY, Place, ids_digest
from goldenlayers.truth import OVERALL

OTHERS = 300
"""Facts outside the judged ones that worked examples and unrelated prompts are drawn from."""


class TimeUp(UserError):  # noqa: N818 - no error: what is finished is kept
    """The minutes of a study are over."""


@dataclass(eq=False)
class Cell:
    """A model on a data set.

    Attributes:
        study: what it is of.
        model, data: of the study.
        source: all facts of the data set.
        folder: where its runs stand.
        inputs: hashes of what all runs read beside the facts.
        cache_dir: of key statistics.
        failed: what failed in this call, by run, with the error.
    """

    study: Study
    model: StudyModel
    data: StudyData
    source: FactSet
    folder: Path
    inputs: dict[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None
    failed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Draw the facts: the test facts as ``--limit`` draws them, the proxy facts apart from them
        and from their subjects.

        Raises:
            UserError: no proxy facts are left.
        """
        study = self.study
        n_test, n_proxy = study.counts(self.model, self.data)
        self.test = self.source.sample(n_test, study.seed)
        rest = self.source.without([f.id for f in self.test], [f.subject for f in self.test])
        if study.methods and not rest:
            raise UserError(
                f"{self.data.name} has {len(self.source)} facts: {len(self.test)} test facts leave "
                "none about other subjects to choose a layer with",
                fix="Ask for fewer test facts, or leave out the methods",
            )
        self.proxy = rest.sample(n_proxy, study.seed)
        common = {
            "model": absolute_model(self.model.source),
            "data": absolute_data(self.data.source),
            "seed": study.seed,
            "skip_invalid": True,
            "joint": "auto",
            "dtype": study.dtype,
            "statistics": absolute_text(study.statistics),
            **({"chat": True} if self.chat else {}),
        }
        judged = common | {"limit": n_test, "metrics": list(study.metrics), "preset": None}
        self.places: dict[str, Place] = {}
        for one in study.editors:
            own = judged | {"method": one.method, "set": dict(one.settings)}
            if one.sweeps:
                own |= {"known": False, "apart_from": []}
            else:
                own |= {"delta": None, "mode": "single", "layer": "auto"}
            command = "sweep" if one.sweeps else "evaluate"
            self._add(one.name, command, own, self.inputs)
        apart = {"apart_from": ids_digest(f.id for f in self.test)}
        for one in study.methods:
            flags = {name: value for name, value in one.options.items() if name in FLAGS}
            own = common | {"limit": n_proxy, "method": one.called, **flags}
            own["set"] = {n: str(value) for n, value in one.options.items() if n not in FLAGS}
            own["apart_from"] = [str(self.folder / study.editors[0].name)]
            self._add(f"locate/{one.name}", "locate", own, self.inputs | apart)

    def _add(
        self, run: str, command: str, settings: dict[str, Any], inputs: dict[str, str]
    ) -> None:
        sha256 = self.source.sha256
        self.places[run] = Place(self.folder / run, command, settings, sha256, inputs)

    # --- what is there

    @property
    def name(self) -> str:
        """The cell in words."""
        return f"{self.model.name}/{self.data.name}"

    @property
    def chat(self) -> bool:
        """Whether prompts are asked by the model's chat template."""
        return self.study.chat if self.model.chat is None else self.model.chat

    def finished(self) -> dict[str, RunFolder]:
        """The finished runs by name.

        Raises:
            UserError: one of them has other settings than the study.
        """
        found = {run: place.finished() for run, place in self.places.items()}
        there = {run: folder for run, folder in found.items() if folder is not None}
        for folder in there.values():
            if folder.kind == "sweep":
                depth = entry(folder.json(SUMMARY), "n_layers", int, folder.file(SUMMARY))
                swept = (folder.config.get("settings") or {}).get("layers")
                if swept != (wanted := self.layers_text(depth)):
                    raise UserError(
                        f"{folder.path} holds a finished sweep of other layers: {swept}, and the "
                        f"study asks for {wanted}",
                        fix="Take the study's old layers, or choose another --out",
                    )
        return there

    def todo(self, only: str = "") -> list[str]:
        """The runs that are not finished, of those with ``only`` in their names."""
        there = self.finished()
        return [run for run in self.places if run not in there and only in f"{self.name}/{run}"]

    def layers(self, n_layers: int) -> dict[str, int]:
        """The layers to sweep, by their words."""
        return layers_named(self.model.layers or self.study.layers, n_layers)

    @property
    def all_layers(self) -> bool:
        """Whether layers are swept to find the best, and not some that are named."""
        first = (self.model.layers or self.study.layers)[0]
        return first == "all" or first.startswith("every ")

    def layers_text(self, n_layers: int) -> str:
        """The layers as ``golden sweep --layers`` takes them."""
        found = sorted(set(self.layers(n_layers).values()))
        return "all" if len(found) == n_layers else ",".join(map(str, found))

    @property
    def editors(self) -> tuple[str, ...]:
        """The runs that judge editors."""
        return tuple(one.name for one in self.study.editors)

    @property
    def methods(self) -> dict[str, LayerMethod]:
        """The runs that choose layers, and by which method."""
        return {f"locate/{one.name}": one.method for one in self.study.methods}

    def editor(self, run: str) -> StudyEditor:
        """The editor of a run."""
        return next(one for one in self.study.editors if one.name == run)

    def compare(self) -> None:
        """Judge the choices by every sweep; what is judged already is not judged again.

        Without methods, and where no layer is looked for, there is nothing to judge.
        """
        there = self.finished()
        located = {run: one for run, one in there.items() if one.kind == "locate"}
        judges = {run: one for run, one in there.items() if one.kind == "sweep"}
        for run, folder in judges.items() if located or self.all_layers else ():
            files = [one.config.get("files") for one in (folder, *located.values())]
            place = Place(
                self.folder / "compare" / run,
                "compare",
                {
                    "sweep": str(folder.path),
                    "with_": [str(one.path) for one in located.values()],
                    "metric": OVERALL,
                    "sizes": list(SIZES),
                    "repeats": REPEATS,
                    "seed": self.study.seed,
                },
                inputs={"runs": ids_digest(str(sorted((one or {}).items())) for one in files)},
            )
            try:
                if place.finished() is not None:
                    continue
            except UserError:  # of fewer choices: it takes a second
                pass
            with self.noting(f"compare/{run}"):
                judge = SweepRun.read(folder)
                runs = [LocateRun.read(one) for one in located.values()]
                warnings = overlap_warnings(runs, judge)
                metric = judge.truth.leading or OVERALL
                found = compare(judge, runs, metric=metric, seed=self.study.seed)
                found = dataclasses.replace(found, warnings=(*warnings, *found.warnings))
                by = dataclasses.replace(place, settings={**place.settings, "metric": metric})
                with by.open(resume=False, overwrite=True) as target:
                    target.write_json(COMPARE, found.to_json() | {"sweep": judge.to_json()})
                    target.finish()

    def place_with(self, run: str, extra: Mapping[str, Any]) -> Place:
        """A run's place with settings that only the model tells."""
        place = self.places[run]
        return dataclasses.replace(place, settings={**place.settings, **extra})

    def recorded_joints(self) -> dict[str, str]:
        """What the model decided about joints in earlier runs of the cell."""
        found: dict[str, str] = {}
        for place in self.places.values():
            try:
                config = RunFolder.open(place.path, part=True).config
            except UserError:
                continue
            joints = (config.get("settings") or {}).get("joints")
            found |= joints if isinstance(joints, dict) else {}
        return found

    @contextlib.contextmanager
    def noting(self, run: str) -> Iterator[None]:
        """Within it an error is noted, and the study goes on; but not where the time is over."""
        try:
            yield
        except TimeUp:
            raise
        except Exception as error:
            self.fail(run, error)

    def fail(self, run: str, error: BaseException, folder: RunFolder | None = None) -> None:
        """Note that a run failed, say it, and log it in its folder if that is open."""
        self.failed[run] = f"{error}" if isinstance(error, UserError) else repr(error)
        say(f"  {self.name}/{run} failed: {self.failed[run]}")
        if folder is not None and folder.writable:
            expected = isinstance(error, UserError)
            folder.log(f"failed: {error}", error=None if expected else error)


def others_of(source: FactSet, facts: Sequence[Fact], limit: int, seed: int) -> list[Fact] | None:
    """Facts of the same data outside the judged ones; None if there are hardly any.

    ``facts`` are a sample of ``limit`` drawn with ``seed``; the others come from a larger one.
    """
    drawn = source.sample(limit + OTHERS, seed)
    free = list(drawn.without([fact.id for fact in facts], [fact.subject for fact in facts]))
    return free if len(free) >= 20 else None


def cells_of(
    study: Study, sources: Mapping[str, FactSet], out: Path, **more: Any
) -> Iterator[Cell]:
    """The cells of a study, models and data sets in their order."""
    text = Path(study.statistics)
    inputs = {"statistics": sha256_file(text)} if text.is_file() else {}
    for model in study.models:
        for data in study.data_of(model):
            folder = out / model.name / data.name
            yield Cell(study, model, data, sources[data.name], folder, inputs, **more)


def layers_named(words: Sequence[str], n_layers: int) -> dict[str, int]:
    """Layers by the words they are named with; of words for one layer the first stands.

    A share of the depth is rounded as "published" is: L layers times the share, to the next whole
    number, the last layer at most.

    Raises:
        UserError: a number that the model has no layer of.
    """
    if words[0] == "all" or words[0].startswith("every "):
        step = 1 if words[0] == "all" else int(words[0].removeprefix("every "))
        return {str(layer): layer for layer in range(0, n_layers, step)}
    found: dict[str, int] = {}
    for word in words:
        if "/" in word:
            above, below = map(int, word.split("/"))
            layer = min(n_layers - 1, round(above / below * n_layers))
        else:
            named: Any = word if word in ("published", "middle") else int(word)
            layer = Fixed(named).fixed_layer(n_layers)
        if layer not in found.values():
            found[word] = layer
    return found
