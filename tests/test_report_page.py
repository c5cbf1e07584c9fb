"""``golden report``: one page that asks for nothing, of runs that may come from anyone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_runs import EVIL, choice, every, sweep

from goldenlayers.cli import main
from goldenlayers.errors import UserError
from goldenlayers.report import page


class Seen(HTMLParser):
    """The tags of a page with their attributes, and its texts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, name: str) -> int:
        return sum(tag == name for tag, _ in self.tags)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return every(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def text(runs: list[Path]) -> str:
    return page.html_of(page.build(page.find(runs)), f"title {EVIL}")


def test_it_says_which_layer_how_sure_and_what_another_costs(text: str) -> None:
    seen = Seen(text).text
    assert "Layer 2 of 6" in seen and "Layer 4 of 6" in seen
    assert "How sure?" in seen and "of resamples" in seen
    assert "a layer drawn at random costs" in seen and "the published depth" in seen
    assert "With rome on" in seen  # the choice is held to the sweep of the same weights
    assert "damaging" in seen and "Noise floor" in seen and "m/" in seen


def test_texts_of_runs_are_never_markup(text: str) -> None:
    seen = Seen(text)
    assert "window.evil" in text  # the control: they are there
    assert EVIL in seen.text  # as text
    assert "<script>window" not in text and "<img" not in text
    assert seen.count("script") == 3 and seen.count("img") == 0
    assert seen.count("b") == 0 and "{{7*7}}" in seen.text and "onerror" in seen.text
    for tag, given in seen.tags:
        assert not [name for name in given if name.startswith("on")], (tag, given)
        assert not given.get("src") and (given.get("href") or "#").startswith("#")
    figures = re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)
    assert figures
    drawn = json.loads(figures[1])
    raw = json.dumps(drawn)
    # Plotly reads a little HTML: there, too, they are text.
    assert "<script" not in raw and "<img" not in raw and "&lt;script" in raw


def test_it_allows_its_own_scripts_alone(text: str) -> None:
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert "default-src 'none'" in policy and policy.count("'sha256-") == 2
    assert "unsafe-eval" not in policy and "http" not in policy
    scripts = policy.split("script-src")[1]
    assert "unsafe-inline" not in scripts


def test_every_figure_is_one_that_plotly_knows(runs: list[Path]) -> None:
    from plotly.graph_objects import Figure

    made = page.build(page.find(runs))
    charts = [part for s in made.sections for part in s.parts if isinstance(part, page.Chart)]
    assert len(charts) >= 14

    def plain(value: Any) -> Any:
        if isinstance(value, str):
            return "#123456" if value.startswith("var(--") else value
        if isinstance(value, list):
            return [plain(one) for one in value]
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else value

    for chart in charts:
        assert chart.said and chart.table.rows, chart.title
        for one in chart.views.values():
            assert Figure(plain(one)).data
    with pytest.raises(ValueError):  # the control: it refuses what it does not know
        Figure({"data": [{"type": "bar", "colour": "red"}]})


def test_a_folder_stands_for_the_runs_below_it(tmp_path: Path) -> None:
    sweep(tmp_path / "study" / "m" / "d", "rome")
    choice(tmp_path / "study" / "m" / "d" / "locate", "lga")
    (tmp_path / "study" / "m" / "d" / "memit.part").mkdir()
    (tmp_path / "study" / "m" / "d" / "memit.part" / "config.yaml").write_text("command: sweep")
    found = page.find([tmp_path / "study", tmp_path / "study" / "m" / "d" / "rome"])
    assert [one.kind for one in found.folders] == ["locate", "sweep"]
    with pytest.raises(UserError, match="no finished run"):
        (tmp_path / "none").mkdir()
        page.find([tmp_path / "none"])
    with pytest.raises(UserError, match="there is no"):
        page.find([tmp_path / "nothing"])


def test_a_damaged_run_is_left_out_with_a_word(tmp_path: Path) -> None:
    good, bad = sweep(tmp_path, "good"), sweep(tmp_path, "bad")
    file = bad / "scores.jsonl"
    file.write_text(file.read_text().replace('"score": 8', '"score": 9', 1))
    seen = Seen(page.html_of(page.build(page.find([good, bad])))).text
    assert "Left out" in seen and "scores.jsonl" in seen
    with pytest.raises(UserError, match="nothing could be read"):
        page.find([bad])


@pytest.mark.parametrize("wrong", [None, [], {}, "text", 1e300, [{"age": 1}], {"a": {"b": []}}])
def test_odd_records_end_in_a_sentence(tmp_path: Path, wrong: Any) -> None:
    from comparing import write_run

    for command, name, keys in (
        ("compare", "compare.json", ("choices", "sweep", "metric")),
        ("evaluate", "summary.json", ("metrics", "overall", "retention", "layer")),
        ("study", "summary.json", ("means", "choices", "metrics", "left", "failed")),
        ("edit", "delta.json", ("facts", "layers", "method")),
    ):
        for key in keys:
            files = {name: {"metrics": {}, "facts": [], "choices": [], "sweep": {}, key: wrong}}
            run = write_run(tmp_path, f"{command}-{key}", command, files, settings={"x": wrong})
            found = page.find([run])
            made = page.build(found)
            assert page.html_of(made)
            assert all(why for _, why in made.left_out)


def test_the_command(tmp_path: Path, runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    call = ["report", *map(str, runs), "--out", str(out)]
    assert main([*call, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["out"] == str(out) and len(found["runs"]) == len(runs) and not found["left_out"]
    first = out.read_bytes()
    assert main(call) == 2 and "--overwrite" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0 and out.read_bytes() == first
    out.write_text("<html>mine</html>")
    assert main([*call, "--overwrite"]) == 2 and "no report" in capsys.readouterr().err
    assert out.read_text() == "<html>mine</html>"
    assert main([*call[:-1], str(tmp_path / "page.txt")]) == 2
    assert "NAME.html" in capsys.readouterr().err
