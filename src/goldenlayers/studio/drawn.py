"""What the page shows of layers, answers, checks and edits, as HTML.

All text from outside goes through :func:`text`, which makes it safe to show and escapes it.
"""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

from goldenlayers.shown import shown
from goldenlayers.studio.workbench import Kind, plain_sentence

if TYPE_CHECKING:
    from goldenlayers.checking import Check, Probed
    from goldenlayers.checking.probes import Part
    from goldenlayers.locating.ranking import LayerRanking
    from goldenlayers.studio.workbench import Answer, Edit

_PARTS: dict[Part, tuple[str, str]] = {
    "prompt": ("The edited prompt", "gives the new answer"),
    "rephrase": ("Rephrasings", "follow"),
    "neighbours": ("Nearest neighbours", "keep their answer"),
    "unrelated": ("Unrelated prompts", "keep their answer"),
}
_FILES: dict[Kind, str] = {"delta": "delta", "peft": "PEFT", "gguf": "GGUF"}


def text(value: object) -> str:
    """Any text as HTML, its line breaks kept."""
    return "\n".join(html.escape(shown(line)) for line in str(value).split("\n"))


def quiet(words: str) -> str:
    """A place where something will be shown, and what."""
    return f'<p class="quiet">{text(words)}</p>'


def strip(words: str, kind: str = "") -> str:
    """A line on what happens: ``kind`` is "busy", "wrong", "done", or "" for a plain word."""
    if not words:
        return ""
    role = "alert" if kind == "wrong" else "status"
    return f'<div class="strip {kind}" role="{role}">{text(words)}</div>'


def layers(ranking: LayerRanking) -> str:
    """A bar for each layer's score, the golden layer marked."""
    values = [row.value for row in ranking.layers]
    top = max([abs(value) for value in values if value == value] or [0.0]) or 1.0
    below = min([value for value in values if value == value] or [0.0]) < 0
    every = max(1, -(-len(values) // 13))
    bars = []
    for row in ranking.layers:
        golden = row.layer == ranking.golden_layer
        share = 0.0 if row.value != row.value else abs(row.value) / top
        kinds = "golden" * golden + " out" * (not row.kept) + " minus" * (row.value < 0)
        told = f"layer {row.layer}: {row.value:.3g}" + ", outside the fences" * (not row.kept)
        number = row.layer if golden or row.layer % every == 0 else ""
        bars.append(
            f'<li class="{kinds}" title="{told}"><span class="up">'
            f'<i style="height:{share * (row.value > 0):.1%}"></i></span>'
            + f'<span class="down"><i style="height:{share * (row.value < 0):.1%}"></i></span>'
            * below
            + f"<b>{number}</b></li>"
        )
    label = f"LGA scores of {len(values)} layers; the best is layer {ranking.golden_layer}"
    return (
        f'<figure class="layers"><ol role="img" aria-label="{label}">{"".join(bars)}</ol>'
        f"<figcaption>By LGA on this one fact <strong>layer {ranking.golden_layer}</strong> is the "
        "golden one; pale layers lie outside the fences. One fact says little: an edit and its "
        "check judge a layer better than its score.</figcaption></figure>"
    )


def answers(prompt: str, before: Answer, after: Answer | None, n_on: int) -> str:
    """Both models side by side, with their likeliest next tokens."""
    many = "1 edit" if n_on == 1 else f"{n_on} edits"
    sides = [_side("As it is", prompt, before)]
    sides.append(
        f"<section><h4>Edited</h4>{quiet('No edit is switched on.')}</section>"
        if after is None
        else _side(f"With {many}", prompt, after, changed=after.text != before.text)
    )
    return f'<div class="sides">{"".join(sides)}</div>'


def _side(title: str, prompt: str, answer: Answer, *, changed: bool = False) -> str:
    rows = "".join(
        f"<li><code>{text(repr(token)[1:-1])}</code>"
        f'<i style="width:{chance:.1%}"></i><span>{chance:.3f}</span></li>'
        for token, chance in answer.next
    )
    mark = ' class="changed"' if changed else ""
    return (
        f'<section{mark}><h4>{text(title)}</h4><p class="said"><span>{text(prompt)}</span>'
        f'<mark>{text(answer.text)}</mark></p><ol class="next" aria-label="likeliest next tokens">'
        f"{rows}</ol></section>"
    )


def check(found: Check, edit: Edit) -> str:
    """The verdict on an edit, and every prompt before and after it."""
    parts = []
    for part, (title, verb) in _PARTS.items():
        share, rows = found.share(part), [one for one in found.probes if one.part == part]
        if rows:
            parts.append(
                f"<tbody><tr><th colspan=4>{title} <small>{share.ok} of {share.n} {verb}"
                f"</small></th></tr>{''.join(map(_row, rows))}</tbody>"
            )
    try_next = {"good": ""}.get(
        found.verdict, " Try another layer, another strength, or another editor."
    )
    kind = found.verdict.replace(" ", "-")
    return (
        f'<div class="check"><p><span class="verdict {kind}">{text(found.verdict)}</span> '
        f"Edit {edit.number}, {_name(edit)}: {text(plain_sentence(found).partition(': ')[2])}"
        f'{try_next}</p><div class="wide"><table><thead><tr><th>Prompt</th><th>Before</th>'
        f"<th>After</th><th>p({text(edit.fact.target)})</th></tr></thead>"
        f"{''.join(parts)}</table></div></div>"
    )


def _row(one: Probed) -> str:
    mark = ("✓", "as it should be") if one.ok else ("✗", "not as it should be")
    chances = " → ".join("–" if p is None else f"{p:.3f}" for p in (one.p_before, one.p_after))
    return (
        f'<tr class="{"" if one.ok else "bad"}"><td><span class="mark" title="{mark[1]}">{mark[0]}'
        f"</span>{text(one.prompt)}</td><td>{text(one.before)}</td><td>{text(one.after)}</td>"
        f"<td>{chances}</td></tr>"
    )


def title(edit: Edit) -> str:
    """An edit in a few words, as plain text."""
    return shown(f"{edit.number}. {edit.fact.subject} → {edit.fact.target}", 80)


def _name(edit: Edit) -> str:
    return f"<em>{text(edit.fact.prompt)}</em> → <em>{text(edit.fact.target)}</em>"


def about(edit: Edit, key: str) -> str:
    """How an edit was made, how it came out, and the links that download it."""
    times = "" if edit.strength == 1 else f", strength {edit.strength:g}"
    verdict = "" if edit.check is None else edit.check.verdict
    pill = f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span> ' if verdict else ""
    return (
        f'<p class="about">{pill}{text(edit.method)}, layer {edit.layer}{times}'
        f"{links(key, str(edit.number))}</p>"
    )


def links(key: str, which: str) -> str:
    """Links to what the edit, or the sum of ``all`` that are on, can be downloaded as."""
    found = (
        f'<a href="./download/{text(key)}/{text(which)}/{kind}">{name}</a>'
        for kind, name in _FILES.items()
    )
    return f'<span class="links">{" ".join(found)}</span>'
