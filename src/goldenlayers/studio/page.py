"""The page itself: Gradio's fields and buttons, and which call of a session each of them makes."""

from __future__ import annotations

import asyncio
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.themes import Base, Color

from goldenlayers.errors import UserError
from goldenlayers.progress import in_words
from goldenlayers.shown import warn
from goldenlayers.studio import drawn
from goldenlayers.studio.workbench import LONGEST, STRONGEST, Tell, make_fact, methods

if TYPE_CHECKING:
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.studio.workbench import Session, Workbench

_EVERY = 0.2  # seconds between two looks at how far a call is
# The name of the tab, kept by the browser until the tab is closed: a page that is loaded anew has
# its edits again. `randomUUID` is not there on pages of plain http from another machine.
_KEY = """() => {
  let key = sessionStorage.getItem("goldenlayers");
  if (!/^[0-9a-f]{32}$/.test(key || "")) {
    const bytes = crypto.getRandomValues(new Uint8Array(16));
    key = Array.from(bytes, b => b.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("goldenlayers", key);
  }
  return key;
}"""
_GOLD = dict(zip(
    ("c50", "c100", "c200", "c300", "c400", "c500", "c600", "c700", "c800", "c900", "c950"),
    ("#fdf9ef", "#f9efd6", "#f1dda9", "#e6c777", "#d9ae4b", "#c9962f", "#a97b22", "#85601c",
     "#634818", "#453213", "#2b1f0c"),
    strict=True,
))  # fmt: skip


def mounted(app: Any, bench: Workbench) -> Any:
    """``app`` with the page of a workbench on it."""
    style = (files("goldenlayers.studio") / "style.css").read_text("utf-8")
    # Gradio sets its own style sheet's rules, and ours, inside this box.
    box = "<style>.gradio-container .main.main { padding: 0 !important; }</style>"
    blocks = page(bench)
    whole = gr.mount_gradio_app(
        app, blocks, "/", css=style, head=box, theme=_theme(), footer_links=[],
        run_history=False, show_error=False, ssr_mode=False, mcp_server=False, pwa=False,
        enable_monitoring=False,
    )  # fmt: skip
    blocks._queue.pending_event_ids_session = _Awaited()
    return whole


class _Awaited(dict[str, set[str]]):
    """The calls whose results a tab awaits, by tabs; never none.

    Gradio ends the stream of a tab's results when none is awaited, and the next call opens another.
    A call that is made in the moment before the tab hears of the end gets no answer, or loses the
    new stream with the old one. So the stream stays open as long as its tab.
    """

    def __setitem__(self, tab: str, calls: set[str]) -> None:
        super().__setitem__(tab, calls | {"none"})


def _theme() -> Any:
    """Warm and plain, with the system's own letters: nothing is fetched from elsewhere."""
    sans = ["ui-sans-serif", "system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif"]
    theme = Base(
        primary_hue=Color(**_GOLD), neutral_hue="stone", font=sans,
        font_mono=["ui-monospace", "Consolas", "monospace"], radius_size="lg",
    )  # fmt: skip
    return theme.set(
        body_background_fill="#f7f5f1",
        body_background_fill_dark="#161412",
        body_text_color_subdued="#6b645b",
        body_text_color_subdued_dark="#aca59b",
        block_background_fill="#fffefb",
        block_background_fill_dark="#201d1a",
        background_fill_secondary="#f6f3ec",
        background_fill_secondary_dark="#2a2622",
        border_color_primary="#e6e1d6",
        border_color_primary_dark="#3a352f",
        block_border_width="0px",
        block_padding="0px",
        button_large_text_size="0.95rem",
        button_large_text_weight="600",
        button_large_padding="9px 16px",
        button_small_text_size="0.85rem",
        button_secondary_background_fill="#ece8df",
        button_secondary_background_fill_hover="#e2dccf",
        button_secondary_background_fill_dark="#38332d",
        button_secondary_background_fill_hover_dark="#453f38",
        block_shadow="none",
        block_label_text_size="0.85rem",
        input_background_fill="#ffffff",
        input_background_fill_dark="#1a1715",
        input_border_width="1px",
        input_border_color_focus="*primary_500",
        input_border_color_focus_dark="*primary_500",
        input_shadow_focus="none",
        input_shadow_focus_dark="none",
        button_primary_background_fill="#85601c",
        button_primary_background_fill_hover="#6f4f15",
        button_primary_background_fill_dark="#c9962f",
        button_primary_background_fill_hover_dark="#d9ae4b",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#1b1509",
    )


class _Call:
    """A call of a session, in a thread of its own, that tells how far it is."""

    def __init__(self, work: Callable[[Tell], Any]) -> None:
        self.stage, self.found, self.error = "", None, ""
        self._start = time.monotonic()
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Callable[[Tell], Any]) -> None:
        try:
            self.found = work(lambda stage: setattr(self, "stage", stage))
        except UserError as error:
            self.error = str(error)
        except Exception as error:  # told where the studio was started, in full
            import traceback

            self.error = (
                f"A defect of the studio ({type(error).__name__}): please report what the terminal "
                "shows."
            )
            for line in traceback.format_exc().splitlines():
                warn(line)

    def busy(self) -> str:
        """The line on what happens now."""
        spent = time.monotonic() - self._start
        return drawn.strip(f"{self.stage or 'Beginning'} · {in_words(spent)}", "busy")


async def followed(work: Callable[[Tell], Any]) -> AsyncIterator[tuple[str, Any]]:
    """Lines on how far a call is; at last its result, or the line that says why there is none."""
    call, told = _Call(work), ""
    while call.thread.is_alive():
        if (line := call.busy()) != told:
            told = line
            yield line, None
        await asyncio.sleep(_EVERY)
    yield (drawn.strip(call.error, "wrong"), None) if call.error else ("", call.found)


def page(bench: Workbench) -> Any:
    """The page of a workbench."""
    n_layers = len(bench.model.layers)

    def choices(method: str, ranking: LayerRanking | None = None) -> list[tuple[str, str]]:
        layer, _ = bench.advised(method)
        golden = ranking and ranking.golden_layer
        numbers = [(f"{i}: golden of this fact" if i == golden else f"{i}", f"{i}")
                   for i in range(n_layers)]  # fmt: skip
        return [(f"advised: {layer}", "auto"), *numbers]

    def why(method: str) -> str:
        return f"Layer {(found := bench.advised(method))[0]}: {found[1]}"

    default = methods()[0]
    with gr.Blocks(title="golden studio", analytics_enabled=False) as blocks:
        key, turn = gr.State(""), gr.State(0)
        sent = gr.Textbox(visible=False)
        gr.HTML(
            "<h1>golden <span>studio</span></h1><p>"
            f"{drawn.text(bench.model.name)} · {n_layers} layers"
            f"{' · asked by its chat template' * bench.model.chat} · the model itself is never "
            "changed</p>",
            elem_id="top",
        )
        with gr.Row(elem_id="columns"):
            with gr.Column(scale=5, min_width=300):
                with gr.Column(elem_classes="card"):
                    gr.HTML("<h2>The fact</h2>")
                    subject = _field("Subject", "subject", "France")
                    prompt = _field("Prompt", "prompt", "The capital of {} is", "{} is the subject")
                    target = _field("New answer", "new answer", "Rome")
                    look = gr.Button("Score the layers", elem_id="look")
                    scores = gr.HTML(elem_id="scores")
                with gr.Column(elem_classes="card"):
                    gr.HTML("<h2>The edit</h2>")
                    with gr.Row():
                        method = gr.Dropdown(
                            list(methods()), value=default, label="Editor", elem_id="method",
                            min_width=130,
                        )  # fmt: skip
                        layer = gr.Dropdown(
                            choices(default), value="auto", label="Layer", elem_id="layer",
                            min_width=130,
                        )  # fmt: skip
                    reason = gr.HTML(drawn.quiet(why(default)))
                    strength = gr.Slider(
                        0.1, STRONGEST, 1.0, step=0.1, label="Strength", elem_id="strength",
                        info="1 is the change as the editor makes it",
                    )  # fmt: skip
                    make = gr.Button("Make the edit", variant="primary", elem_id="make")
                    state = gr.HTML(elem_id="state")
            with gr.Column(scale=7, min_width=300):
                with gr.Column(elem_classes="card"):
                    gr.HTML("<h2>Ask both models</h2>")
                    with gr.Row(equal_height=True):
                        question = gr.Textbox(
                            show_label=False, elem_id="question", scale=5,
                            placeholder="The capital of France is", max_length=LONGEST["prompt"],
                            min_width=180,
                        )  # fmt: skip
                        ask = gr.Button("Ask", elem_id="ask", scale=1, min_width=80)
                    answered = gr.HTML(
                        drawn.quiet("What the model says as it is, and with the edits."),
                        elem_id="answers",
                    )
                with gr.Column(elem_classes="card", elem_id="edits"):
                    gr.HTML("<h2>Edits of this tab</h2>")
                    checked = gr.HTML(
                        drawn.quiet(
                            "After an edit: rephrasings and the nearest neighbours, before and "
                            "after."
                        ),
                        elem_id="checked",
                        render=False,
                    )

                    @gr.render(inputs=[key], triggers=[turn.change])
                    def _edits(tab: str) -> None:
                        _list(bench.session(tab), tab, turn, checked, state)

                with gr.Column(elem_classes="card"):
                    gr.HTML("<h2>What moved</h2>")
                    checked.render()

        async def on_look(tab: str, *typed: str) -> Any:
            def work(tell: Tell) -> LayerRanking:
                return bench.session(tab).layers(make_fact(*typed[:3]), tell)

            async for line, found in followed(work):
                if found is None:
                    yield line, gr.skip()
                else:
                    yield drawn.layers(found), gr.update(choices=choices(typed[3], found))

        async def on_make(
            tab: str, subject: str, prompt: str, target: str, method: str, layer: str,
            strength: float, asked: str,
        ) -> Any:  # fmt: skip
            skip = gr.skip()

            def work(tell: Tell) -> Any:
                number = None if layer == "auto" else int(layer)
                fact = make_fact(subject, prompt, target)
                return bench.session(tab).edit(fact, method, number, strength, tell)

            made = None
            async for line, made in followed(work):
                if made is None:
                    yield line, skip, skip, skip
            if made is None:
                return
            told = " ".join((f"Edit {made.number} is made, at layer {made.layer}.", *made.notes))
            yield drawn.strip(told, "busy"), _anew(), asked.strip() or made.fact.prompt, skip

            def checking(tell: Tell) -> Any:
                return bench.session(tab).check(made.number, tell)

            async for line, found in followed(checking):
                if found is not None:
                    yield drawn.strip(told, "done"), _anew(), skip, drawn.check(found, made)
                else:
                    yield line or drawn.strip(told, "done"), skip, skip, skip

        async def on_ask(tab: str, question: str) -> Any:
            def work(tell: Tell) -> str:
                session = bench.session(tab)
                n_on = sum(one.on for one in session.edits)
                return drawn.answers(question, *session.ask(question, tell), n_on)

            async for line, found in followed(work):
                yield found or line

        fact = [subject, prompt, target]
        results = [state, turn, question, checked]
        _on(look.click, on_look, [key, *fact, method], [scores, layer])
        _on(make.click, on_make, [key, *fact, method, layer, strength, question], results)
        _on(gr.on, on_ask, [key, question], [answered], triggers=[ask.click, question.submit])
        _on(
            method.input,
            lambda name: (gr.update(choices=choices(name), value="auto"), drawn.quiet(why(name))),
            [method],
            [layer, reason],
        )
        _on(blocks.load, _opened, [sent], [key, turn], js=_KEY)
    blocks.queue(default_concurrency_limit=16, max_size=100, api_open=False)
    return blocks


def _anew() -> int:
    """A number that was not there before: the list of edits is drawn again."""
    return time.monotonic_ns()


def _opened(sent: str) -> tuple[str, int]:
    """The name of a tab that was opened, or loaded anew."""
    return (sent if re.fullmatch("[0-9a-f]{32}", sent or "") else secrets.token_hex(16)), _anew()


def _on(event: Any, call: Callable[..., Any], inputs: Any, outputs: Any, **more: Any) -> None:
    """A call on an event, without a name in an API and without Gradio's own progress."""
    event(
        fn=call, inputs=inputs, outputs=outputs, show_progress="hidden", api_visibility="private",
        **more,
    )  # fmt: skip


def _field(label: str, name: str, example: str, info: str | None = None) -> Any:
    return gr.Textbox(
        label=label, placeholder=example, info=info, max_length=LONGEST[name],
        elem_id=name.replace(" ", "-"), lines=1,
    )  # fmt: skip


def _list(session: Session, tab: str, turn: Any, checked: Any, state: Any) -> None:
    """The list of a session's edits."""
    if not session.edits:
        gr.HTML(drawn.quiet("None yet. They stay when the page is loaded anew, until the tab or "
                            "the studio is closed."))  # fmt: skip
        return
    for one in session.edits:
        with gr.Row(elem_classes="edit", key=f"row-{one.number}"):
            with gr.Column(min_width=220, scale=6):
                box = gr.Checkbox(
                    value=one.on, label=drawn.title(one), container=False, interactive=True,
                    elem_id=f"on-{one.number}",
                )  # fmt: skip
                gr.HTML(drawn.about(one, tab))
            look = gr.Button("Check", size="sm", elem_id=f"check-{one.number}")
            undo = gr.Button("Undo", size="sm", elem_id=f"undo-{one.number}")

        def on_switch(on: bool, number: int = one.number) -> Any:
            return _quick(lambda: session.switch(number, on))

        def on_undo(number: int = one.number) -> Any:
            return _quick(lambda: session.undo(number))

        async def on_check(number: int = one.number) -> Any:
            async for line, found in followed(lambda tell: session.check(number, tell)):
                if found is None:
                    yield line, gr.skip(), gr.skip()
                else:
                    yield "", drawn.check(found, session.find(number)), _anew()

        _on(box.input, on_switch, [box], [state, turn])
        _on(undo.click, on_undo, [], [state, turn])
        _on(look.click, on_check, [], [state, checked, turn])
    if sum(one.on for one in session.edits) > 1:
        gr.HTML(f'<p class="about">All that are on, as one{drawn.links(tab, "all")}</p>')


def _quick(work: Callable[[], None]) -> tuple[str, int]:
    """A call that needs no model; the list is drawn anew even where it fails."""
    try:
        work()
    except UserError as error:
        return drawn.strip(str(error), "wrong"), _anew()
    return "", _anew()
