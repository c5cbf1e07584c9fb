"""The front door: what importing costs, which names are public, and what the pages promise."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import goldenlayers as gl

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")]
for part in ("*.md", "howto/*.md", "results/*.md"):
    PAGES += sorted((ROOT / "docs").glob(part))
HEAVY = ("torch", "transformers", "matplotlib", "datasets", "numpy")
# Processor time, the best of three runs: other work on the machine counts little.
TIMED = """
import sys, time
start = time.process_time()
{code}
print(time.process_time() - start)
print(*(name for name in {heavy!r} if name in sys.modules))
"""


def timed(code: str) -> tuple[float, list[str]]:
    """Best processor time of ``code`` in a new Python, in seconds; the heavy modules it loads."""
    best, loaded = float("inf"), []
    for _ in range(3):
        script = TIMED.format(code=code, heavy=HEAVY)
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        seconds, names = done.stdout.splitlines()[-2:]
        best, loaded = min(best, float(seconds)), names.split()
    return best, loaded


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def plain(name: str) -> str:
    """A distribution's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def test_import_is_quick_and_loads_nothing_heavy():
    # What NumPy costs is the unit, for machines differ; the control: that it is heavy is seen.
    unit, heavy = timed("import numpy")
    seconds, loaded = timed("import goldenlayers")
    assert heavy == ["numpy"]
    assert loaded == []
    assert seconds < unit


def test_help_answers_quickly_without_torch():
    code = (
        "from goldenlayers.cli import main\ntry: main(['--help'])\nexcept SystemExit as e:"
        " assert not e.code"
    )
    seconds, loaded = timed(code)
    assert "torch" not in loaded
    assert "transformers" not in loaded
    assert seconds < 6 * timed("import numpy")[0]  # 2 where this was written


@pytest.mark.parametrize("name", gl.__all__)
def test_every_public_name_is_there(name: str):
    assert name in dir(gl)
    value = getattr(gl, name)
    assert value is getattr(gl, name)
    if name != "__version__":
        assert value.__doc__


def test_public_names_are_those_that_type_checkers_see():
    tree = ast.parse(inspect.getsource(gl))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    imported = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    names = {alias.name for node in imported for alias in node.names} | {"__version__"}
    assert names == set(gl.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'lokate'"):
        gl.lokate  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("first", ["pass", "import goldenlayers.locating.ranking", "gl.locate"])
def test_locate_is_a_function_whatever_came_first(first: str):
    code = (
        f"import goldenlayers as gl, inspect, pickle\n{first}\n"
        "from goldenlayers import locate\n"
        "assert 'facts' in inspect.signature(gl.locate).parameters\n"
        "import goldenlayers.locating.ranking\n"
        "assert locate is gl.locate and pickle.loads(pickle.dumps(locate)) is locate\n"
        "try: gl.locate(None, [], 'nope')\n"
        "except gl.UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "unknown method 'nope'" in done.stdout


def test_version_is_the_projects():
    assert gl.__version__ == project()["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"## [{gl.__version__}]" in changelog
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {gl.__version__}\n" in citation


def test_constraints_pin_every_dependency_exactly():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [
        pin for pin in pins if not re.fullmatch(r"[A-Za-z0-9_.-]+==[0-9][0-9A-Za-z.]*", pin)
    ] == []
    pinned = {plain(pin.split("==")[0]) for pin in pins}
    extras = project()["optional-dependencies"]
    wanted = [*project()["dependencies"], *extras["dev"], *extras["peft"]]
    assert {plain(re.split(r"[<>=\[ ]", name)[0]) for name in wanted} - pinned == set()


def test_every_imported_package_is_a_declared_dependency():
    declared = {
        plain(re.split(r"[<>=\[ ]", name)[0])
        for name in [
            *project()["dependencies"],
            *(name for extra in project()["optional-dependencies"].values() for name in extra),
        ]
    }
    called = {"yaml": "pyyaml", "huggingface_hub": "huggingface-hub"}
    found = {
        match
        for path in (ROOT / "src").rglob("*.py")
        for match in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text("utf-8"), re.M)
    }
    outside = found - set(sys.stdlib_module_names) - {"goldenlayers"}
    # Words at the beginning of a docstring's line may look like imports, but none can be found.
    outside = {name for name in outside if importlib.util.find_spec(name)}
    assert {called.get(name, plain(name)) for name in outside} - declared == set()


def test_control_a_wrong_command_is_not_understood():
    from goldenlayers.cli import parse

    with pytest.raises(gl.UserError, match=r"limmit.*--limit.*golden locate --help"):
        parse(["locate", "smollm2-135m", "--limmit", "3"])


def test_the_page_of_commands_lists_every_command():
    from goldenlayers.commands import COMMANDS

    page = (ROOT / "docs/commands.md").read_text("utf-8")
    assert set(re.findall(r"^\| `golden (\w+)", page, re.M)) == set(COMMANDS)


def test_contributing_names_every_room_and_its_picture_is_of_todays_imports():
    source = ROOT / "src/goldenlayers"
    rooms = {path.name.removesuffix(".py") for path in source.iterdir()}
    rooms -= {"__init__", "__pycache__", "py.typed"}
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    named = {
        name for row in re.findall(r"^\| (`.*?) \|", text, re.M) for name in row.split("`")[1::2]
    }
    assert named == rooms
    house = [sys.executable, str(ROOT / "tools/house.py"), "--check"]
    done = subprocess.run(house, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files(page: Path):
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).is_file()] == []


def test_the_pages_count_the_starter_facts_right():
    facts = gl.load_facts("starter")
    ours = [page for page in PAGES if page.parent.name != "results"]
    pages = [page.read_text("utf-8") for page in (*ours, ROOT / "CHANGELOG.md")]
    counts = [
        n for page in pages for n in re.findall(r"(\d+)\s+(?:starter|well-known) facts", page)
    ]
    assert counts == [str(len(facts))] * 2
    assert f"starter` ({len(facts)} facts" in (ROOT / "docs/commands.md").read_text("utf-8")
    relations = len({fact.relation for fact in facts})
    assert f"{relations} relations" in (ROOT / "docs/data.md").read_text("utf-8")
