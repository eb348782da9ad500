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
Data = Annotated[
    Path | None, typer.Option("--data", metavar="PATH", help="Everybody's data, in place of what ships with the task.")
]
Device = Annotated[str | None, typer.Option("--device", metavar="NAME", help="auto, cpu or cuda:N; cpu without it.")]
BackendName = Annotated[
    str | None,
    typer.Option("--backend", metavar="NAME", help="How clients are trained: auto, batched, sequential, ray."),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", min=1, metavar="N", help="Trained at the same time; as many as cores without it."),
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
