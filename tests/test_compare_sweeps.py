"""Golden layers of other sweeps judged by a sweep: from data to data, from editor to editor."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from comparing import L, named, sweep_rows, write_run

from goldenlayers.cli import main
from goldenlayers.compare import SweepRun, compare, transfer_warnings
from goldenlayers.errors import UserError
from goldenlayers.evaluation.metrics import spearman
from goldenlayers.truth import Truth


def shifted(seed: int, by: int, prefix: str = "t", layers: int = L) -> list[dict[str, Any]]:
    """A sweep whose best layers lie ``by`` layers deeper; another prefix makes other facts."""
    rows = [{**row, "layer": row["layer"] + by} for row in sweep_rows(seed, n_layers=layers)]
    return [{**row, "fact": prefix + row["fact"][1:]} for row in rows if 0 <= row["layer"] < layers]


def test_golden_layers_of_other_sweeps_are_choices():
    truth = Truth.from_rows(sweep_rows(0))
    # One sweeps some of the layers only, and one layer that the judging sweep does not have.
    deeper = SweepRun("deep", Truth.from_rows(shifted(1, 2)), "rome", "zsre", seconds=50.0)
    other = Truth.from_rows(shifted(2, 0, "x", 9)).limited_to([1, 2, 3, 8])
    partly = SweepRun("part", other)
    found = compare(truth, sweeps=[deeper, partly], name="mine", sweep_seconds=100.0, repeats=2)
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
    # The matrix is over the layers that all of them swept.
    transfer = found.transfer
    assert transfer is not None and transfer.layers == (2, 3)
    assert transfer.names == ("mine", "deep (rome on zsre)", "part")
    truths = [truth, deeper.truth, other]
    for i, j in itertools.product(range(3), range(3)):
        table = [one.table()[:, [one.layers.index(x) for x in (2, 3)]].mean(0) for one in truths]
        assert transfer.golden[i] == (2, 3)[int(table[i].argmax())]
        lost = table[j].max() - table[j][table[i].argmax()]
        assert transfer.regret[i][j].value == pytest.approx(lost)
    assert json.loads(json.dumps(found.to_json()))["transfer"]["golden_layers"] == [
        *transfer.golden
    ]
    assert compare(truth, repeats=2).transfer is None


def test_sweeps_that_may_not_judge_each_other():
    truth = Truth.from_rows(sweep_rows(0))
    mine = SweepRun("mine", truth, data_sha256="d1", fingerprint="w1")
    same = SweepRun("same", truth, data_sha256="d1", fingerprint="w1")
    (warning,) = transfer_warnings(mine, [same], "overall")
    assert "30 of its 30 facts in common" in warning and "editors" in warning
    # The ids of another file may be the same without being the same facts.
    elsewhere = SweepRun("elsewhere", truth, data_sha256="d2", fingerprint="w1")
    assert transfer_warnings(mine, [elsewhere], "overall") == []
    with pytest.raises(UserError, match="other weights"):
        transfer_warnings(mine, [SweepRun("x", truth, fingerprint="w2")], "overall")
    with pytest.raises(UserError, match="has no 'rephrase'"):
        transfer_warnings(mine, [same], "rephrase")
    apart = SweepRun("apart", truth.limited_to([0, 1]))
    upper = SweepRun("upper", truth.limited_to([2, 3]))
    with pytest.raises(UserError, match="no layer in common"):
        transfer_warnings(apart, [upper], "overall")


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
    assert "sweep 'emmet' has 30 of its 30 facts in common" in said and "'zsre' has" not in said
    written = json.loads((out / "compare.json").read_text())
    names = [one["name"] for one in written["choices"] if one["method"] == "sweep"]
    assert names == ["golden layer of emmet", "golden layer of zsre"]
    assert written["transfer"]["names"] == [
        "mine (rome on starter)", "emmet (emmet on starter)", "zsre (rome on zsre)",
    ]  # fmt: skip
    assert main(["compare", str(mine), "--with", str(mine)]) == 2
    assert "is the sweep that judges" in capsys.readouterr().err
