"""What ``--layer`` may name: a number, the published depth, a run, and auto; and the atlas."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import build
from sweep_helpers import some_facts
from tokenizers_built import TOKENIZERS

from goldenlayers import atlas, models
from goldenlayers.atlas import Entry, add_entry, read_atlas
from goldenlayers.cli import main
from goldenlayers.commands import auto_layer
from goldenlayers.datasets import load_facts, write_jsonl
from goldenlayers.delta import WeightDelta
from goldenlayers.editors import Rome
from goldenlayers.editors.finetune import FtM
from goldenlayers.errors import UserError
from goldenlayers.racing import Contest, drawn
from goldenlayers.store import RunFolder

FLAGS = ("--subject", "Italy", "--prompt", "The capital of Italy is", "--target", "Paris")
QUICK = ("--method", "ft-m", "--set", "steps", "1")
Golden = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny GPT-2 in ``model``, another in ``other``, and facts in ``facts.jsonl``."""
    folder = tmp_path_factory.mktemp("layers")
    for name, seed in (("model", 0), ("other", 1)):
        build("gpt2", seed=seed).save_pretrained(folder / name)
        TOKENIZERS["byte_level_bpe"]().save_pretrained(folder / name)
    write_jsonl(some_facts(4), folder / "facts.jsonl")
    return folder


@pytest.fixture
def golden(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Golden:
    """``golden(*arguments)``: exit status, and all that was said; a cache of its own."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("GOLDENLAYERS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(FtM, "carries_over", True)  # as other editors, which take longer

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        printed = capsys.readouterr()
        return status, " ".join((printed.err + printed.out).split())

    return run


@pytest.fixture
def raced(monkeypatch: pytest.MonkeyPatch) -> list[Contest]:
    """The races that are run, each shortened to 12 edits."""
    seen: list[Contest] = []
    real = Contest.run

    def run(self: Contest) -> Any:
        self.edits = min(self.edits, 12)
        seen.append(self)
        return real(self)

    monkeypatch.setattr(Contest, "run", run)
    return seen


def edited(run: Path) -> int:
    """The layer of an edit's delta; its record names it, too."""
    layer = WeightDelta.load(run).layers[0]
    assert RunFolder.open(run).config["settings"]["layer"] == str(layer)
    return layer


def test_auto_races_with_the_editor_once_and_keeps_the_choice(
    golden: Golden, place: Path, tmp_path: Path, raced: list[Contest]
) -> None:
    command = ("edit", place / "model", *FLAGS, *QUICK)
    status, said = golden(*command, "--out", tmp_path / "run")
    assert status == 0, said
    (race,) = raced
    assert race.editor.name == "ft-m" and vars(race.editor)["steps"] == 1
    assert "Italy" not in {fact.subject for fact in race.facts}
    chosen = edited(tmp_path / "run")
    assert "chosen once, by real edits of starter facts" in said
    assert "Racing 2 layers with ft-m: about" in said
    assert f"Layer {chosen} was chosen by" in said and "% of resamples" in said
    # The second time nothing is raced: not for these weights, this editor and this budget.
    assert golden(*command, "--out", tmp_path / "again")[0] == 0
    assert edited(tmp_path / "again") == chosen and len(raced) == 1
    repeated = golden("run", tmp_path / "run", "--out", tmp_path / "repeated")
    assert repeated[0] == 0 and edited(tmp_path / "repeated") == chosen and len(raced) == 1
    status, said = golden(*command, "--budget", "1h")
    assert status == 0 and len(raced) == 1, said
    for n, more in enumerate((("--set", "steps", "2"), ("--seed", "1"), ("--dtype", "float64")), 2):
        status, said = golden(*command, *more)
        assert status == 0 and len(raced) == n, said
    # A kept layer that was altered is not believed.
    kept = list((tmp_path / "cache").rglob("golden/*.json"))
    assert len(kept) == 4
    for path in kept:
        text = json.loads(path.read_text())
        old = f'"golden_layer": {json.loads(text["ranking"])["golden_layer"]}'
        text["ranking"] = text["ranking"].replace(old, '"golden_layer": 99')
        path.write_text(json.dumps(text))
    status, said = golden(*command, "--out", tmp_path / "third")
    assert status == 0 and "has changed since it was written" in said
    assert edited(tmp_path / "third") == chosen and len(raced) == 5


def test_fine_tuning_takes_the_published_depth_where_the_atlas_has_none(
    golden: Golden, place: Path, tmp_path: Path, raced: list[Contest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(FtM, "carries_over", False)
    status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--out", tmp_path / "run")
    assert status == 0 and edited(tmp_path / "run") == 1 and not raced
    assert "Layer 1: the published depth. By ft-m" in said


def test_a_race_that_was_stopped_is_not_kept(
    golden: Golden, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Contest._edited, list[int]()

    def stopped(self: Contest, layer: int, places: Any) -> list[float]:
        calls.append(layer)
        if len(calls) > 5:
            raise KeyboardInterrupt
        return real(self, layer, places)

    monkeypatch.setattr(Contest, "_edited", stopped)
    assert golden("edit", place / "model", *FLAGS, *QUICK, "--out", tmp_path / "run")[0] == 130
    assert not list((tmp_path / "cache").rglob("golden/*.json"))
    assert not (tmp_path / "run").exists()


def test_numbers_and_the_published_depth(golden: Golden, place: Path, tmp_path: Path) -> None:
    for text, layer in (("-1", 3), ("-4", 0), ("2", 2), ("published", 1)):
        out = tmp_path / f"run{text}"
        status, said = golden(
            "edit", place / "model", *FLAGS, *QUICK, "--layer", text, "--out", out
        )
        assert status == 0 and edited(out) == layer, said
    for wrong, words in (
        ("4", "layer 4"), ("-5", "-5"), ("soon", "--layer is 'soon'. Expected a layer number"),
        ("", "--layer is"), ("9" * 30, "--layer is"),
    ):  # fmt: skip
        status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", wrong)
        assert status == 2 and words in said, said
    status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", 1, "--budget", "3m")
    assert status == 2 and "--budget is for --layer auto" in said
    status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--budget", "soon")
    assert status == 2 and "the budget is 'soon'" in said


@pytest.fixture
def swept(golden: Golden, place: Path, tmp_path: Path) -> Path:
    out = tmp_path / "swept"
    files = (place / "model", place / "facts.jsonl")
    assert golden("sweep", *files, *QUICK, "--limit", 3, "--out", out)[0] == 0
    return out


def test_the_layer_of_a_run(golden: Golden, place: Path, tmp_path: Path, swept: Path) -> None:
    located = tmp_path / "located"
    files = (place / "model", place / "facts.jsonl")
    assert golden("locate", *files, "--bootstrap", 0, "--out", located)[0] == 0
    by_sweep = RunFolder.open(swept).json("summary.json")["golden_layer"]
    by_lga = RunFolder.open(located).json("ranking.json")["golden_layer"]
    for run, layer in ((swept, by_sweep), (located, by_lga)):
        out = tmp_path / f"by-{run.name}"
        status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", run, "--out", out)
        assert status == 0 and edited(out) == layer, said
        assert f"Layer {layer}: the golden layer of {run}" in said
    # Known by what they say: ids of other data, or none, tell nothing.
    row = json.loads((place / "facts.jsonl").read_text("utf-8").splitlines()[0])
    same = ("--subject", row["subject"], "--prompt", row["prompt"], "--target", "Ulm")
    status, said = golden("edit", place / "model", *same, *QUICK, "--layer", located)
    assert status == 0 and "1 of the facts are among those" in said, said
    (tmp_path / "new.jsonl").write_text(json.dumps(row | {"subject": "Ulm", "prompt": "Ulm is"}))
    new = ("--facts", tmp_path / "new.jsonl")
    status, said = golden("edit", place / "model", *new, *QUICK, "--layer", located)
    assert status == 0 and "are among those" not in said, said
    for name in ("x" * 300, "~nobody-at-all/x", "a\0b"):
        status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", name)
        assert status == 2 and "--layer is '" in said, said
    other = (*FLAGS, "--statistics", "none", "--method", "rome", "--layer", swept)
    status, said = golden("edit", place / "model", *other)
    assert status == 0 and "chose the layer for ft-m, and rome edits" in said, said
    judge = ("evaluate", *files, *QUICK, "--layer", located)
    status, said = golden(*judge, "--limit", 2, "--out", tmp_path / "judged")
    assert status == 0 and "2 of the facts are among those" in said, said
    assert RunFolder.open(tmp_path / "judged").config["settings"]["layer"] == str(by_lga)
    status, said = golden("edit", place / "other", *FLAGS, *QUICK, "--layer", swept)
    assert status == 2 and "was made on other weights" in said
    status, said = golden("edit", place / "model", *FLAGS, *QUICK, "--layer", tmp_path / "judged")
    assert status == 2 and "golden locate or golden sweep" in said


def test_a_judged_layer_is_chosen_on_other_facts_and_gone_on_with(
    golden: Golden,
    place: Path,
    tmp_path: Path,
    raced: list[Contest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("evaluate", place / "model", "starter", "--limit", 3, *QUICK, "--out")
    with monkeypatch.context() as patch:

        def killed(*_: Any, **__: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr("goldenlayers.evaluation.evaluate", killed)
        assert golden(*command, tmp_path / "run")[0] == 130
    status, said = golden(*command, tmp_path / "run")  # the layer is known by now
    assert status == 0 and len(raced) == 1, said
    judged = {fact.subject for fact in load_facts("starter", limit=3)}
    assert not judged & {fact.subject for fact in raced[0].facts}
    # Facts that no race would use change nothing: the choice that is kept serves.
    used = {fact.id for fact in drawn(load_facts("starter"))}
    other = next(fact for fact in load_facts("starter") if fact.id not in used)
    assert drawn(auto_layer._proxy([other])) == drawn(load_facts("starter"))
    layer = RunFolder.open(tmp_path / "run").config["settings"]["layer"]
    assert layer in "0123"


def test_too_few_facts_to_choose_with(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = load_facts("starter")
    with pytest.raises(UserError, match="only 0 starter facts are left"):
        auto_layer._proxy(list(facts))


# --- the atlas


def an_entry(**more: Any) -> Entry:
    known: dict[str, Any] = {
        "model": "m", "fingerprint": "f", "n_layers": 4, "editor": "ft-m", "kind": "facts",
        "settings": {"steps": 1}, "data_sha256": "d", "n_facts": 40, "layer": 2,
        "overall": (60.0, 50.0, 70.0), "lead": (3.0, 1.0, 5.0), "wins": 0.8,
        "layers": (0, 1, 2, 3), "leads": (-5.0, 0.0, 3.0, 2.0), "errors": (1.0, 0.0, 1.0, 1.0),
        "command": "golden sweep m facts",
    }  # fmt: skip
    return Entry(**known | more)


@pytest.fixture
def entries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An atlas in place of the package's own."""
    monkeypatch.setattr(atlas, "ATLAS", tmp_path / "atlas.json")
    return tmp_path / "atlas.json"


def test_auto_takes_what_the_atlas_knows(
    golden: Golden, place: Path, tmp_path: Path, entries: Path, raced: list[Contest]
) -> None:
    model = models.load(str(place / "model"))
    mine = an_entry(fingerprint=model.fingerprint())
    for one in (
        mine,
        dataclasses.replace(mine, kind="others", n_facts=25),
        dataclasses.replace(mine, kind="few", layer=0, n_facts=5),
        dataclasses.replace(mine, settings={"ft_lr": 0.5}, layer=1, n_facts=90),
        dataclasses.replace(mine, fingerprint="another", layer=1),
    ):
        add_entry(entries, one)
    command = ("edit", place / "model", *FLAGS, *QUICK, "--out", tmp_path / "run")
    status, said = golden(*command)
    assert status == 0 and edited(tmp_path / "run") == 2 and not raced
    assert "Layer 2: measured for ft-m on these weights with facts of facts and of others" in said
    assert "+3.0 points (+1.6 to +4.4) from the published depth, behind it with none" in said
    editor = Rome()
    assert atlas.found_for(model, editor) is None
    ft_m = auto_layer_editor()
    found = atlas.found_for(model, ft_m, sha256="d")
    assert found is None  # all of these data
    status, said = golden("models", "--inspect", place / "model")
    assert status == 0 and "Golden layers in the atlas" in said and "60.0 (50.0 to 70.0)" in said
    assert "golden sweep m facts" in said and "ft-m steps 1" in said
    assert "--layer auto takes layer 2 for ft-m." in said
    status, said = golden("models", "--inspect", place / "other")
    assert status == 0 and "The atlas has no golden layer of these weights" in said


def auto_layer_editor() -> Any:
    from goldenlayers.editors import FtM

    return FtM(steps=7)  # how long is searched makes no other entry


def test_a_lead_that_may_be_luck_leaves_the_published_depth() -> None:
    sure, unsure = an_entry(), an_entry(errors=(1.0, 0.0, 2.0, 1.0))
    assert atlas.Known((sure,)).advised == 2 and atlas.Known((unsure,)).advised == 1
    said = atlas.Known((unsure,)).sentence()
    assert "layer 2 is +3.0 points (-0.9 to +6.9) from it, too little to leave it" in said
    home = atlas.Known((an_entry(layer=1, lead=(0.0, 0.0, 0.0), leads=(-1.0, 0.0, -2.0, -3.0)),))
    assert home.advised == 1 and home.best[1].value == 0 and "no layer is better" in home.sentence()


def test_kinds_of_facts_together() -> None:
    mine = an_entry(leads=(-5.0, 0.0, 9.0, 4.0), errors=(1.0, 0.0, 3.0, 1.5))
    other = an_entry(kind="others", leads=(-5.0, 0.0, -1.0, 2.0), errors=(1.0, 0.0, 3.0, 2.0))
    both = atlas.Known((mine, other))  # layer 2 is ahead in the mean, but behind with the others
    layer, lead = both.best
    assert (layer, lead.value, lead.n) == (3, 3.0, 80) and both.advised == 3
    assert lead.high - lead.value == pytest.approx(1.96 * math.hypot(1.5, 2.0) / 2)
    assert "with facts of facts and of others, +3.0 points (+0.5 to +5.5)" in both.sentence()
    apart = an_entry(kind="others", leads=(-5.0, 0.0, -1.0, -2.0))
    none = atlas.Known((mine, apart))
    assert none.advised == 1 and "golden locate --method race finds yours" in none.sentence()
    # Layers that were not swept for all kinds are not compared.
    few = an_entry(kind="few", layers=(1, 2), leads=(0.0, 3.0), errors=(0.0, 1.0))
    assert atlas.Known((mine, few)).best[0] == 2 and atlas.Known((other, few)).advised == 1


def test_a_sweep_becomes_an_entry(golden: Golden, place: Path, tmp_path: Path, swept: Path) -> None:
    path = tmp_path / "new.json"
    status, said = golden("compare", swept, "--atlas", path)
    assert status == 0 and f"{path}: layer" in said, said
    (found,) = read_atlas(path)
    summary = RunFolder.open(swept).json("summary.json")
    assert found.layer == summary["golden_layer"] and found.n_facts == 3
    assert found.settings == {"steps": 1} and found.editor == "ft-m" and found.n_layers == 4
    assert found.fingerprint == models.load(str(place / "model")).fingerprint()
    place_of = summary["layers"].index(found.layer)
    assert found.overall[0] == pytest.approx(
        summary["metrics"]["overall"]["mean"][place_of], abs=0.01
    )
    truth = RunFolder.open(swept).json("summary.json")["metrics"]["overall"]["mean"]
    assert found.layers == (0, 1, 2, 3) and found.leads[1] == 0 == found.errors[1]
    assert found.leads == pytest.approx([mean - truth[1] for mean in truth], abs=0.01)
    words = "golden sweep model facts.jsonl --limit 3 --method ft-m --set steps 1"
    assert sorted(found.command.split()) == sorted(words.split())
    assert str(place) not in path.read_text()
    assert golden("compare", swept, "--atlas", path)[0] == 0 and len(read_atlas(path)) == 1


def test_a_damaged_atlas_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "atlas.json"
    good = dataclasses.asdict(an_entry())
    for record, words in (
        ([], "is no atlas"),
        ({"schema": 2, "entries": []}, "is no atlas"),
        ({"schema": 1, "entries": [good | {"layer": 9}]}, "layer 9 of 4"),
        ({"schema": 1, "entries": [good | {"overall": [1]}]}, "'overall' is"),
        ({"schema": 1, "entries": [good | {"leads": [1.0]}]}, "are not as many"),
        ({"schema": 1, "entries": [good, good]}, "entry 1 repeats"),
        ({"schema": 1, "entries": [3]}, "there is no 'model'"),
    ):
        path.write_text(json.dumps(record))
        with pytest.raises(UserError, match=words):
            read_atlas(path)


def test_the_atlas_of_the_package_is_whole() -> None:
    for one in read_atlas():
        assert one.command.startswith("golden sweep ") and one.n_facts >= 10
