"""fedlearn: one model from many organisations' data, without anyone showing theirs.

`simulate` rehearses a federation in this process; the command `fedlearn` runs real ones. Names are imported when they
are first used, so that `import fedlearn` is quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlearn.errors import FedlearnError
    from fedlearn.simulation.run import SimulationResult, simulate
    from fedlearn.study import Study, load_study

__version__ = "0.1.0"
__all__ = ["FedlearnError", "SimulationResult", "Study", "load_study", "simulate"]

_HOMES = {
    "FedlearnError": "fedlearn.errors",
    "SimulationResult": "fedlearn.simulation.run",
    "Study": "fedlearn.study",
    "load_study": "fedlearn.study",
    "simulate": "fedlearn.simulation.run",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
