"""Where every command starts and ends: whatever goes wrong becomes one clear message and one exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Final

from fedlearn.errors import INTERRUPTED_EXIT_CODE, USAGE_EXIT_CODE, FedlearnError

INTERNAL_EXIT_CODE: Final = 1
BROKEN_PIPE_EXIT_CODE: Final = 141
"""128 + SIGPIPE, as a shell reports a program whose reader went away."""
DEBUG_VARIABLE: Final = "FEDLEARN_DEBUG"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments without the program's name; None takes the process's own.

    Returns:
        The exit code; see `fedlearn exit-codes`. Nothing is raised.
    """
    import click

    from fedlearn.cli.commands import app

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        result = app(args=arguments, prog_name="fedlearn", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message())
        return USAGE_EXIT_CODE
    except click.ClickException as error:
        return _usage(error)
    except FedlearnError as error:
        _trace_if_asked(arguments)
        return _say(error.message, error.hint, error.exit_code)
    except (KeyboardInterrupt, click.Abort, EOFError):
        return _say_interrupted()
    except BrokenPipeError:
        return _broken_pipe()
    except Exception as error:  # a defect: still one message and an exit code
        _trace_if_asked(arguments)
        return _say(f"{type(error).__name__}: {error}", _defect_hint(arguments), INTERNAL_EXIT_CODE)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    return result if isinstance(result, int) else 0


def _usage(error: Exception) -> int:
    import click

    assert isinstance(error, click.ClickException)
    context = getattr(error, "ctx", None)
    return _say(error.format_message(), f"{context.command_path} --help" if context else "", USAGE_EXIT_CODE)


def _say(message: str, hint: str, code: int) -> int:
    try:
        print(f"error: {message}", file=sys.stderr)
        if hint:
            print(f"hint:  {hint}", file=sys.stderr, flush=True)
    except BrokenPipeError:
        return _broken_pipe()
    return code


def _say_interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE


def _broken_pipe() -> int:
    # The reader is gone, so nothing can be said; without this the interpreter would complain at exit.
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    return BROKEN_PIPE_EXIT_CODE


def _debug(arguments: list[str]) -> bool:
    return "--debug" in arguments or os.environ.get(DEBUG_VARIABLE, "") not in {"", "0"}


def _trace_if_asked(arguments: list[str]) -> None:
    if _debug(arguments):
        traceback.print_exc()


def _defect_hint(arguments: list[str]) -> str:
    if _debug(arguments):
        return "this is a defect of fedlearn: please report it with the traceback above"
    return "this is a defect of fedlearn: run it again with --debug, and report what it prints"
