"""`fedlearn certs`, and what a coordinator makes on its first start when nobody gave it certificates."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final

import typer

from fedlearn.cli.options import Debug, Json
from fedlearn.cli.output import print_json
from fedlearn.errors import TlsError

AUTHORITY: Final = "tls"
"""The authority's folder inside a coordinator's state folder; what it issues for the coordinator lies below it."""
SERVER_BUNDLE: Final = "tls/server"
OPERATOR_BUNDLE: Final = "tls/operator"
CLIENT_BUNDLES: Final = "tls/clients"
DEVELOPMENT_NOTICE: Final = (
    "this authority is for development: whoever reads its key can pose as any site or operator, and nothing is revoked"
)


class IssuedRole(StrEnum):
    """Roles as the command line names them."""

    client = "client"
    operator = "operator"
    server = "server"


def issue(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Who holds it, such as a hospital's name.")],
    state: Annotated[Path, typer.Option("--state", metavar="DIR", help="The coordinator's state folder.")],
    role: Annotated[IssuedRole, typer.Option("--role", help="What its holder may do.")] = IssuedRole.client,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Where to write it; STATE/tls/clients/NAME without it.")
    ] = None,
    host: Annotated[
        list[str] | None,
        typer.Option("--host", help="For --role server: a DNS name or address that sites dial; may be given again."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Issue a certificate: ca.pem, cert.pem and key.pem in one folder, to be carried to its holder.

    A site's name is the client's id in every study: a hospital called cleveland needs a certificate for cleveland.
    """
    del debug
    from fedlearn.link import tls

    authority = state / AUTHORITY
    if not (authority / tls.CA_KEY_FILE).is_file():
        raise TlsError(
            f"{authority}: holds no development authority",
            hint=f"`fedlearn server --state {state}` makes one when it starts for the first time",
        )
    folder = out if out is not None else state / _default_place(role, name)
    written = tls.issue(authority, name, tls.Role(role.value), folder, hosts=_hosts(host or ()))
    if json:
        print_json({"name": name, "role": role.value, "folder": str(written), "development": True})
        return
    print(f"{role.value} {name}: {written}")
    print(f"note: {DEVELOPMENT_NOTICE}")


def coordinator_bundles(state: Path, hosts: Sequence[str]) -> tuple[Path, bool]:
    """The server bundle in a state folder; made, with its authority and an operator's bundle, where it is missing.

    Returns:
        The folder, and whether anything was made.

    Raises:
        TlsError: the folder cannot be written.
    """
    from fedlearn.link import tls

    authority, server, operator = state / AUTHORITY, state / SERVER_BUNDLE, state / OPERATOR_BUNDLE
    made = False
    if not (authority / tls.CA_FILE).is_file():
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        tls.create_authority(authority)
        made = True
    for folder, name, role in ((server, "coordinator", tls.Role.SERVER), (operator, "operator", tls.Role.OPERATOR)):
        if not (folder / tls.CERT_FILE).is_file():
            tls.issue(authority, name, role, folder, hosts=_hosts(hosts))
            made = True
    return server, made


def _default_place(role: IssuedRole, name: str) -> str:
    places: dict[Any, str] = {IssuedRole.server: SERVER_BUNDLE, IssuedRole.operator: f"tls/operators/{name}"}
    return places.get(role, f"{CLIENT_BUNDLES}/{name}")


def _hosts(extra: Sequence[str]) -> tuple[str, ...]:
    from fedlearn.link.tls import LOCAL_HOSTS

    return tuple(dict.fromkeys([*LOCAL_HOSTS, *extra]))
