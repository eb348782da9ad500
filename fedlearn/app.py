"""An app: the folder with `server/`, `client/`, `strategies/` and `simulations/`, loaded the way Flower loads one.

In a checkout the app is the repository's root; in an installed wheel it travels as files inside the package. `--app DIR` names somebody
else's Flower App. The folder goes first on `sys.path` and its parts are imported by name; nothing is executed that was not
installed on this machine.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedlearn.errors import StudyError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fedlearn.learning.strategy import Strategy

APP_FOLDERS = ("server", "client", "strategies")

RUN_CONFIG = "fedlearn.run-config"
"""The record by which a coordinator tells sites a foreign app's run config. Flower tells its SuperNodes beside the messages."""


@dataclass(frozen=True)
class App:
    """An app's folder, on `sys.path`.

    Args:
        root: the folder.
        server: where the ServerApp is, as module:attribute.
        client: where the ClientApp is, as module:attribute.
        native: True for fedlearn's own app, False for a foreign Flower App.
    """

    root: Path
    server: str = "server.app:app"
    client: str = "client.app:app"
    native: bool = True

    @property
    def server_app(self) -> Any:
        """The Flower ServerApp."""
        return _attribute(self.server, self.root)

    @property
    def client_app(self) -> Any:
        """The Flower ClientApp."""
        return _attribute(self.client, self.root)

    def strategy(self, name: str, options: Mapping[str, Any]) -> Strategy:
        """A strategy of the app's registry.

        Raises:
            StudyError: no strategy of that name, or an option that it does not take.
        """
        strategy: Strategy = importlib.import_module("strategies").create(name, dict(options))
        return strategy

    @property
    def digest(self) -> str:
        """SHA-256 over the app's Python files, as hex: what a site admits, and a run's manifest names."""
        sha = hashlib.sha256()
        for folder in APP_FOLDERS if self.native else (".",):
            for path in sorted((self.root / folder).rglob("*.py")):
                data = path.read_bytes()
                sha.update(f"{path.relative_to(self.root).as_posix()}:{len(data)};".encode() + data)
        return sha.hexdigest()

    @property
    def config(self) -> dict[str, bool | int | float | str]:
        """`[tool.flwr.app.config]` of the app's pyproject.toml, nested tables as dotted keys; empty where there is none.

        Raises:
            StudyError: a value is neither number, text nor truth value.
        """
        settings = self.root / "pyproject.toml"
        if not settings.is_file():
            return {}
        app = tomllib.loads(settings.read_text(encoding="utf-8")).get("tool", {}).get("flwr", {}).get("app", {})
        return flat_config(app.get("config", {}), str(settings))

    def study(self, name: str) -> Path:
        """A study's path: as it stands, or among the app's own.

        Raises:
            StudyError: there is none; the hint names one that is.
        """
        path = Path(name)
        inside = self.root / name
        if path.exists() or inside.exists():
            return path if path.exists() else inside
        own = [file.relative_to(self.root).as_posix() for file in sorted(self.root.glob("simulations/**/*.toml"))]
        known = {Path(one).stem: one for one in [*reversed(own), *map(str, path.parent.glob("*.toml"))]}
        near = difflib.get_close_matches(path.stem, known, n=1)
        named = f"the app's own: {', '.join(one for one in own if one.count('/') == 1)}" if own else "name a TOML file"
        raise StudyError(f"{path}: no such study file", hint=f"did you mean {known[near[0]]}?" if near else named)


def flat_config(tree: Mapping[str, Any], origin: str, prefix: str = "") -> dict[str, bool | int | float | str]:
    """A run config as Flower has it: nested tables become dotted keys.

    Raises:
        StudyError: a value is neither number, text nor truth value.
    """
    found: dict[str, bool | int | float | str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat_config(value, origin, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            found[prefix + key] = value
        else:
            kind = type(value).__name__
            raise StudyError(f"{origin}: {prefix + key} is {kind}, expected a number, text or true/false")
    return found


def own_root() -> Path:
    """fedlearn's own app: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    installed = package / "_app"
    return installed if installed.is_dir() else package.parent


def app_of(module_file: str) -> App:
    """The app that a module such as `server/app.py` belongs to, wherever it was loaded from.

    Whoever imported the module put the app's folder on `sys.path`: `load_app`, or Flower after it unpacked a FAB. So both
    sides take their strategies from the app that they were told to run, and not from another copy on this machine.
    """
    return App(Path(module_file).resolve().parents[1])


def load_app(folder: Path | str | None = None) -> App:
    """Put an app's folder first on `sys.path` and say where its parts are.

    A folder without a Flower App in its pyproject.toml holds tasks only: it is put on the path before fedlearn's own app.

    Raises:
        StudyError: the folder does not exist, or its pyproject.toml cannot be read.
    """
    own = own_root()
    _first_on_path(own)
    if folder is None:
        return App(own)
    root = Path(folder).resolve()
    if not root.is_dir():
        raise StudyError(f"--app {folder}: no such folder")
    _first_on_path(root)
    settings = root / "pyproject.toml"
    if root == own or not settings.is_file():
        return App(own)
    try:
        components = tomllib.loads(settings.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["components"]
        return App(root, str(components["serverapp"]), str(components["clientapp"]), native=False)
    except (KeyError, TypeError):
        return App(own)
    except (OSError, ValueError) as error:  # not TOML, or not UTF-8
        raise StudyError(f"{settings}: cannot be read: {error}") from None


def _first_on_path(folder: Path) -> None:
    entry = str(folder)
    if entry in sys.path:
        sys.path.remove(entry)
    sys.path.insert(0, entry)


def _attribute(reference: str, root: Path) -> Any:
    module, _, attribute = reference.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        raise StudyError(f"app {root}: {reference!r} cannot be loaded: {error}") from None
