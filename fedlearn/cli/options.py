"""Options that several commands share, each declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

TLS_VARIABLE: Final = "FEDLEARN_TLS"
SERVER_VARIABLE: Final = "FEDLEARN_SERVER"

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks, and log more.")]
Rounds = Annotated[int | None, typer.Option("--rounds", min=1, help="Override the study's number of rounds.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override any key of the study; may be given again."),
]
AppFolder = Annotated[
    Path | None, typer.Option("--app", metavar="DIR", help="A folder with tasks of your own, or a whole Flower App.")
]
Server = Annotated[
    str, typer.Option("--server", metavar="HOST:PORT", envvar=SERVER_VARIABLE, help="Where the coordinator listens.")
]
Tls = Annotated[
    Path | None,
    typer.Option(
        "--tls",
        metavar="DIR",
        envvar=TLS_VARIABLE,
        help="Folder with ca.pem, cert.pem and key.pem of who you are.",
    ),
]
