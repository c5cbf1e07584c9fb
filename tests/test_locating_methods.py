"""Layer methods as objects: their options, what they refuse, and one of somebody else's."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from comparing import sweep_rows, write_run
from families import tiny
from sweep_helpers import some_facts
from test_locating_transfer import BARE, FACTS, PREFIXES, covariances

import goldenlayers as gl
from goldenlayers.cli import main, parse
from goldenlayers.comparing import LocateRun
from goldenlayers.editors.lookup_states import sample_prefixes
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating import METHODS, LayerMethod, Scoring, Work, make_method
from goldenlayers.locating.methods import recorded_method
from goldenlayers.locating.ranking import LayerRanking
from goldenlayers.progress import Progress
from goldenlayers.store import RunFolder


@dataclass(frozen=True, kw_only=True)
class Depth(LayerMethod):
    """Somebody else's method: the layer nearest to a share of the depth."""

    name: ClassVar[str] = "depth"
    axis: ClassVar[tuple[str, str]] = ("score: nearness", "layers")

    share: float = 0.4
    scope: str = "mlp"
    known: bool = False

    @property
    def scoring(self) -> Scoring:
        return Scoring(fence=None, reduce="mean", enough=1)

    def rows(self, work: Work) -> Iterator[list[dict[str, Any]]]:
        last = len(work.model.layers) - 1
        phi = [-abs(i - self.share * last) for i in range(last + 1)]
        for fact in work.facts:
            yield [{"fact": fact.id, "phi": phi}]


@pytest.fixture
def depth() -> Iterator[type[Depth]]:
    METHODS.register("depth", Depth)
    yield Depth
    METHODS.unregister("depth")


ALL = [
    gl.LGA(scope="down", loss="answer", fence="last"),
    gl.LGA(kappa=3.0, known=True, batch_size=2),
    gl.Saliency(scope="attention"),
    gl.Transfer(align=True, prefixes=("It rains. ",)),
    gl.CMA(kind="attention", window=5, samples=2),
    gl.Fixed("published"),
    gl.Fixed(-1),
]


@pytest.mark.parametrize("how", ALL, ids=lambda how: how.label)
def test_they_are_values(how: LayerMethod) -> None:
    again = pickle.loads(pickle.dumps(how))
    assert again == how and again.name == how.name and again.label == how.label
    assert {how: 1}[again] == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        how.batch_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_labels_tell_settings_apart() -> None:
    assert [how.label for how in ALL] == [
        "lga down answer", "lga mlp sequence", "saliency attention sequence", "transfer align",
        "cma kind attention window 5 samples 2", "published", "layer -1",
    ]  # fmt: skip
    assert Depth(share=0.25).label == "depth share 0.25" and gl.CMA(known=False).label == "cma"


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (gl.LGA, {"fence": "tuky"}, "unknown fence 'tuky'. Did you mean 'tukey'"),
        (gl.LGA, {"scope": "mpl"}, "unknown scope 'mpl'"),
        (gl.LGA, {"known": "yes"}, "known is 'yes'. Expected True or False"),
        (gl.LGA, {"kappa": -1.0}, "kappa is -1"),
        (gl.LGA, {"kappa": float("nan")}, "kappa is nan"),
        (gl.LGA, {"kappa": 2.0, "fence": "last"}, "kappa is for the fence tukey, not last"),
        (gl.LGA, {"batch_size": 0}, "the batch size is 0"),
        (gl.Saliency, {"loss": "answers"}, "unknown loss 'answers'"),
        (gl.Transfer, {"max_probes": 0}, "locality probes is 0"),
        (gl.Transfer, {"clamp": 0}, "the clamp is 0. Expected a number above 0"),
        (gl.CMA, {"kind": "residual"}, "unknown kind 'residual'"),
        (gl.CMA, {"window": 0}, "window of causal tracing is 0"),
        (gl.CMA, {"noise": float("inf")}, "the noise is inf"),
        (gl.CMA, {"kind": "block", "window": 5}, "window is for the kinds mlp and attention"),
        (gl.Fixed, {"layer": "midle"}, "unknown layer 'midle'. Did you mean 'middle'"),
    ],
)
def test_a_value_that_it_cannot_take_is_refused(kind: Any, options: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        kind(**options)
    assert said in str(caught.value)


def test_an_option_that_a_method_does_not_have_is_refused(depth: type[Depth]) -> None:
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("saliency", {"fence": "nonsense"}, "fence is for the method lga, not saliency"),
        ("cma", {"scope": "mlp"}, "scope is for the method lga or saliency or depth, not cma"),
        (gl.Transfer(), {"loss": "answer"}, "loss is for the method lga or saliency, not transfer"),
        ("published", {"layer": 3}, "the method published has no option 'layer'"),
        ("lga", {"scop": "mlp"}, "the method lga has no option 'scop'. Did you mean 'scope'"),
    ]
    for method, options, said in cases:
        with pytest.raises(UserError) as caught:
            gl.locate(tiny("llama"), FACTS, method, **options)
        assert said in str(caught.value)
    # The class in place of an object.
    with pytest.raises(UserError, match=r"Expected a name such as 'lga', or an object such as"):
        gl.locate(tiny("llama"), FACTS, gl.LGA)  # pyright: ignore[reportArgumentType]


def test_names_and_objects_are_one() -> None:
    assert make_method("lga", scope="down") == gl.LGA(scope="down")
    assert make_method("middle") == gl.Fixed("middle") and make_method("middle").name == "middle"
    assert make_method(gl.LGA(scope="down"), loss="answer") == gl.LGA(scope="down", loss="answer")
    model, facts = tiny("llama"), some_facts(4)

    def untimed(ranking: LayerRanking) -> LayerRanking:
        return dataclasses.replace(ranking, seconds=None, peak_memory_bytes=None)

    one = gl.locate(model, facts, "lga", scope="down", fence="none", bootstrap=5)
    same = gl.locate(model, facts, gl.LGA(scope="down", fence="none"), bootstrap=5)
    other = gl.locate(model, facts, gl.LGA(fence="none"), bootstrap=5)
    assert untimed(one) == untimed(same) != untimed(other)


def test_a_layer_can_be_named() -> None:
    model = tiny("llama")
    named: list[tuple[Any, int]] = [(3, 3), (-1, 3), (0, 0), ("middle", 2)]
    for layer, found in named:
        ranking = gl.locate(model, [], gl.Fixed(layer))
        assert ranking.golden_layer == found and ranking.candidates[0] == found
    assert gl.locate(model, [], gl.Fixed(-1)).method == "fixed"
    for wrong in (4, -5, 1.5):
        with pytest.raises(UserError, match=f"the layer is {wrong}"):
            gl.locate(model, [], gl.Fixed(wrong))  # pyright: ignore[reportArgumentType]


def test_a_transformers_model_is_refused_with_the_way_to_wrap_it() -> None:
    model = tiny("llama")
    with pytest.raises(UserError, match=r"LlamaForCausalLM.*gl\.Model\.wrap\(model, tokenizer\)"):
        gl.locate(model.hf, FACTS)  # pyright: ignore[reportArgumentType]
    wrapped = gl.Model.wrap(model.hf, model.tokenizer)
    assert gl.locate(wrapped, some_facts(4), bootstrap=0).n_facts == 4


def test_what_transfer_needs_is_collected_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = tiny("llama"), []

    def collected(one: Any, _layers: Any, *, seed: int, **_: Any) -> Any:
        assert one is model
        asked.append(seed)
        return covariances(model)

    monkeypatch.setattr("goldenlayers.statistics.key_statistics", collected)
    rows: dict[str, list[dict[str, Any]]] = {"mine": [], "given": []}
    gl.locate(model, BARE, "transfer", seed=3, progress=Progress(on_rows=rows["mine"].extend))
    assert asked == [3]
    prefixes = tuple(sample_prefixes(model, 5, 8, 3))
    assert len(prefixes) > 2
    gl.locate(
        model, BARE, gl.Transfer(prefixes=prefixes), seed=3, statistics=covariances(model),
        progress=Progress(on_rows=rows["given"].extend),
    )  # fmt: skip
    assert asked == [3] and rows["mine"] == rows["given"]
    # Nothing is sampled where every fact has a rephrasing; facts that are wrong are told first.
    monkeypatch.setattr("goldenlayers.editors.lookup_states.sample_prefixes", None)
    gl.locate(model, FACTS, "transfer", seed=4)
    with pytest.raises(UserError, match="no facts"):
        gl.locate(model, [], "transfer")
    assert asked == [3, 4]
    gl.locate(model, BARE, "transfer", prefixes=PREFIXES, statistics=covariances(model))
    gl.locate(model, FACTS, "lga")
    assert asked == [3, 4]


def test_without_a_progress_there_is_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    from contextlib import contextmanager

    bars: list[Any] = []

    @contextmanager
    def bar(what: str, unit: str) -> Iterator[Any]:
        bars.append((what, unit))
        yield lambda done, total: bars.append((done, total))

    monkeypatch.setattr("goldenlayers.locating.progress_bar", bar)
    monkeypatch.setattr("goldenlayers.statistics.progress_bar", bar)
    model = tiny("llama")
    gl.locate(model, some_facts(4), gl.LGA(batch_size=3))
    assert bars == [("locating with lga", "facts"), (0, 4), (3, 4), (4, 4)]
    bars.clear()
    gl.locate(model, some_facts(4), progress=Progress())
    assert bars == []
    gl.key_statistics(model, [0], tokens=200, length=40, cache=False)
    assert bars[0] == ("key statistics of tiny-llama, layer 0", "tokens") and bars[-1][0] >= 200


def test_flags_become_options() -> None:
    def of(*flags: str) -> LayerMethod:
        return parse(["locate", "m", *flags]).layer_method()

    assert of() == gl.LGA()
    assert of("--method", "cma") == gl.CMA() == of("--method", "cma", "--known")
    assert of("--method", "cma", "--window", "5", "--batch-size", "3") == gl.CMA(
        window=5, batch_size=3
    )
    assert of("--loss", "answer", "--fence", "none") == gl.LGA(loss="answer", fence="none")
    assert of("--kappa", "2", "--known", "--scope", "down") == gl.LGA(
        kappa=2.0, known=True, scope="down"
    )
    assert of("--method", "transfer", "--set", "reach", "true", "align", "true") == gl.Transfer(
        reach=True, align=True
    )
    # To have no fence is what methods without fences do.
    assert of("--method", "saliency", "--fence", "none") == gl.Saliency()


def test_the_command_line_refuses_options_of_other_methods(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for flags, said in (
        (
            ("--method", "transfer", "--scope", "attention"),
            "scope is for the method lga or saliency",
        ),
        (("--window", "5"), "window is for the method cma, not lga"),
        (("--method", "cma", "--window", "0"), "--window is 0"),
        (("--method", "lgs"), "unknown method 'lgs'. Did you mean 'lga'"),
        (("--method", "middle", "--known"), "known is for the method"),
    ):
        assert main(["locate", "m", *flags]) == 2
        assert said in capsys.readouterr().err


# --- somebody else's


def test_a_method_of_somebody_else_works_everywhere(
    depth: type[Depth], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny("llama")
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    facts = [
        {"id": f.id, "subject": f.subject, "prompt": f.prompt, "target_new": f.target}
        for f in some_facts(4)
    ]
    (tmp_path / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in facts))
    assert gl.locate(model, some_facts(4), "depth", share=1.0).golden_layer == 3
    assert gl.locate(model, some_facts(4), depth(share=0.0)).golden_layer == 0
    with pytest.raises(UserError, match="share is for the method depth, not lga"):
        gl.locate(model, FACTS, "lga", share=1.0)
    command = ["locate", str(tmp_path / "model"), str(tmp_path / "facts.jsonl"), "--bootstrap", "0"]
    run = tmp_path / "run"
    assert main([*command, "--method", "depth", "--scope", "down", "--out", str(run)]) == 0
    assert "depth" in capsys.readouterr().out
    folder = RunFolder.open(run)
    ranking = LayerRanking.from_json(folder.json("ranking.json"))
    assert ranking.method == "depth" and ranking.warnings == () and ranking.fence == "none"
    assert "score: nearness" in folder.file("ranking.svg").read_text("utf-8")
    assert main([*command, "--method", "depth", "--fence", "last"]) == 2
    assert "fence is for the method lga, not depth" in capsys.readouterr().err
    # It is a choice like any other.
    rows = sweep_rows(n_layers=4)
    summary = {"method": "rome", "seconds": 60.0}
    files = {"scores.jsonl": rows, "summary.json": summary}
    sweep = write_run(tmp_path, "sweep", "sweep", files, settings={"seed": 0})
    compare = ["compare", str(sweep), "--with", str(run), "--repeats", "2", "--out"]
    assert main([*compare, str(tmp_path / "a")]) == 0
    choices = RunFolder.open(tmp_path / "a").json("compare.json")["choices"]
    mine = next(one for one in choices if one["method"] == "depth")
    assert (mine["name"], mine["scope"], mine["fence"]) == ("depth scope down", "down", None)
    assert mine["layer"] == ranking.golden_layer and mine["n_proxy"] == 4
    # Where it is not installed, its runs can still be compared.
    METHODS.unregister("depth")
    assert main([*compare, str(tmp_path / "b")]) == 0
    choices = RunFolder.open(tmp_path / "b").json("compare.json")["choices"]
    assert next(one for one in choices if one["method"] == "depth")["name"] == "depth"
    assert LocateRun.read(folder).fence is None


def test_a_method_that_lacks_an_option_says_so() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Needy(LayerMethod):
        name: ClassVar[str] = "needy"
        depth: int

    METHODS.register("needy", Needy)
    try:
        with pytest.raises(UserError, match="the method needy: missing a required"):
            make_method("needy")
        with pytest.raises(NotImplementedError, match="Needy scores no facts"):
            gl.locate(tiny("llama"), some_facts(2), "needy", depth=1)
    finally:
        METHODS.unregister("needy")


def test_a_recorded_method_has_the_runs_options() -> None:
    settings = {"scope": "down", "loss": "answer", "fence": "tukey", "reach": True, "model": "m"}
    assert recorded_method("lga", settings) == gl.LGA(scope="down", loss="answer")
    assert recorded_method("transfer", settings) == gl.Transfer(reach=True)
    assert recorded_method("published", settings).fixed_layer(30) == 5
    gone = recorded_method("kta", settings)
    assert (gone.name, gone.label, gone.scoring.fence) == ("kta", "kta", None)
    fact = Fact("Rome", "Rome is", "big", id="a")
    with pytest.raises(NotImplementedError, match="kta traces no tokens"):
        gone.grids(Work(tiny("llama"), [fact]), [fact])
    damaged = LocateRun("mine", LayerRanking.fixed("lga", 4, 2), settings={"scope": "mpl"})
    with pytest.raises(UserError, match=r"run 'mine': unknown scope 'mpl'"):
        _ = damaged.label
