"""A sweep's worker: `python -m fedlearn.simulation.cell` runs one study after another for the process that started it.

Lines of JSON in: `{"index", "study", "folder", "setting", "workers"}` is a study to run, `{"stop": true}` ends the one that runs after its
round. Lines of JSON out: `{"index", "kind"}` with the kind `progress` (`round`, `rounds`), `finished`, `stopped` (`scored`) or `failed` (`reason`, `hint`).
When standard input ends, whoever wanted the results is gone: so is this process, and the run folder is resumed another time.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

from fedlearn import events


def main() -> int:
    """Serve until standard input ends."""
    # A task may print whatever it likes: the protocol has a descriptor of its own.
    out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    jobs: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    threading.Thread(target=_listen, args=(jobs, stop), daemon=True).start()
    while True:
        job = jobs.get()
        _say(out, job["index"], **_run(job, out, stop))


def _listen(jobs: queue.SimpleQueue[dict[str, Any]], stop: threading.Event) -> None:
    for line in sys.stdin:
        order = json.loads(line)
        if order.get("stop"):
            stop.set()
        else:
            jobs.put(order)
    os._exit(0)


def _run(job: dict[str, Any], out: TextIO, stop: threading.Event) -> dict[str, Any]:
    from fedlearn.errors import FedlearnError
    from fedlearn.simulation.run import simulate
    from fedlearn.simulation.workspace import RUN
    from fedlearn.study import study_from_json

    def note(event: events.Event) -> None:
        if isinstance(event, events.RunStarted):
            _say(out, job["index"], kind="progress", round=event.rounds_done, rounds=event.rounds)
        elif isinstance(event, events.RoundFinished):
            _say(out, job["index"], kind="progress", round=event.round)

    folder = Path(job["folder"])
    begun = (folder / RUN).exists()
    try:
        result = simulate(
            study_from_json(job["study"]),
            **job["setting"],
            workers=job["workers"],
            out=None if begun else folder,
            resume=folder if begun else None,
            emit=note,
            told=lambda failure: None,  # noqa: ARG005  # it is in the run folder
            should_stop=stop.is_set,
        )
    except FedlearnError as error:
        return {"kind": "failed", "reason": error.message, "hint": error.hint}
    except Exception as error:  # of a user's task, outside any client: this study's alone
        traceback.print_exc()
        return {
            "kind": "failed",
            "reason": f"{type(error).__name__}: {error}",
            "hint": "the worker's log has the traceback",
        }
    history = result.history
    scored = f"{history.metric} {history.final():.4f}" if history.metric in history.columns else ""
    return {"kind": "stopped" if result.stopped else "finished", "scored": scored}


def _say(out: TextIO, index: int, **what: Any) -> None:
    out.write(json.dumps({"index": index, **what}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
