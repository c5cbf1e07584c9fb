"""Our own fields of facts and probes, and tables as spreadsheets write them (CSV, TSV and their
kin), whose columns may bear them.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from goldenlayers.datasets.reading import loads
from goldenlayers.errors import DataError, UserError, shortened


@dataclass(frozen=True, slots=True)
class Field:
    """A field of a line: its name, its type in words, what it is."""

    name: str
    type: str
    meaning: str
    required: bool = False


FACT_FIELDS = (
    Field("subject", "text", "what the fact is about, letter for letter as in the prompt", True),
    Field("prompt", "text", "the beginning that the answer continues; kept as it is", True),
    Field("target_new", "text", "the answer after the edit", True),
    Field("target_old", "text", "the answer now; without it, the model's own continuation"),
    Field("old_aliases", "list of texts", "other ways of writing the old answer"),
    Field("target_old_is_generated", "true or false", "whether a model wrote the old answer"),
    Field("id", "text", "the fact's name in results; without it, 'fact-' and the row number"),
    Field("relation", "text", "the kind of fact, e.g. capital"),
    Field("rephrasings", "list of texts", "prompts that ask the same in other words"),
    Field("locality", "list of probes", "what must not move; a probe may have no answer"),
    Field("portability", "list of probes", "what must follow from the edit; answers required"),
    Field("generation_prompts", "list of texts", "beginnings of free text about the subject"),
    Field("joint", "text", "between prompts and answers: space, none, or auto (without it)"),
)


PROBE_FIELDS = (
    Field("prompt", "text", "the beginning that the answer continues", True),
    Field("answer", "text", "the expected answer"),
    Field("kind", "text", "probes of one kind are averaged together"),
    Field("aliases", "list of texts", "other ways of writing the answer"),
    Field("joint", "text", "between prompt and answer, as for facts"),
    Field("contradicts", "true or false", "of locality: it asks what the edit changes; else found"),
)


OTHER_NAMES = {"target": "target_new"}


EXAMPLE = {
    "id": "capital-france",
    "relation": "capital",
    "subject": "France",
    "prompt": "The capital of France is",
    "target_new": "Sofia",
    "target_old": "Paris",
    "rephrasings": ["France has as its capital the city of"],
    "locality": [
        {"prompt": "The capital of Nepal is", "answer": "Kathmandu", "kind": "neighborhood"}
    ],
    "portability": [
        {"prompt": "The French capital is", "answer": "Sofia", "kind": "Subject_Aliasing"}
    ],
    "generation_prompts": ["The capital of France is a city where"],
}


def schema_text() -> str:
    """The description of our JSON lines that ``golden datasets --schema`` prints."""

    def table(fields: tuple[Field, ...]) -> list[str]:
        return [
            f"  {field.name:<24} {field.type:<14} {'(required) ' * field.required}{field.meaning}"
            for field in fields
        ]

    return "\n".join(
        [
            "Facts as JSON lines: UTF-8, one object per line (a JSON array of them is read too).",
            "",
            "A fact:",
            *table(FACT_FIELDS),
            "",
            "A probe:",
            *table(PROBE_FIELDS),
            "",
            "'target' is taken for 'target_new'. In a prompt or rephrasing without the subject, {}",
            "stands for it. Fields with other names are not read; this is told once, unless their",
            "names begin with '_'. A name close to one of the above is an error.",
            "Space around subject and answers does not count, but a space before target_new or",
            "before a probe's answer asks for one there; prompts are kept as they are.",
            "A wrong line is refused with its number; --skip-invalid keeps the others.",
            "",
            "The same fields as a table (CSV, TSV): the first line names the columns, and a cell",
            "with several texts holds them as JSON:",
            "subject,prompt,target_new,target_old,rephrasings",
            'France,The capital of France is,Sofia,Paris,"[""France has as its capital""]"',
            "",
            "Example (in one line):",
            json.dumps(EXAMPLE, ensure_ascii=False),
        ]
    )


_DELIMITERS = "\t;,|"
_OWN = frozenset({field.name for field in FACT_FIELDS} | OTHER_NAMES.keys())
# Columns whose cells may hold JSON. Everywhere else a bracket is text, as in a prompt of code.
_OWN_LISTS = frozenset(field.name for field in FACT_FIELDS if field.type == "list of texts")
_OBJECTS = frozenset(
    {"locality", "portability", "requested_rewrite", "single_hops", "new_single_hops", "orig"}
    | {"edited", "probes"}
)
_LISTS = _OWN_LISTS.union(
    ("answers", "attribute_prompts", "ground_truth", "loc_ans", "locality_ground_truth"),
    ("locality_prompt", "neighborhood_prompts", "new_answer_alias", "answer_alias"),
    ("paraphrase_prompts", "questions", "rephrase", "rephrase_prompt"),
)
_NUMBERS = frozenset({"case_id", "known_id"})
# What begins like this was meant as a list: "[INST]" was not.
_LIST = re.compile(r"\s*\[\s*([\"'\[{\]]|$)")


def is_table(text: str) -> bool:
    """Whether the first line has several cells."""
    return len(_cells(_first_line(text), _delimiter(text))) > 1


def records(text: str, source: str) -> tuple[list[tuple[int, object]], list[DataError]]:
    """The rows below the header as (line number, record), and those that are broken.

    The delimiter is the one of tab, semicolon, comma and bar that gives the header most cells
    (or what a first line "sep=;" names). An empty cell is a field that is missing. A row's number
    is the line of the file that it begins in, the header being line 1.

    Raises:
        UserError: the header is broken, or names a column twice.
    """
    delimiter = _delimiter(text)
    reader = csv.reader(_lines(text), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    rows: list[tuple[int, object]] = []
    broken: list[DataError] = []
    while True:
        number = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            broken.append(_broken(error, delimiter).at(source=source, row=number))
            if header is None:
                raise broken[0] from None
            continue
        mark = number == 1 and cells[:1] and cells[0].lower().startswith("sep=")
        if not any(cell.strip() for cell in cells) or (mark and not any(cells[1:])):
            continue
        if header is None:
            header = _header(cells, source)
            continue
        try:
            rows.append((number, _record(header, cells)))
        except DataError as error:
            broken.append(error.at(source=source, row=number))
    return rows, broken


def _lines(text: str) -> Iterator[str]:
    """The lines with their breaks; other than by splitlines(), U+2028 and the like are text."""
    return (found[0] for found in re.finditer(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+", text))


def _first_line(text: str) -> str:
    filled = (line for line in _lines(text) if line.strip())
    first = next(filled, "")
    return next(filled, "") if _mark(first) else first


def _mark(line: str) -> str:
    """The delimiter that Excel's first line "sep=;" names, if this is such a line."""
    found = re.fullmatch(r"\"?sep=(.)\"?", line.strip(), re.IGNORECASE)
    return found[1] if found else ""


def _delimiter(text: str) -> str:
    named = _mark(next(_lines(text), ""))
    if named and named in _DELIMITERS:
        return named
    line = _first_line(text)
    return max(_DELIMITERS, key=lambda delimiter: len(_cells(line, delimiter)))


def _cells(line: str, delimiter: str) -> list[str]:
    with contextlib.suppress(csv.Error):
        return next(csv.reader([line], delimiter=delimiter), [])
    return []


def _header(cells: list[str], source: str) -> list[str]:
    """The columns' names; our own fields' in any letter case. A column without a name is ""."""
    names = []
    for cell in cells:
        name = cell.strip()
        plain = "_".join(name.replace("-", " ").split()).lower()
        names.append(plain if plain in _OWN else name)
    twice = next((name for name, n in Counter(names).items() if name and n > 1), None)
    if twice:
        raise UserError(
            f"{source} has the column '{shortened(twice)}' twice",
            fix="Give each column a name of its own",
        )
    return names


def _record(header: list[str], cells: list[str]) -> dict[str, object]:
    if len(cells) > len(header) and not any(cell.strip() for cell in cells[len(header) :]):
        cells = cells[: len(header)]
    if len(cells) != len(header):
        raise DataError(
            f"the row has {len(cells)} cells, the header {len(header)}",
            fix='Put a cell that holds the delimiter in quotes: "like, this"',
            reason="the row has more or fewer cells than the header",
        )
    return {name: _value(name, cell) for name, cell in zip(header, cells, strict=True) if name}


def _value(name: str, cell: str) -> object:
    """What a cell holds: text, or the JSON of a column that may hold lists or objects."""
    begin = cell.lstrip()[:1]
    if not begin:
        return None
    if name in _NUMBERS and re.fullmatch(r"\d{1,18}", cell.strip()):
        return int(cell)
    if name == "target_old_is_generated" and cell.strip().lower() in ("true", "false"):
        return cell.strip().lower() == "true"
    of_objects = name in _OBJECTS
    if of_objects or (name in _LISTS and _LIST.match(cell)):
        return _json(name, cell)
    # CounterFact writes an answer as {"str": ...}; other braces are text.
    if begin == "{" and name in ("target_new", "target_true") and '"str"' in cell:
        return _json(name, cell)
    return [cell] if name in _OWN_LISTS else cell


def _json(name: str, cell: str) -> object:
    example = '[{"prompt": "…", "answer": "…"}]' if name in _OBJECTS else '["…", "…"]'
    try:
        return loads(cell)
    except ValueError as error:
        raise DataError(
            f"the cell is no JSON ({error})",
            field=name,
            expected=f"a list as JSON, in double quotes: {example}",
            reason=f"a cell of {name} is no JSON",
        ) from None


def _broken(error: csv.Error, delimiter: str) -> DataError:
    what = str(error)
    if "unexpected end" in what:
        return DataError(
            "a quotation mark opens a cell here that is never closed",
            fix='Close it, or double the mark: ""',
            reason="a quotation mark is never closed",
        )
    if "limit" in what:
        return DataError(
            f"a cell has more than {csv.field_size_limit():,} characters",
            fix="Look for a quotation mark that is not closed",
            reason="a cell is too long",
        )
    if "expected after" in what:
        return DataError(
            "after a quotation mark that closes a cell comes something else than "
            + ("a tab" if delimiter == "\t" else f"'{delimiter}'"),
            fix='A quotation mark inside a cell in quotes is written twice: ""',
            reason="a quotation mark stands at a wrong place",
        )
    return DataError(f"the row cannot be read ({what})", reason="the row cannot be read")
