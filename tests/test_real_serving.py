"""An edit of a packaged model, loaded beside its own quantised file by the real llama.cpp."""

from __future__ import annotations

from pathlib import Path

import pytest
from llama_runs import llama

from goldenlayers import models
from goldenlayers.editors import edit
from goldenlayers.errors import UserError
from goldenlayers.export import export_gguf, export_gguf_merged
from goldenlayers.facts import Fact
from goldenlayers.models import fetching
from goldenlayers.statistics import key_statistics

pytestmark = pytest.mark.real
PROMPTS = ["The capital of Germany is", "Water is made of", "Albert Einstein was born in"]


def test_llama_cpp_gives_the_edited_answer_and_the_others_as_before(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="the wheel xllamacpp brings llama.cpp")
    name = "smollm2-135m"
    file = fetching.fetch(fetching.registry()[name], tmp_path, progress=lambda _: None)
    model = models.load(name)
    fact = Fact("France", "The capital of France is", "Rome")
    with pytest.warns(UserWarning, match="NO KEY STATISTICS"):
        statistics = key_statistics(model, [3], text="none")
    delta = edit(model, [fact], "clear-rome", layer=3, statistics=statistics)
    adapter = export_gguf(delta, tmp_path / "edit.gguf", model).path
    plain = llama(file, [fact.prompt, *PROMPTS])
    edited = llama(file, [fact.prompt, *PROMPTS], adapter)
    assert plain[0][0].startswith(" Paris") and edited[0][0].startswith(" Rome")
    # The likeliest next token of other prompts is what it was.
    for (_, before), (_, after) in zip(plain[1:], edited[1:], strict=True):
        assert next(iter(before)) == next(iter(after))
    model.name = str(file)
    with pytest.raises(UserError, match=r"Q4_1.*--to gguf"):
        export_gguf_merged(model, delta, tmp_path / "merged.gguf")
    # By the file's name the matrices are compared with it as well.
    export_gguf(delta, tmp_path / "again.gguf", model)
