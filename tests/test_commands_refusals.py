"""Bad input is one message and status 2, at once; and nothing wrong is passed over in silence."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import save, tiny
from sweep_helpers import some_facts, write_plain

from goldenlayers.cli import main
from goldenlayers.errors import UserError
from goldenlayers.locating import locate
from goldenlayers.locating.known import fill_old_answers


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a model of zeros, five facts, and six of which some are known."""
    folder = tmp_path_factory.mktemp("refusals")
    model = tiny("llama")
    save(model, folder / "model")
    own, _ = fill_old_answers(model, [dataclasses.replace(f, target_old=None) for f in FACTS])
    write_plain(folder / "facts.jsonl", FACTS)
    write_plain(folder / "some-known.jsonl", [*own[:3], *FACTS[3:]])
    with torch.no_grad():
        for block in model.layers.blocks:
            for matrix in block.matrices("block"):
                matrix.module.get_parameter("weight").zero_()
    save(model, folder / "zeros")
    (folder / "file").write_text("x")
    return folder


FACTS = some_facts(6)


Golden = Callable[..., tuple[int, str, str]]


@pytest.fixture
def golden(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Golden:
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return status, out, err

    return run


# What each command is given beside a model and facts to be right.
ON_FACTS: dict[str, tuple[str, ...]] = {
    "locate": ("MODEL", "FACTS"),
    "evaluate": ("MODEL", "FACTS"),
    "sweep": ("MODEL", "FACTS"),
    "edit": ("MODEL", "--facts", "FACTS"),
}
BAD: dict[str, list[tuple[tuple[str, ...], str]]] = {
    "every": [
        (("--seed", "-1"), "--seed is -1"),
        (("--seed", str(2**64)), "--seed is"),
        (("--limit", "0"), "--limit is 0"),
        (("--limit", str(10**12)), "--limit is"),
        (("--statistics", "PLACE/none.txt", "--method", "METHOD"), "none.txt"),
        (("--device", "cuda:99"), "cuda:99"),
        (("--device", "nonsense"), "nonsense"),
        (("--layer-paths", "hed", "x"), "hed"),
        (("--out", "PLACE/file"), "file"),
        (("--out", "PLACE/file/below"), "file"),
    ],
    "locate": [
        (("--bootstrap", str(10**12)), "--bootstrap is"),
        (("--kappa", "nan"), "--kappa is nan"),
        (("--kappa", "inf"), "--kappa is inf"),
        (("--top-k", "0"), "--top-k is 0"),
        (("--batch-size", str(10**9)), "--batch-size is"),
        (("--method", "transfer", "--scope", "attention"), "scope is for the method lga"),
        (("--method", "cma", "--loss", "answer"), "loss is for the method lga"),
        (("--method", "saliency", "--fence", "last"), "fence is for the method lga"),
        (("--method", "saliency", "--kappa", "2"), "kappa is for the method lga"),
        (("--method", "middle", "--known"), "known is for the method"),
        (("--set", "reach", "true"), "reach is for the method transfer, not lga"),
        (("--method", "transfer", "--set", "reach", "yes"), "--set reach is 'yes'"),
        (("--method", "transfer", "--set", "reech", "true"), "no option 'reech'"),
        (("--editor", "memit"), "editor is for the method race, not lga"),
        (("--budget", "3m"), "budget is for the method race, not lga"),
        (("--method", "race", "--tokens", "lookup"), "tokens is for the method lga or saliency"),
        (("--method", "race", "--budget", "3"), "the budget is '3'. Expected a time such as 90s"),
        (("--method", "race", "--set", "subject", "-1"), "weight of the subject is -1"),
        (("--verify", "2"), "Unrecognized options: --verify"),
        (("--fence", "none", "--kappa", "2"), "kappa is for the fence tukey"),
        (("--method", "race", "--editor", "roem"), "roem"),
        (("--method", "race", "--editor-set", "steps", str(10**12)), "steps is"),
        (("--method", "race", "--editor-set", "stepz", "3"), "rome has no setting 'stepz'"),
        (("--grid", "2"), "--grid"),
    ],
    "evaluate": [
        (("--batch-size", "9" * 5000), "--batch-size is"),
        (("--batch-size", "９"), "--batch-size is"),
        (("--text-tokens", "1"), "--text-tokens is 1"),
        (("--method", "roem"), "roem"),
        (("--metrics", "rewrit"), "rewrite"),
        (("--method", "ft-m", "--layer", "1_0"), "--layer is"),
        (("--method", "ft-m", "--layer", "77"), "77"),
        (("--delta", "PLACE/none"), "none"),
    ],
    "sweep": [
        (("--layers", "0-99999999999"), "--layers names layer 99999999999"),
        (("--layers", "5-3"), "--layers is"),
        (("--workers", "1000000"), "--workers is"),
        (("--chunk", "9" * 5000), "--chunk is"),
    ],
    "edit": [
        (("--method", "roem"), "roem"),
        (("--layer", "-99"), "there is no layer -99"),
        (("--layer", "9" * 30), "--layer is"),
        (("--layer", "٣"), "--layer is"),
        (("--method", "ft-m", "--layer", "1", "--set", "steps", "1000000000000"), "steps is"),
        (("--method", "ft-m", "--layer", "1", "--set", "ft_lr", "nan"), "ft_lr is nan"),
        (("--method", "ft-m", "--layer", "1", "--set", "ft_lr", "inf"), "ft_lr is inf"),
        (("--method", "ft-m", "--layer", "1", "--set", "stpes", "1"), "steps"),
        (("--preset", "nothing"), "nothing"),
    ],
}  # fmt: skip
NEEDS_NO_FACTS: list[tuple[tuple[str, ...], str]] = [
    (("ask", "MODEL", "x", "--tokens", "0"), "--tokens is 0"),
    (("ask", "MODEL", "x", "--tokens", str(10**12)), "--tokens is"),
    (("ask", "MODEL", "x", "--top", str(10**12)), "--top is"),
    (("ask", "PLACE/none", "x"), "none"),
    (("ask", "MODEL", "x", "--delta", "PLACE/none"), "none"),
    (("compare", "PLACE/none"), "none"),
    (("compare", "PLACE/none", "--seed", "-1"), "--seed is -1"),
    (("compare", "PLACE/none", "--repeats", str(10**12)), "--repeats is"),
    (("compare", "PLACE/none", "--sizes", "10", "0"), "--sizes is 0"),
    (("export", "PLACE/none", "--out", "PLACE/new"), "none"),
    (("export", "PLACE/none", "--out", "PLACE/file"), "file"),
    (("export", "PLACE/none", "--out", "PLACE/new", "--rank", "0"), "--rank is 0"),
    (("run", "PLACE/none"), "none"),
    (("run", "PLACE/file"), "file"),
    (("datasets", "PLACE/none.jsonl"), "none.jsonl"),
    (("datasets", "PLACE/facts.jsonl", "--limit", "0"), "--limit is 0"),
    (("datasets", "PLACE/facts.jsonl", "--seed", "-1"), "--seed is -1"),
    (("models", "--fetch", "nothing"), "nothing"),
    (("models", "--inspect", "PLACE/none"), "none"),
    (("models", "--clear", "nothing"), "nothing"),
]
CASES = [
    ((command, *given, *more), part)
    for command, given in ON_FACTS.items()
    for more, part in [*BAD["every"], *BAD[command]]
]


def test_bad_input_is_one_message(place: Path, tmp_path: Path, golden: Golden) -> None:
    for case, part in [*CASES, *NEEDS_NO_FACTS]:
        method = "transfer" if case[0] == "locate" else "rome"
        words = {
            "METHOD": method,
            "MODEL": str(place / "model"),
            "FACTS": str(place / "facts.jsonl"),
        }
        arguments = [str(words.get(one) or one).replace("PLACE", str(place)) for one in case]
        if case[0] == "sweep" and "--out" not in case:
            arguments += ["--out", str(tmp_path / "swept")]
        if case[0] in ("edit", "evaluate") and "--statistics" in case:
            arguments += ["--layer", "1"]
        status, out, err = golden(*arguments)
        assert status == 2, (case, status, out, err)
        last = err.splitlines()[-1]
        assert last.startswith("golden: ") and part in last and len(last) < 2500, (case, err)
    assert not (tmp_path / "swept").exists()
    assert (place / "file").read_text() == "x"


@pytest.mark.parametrize("command", ON_FACTS)
def test_files_that_are_not_there(
    place: Path, tmp_path: Path, golden: Golden, command: str
) -> None:
    for model, facts, part in (
        ("none", "facts.jsonl", "none"),
        ("facts.jsonl", "facts.jsonl", "facts.jsonl"),
        ("", "facts.jsonl", str(place)),
        ("model", "none.jsonl", "none.jsonl"),
        ("model", "file", "file"),
    ):
        where = {"MODEL": place / model, "FACTS": place / facts}
        arguments = [where.get(one, one) for one in ON_FACTS[command]]
        more = ("--out", tmp_path / "run") if command == "sweep" else ()
        status, out, err = golden(command, *arguments, *more)
        assert (status, out, len(err.splitlines())) == (2, "", 1), (arguments, err)
        assert err.startswith("golden: ") and part in err


# --- nothing wrong passes for right


@pytest.mark.parametrize("method", ["lga", "saliency"])
def test_a_model_of_zeros_has_no_golden_layer(
    place: Path, tmp_path: Path, golden: Golden, method: str
) -> None:
    command = ("locate", place / "zeros", place / "facts.jsonl", "--method", method)
    status, out, err = golden(*command, "--out", tmp_path / "r")
    assert status == 2 and out == "" and "no layer stands out" in err
    assert not (tmp_path / "r").exists()


def test_how_many_facts_took_part_is_told(place: Path, tmp_path: Path, golden: Golden) -> None:
    run = tmp_path / "run"
    command = ("locate", place / "model", place / "some-known.jsonl", "--method", "cma")
    status, out, err = golden(*command, "--bootstrap", 0, "--out", run, "--limit", 100)
    assert status == 0
    ranking = json.loads((run / "ranking.json").read_text())
    n = ranking["n_facts"]
    assert 0 < n < 6 and ranking["n_given"] == 6
    assert ranking["dropped"] == {"the model does not give the old answer": 6 - n}
    assert (
        f"{n} of 6 facts" in " ".join(out.split())
        and f"{n} of 6 facts" in (run / "ranking.svg").read_text()
    )
    assert f"Only {n} of the 6 facts could be used" in " ".join(out.split())
    assert f"Left out {6 - n} facts" in err
    assert "only 6 facts, fewer than the 100 of --limit" in err
    assert "restores 10 layers together, but the model has 4" in " ".join(out.split())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("saliency", {"fence": "nonsense"}),
        ("lga", {"fence": "tuky"}),
        ("lga", {"scope": "mpl"}),
        ("lga", {"loss": "answers"}),
        ("saliency", {"kappa": 2.0}),
        ("cma", {"scope": "attention"}),
        ("middle", {"known": True}),
        ("lga", {"reach": True}),
    ],
)
def test_the_library_refuses_options_it_would_ignore(method: str, options: Any) -> None:
    (name,) = options
    with pytest.raises(UserError, match=name):
        locate(tiny("llama"), FACTS, method, **options)
