"""Golden layers of other sweeps judged by a sweep: from data to data, from editor to editor."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from comparing import L, named, sweep_rows, write_run

from goldenlayers.cli import main
from goldenlayers.comparing import SweepRun, compare, transfer_warnings
from goldenlayers.errors import UserError
from goldenlayers.evaluation.bootstrap import spearman
from goldenlayers.truth import Truth


def shifted(seed: int, by: int, prefix: str = "t", layers: int = L) -> list[dict[str, Any]]:
    """A sweep whose best layers lie ``by`` layers deeper; another prefix makes other facts."""
    rows = [{**row, "layer": row["layer"] + by} for row in sweep_rows(seed, n_layers=layers)]
    return [{**row, "fact": prefix + row["fact"][1:]} for row in rows if 0 <= row["layer"] < layers]


def limited_to(truth: Truth, layers: list[int]) -> Truth:
    """The truth among some of the layers only."""
    kept = [truth.layers.index(layer) for layer in layers]
    tables = {name: table[:, kept] for name, table in truth.scores.items()}
    return dataclasses.replace(truth, layers=tuple(layers), scores=tables)


def test_golden_layers_of_other_sweeps_are_choices():
    truth = Truth.from_rows(sweep_rows(0))
    # One sweeps some of the layers only, and one layer that the judging sweep does not have.
    deeper = SweepRun("deep", Truth.from_rows(shifted(1, 2)), "rome", "zsre", seconds=50.0)
    other = limited_to(Truth.from_rows(shifted(2, 0, "x", 9)), [1, 2, 3, 8])
    partly = SweepRun("part", other)
    found = compare(SweepRun("mine", truth, seconds=100.0), [deeper, partly], repeats=2)
    choices = named(found)
    means = truth.means().tolist()
    for run in (deeper, partly):
        one = choices[f"golden layer of {run.run}"]
        own = dict(zip(run.truth.layers, run.truth.means().tolist(), strict=True))
        assert one.layer == max(own, key=lambda layer: own[layer])
        assert one.score == pytest.approx(means[one.layer])
        assert one.regret.value == pytest.approx(max(means) - means[one.layer])
        common = sorted(set(own) & set(range(L)))
        expected = spearman([own[i] for i in common], [means[i] for i in common])
        assert one.spearman == pytest.approx(expected)
        assert one.n_proxy == 30 and one.run == run.run
    assert choices["golden layer of deep"].speed_up == 2.0
    assert choices["golden layer of part"].seconds is None
    # Each sweep's own golden layer is judged by each sweep that has it.
    transfer = found.transfer
    assert transfer is not None
    assert transfer.names == ("mine", "deep (rome on zsre)", "part")
    truths = [truth, deeper.truth, other]
    assert transfer.golden == tuple(one.golden_layer() for one in truths)
    for i, j in itertools.product(range(3), range(3)):
        judge, layer = truths[j], transfer.golden[i]
        lost = transfer.regret[i][j].value
        if layer in judge.layers:
            own = dict(zip(judge.layers, judge.means().tolist(), strict=True))
            assert lost == pytest.approx(max(own.values()) - own[layer])
        else:
            assert math.isnan(lost)
    assert math.isnan(transfer.regret[1][2].value)  # "part" was not swept there
    assert json.loads(json.dumps(found.to_json()))["transfer"]["golden_layers"] == [
        *transfer.golden
    ]
    assert compare(SweepRun("mine", truth), repeats=2).transfer is None


def test_sweeps_of_one_name_are_told_apart():
    truth = Truth.from_rows(sweep_rows(0))
    pair = [SweepRun("sweep", Truth.from_rows(shifted(i, i)), "rome", f"d{i}") for i in (1, 2)]
    choices = named(compare(SweepRun("mine", truth), pair, repeats=2))
    assert {"golden layer of sweep (rome on d1)", "golden layer of sweep (rome on d2)"} <= {
        *choices
    }


def test_what_the_reader_has_to_know_of_other_sweeps():
    truth = Truth.from_rows(sweep_rows(0))
    mine = SweepRun("mine", truth, "rome", data_sha256="d1", fingerprint="w1")

    def said(**other: Any) -> list[str]:
        one: dict[str, Any] = {"run": "one", "truth": truth, "data_sha256": "d1"}
        return transfer_warnings(mine, [SweepRun(**(one | other))], "overall")

    (editors,) = said(editor="emmet")
    assert "30 of its 30 facts in common" in editors and "compares the editors" in editors
    for more in ({"editor": "rome"}, {}):
        (same,) = said(**more)
        assert "too good" in same and "editors" not in same
    (elsewhere,) = said(data_sha256="d2")
    assert "in other data" in elsewhere
    assert said(truth=Truth.from_rows(shifted(1, 1, "x"))) == []
    few = [row for row in shifted(1, 1, "x") if row["metric"] == "rewrite"]
    (overall,) = said(truth=Truth.from_rows(few))
    assert "mean of rewrite in sweep 'one', but of rewrite, locality in 'mine'" in overall
    with pytest.raises(UserError, match="other weights"):
        said(fingerprint="w2")
    (older,) = said(fingerprint="w2-1", truth=Truth.from_rows(shifted(1, 1, "x")))
    assert "older version" in older
    with pytest.raises(UserError, match="has no 'rephrase'"):
        transfer_warnings(mine, [mine], "rephrase")
    apart = SweepRun("apart", limited_to(truth, [0, 1]))
    upper = SweepRun("upper", limited_to(truth, [2, 3]))
    with pytest.raises(UserError, match="no layer in common"):
        transfer_warnings(apart, [upper], "overall")
    # One that is judged need not have a layer in common with another that is.
    assert transfer_warnings(mine, [apart, upper], "overall")
    assert compare(mine, [apart, upper], repeats=2).transfer is not None


def test_sweeps_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    def swept(name: str, rows: list[dict[str, Any]], method: str, data: str) -> Path:
        return write_run(
            tmp_path, name, "sweep",
            {"scores.jsonl": rows, "summary.json": {"method": method, "seconds": 60.0}},
            settings={"seed": 0}, model={"name": "tiny", "fingerprint": "w1"},
            data={"name": data, "sha256": data},
        )  # fmt: skip

    mine = swept("mine", sweep_rows(0), "rome", "starter")
    emmet = swept("emmet", shifted(1, 1), "emmet", "starter")
    zsre = swept("zsre", shifted(2, 2, "z"), "rome", "zsre")
    out = tmp_path / "compared"
    command = ["compare", str(mine), "--with", str(emmet), str(zsre), "--repeats", "2"]
    assert main([*command, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    for words in ("Regret of each sweep's golden layer", "C: zsre (rome on zsre)"):
        assert words in shown.out
    said = " ".join(shown.err.split())
    assert "sweep 'emmet (emmet on starter)' has 30 of its 30 facts in common" in said
    assert "sweep 'zsre" not in said
    written = json.loads((out / "compare.json").read_text())
    names = [one["name"] for one in written["choices"] if one["method"] == "sweep"]
    assert names == ["golden layer of emmet", "golden layer of zsre"]
    assert written["transfer"]["names"] == [
        "mine (rome on starter)", "emmet (emmet on starter)", "zsre (rome on zsre)",
    ]  # fmt: skip
    assert main(["compare", str(mine), "--with", str(mine)]) == 2
    assert "is the sweep that judges" in capsys.readouterr().err
