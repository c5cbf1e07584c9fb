"""The numbers among the flags: bounded, finite, and the same whatever the command; and flags that
are named twice.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, get_args, get_origin

import pytest
from tyro.conf import Positional

from goldenlayers.cli import parse
from goldenlayers.commands import COMMANDS, options_of
from goldenlayers.commands.options import LIMITS, flag, marks_of, types_of
from goldenlayers.commands.sweeps import layers_named
from goldenlayers.editors import EDITORS, InContext
from goldenlayers.errors import UserError, check_number
from goldenlayers.locating import LGA
from goldenlayers.locating.building import RankingBuilder

# What a command cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    "edit": {"model": "m", "facts": "f"},
    "ask": {"model": "m"},
    "export": {"run": "r", "out": "o"},
    "sweep": {"model": "m", "out": "o"},
    "compare": {"sweep": "s"},
    "locate": {"model": "m", "method": "cma", "out": "o"},
    "evaluate": {"model": "m", "mode": "sequential"},
    "run": {"config": "c"},
    "studio": {"model": "m"},
}
WORDS_OR_NUMBERS = {"chunk", "batch_size"}  # "auto", or a number as text


def numbers_of(kind: type) -> dict[str, str]:
    """Fields of a config that hold numbers, with how each is annotated."""
    written = {
        name: hint.__name__ if get_origin(hint) is None and isinstance(hint, type) else str(hint)
        for name, hint in types_of(kind).items()
    }
    return {
        name: hint
        for name, hint in written.items()
        if re.search(r"\b(int|float)\b", hint) or name in WORDS_OR_NUMBERS
    }


CASES = [(command, name) for command in COMMANDS for name in numbers_of(options_of(command))]


def test_every_number_has_limits() -> None:
    assert {name for _, name in CASES} == set(LIMITS)  # and none is left over
    assert len(CASES) > 20
    for low, high in LIMITS.values():
        assert 0 <= low < high < 2**63

    @dataclasses.dataclass
    class Another:
        depth: int | None = None

    assert set(numbers_of(Another)) - set(LIMITS) == {"depth"}  # the test sees a new one


@pytest.mark.parametrize(("command", "name"), CASES)
def test_numbers_out_of_bounds_are_refused(command: str, name: str) -> None:
    low, high = LIMITS[name]
    flag = "--" + name.replace("_", "-")
    kind = options_of(command)
    annotated = numbers_of(kind)[name]

    def made(value: Any) -> Any:
        if annotated == "str":
            value = str(value)
        elif annotated.startswith("list"):
            value = [5, value]
        needed = NEEDED.get(command, {}) | ({"method": "lga"} if name == "kappa" else {})
        return kind(**needed | {name: value})

    made(high)
    made(low)
    wrong = [low - 1, high + 1, 10**30, float("nan"), float("inf"), "x", "5\x1b[31m", "９"]
    for value in wrong if annotated != "float" else [*wrong[:2], *wrong[3:]]:
        with pytest.raises(UserError, match=flag):
            made(value)


def test_of_an_option_that_is_named_twice_all_values_count() -> None:
    fact = ["--subject", "A", "--prompt", "{}", "--target", "x"]
    more = "--clear-of A --layer 3 --clear_of B C --set steps 1 --set=prefixes 2 --clear-of=D"
    kept = ["--keep", "x", "--keep", "y"]
    found = parse(["edit", "m", *fact, *more.split(), *kept])
    assert found.clear_of == ["A", "B", "C", "D"] and found.keep == ["x", "y"]
    assert found.set == {"steps": "1", "prefixes": "2"} and (found.model, found.layer) == ("m", "3")
    found = parse(
        ["ask", "m", "--delta", "a", "--tokens", "3", "--delta", "b", "--", "p", "--delta"]
    )
    assert found.delta == [Path("a"), Path("b")] and found.prompts == ["p", "--delta"]
    for name in COMMANDS:  # whichever options there are
        kind = options_of(name)
        for option, hint in types_of(kind).items():
            if get_origin(hint) is not list or Positional in marks_of(kind)[option]:
                continue
            given = [word for value in ("1", "2") for word in (flag(option), value)]
            wanted = [get_args(hint)[0](value) for value in ("1", "2")]
            needed = fact if name == "edit" else ["--out", "o"] if name == "sweep" else []
            try:
                values = getattr(parse([name, "m", *needed, *given]), option)
            except UserError as error:  # read, and then refused as no metric
                assert "metric" in str(error)
            else:
                assert values == wanted, (name, option)


@pytest.mark.parametrize(
    "given",
    ["--set steps=1 prefixes=2 stop=a=b", "--set=steps=1 --set prefixes 2 --set stop a=b"],
)
def test_pairs_may_stand_with_an_equals_sign(given: str) -> None:
    fact = ["--subject", "A", "--prompt", "{}", "--target", "x"]
    found = parse(["edit", "m", *given.split(), *fact])
    assert found.set == {"steps": "1", "prefixes": "2", "stop": "a=b"}


def test_numbers_are_numbers() -> None:
    import numpy as np

    for value in (3, np.int64(3), np.uint8(3)):
        check_number("n", value, 1, 5)
    for value in (3.0, 0.5, np.float32(2)):
        check_number("n", value, 0, 5, whole=False)
    check_number("n", 1, 0, 5, whole=False, above=True)
    for value in (True, "3", 3.0, None, [3], float("nan"), 0, 6, 10**400):
        with pytest.raises(UserError, match="n is "):
            check_number("n", value, 1, 5)
    for value in ("3", None, float("nan"), float("inf"), -0.1, True):
        with pytest.raises(UserError, match="n is "):
            check_number("n", value, 0, 5, whole=False)
    with pytest.raises(UserError, match="above 0"):
        check_number("n", 0.0, 0, 5, whole=False, above=True)


def test_editor_settings_are_bounded() -> None:
    for kind in (*(EDITORS[name] for name in EDITORS), InContext):
        for f in dataclasses.fields(kind):
            wrong: list[Any] = ["x", None, float("nan"), float("inf"), -1, 10**13]
            if f.type == "bool":
                wrong = [0, 1, "true", None]
            for value in wrong:
                with pytest.raises(UserError, match=f.name):
                    kind(**{f.name: value})


def test_layers_are_read_without_counting_them_out() -> None:
    assert layers_named("0-3,7", 8) == [0, 1, 2, 3, 7]
    for text, part in (
        ("0-99999999999", "names layer 99999999999"),
        ("99999999999", "names layer 99999999999"),
        ("0-" + "9" * 5000, "--layers is"),
        ("5-3", "--layers is"),
        ("-1", "--layers is"),
        ("1,,2", "--layers is"),
        ("", "--layers is"),
        ("１-３", "--layers is"),
        ("1_0", "--layers is"),
        ("1-2-3", "--layers is"),
        ("1\x1b[31m", "--layers is"),
    ):
        with pytest.raises(UserError, match=re.escape(part)) as caught:
            layers_named(text, 12)
        assert len(str(caught.value)) < 3000 and "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [("bootstrap", 10**12), ("bootstrap", -1), ("bootstrap", 2.5), ("seed", -1), ("seed", 2**70),
     ("kappa", float("nan")), ("kappa", float("inf")), ("top_k", 0), ("top_k", "5")],
)  # fmt: skip
def test_the_library_checks_its_numbers_too(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=name):
        if name == "kappa":
            LGA(kappa=value)
        else:
            RankingBuilder("lga", 4, **{name: value})
