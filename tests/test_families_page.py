"""docs/families.md: a few of its rows, tried anew; layers without an MLP take no part."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers_built import TOKENIZERS

import goldenlayers as gl
from goldenlayers.choosing import usual_layers
from goldenlayers.editors.routing import layer_statistics
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.locating.building import RankingBuilder
from goldenlayers.locating.race import Race
from goldenlayers.models import Model
from goldenlayers.sweeping import sweep
from goldenlayers.tokens import TooLongError

ROOT = Path(__file__).resolve().parents[1]
# An ordinary one, experts beside state spaces, layers without an MLP, a shared expert outside the
# experts' module, layers that hand on more than their state, refused ones.
SAMPLE = ("llama", "jamba", "nemotron_h", "granitemoeshared", "zaya", "jetmoe", "mamba")


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("families_tool", ROOT / "tools/families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["families_tool"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kind", SAMPLE)
def test_rows_of_the_page_are_what_comes(tool: Any, kind: str) -> None:
    page = (ROOT / "docs/families.md").read_text(encoding="utf-8")
    if f"transformers {transformers.__version__}," not in page:
        pytest.skip("the page is of another transformers")
    one = tool.tried(kind)
    assert one.verdict in ("works", "refused"), one
    (row,) = (line for line in page.splitlines() if line.startswith(f"| {kind} |"))
    assert row in tool.page([one])


@pytest.fixture(scope="module")
def hybrid(tool: Any) -> Model:
    """Layers 0 and 2 mix tokens and do nothing else; 1 has experts, 3 an ordinary MLP."""
    config = tool.shrunk("nemotron_h")
    config.vocab_size = 320
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    tool.randomise(hf)
    return Model.wrap(hf, TOKENIZERS["byte_level_bpe"](), "hybrid")


FACTS = [
    Fact("France", "The capital of France is", "Rome", "Paris", id="a"),
    Fact("Italy", "The capital of Italy is", "Ulm", "Rome", id="b"),
]


def test_layers_without_an_mlp_are_told_and_left_out(hybrid: Model) -> None:
    assert "layers without an MLP, neither ranked nor edited: 0, 2" in hybrid.layers.describe()
    ranking = gl.locate(hybrid, FACTS, bootstrap=20)
    assert [one.score is None for one in ranking.layers] == [True, False, True, False]
    assert ranking.golden_layer in (1, 3)
    assert set(ranking.candidates) <= {1, 3}
    assert any("Layers 0, 2 take no part" in text for text in ranking.warnings)
    with pytest.raises(UserError, match=r"layer 2 .* has no MLP, so nothing can be edited there"):
        gl.edit(hybrid, FACTS[0], "rome", layer=2)
    fixed = gl.locate(hybrid, FACTS, "middle")  # layer 2, which has none
    assert fixed.golden_layer == 1


def test_what_edits_goes_round_layers_without_an_mlp(hybrid: Model) -> None:
    assert set(layer_statistics(hybrid)) == {1, 3}
    found = sweep(hybrid, FACTS, "rome", steps=2, prefixes=1)
    assert {row["layer"] for row in found.rows} == {1, 3}
    assert usual_layers(hybrid) == [1, 3]  # of 0 to 3
    raced = gl.locate(hybrid, FACTS, Race(edits=4, editor="rome"), bootstrap=0)
    assert raced.golden_layer in (1, 3)
    assert {i for i, one in enumerate(raced.layers) if one.score is not None} <= {1, 3}


def test_positions_that_are_counted_from_behind_the_padding_are_no_context(tool: Any) -> None:
    config = tool.shrunk("camembert")
    config.vocab_size, config.pad_token_id = 320, 1
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = Model.wrap(hf, TOKENIZERS["byte_level_bpe"](), "camembert")
    longest = config.max_position_embeddings - 2
    assert len(model.encoder.verbatim("ë" * (longest // 2))) == longest
    with torch.no_grad():
        hf(input_ids=torch.full((1, longest), 7))
    with pytest.raises(TooLongError):
        model.encoder.verbatim("ë" * (longest // 2 + 1))


def test_a_ranking_without_some_layers_is_that_of_the_others() -> None:
    rows = [{"fact": str(i), "phi": [9.0, 1.0 + i, 7.0, 2.0, 3.0 * i]} for i in range(4)]
    some = [{**row, "phi": [row["phi"][i] for i in (1, 3, 4)]} for row in rows]
    left = RankingBuilder("lga", 5, bootstrap=50, without=(0, 2)).update(rows).result()
    plain = RankingBuilder("lga", 3, bootstrap=50).update(some).result()
    assert left.golden_layer == (1, 3, 4)[plain.golden_layer]
    assert left.fences == plain.fences
    assert [left.layers[i].wins for i in (1, 3, 4)] == [one.wins for one in plain.layers]
    assert left.layers[0].score is None
    assert not left.layers[2].kept
