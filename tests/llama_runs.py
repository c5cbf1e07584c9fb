"""The real llama.cpp, by the wheel xllamacpp, in a process of its own: it logs, and could crash."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

_PROGRAM = """
import json, sys
import xllamacpp

job = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = job["model"]
params.n_ctx, params.n_gpu_layers, params.warmup = 256, 0, False
params.cpuparams.n_threads = 1
if job["adapter"]:
    params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(job["adapter"], 1.0)]
server = xllamacpp.Server(params)
answers = []
for prompt in job["prompts"]:
    ask = {"prompt": prompt, "n_predict": job["tokens"], "temperature": 0, "cache_prompt": False}
    answer = server.handle_completions({**ask, "n_probs": job["n_probs"]})
    choice = answer["choices"][0]
    first = choice["logprobs"]["content"][0]["top_logprobs"]
    answers.append([choice["text"], {row["id"]: row["logprob"] for row in first}])
print("ANSWERS " + json.dumps(answers))
"""


def llama(
    model: Path,
    prompts: list[Any],
    adapter: Path | None = None,
    *,
    tokens: int = 4,
    n_probs: int = 5,
) -> list[tuple[str, dict[int, float]]]:
    """Per prompt (a text or token ids) the greedy continuation, and the first token's log
    probabilities by id (the ``n_probs`` likeliest). Skips the test where there is no llama.cpp.
    """
    pytest.importorskip("xllamacpp", reason="the wheel xllamacpp brings llama.cpp")
    job = {"model": str(model), "adapter": str(adapter or ""), "prompts": prompts}
    run = subprocess.run(
        [sys.executable, "-c", _PROGRAM],
        input=json.dumps({**job, "tokens": tokens, "n_probs": n_probs}),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = [line for line in run.stdout.splitlines() if line.startswith("ANSWERS ")]
    assert lines, run.stderr[-3000:]
    found = json.loads(lines[-1].removeprefix("ANSWERS "))
    return [(text, {int(key): value for key, value in row.items()}) for text, row in found]
