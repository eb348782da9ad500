"""typer, as this program uses it: plain help that fits a pipe and a README."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, Final, get_args, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import ArgumentInfo

if TYPE_CHECKING:
    import click

SETTINGS: Final = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Command(TyperCommand):
    """A command whose help has its arguments' text, and brackets without the escapes that rich would need."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        texts = _argument_texts(self.callback)
        arguments, options = [], []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append((parameter.make_metavar(ctx), texts.get(str(parameter.name), "")))
            else:
                options.append((record[0], record[1].replace("\\[", "[")))
        for title, records in (("Arguments", arguments), ("Options", options)):
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def group(text: str) -> typer.Typer:
    """A group of commands."""
    return typer.Typer(
        help=text,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        add_completion=False,
        suggest_commands=False,  # click does it
        context_settings=SETTINGS,
    )


def add(to: typer.Typer, name: str, function: Any, short: str, *examples: str) -> None:
    """Add a command with its one-line summary for listings and the examples at the end of its help."""
    epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples)
    to.command(name, cls=Command, short_help=short, epilog=epilog, context_settings=SETTINGS)(function)


def _argument_texts(callback: Any) -> dict[str, str]:
    # click 8.2 and later reset the help that typer gives an argument, so it is read where it was written.
    hints = get_type_hints(inspect.unwrap(callback), include_extras=True)
    found = {name: [a for a in get_args(hint) if isinstance(a, ArgumentInfo)] for name, hint in hints.items()}
    return {name: infos[0].help or "" for name, infos in found.items() if infos}
