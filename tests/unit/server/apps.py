"""A Flower App whose ServerApp does as its run config says, in few lines and without torch."""

from __future__ import annotations

from pathlib import Path

from fedlearn.app import App

SERVER = '''
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import ServerApp

from fedlearn import events
from fedlearn.release.keys import record_key

app = ServerApp()


@app.main()
def main(grid, context):
    """Each round: ask every client for its square, and keep the sum in the journal."""
    runtime, config = grid.runtime, context.run_config
    done = int((runtime.journal.get("done") or b"0").decode())
    total = int((runtime.journal.get("total") or b"0").decode())
    nodes = grid.wait_nodes(config["clients"], 20)
    names = tuple(sorted(runtime.client_name(node) for node in nodes))
    if config["unit"]:
        runtime.emit(events.PrivacyStated(runtime.run_id, {"unit": config["unit"], "state": "planned"}))
    runtime.emit(events.RunStarted(runtime.run_id, "squares", config["rounds"], done, names, 1, "sum"))
    for number in range(done + 1, config["rounds"] + 1):
        if runtime.should_stop():
            runtime.emit(events.RunStopped(runtime.run_id, number - 1))
            return
        runtime.emit(events.RoundStarted(runtime.run_id, number, 1, len(nodes)))
        asked = [Message(RecordDict({"ask": ConfigRecord({"n": number})}), node, "query") for node in nodes]
        replies = grid.send_and_receive(asked, timeout=20)
        if config["fail"] == number:
            raise ValueError("no such luck")
        total += sum(reply.content["answer"]["n"] for reply in replies)
        row = b'{"attempt":1,"clients":%d,"total":%d}' % (len(nodes), total)
        changes = {"done": b"%d" % number, "total": b"%d" % total, record_key("commit", runtime.run_id, number): row}
        runtime.journal.write(changes)
        runtime.emit(events.RoundFinished(runtime.run_id, number, 1, len(nodes), 0, 0.0, 0.0, float(total)))
    runtime.emit(events.RunFinished(runtime.run_id, config["rounds"], 0.0, str(total)))
    runtime.checkpoints.finish(b"%d" % total, {})
'''

SETTINGS = """
[tool.flwr.app.components]
serverapp = "squares.server_app:app"
clientapp = "squares.client_app:app"

[tool.flwr.app.config]
rounds = 3
clients = 1
fail = 0
unit = ""
nested.name = "x"
"""


def squares(folder: Path) -> App:
    """The app, written to `folder`. Its ServerApp is loaded by path, since tests share one `sys.modules`."""
    package = folder / "squares"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "server_app.py").write_text(SERVER)
    (folder / "pyproject.toml").write_text(SETTINGS)
    return App(folder, "squares.server_app:app", "squares.client_app:app", native=False)
