"""What the documentation takes from the program itself when mkdocs builds it, so that it is never out of date.

As a hook of MkDocs: on a page, the line `<!-- commands -->` becomes one section for every command, in the order of
`moe2gguf --help`, with all options. As an extension of griffe, which reads docstrings for mkdocstrings: aligned lists
of fields become Markdown lists.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

import click
import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the program of this checkout

from moe2gguf.cli import cli
from moe2gguf.cli.command import show_everything

PLACE = "<!-- commands -->"
FIELD = re.compile(r"^(?P<names>\w+(?:, \w+)*) {2,}(?P<text>\S.*)$")
"""A line of a docstring that explains a field: `n_shared  experts that the router always picks`."""


class FieldLists(griffe.Extension):
    """Turns the fields that a docstring explains, one a line, into a Markdown list."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by griffe with every object that it has read."""
        if obj.docstring:
            obj.docstring.value = "\n".join(list_fields(obj.docstring.value.splitlines()))


def list_fields(lines: list[str]) -> Iterator[str]:
    """The lines, with every field as a list item and a blank line before the first one."""
    before = ""
    for line in lines:
        field = FIELD.match(line)
        if field and before.strip() and not before.startswith(" "):
            yield ""
        yield f"- `{field['names']}`: {field['text']}" if field else line
        before = "  " if field else line


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs with the text of each page; returns the text with the commands in their place."""
    return markdown.replace(PLACE, "\n".join(command_reference())) if PLACE in markdown else markdown


def command_reference() -> Iterator[str]:
    """The lines of all commands, section by section."""
    context = click.Context(cli, info_name="moe2gguf")
    for section in cli.list_sections(context):
        yield f"## {section.title}\n"
        for name, command in section.list_commands():
            with show_everything(command):  # as --help-all does
                yield from list(command_lines(name, command, context))


def command_lines(name: str, command: Any, parent: click.Context) -> Iterator[str]:
    """One command: its usage, what it does, its examples and a table for every group of its options."""
    context = click.Context(command, info_name=name, parent=parent)
    about, _, examples = inspect.cleandoc(command.help or "").partition("\b\nExample:\n")
    yield f"### {name}\n"
    yield f"{about.strip()}\n"
    yield f"```\n{command.get_usage(context).removeprefix('Usage: ')}\n```\n"
    if examples:
        yield "```sh\n" + inspect.cleandoc(examples) + "\n```\n"
    for title, parameters in groups(command, context):
        rows = [record for parameter in parameters if (record := parameter.get_help_record(context))]
        if rows:
            yield f"| {title} | |\n|---|---|"
            yield from (f"| <code>{cell(names)}</code> | {cell(text)} |" for names, text in rows)
            yield ""


def groups(command: Any, context: click.Context) -> Iterator[tuple[str, list[Any]]]:
    """The arguments and option groups of a command, those for experts included."""
    yield "Arguments", [p for p in command.get_params(context) if isinstance(p, click.Argument)]
    for group in command.option_groups:
        yield group.title, group.options
    yield "Other options", list(command.get_ungrouped_options(context))


def cell(text: str) -> str:
    """Text as a cell of a Markdown table."""
    text = " ".join(text.replace("][", "] [").replace(" RANGE", "").split())
    return escape(text, quote=False).replace("|", "&#124;").replace("*", "&#42;")
