"""The evaluation harness on a tiny model, with and without an edit, on a data set of our own."""

from __future__ import annotations

import json
import random
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltas import bits, random_delta, same_bits
from families import tiny
from tokenizers_built import byte_level_bpe

from goldenlayers.decoding import greedy
from goldenlayers.editors import edit
from goldenlayers.errors import UserError
from goldenlayers.facts import Fact
from goldenlayers.harness import harness_evaluate, harness_model
from goldenlayers.hooks import final_hidden, token_nll
from goldenlayers.models import Model

pytest.importorskip("lm_eval")

FACT = Fact(
    id="1",
    subject="France",
    prompt="The capital of France is",
    target="Rome",
    target_old="Paris",
)
ASKED = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "Rome"),
    ("Toko Yasuda plays the", "guitar. She is the author of the novel"),
    ("It", "is"),
]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test here may look a name up; the variables alone are read once, at import."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"the network was asked for {args[:1]}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _own_randomness() -> Any:
    # The harness seeds the global generators: other tests get theirs back.
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])


@pytest.fixture
def manager() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=False)  # the harness's own 14 thousand names take seconds


def capitals(folder: Path) -> str:
    """A multiple-choice task of two questions as a YAML file beside its data; its path."""
    rows = [
        {"q": FACT.prompt, "choices": ["Rome", "Paris"], "right": 0},
        {
            "q": "The mother tongue of Danielle Darrieux is",
            "choices": ["French", "yen"],
            "right": 0,
        },
    ]
    data = folder / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task = folder / "capitals.yaml"
    # JSON is YAML too.
    settings = {
        "task": "capitals",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{right}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    task.write_text(json.dumps(settings), "utf-8")
    return str(task)


def requests(kind: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(arguments)
    ]


def chosen(lm: Any) -> list[float]:
    """The harness's log-likelihoods of the answers in ``ASKED``."""
    asked = [(prompt, " " + answer) for prompt, answer in ASKED]
    return [value for value, _ in lm.loglikelihood(requests("loglikelihood", asked), True)]


def ours(model: Model, ids: list[int], start: int) -> float:
    """Log-likelihood of ``ids[start:]`` after what is before them, one text at a time."""
    row = torch.tensor([ids])
    hidden = final_hidden(model, row)[0, start - 1 : -1]
    return -float(token_nll(model.layers, hidden, row[0, start:]).sum())


def own_answers(model: Model) -> list[float]:
    encodings = [model.encoder.encode(prompt, answer) for prompt, answer in ASKED]
    return [ours(model, list(e.ids), e.n_prompt) for e in encodings]


def test_an_edit_raises_the_accuracy_and_leaves_no_trace(tmp_path: Path, manager: Any) -> None:
    model = tiny("llama")
    before = bits(model.hf)
    assert own_answers(model)[0] > own_answers(model)[1]  # the task's right answer is unlikely
    delta = edit(model, [FACT], "ft-m", layer=2)
    found = harness_evaluate(
        model, capitals(tmp_path), delta=delta, task_manager=manager, bootstrap_iters=0
    )
    (change,) = found.changes()
    assert (change.task, change.metric, change.filter) == ("capitals", "acc", "none")
    assert found.after is not None
    first = [result["samples"]["capitals"][0] for result in (found.before, found.after)]
    assert [sample["acc"] for sample in first] == [0.0, 1.0]
    assert change.after is not None and change.after > change.before
    # What it was judged by are our own losses under the edit.
    with delta.applied(model):
        expected = own_answers(model)[:2]
    rome, paris = (value for ((value, _),) in first[1]["resps"])
    assert [paris, rome] == pytest.approx(expected, abs=1e-4)
    assert same_bits(model.hf, before)
    again = harness_evaluate(model, capitals(tmp_path), task_manager=manager, bootstrap_iters=0)
    assert again.after is None
    assert again.before["results"] == found.before["results"]


def test_a_group_is_run_as_one(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    capitals(tmp_path)
    mean = {"metric": "acc", "aggregation": "mean", "weight_by_size": True}
    group = {"group": "places", "task": ["capitals"], "aggregate_metric_list": [mean]}
    (tmp_path / "places.yaml").write_text(json.dumps(group), "utf-8")
    manager = TaskManager(include_defaults=False, include_path=str(tmp_path))
    model = tiny("llama")
    found = harness_evaluate(model, ["places"], task_manager=manager, limit=1, num_fewshot=1)
    assert sorted(change.task for change in found.changes()) == ["capitals", "places"]
    assert {(change.before, change.after) for change in found.changes()} == {(0.0, None)}
    with pytest.raises(UserError, match=r"could not load its tasks .*capitals"):
        harness_evaluate(model, ["places", "capitals"], task_manager=manager)


@pytest.mark.parametrize(
    ("family", "tokenizer"),
    [("gpt2", "byte_level_bpe"), ("gemma3", "sentencepiece_bpe"), ("mpt", "bytes")],
)
def test_it_answers_as_we_do_in_and_out_of_an_edit(family: str, tokenizer: str) -> None:
    model = tiny(family, tokenizer)
    before = bits(model.hf)
    lm: Any = harness_model(model, batch_size=3)
    assert lm.max_length == model.encoder.max_length

    def check() -> list[float]:
        found = chosen(lm)
        assert found == pytest.approx(own_answers(model), abs=1e-4)
        text = "The capital of Italy is Rome."
        rolling = lm.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]), True)
        ids = [lm.prefix_token_id, *model.encoder.tokens(text)[0]]
        assert rolling == pytest.approx([ours(model, ids, 1)], abs=1e-4)
        prompts = [prompt for prompt, _ in ASKED[1:]]  # lengths differ: they are padded
        options = {"until": ["never to be written"], "max_gen_toks": 5}
        texts = lm.generate_until(
            requests("generate_until", [(prompt, options) for prompt in prompts]), True
        )
        rows = greedy(model, [model.encoder.tokens(prompt)[0] for prompt in prompts], 5)
        assert texts == [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return found

    plain = check()
    with random_delta(model.hf, [1, 2]).applied(model):
        edited = check()
    assert max(abs(a - b) for a, b in zip(plain, edited, strict=True)) > 0.1
    assert chosen(lm) == plain
    assert same_bits(model.hf, before)


def test_our_tokenizer_stays_as_it_is() -> None:
    model = tiny("llama")
    assert model.tokenizer.pad_token is None
    lm: Any = harness_model(model)
    assert lm.tokenizer.pad_token is not None
    assert model.tokenizer.pad_token is None
    bare = byte_level_bpe()
    bare.eos_token = bare.bos_token = None  # type: ignore[assignment]
    lm = harness_model(Model.wrap(model.hf, bare))
    assert len(lm.tokenizer) == len(bare)  # no token that the model has no embedding for
    assert lm.tokenizer.pad_token_id == 0


def test_what_cannot_work_is_refused(
    tmp_path: Path, manager: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    task = capitals(tmp_path)
    other = random_delta(tiny("llama", seed=1).hf, [1], base_fingerprint="0" * 64)

    def ask(tasks: Any = task, **options: Any) -> Any:
        return lambda: harness_evaluate(model, tasks, task_manager=manager, **options)

    broken = tmp_path / "broken.yaml"
    broken.write_text(
        Path(task).read_text("utf-8").replace("capitals.jsonl", "gone.jsonl"), "utf-8"
    )
    cases = {
        "batch_size is 0": lambda: harness_model(model, batch_size=0),
        "special token behind every text": lambda: harness_model(tiny("llama", "bytes_eos")),
        "other weights": ask(delta=other),
        "no task was given": ask([]),
        "no task 'capitols'": ask("capitols"),
        "could not load its tasks": ask(str(broken)),
        "limit is 0": ask(limit=0),
        "limit is 2.5": ask(limit=2.5),
        "from before the edit on to after it": ask(use_cache="answers"),
    }
    for message, case in cases.items():
        with pytest.raises(UserError, match=message):
            case()
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match=r"pip install 'goldenlayers\[harness\]'"):
        harness_model(model)
