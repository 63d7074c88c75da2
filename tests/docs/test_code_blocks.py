"""Python in the documentation parses, and commands take the options that it gives them."""

import ast
import re
import shlex

import pytest
import typer

from tests.docs.pages import Block, Page, pages

_COMMAND = re.compile(r"^(?:\$ )?(skink \w+.*)$", re.MULTILINE)


def _python() -> list[tuple[Page, Block]]:
    return [(entry, block) for entry in pages() for block in entry.blocks() if block.language == "python"]


@pytest.mark.parametrize(("entry", "block"), _python(), ids=lambda value: getattr(value, "path", ""))
def test_python_parses(entry: Page, block: Block) -> None:
    ast.parse(block.text)


def _commands() -> list[str]:
    texts = [block.text for entry in pages() for block in entry.blocks() if block.language in ("", "sh")]
    return sorted({re.sub(r"\s+#.*$", "", found) for text in texts for found in _COMMAND.findall(_joined(text))})


def _joined(text: str) -> str:
    return re.sub(r"\\\n\s*", " ", text)


@pytest.mark.parametrize("line", _commands())
def test_commands_have_the_options_that_are_shown(line: str) -> None:
    from skink.cli.app import app

    _, name, *arguments = shlex.split(line)
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert name in commands
    known = {option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("--")} <= known | {"--help"}


def test_there_are_commands_to_check() -> None:
    assert any(line.startswith("skink compress") for line in _commands())
