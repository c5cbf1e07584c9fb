"""Records: of ours in strict JSON; from elsewhere read within bounds, and held to their types.

Whatever stands in one from elsewhere, reading it ends in plain values or in a ``UserError``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from goldenlayers.errors import UserError

T = TypeVar("T")

DEEPEST = 64
"""How deep a record of ours may be nested."""


def text_of(data: bytes, where: str | Path) -> str:
    """Bytes as UTF-8 text.

    Raises:
        UserError: they are something else.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{where} is no UTF-8 text ({error.reason})") from error


def parse_json(text: str | bytes, where: str | Path) -> Any:
    """A value from strict JSON: no NaN, not nested too deeply, no half characters.

    Raises:
        UserError: anything else; it begins with ``where``.
    """
    try:
        value = json.loads(text, parse_constant=no_constant)
        refuse_odd(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({said(error)})") from error
    return value


def parse_yaml(text: str, where: str | Path) -> Any:
    """A value from YAML that holds no more than JSON could, and no aliases (they can grow without
    end).

    Raises:
        UserError: anything else; it begins with ``where``.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where it is built
    depth = 0
    try:
        for event in yaml.parse(text, loader):
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("an alias")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                raise ValueError("nested too deeply")
        value = yaml.load(text, loader)
        refuse_odd(value)
    # What its constructors raise on odd scalars is not theirs alone (TypeError, IndexError, ...).
    except (
        yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError,
        RecursionError,
    ) as error:  # fmt: skip
        raise UserError(f"{where} is no YAML of plain settings ({said(error)})") from error
    return value


def plain(value: Any, odd: Callable[[Any], Any] | None = None) -> Any:
    """``value`` in the types that strict JSON and YAML know; a number that is not finite is None.

    Takes dataclasses, mappings, lists, tuples, paths, numpy scalars and arrays, and tensors; of
    any other type what ``odd`` makes of it.

    Raises:
        TypeError: any other type, and there is no ``odd``.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | os.PathLike):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name), odd) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, odd) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, odd) for item in value]
    if callable(listed := getattr(value, "tolist", None)):
        return plain(listed(), odd)
    if odd is not None:
        return plain(odd(value), odd)
    raise TypeError(f"{type(value).__name__} cannot be written to a run folder")


def json_text(value: Any, *, indent: int | None = None) -> str:
    """``plain(value)`` as JSON that any reader accepts (no NaN)."""
    return json.dumps(plain(value), allow_nan=False, ensure_ascii=False, indent=indent)


def json_line(value: Any) -> str:
    """``plain(value)`` as one line of JSON in plain characters, so that it is safe to show."""
    text = re.sub("[\ud800-\udfff]", "\ufffd", json_text(value))  # half characters
    return json.dumps(json.loads(text)).replace("\x7f", "\\u007f")


def refuse_odd(value: Any) -> None:
    """Refuse what strict JSON cannot say, and what is nested deeper than any record of ours.

    Raises:
        ValueError: what is wrong.
    """
    stack = [(value, 1)]
    while stack:
        one, depth = stack.pop()
        if isinstance(one, str):
            if not one.isascii():
                one.encode()  # half a character is a UnicodeEncodeError, which is a ValueError
        elif isinstance(one, float):
            if not math.isfinite(one):
                raise ValueError("a number that is not finite")
        elif isinstance(one, dict | list):
            if depth > DEEPEST:
                raise ValueError("nested too deeply")
            if isinstance(one, dict):
                if not all(isinstance(key, str) for key in one):
                    raise ValueError("a name that is no text")
                stack += [(key, depth) for key in one]
            stack += [(v, depth + 1) for v in (one.values() if isinstance(one, dict) else one)]
        elif isinstance(one, int):
            if one.bit_length() > 64:
                raise ValueError("a number of more than 64 bits")
        elif one is not None:
            raise ValueError(f"a {type(one).__name__}")


def no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def said(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, UnicodeError):
        return "a half character (lone surrogate)"
    return " ".join(str(error).split())[:200] or type(error).__name__


def typed(value: Any, hint: Any) -> Any:
    """``value`` as a field of the type ``hint`` holds it: paths are made of text, tuples of lists.

    Raises:
        TypeError: it is no such value; the message says what is expected.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return typed(value, inner[0])
    if origin in (Union, types.UnionType):
        for one in inner:
            try:
                return typed(value, one)
            except TypeError:
                continue
    elif origin is Literal:
        if isinstance(value, str) and value in inner:
            return value
    elif origin is list and isinstance(value, list):
        return [typed(one, inner[0]) for one in value]
    elif origin is tuple and isinstance(value, list):
        if inner[-1] is Ellipsis:
            return tuple(typed(one, inner[0]) for one in value)
        if len(value) == len(inner):
            return tuple(typed(one, kind) for one, kind in zip(value, inner, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {typed(name, inner[0]): typed(one, inner[1]) for name, one in value.items()}
    elif hint is Any or (hint in (bool, int, type(None)) and type(value) is hint):
        if type(value) is not int or value.bit_length() <= 64:
            return value
    elif hint is float and type(value) in (int, float) and abs(value) <= 1e308:
        return float(value)
    elif hint in (str, Path) and isinstance(value, str) and "\0" not in value:
        return hint(value)
    raise TypeError(in_words(hint))


def made(kind: Callable[..., T], record: Mapping[str, Any], where: str | Path) -> T:
    """A dataclass from a record of its fields, dataclasses, lists of them or None among them; more
    fields are left.

    Raises:
        UserError: a field of another type, or one that is missing and has no default.
    """
    values = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]  # a dataclass
        hint, name = hints[field.name], field.name
        optional = (
            field.default is not dataclasses.MISSING
            or field.default_factory is not dataclasses.MISSING
        )
        if optional and name not in record:
            continue
        inner: Any = get_args(hint)[0] if get_args(hint) else None
        if get_origin(hint) in (Union, types.UnionType) and hasattr(inner, "__dataclass_fields__"):
            row = entry(record, name, dict[str, Any] | None, where)
            values[name] = None if row is None else made(inner, row, f"{where}, {name}")
        elif hasattr(inner, "__dataclass_fields__"):
            rows = entry(record, name, list[dict[str, Any]], where)
            values[name] = tuple(
                made(inner, row, f"{where}, {name} {i}") for i, row in enumerate(rows)
            )
        else:
            values[name] = entry(record, name, hint, where)
    return kind(**values)


def in_words(hint: Any) -> str:
    """What a field of a type holds, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return in_words(inner[0])
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(in_words(one) for one in inner))
    if origin is Literal:
        return " or ".join(f"'{one}'" for one in inner)
    if origin in (list, tuple):
        return f"a list of {in_words(inner[0])}"
    if origin is dict:
        return f"a mapping of {in_words(inner[0])} to {in_words(inner[1])}"
    return {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        Path: "a path",
        type(None): "nothing",
        Any: "anything",
    }.get(hint, str(hint))


def entry(record: Mapping[str, Any], name: str, hint: Any, where: str | Path, *default: Any) -> Any:
    """The field ``name`` of a record, held to its type; ``default`` where it is missing or null.

    Raises:
        UserError: a value of another type, or none where there is no default.
    """
    value = record.get(name)
    if value is None and default:
        return default[0]
    try:
        return typed(value, hint)
    except TypeError:
        found = f"'{name}' is {short(value)}" if name in record else f"there is no '{name}'"
        raise UserError(f"{where}: {found}", expected=in_words(hint)) from None


def short(value: Any) -> str:
    """A value in a message: in plain ASCII and not too long."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."
