"""How Sphinx builds the site: the pages of this folder as they stand, and what is read from the
code (``{golden-commands}``, ``{golden-api}``). ``make docs`` calls it; every warning is an error.
"""

from __future__ import annotations

import json
from importlib import import_module
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from myst_parser.parsers.sphinx_ import MystParser
from sphinx.application import Sphinx

import goldenlayers

project = "Goldenlayers"
author = "The Goldenlayers authors"
project_copyright = author
version = release = goldenlayers.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "results/study", "results/cells"]
myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
highlight_language = "text"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
html_theme = "furo"
html_title = f"Goldenlayers {version}"
html_copy_source = False
html_show_sphinx = False


class NotebookParser(MystParser):
    """A notebook as a page: its texts, and its code in fences."""

    supported = ("notebook",)

    def parse(self, inputstring: str, document: nodes.document) -> None:
        """Hand the notebook on as MyST."""
        parts = []
        for cell in json.loads(inputstring)["cells"]:
            text = "".join(cell["source"])
            parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        super().parse("\n\n".join(parts), document)


class Commands(Directive):
    """A section for every command, with all that ``--help-all`` says."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        from goldenlayers.commands import COMMANDS, options_of
        from goldenlayers.commands.listings import command_help

        found: list[nodes.Node] = []
        for command in COMMANDS:
            section = nodes.section(ids=[f"golden-{command}"], names=[f"golden {command}"])
            section += nodes.title(text=f"golden {command}")
            text = "\n".join(command_help(command, options_of(command), rare=True))
            section += nodes.literal_block(text, text, language="text")
            found.append(section)
        return found


class Api(Directive):
    """A section for every room that has public names, with their signatures and docstrings."""

    def run(self) -> list[nodes.Node]:
        """The sections."""
        found: list[nodes.Node] = []
        for room, names in goldenlayers._ROOMS.items():
            title = f"goldenlayers.{room}"
            section = nodes.section(ids=[nodes.make_id(title)], names=[title])
            section += nodes.title(text=title)
            about = import_module(title).__doc__ or ""
            lines = [" ".join(about.partition("\n\n")[0].split()), ""]
            for name in sorted(names.split(), key=str.swapcase):  # functions first
                is_class = isinstance(getattr(goldenlayers, name), type)
                lines += [f".. auto{'class' if is_class else 'function'}:: goldenlayers.{name}"]
                lines += ["   :members:"] * is_class + [""]
            self.state.nested_parse(StringList(lines, "api"), 0, section)
            found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, Any]:
    """The notebook's parser, and the two directives."""
    app.add_source_suffix(".ipynb", "notebook")
    app.add_source_parser(NotebookParser)
    app.add_directive("golden-commands", Commands)
    app.add_directive("golden-api", Api)
    return {"parallel_read_safe": True}
