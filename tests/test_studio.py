"""``golden studio`` without its page: the workbench, its line, and who is let through."""

from __future__ import annotations

import asyncio
import io
import socket
import sys
import threading
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, tiny
from tokenizers_built import chatting

from goldenlayers import Fact, Model, UserError, WeightDelta
from goldenlayers.checking import Check
from goldenlayers.cli import main
from goldenlayers.delta.apply import deltas_in_force
from goldenlayers.studio import Session, Workbench, drawn, make_fact, workbench
from goldenlayers.studio.serving import LARGEST, Guard, refuse_missing
from goldenlayers.studio.workbench import EDITS, SESSIONS

FACT = make_fact("France", "The capital of {} is", "Rome")


def bench_of(name: str = "gpt2") -> Workbench:
    return Workbench(tiny(name), statistics="none")


@pytest.fixture(scope="module")
def edited() -> tuple[Session, bytes]:
    """A session with one checked edit, and the weights of its model before."""
    bench = bench_of("llama")
    before = weights(bench)
    session = bench.session("a" * 32)
    made = session.edit(FACT, "rome", 1)
    session.check(made.number)
    return session, before


def weights(bench: Workbench) -> bytes:
    state = bench.model.hf.state_dict()
    return b"".join(value.cpu().numpy().tobytes() for value in state.values())


def test_an_edit_is_made_asked_switched_undone_and_the_model_stays(
    edited: tuple[Session, bytes],
) -> None:
    session, before = edited
    (made,) = session.edits
    assert (made.method, made.layer, made.on) == ("rome", 1, True)
    assert (
        isinstance(made.check, Check) and made.check.probes[0].prompt == "The capital of France is"
    )
    plain, changed = session.ask("The capital of France is")
    assert changed is not None and plain.next != changed.next and len(plain.next) == 5
    assert sum(p for _, p in changed.next) <= 1 + 1e-4
    with made.delta.applied(session.bench.model):  # the slow way
        ids = torch.tensor([session.bench.model.encoder.verbatim("The capital of France is").ids])
        chances = session.bench.model.hf(ids).logits[0, -1].softmax(-1)
    assert changed.next[0][1] == pytest.approx(float(chances.max()), rel=1e-4)
    session.switch(made.number, False)
    assert session.ask("The capital of France is") == (plain, None)
    session.switch(made.number, True)
    again = session.edit(FACT, "rome", 1, strength=0.5)
    assert not made.on and again.on and "Edit 1 answers the same prompt" in again.notes[-1]
    for name, change in again.delta.changes.items():  # of the same values, half as strong
        assert torch.allclose(change.dense, 0.5 * made.delta.changes[name].dense, rtol=1e-5)
    session.undo(again.number)
    session.switch(made.number, True)
    assert [one.number for one in session.edits] == [made.number]
    with pytest.raises(UserError, match="no edit 2 here"):
        session.undo(again.number)
    assert session.edit(FACT, "rome", 1).number == 3  # a number is never given twice
    session.undo(3)
    session.switch(made.number, True)
    assert weights(session.bench) == before and not deltas_in_force(session.bench.model)


def test_an_edit_is_downloaded_as_it_is_used_elsewhere(
    edited: tuple[Session, bytes], tmp_path: Path
) -> None:
    session, _ = edited
    made = session.edits[0]
    files: dict[str, list[str]] = {}
    for kind in ("delta", "peft"):
        name, content = session.download(made.number, kind)
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            archive.extractall(tmp_path / name)
            files[name] = sorted(one.rpartition("/")[2] for one in archive.namelist())
    assert files["golden-edit-1.zip"] == ["README.md", "check.json", "delta.json",
                                          "delta.safetensors"]  # fmt: skip
    adapter = {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert adapter <= set(files["golden-edit-1-peft.zip"])
    loaded = WeightDelta.load(tmp_path / "golden-edit-1.zip" / "golden-edit-1")
    assert all(torch.equal(loaded.dense(n), made.delta.dense(n)) for n in made.delta.changes)
    assert Check.load(tmp_path / "golden-edit-1.zip" / "golden-edit-1") == made.check
    card = (tmp_path / "golden-edit-1-peft.zip/golden-edit-1/README.md").read_text("utf-8")
    assert "checked when it was made" in card
    name, content = session.download(None, "gguf")
    assert name == "golden-edits.gguf" and content[:4] == b"GGUF"
    session.switch(made.number, False)
    with pytest.raises(UserError, match="no edit is switched on"):
        session.download(None, "delta")
    session.switch(made.number, True)
    with pytest.raises(UserError, match="no kind of file"):
        session.download(made.number, "../../etc")


def test_what_is_typed_wrongly_is_told_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = bench_of()
    session = bench.session("k")
    for typed, said in (
        (("", "The capital of {} is", "Rome"), "the subject is empty"),
        (("France", "x" * 2000, "Rome"), "the prompt has 2,000 characters"),
        (("France", "The capital of Spain is", "Rome"), "is not in the prompt"),
        (("France", "The capital of {} is", "Rome" * 100), "the new answer has 400"),
    ):
        with pytest.raises(UserError, match=said):
            make_fact(*typed)
    wrong: list[tuple[tuple[Any, ...], str]] = [
        ((FACT, "rome", 99), "there is no layer 99"),
        ((FACT, "roam", 1), "unknown editor 'roam'"),
        ((FACT, "rome", 1, float("nan")), "the strength is nan"),
        ((FACT, "rome", 1, 1e9), "the strength is"),
        ((Fact("a", "a" * 900, "b"), "rome", 1), "tokens"),
    ]
    for arguments, said in wrong:
        with pytest.raises(UserError, match=said):
            session.edit(*arguments)
    with pytest.raises(UserError, match="the prompt is empty"):
        session.ask(" ")
    assert not session.edits and not bench._line
    known = lambda _, rows: [list(row.answer_ids) for row in rows]  # noqa: E731
    monkeypatch.setattr("goldenlayers.decoding.forced_predictions", known)
    with pytest.raises(UserError, match="with 'Rome' already"):
        session.edit(FACT, "rome", 1)
    session.edits += [None] * EDITS  # type: ignore[list-item]
    with pytest.raises(UserError, match="Undo one of them first"):
        session.edit(FACT)


def test_layers_are_scored_for_one_fact_and_advised_without_one() -> None:
    bench = bench_of("gemma3")
    ranking = bench.session("k").layers(FACT)
    assert len(ranking.layers) == 4 and ranking.n_facts == 1
    html = drawn.layers(ranking)
    assert html.count("<li") == 4 and html.count('class="golden') == 1
    assert f"layer {ranking.golden_layer}</strong>" in html
    assert bench.advised("rome") == (1, "the depth of published settings")


def test_one_call_at_a_time_has_the_model_the_others_wait_in_their_order() -> None:
    bench = bench_of()
    inside: list[str] = []
    told: dict[str, list[str]] = {name: [] for name in "abc"}
    most = 0

    def work(name: str) -> None:
        nonlocal most
        with bench.turn(told[name].append):
            inside.append(name)
            most = max(most, len(inside) - done.count(True))
            time.sleep(0.05)
            done.append(True)

    done: list[bool] = []
    threads = []
    for name in "abc":
        threads.append(threading.Thread(target=work, args=(name,)))
        threads[-1].start()
        while not told[name]:  # it stands in the line now
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert inside == ["a", "b", "c"] and most == 1
    assert told["a"] == ["Beginning"]
    assert told["c"][0] in ("Waiting for the model: 2 before you",
                            "Waiting for the model: 1 before you")  # fmt: skip
    with pytest.raises(ZeroDivisionError), bench.turn(len):
        _ = 1 / 0
    assert not bench._line  # a call that fails gives the model back
    bench._line += [object()] * 20
    with pytest.raises(UserError, match="wait for the model already"), bench.turn(len):
        pass


def test_tabs_have_lists_of_their_own_and_the_oldest_are_forgotten() -> None:
    bench = bench_of()
    first = bench.session("first")
    assert bench.session("first") is first and bench.session("second") is not first
    with pytest.raises(UserError, match="still loading"):
        bench.session("")
    for i in range(SESSIONS):
        bench.session(f"more {i}")
    assert bench.session("first") is not first and len(bench._sessions) == SESSIONS


def test_nothing_typed_becomes_html() -> None:
    bad = "<img src=x onerror=alert(1)>\u202e\x1b[2J"
    assert "<img" not in drawn.text(bad) and "\u202e" not in drawn.text(bad)
    for shown in (drawn.strip(bad, "wrong"), drawn.quiet(bad), drawn.links(bad, bad)):
        assert "<img" not in shown
    answer = bench_of().session("k").ask(bad[:28])[0]
    shown = drawn.answers(bad, answer._replace(text=bad, next=((bad, 0.5),)), answer, 1)
    assert "<img" not in shown and "&lt;img" in shown


# --- who is let through


def asked(host: str = "127.0.0.1", **request: Any) -> int:
    """The status of a request to a page that listens at ``host``; 200 where it came through."""
    headers = {"host": "127.0.0.1:7860"} | {
        name.replace("_", "-"): value for name, value in request.pop("headers", {}).items()
    }
    scope = {"type": "http", "method": "GET", "path": "/"} | request
    scope["headers"] = [(n.encode(), v.encode()) for n, v in headers.items()]
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        message = await receive()
        await send({"type": "http.response.start", "headers": [],
                    "status": 200 if message["type"] == "http.request" else 413})  # fmt: skip

    async def receive() -> Any:
        return {"type": "http.request", "body": b"x" * request.get("size", 1)}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(Guard(app, host)(scope, receive, send))
    assert sent[0]["status"] != 200 or b"content-security-policy" in dict(sent[0]["headers"])
    return sent[0]["status"]


JOIN = {"method": "POST", "path": "/gradio_api/queue/join"}


@pytest.mark.parametrize(
    ("status", "request_"),
    [
        (200, {}),
        (200, {"headers": {"host": "localhost:7860"}}),
        (200, {"headers": {"host": "[::1]:7860"}}),
        (200, {"headers": {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}}),
        (200, {**JOIN, "headers": {"origin": "http://127.0.0.1:7860"}}),
        (200, {"path": f"/download/{'a' * 32}/1/peft"}),
        (200, {"host": "0.0.0.0", "headers": {"host": "192.168.1.5:7860"}}),
        (200, {"host": "lab", "headers": {"host": "lab:7860"}}),
        # DNS rebinding, other sites, and what the page does not need.
        (421, {"headers": {"host": "evil.example:7860"}}),
        (421, {"headers": {"host": "192.168.1.5:7860"}}),
        (421, {"host": "0.0.0.0", "headers": {"host": "evil.example"}}),
        (421, {"headers": {"host": "127.0.0.1.evil.example"}}),
        (421, {"headers": {"host": "evil@127.0.0.1"}}),
        (421, {"headers": {"host": ""}}),
        (403, {**JOIN, "headers": {"origin": "http://evil.example"}}),
        (403, {**JOIN, "headers": {"origin": "null"}}),
        (403, {**JOIN, "headers": {"origin": "http://127.0.0.1:8000"}}),
        (403, {**JOIN, "headers": {"sec_fetch_site": "cross-site", "sec_fetch_mode": "navigate"}}),
        (403, {"path": "/config", "headers": {"sec_fetch_site": "same-site"}}),
        (404, {"path": "/gradio_api/upload", "method": "POST"}),
        (404, {"path": "/gradio_api/file=/etc/passwd"}),
        (404, {"path": "/gradio_api/proxy=http://example.com"}),
        (404, {"path": f"/download/{'a' * 32}/../../x/delta"}),
        (404, {"method": "DELETE"}),
        (413, {**JOIN, "headers": {"content_length": str(LARGEST + 1)}}),
        (413, {**JOIN, "size": LARGEST + 1}),
        (400, {**JOIN, "headers": {"content_length": "-1"}}),
    ],
)
def test_only_the_pages_own_tab_is_let_through(status: int, request_: dict[str, Any]) -> None:
    assert asked(**request_) == status


# --- the command


def test_the_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["studio", "nowhere"]) == 2
    assert "pip install 'goldenlayers[studio]'" in capsys.readouterr().err
    with pytest.raises(UserError):
        refuse_missing()


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("goldenlayers.studio.serving.refuse_missing", lambda: None)
    monkeypatch.setattr("goldenlayers.models.load", None)  # cannot be called
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["studio", "any", "--port", f"{taken.getsockname()[1]}"]) == 2
    assert "cannot be served at 127.0.0.1, port" in capsys.readouterr().err
    assert main(["studio", "any", "--host", "no.such.host.invalid", "--port", "7861"]) == 2
    assert "Give another --host or --port" in capsys.readouterr().err


def test_in_a_chat_all_is_asked_so_and_the_atlas_says_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Model.wrap(build("llama"), chatting(), chat=True)
    bench = Workbench(model, statistics="none")
    monkeypatch.setattr("goldenlayers.atlas.known_of", None)  # cannot be called
    assert bench.advised("rome") == (1, "the depth of published settings")
    session = bench.session("k")
    made = session.edit(FACT, "rome", strength=0.5)
    assert made.delta.in_chat
    rows: list[Any] = []
    real = workbench.answers
    monkeypatch.setattr(workbench, "answers", lambda m, r, *n: rows.extend(r) or real(m, r, *n))
    session.ask(FACT.prompt)
    text: Any = model.tokenizer.apply_chat_template(
        [{"role": "user", "content": FACT.prompt}], add_generation_prompt=True, return_dict=True
    )
    assert [list(row) for row in rows] == [text["input_ids"]] * 2
