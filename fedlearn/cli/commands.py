"""All commands and their examples. Importing this is quick: a command's own imports happen when it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from fedlearn import __version__
from fedlearn.cli import (
    audit,
    catalogue,
    certs,
    check_model,
    compare,
    demo,
    ledger,
    model,
    privacy,
    processes,
    runs,
    secagg,
    simulate,
    sweep,
)
from fedlearn.cli.framework import add, group

app = group("One model from many organisations' data, without anyone showing theirs.")
models = group("The final model: fetch it, export it, score a file with it.")
plans = group("Privacy plans: what they cost.")
ledgers = group("A site's ledger of what was spent on its data.")
data = group("Tasks, their data, licences and clients.")
authority = group("Certificates of a coordinator's development authority.")
aggregation = group("Secure aggregation: what it costs and withstands.")
AT = "--server 127.0.0.1:9443"


def _version(asked: bool) -> None:
    if asked:
        print(f"fedlearn {__version__}")
        raise typer.Exit


@app.callback(epilog="Exit codes: fedlearn exit-codes. Documentation: docs/ in the repository.")
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    del version


add(
    app,
    "simulate",
    simulate.simulate,
    "Run a study with all its clients in this process.",
    "fedlearn simulate simulations/heart.toml",
    "fedlearn simulate simulations/heart.toml --rounds 5 --set strategy.name=fedprox",
    "fedlearn simulate simulations/heart.toml --json --out runs/first",
    "fedlearn simulate --resume runs/first",
    "fedlearn simulate simulations/heart.toml --profile",
    "fedlearn simulate simulations/heart.toml --inline cleveland --round 3",
)
add(
    app,
    "sweep",
    sweep.sweep,
    "Run a grid of studies and compare them.",
    "fedlearn sweep simulations/heart.toml --grid strategy=fedavg,fedprox --grid seed=0..4",
    "fedlearn sweep simulations/heart.toml --grid lr=0.03,0.1,0.3 --workers 2 --json",
)
add(
    app,
    "compare",
    compare.compare,
    "Compare run folders: a table and a plot.",
    "fedlearn compare runs/first runs/second --plot both.png",
)
add(
    app,
    "demo",
    demo.demo,
    "Four real hospitals train one model on this machine.",
    "fedlearn demo",
    "fedlearn demo --rounds 5 --out my-demo",
)
add(
    app,
    "server",
    processes.server,
    "The coordinator: accepts sites and runs, and stays.",
    "fedlearn server --listen 127.0.0.1:9443 --state coordinator",
    "fedlearn server --listen 0.0.0.0:9443 --host fl.example.org --state /var/lib/fedlearn",
)
add(
    app,
    "client",
    processes.client,
    "A site: dials out to the coordinator, and stays.",
    f"fedlearn client {AT} --tls cleveland --task hospital/heart --data heart.csv",
    f"fedlearn client --check {AT} --tls cleveland --task hospital/heart --data heart.csv",
    f"fedlearn client --check {AT} --tls cleveland --task hospital/heart --policy policy.toml --study study.toml",
)
add(
    app,
    "run",
    runs.run,
    "Submit a study to a coordinator and watch it live.",
    f"fedlearn run simulations/heart.toml {AT} --tls coordinator/tls/operator",
    f"fedlearn run simulations/heart.toml {AT} --rounds 5 --detach",
)
add(app, "runs", runs.runs, "List the coordinator's runs.", f"fedlearn runs {AT} --tls coordinator/tls/operator")
add(app, "show", runs.show, "Show one run: its rounds and last scores.", f"fedlearn show RUN {AT}")
add(app, "watch", runs.watch, "Watch a run live, from its first event on.", f"fedlearn watch RUN {AT}")
add(app, "stop", runs.stop, "Stop a run after the round that it is in.", f"fedlearn stop RUN {AT}")
add(app, "nodes", runs.nodes, "List the sites that the coordinator knows.", f"fedlearn nodes {AT}")
add(
    models,
    "get",
    model.get,
    "Fetch a finished run's model.",
    f"fedlearn model get RUN {AT} --out heart-model",
)
add(
    models,
    "export",
    model.export,
    "Export a model as safetensors, TorchScript or ONNX.",
    "fedlearn model export heart-model --format onnx --out heart.onnx",
    "fedlearn model export heart-model --format torchscript --out heart.pt",
)
add(
    models,
    "predict",
    model.predict,
    "Score a file with a model.",
    "fedlearn model predict heart-model --data patients.csv --out scores.csv",
    "fedlearn model predict heart-model --data new.csv --reference ours.csv",
)
add(data, "list", catalogue.list_tasks, "List the tasks.", "fedlearn data list", "fedlearn data list --json")
add(
    data,
    "show",
    catalogue.show_task,
    "Show a task: data, licence, clients, schema.",
    "fedlearn data show hospital/heart",
    "fedlearn data show hospital/heart --plot split.png --study simulations/heart.toml",
)
add(
    authority,
    "issue",
    certs.issue,
    "Issue a certificate to a site or an operator.",
    "fedlearn certs issue cleveland --state coordinator",
    "fedlearn certs issue ada --role operator --state coordinator --out ada-tls",
)
add(
    aggregation,
    "plan",
    secagg.plan,
    "Print what a plan costs and withstands.",
    "fedlearn secagg plan --clients 100 --adversarial 0.1 --dropout 0.1 --parameters 1.7e6",
    "fedlearn secagg plan --clients 4 --parameters 50000 --profile malicious --json",
)
add(
    plans,
    "plan",
    privacy.plan,
    "Work out what a study's privacy would cost.",
    "fedlearn privacy plan simulations/heart.toml --epsilon 3 --units 1000 --rate 0.05 --steps 10",
    "fedlearn privacy plan simulations/keyboard.toml --unit client --units 463 --delta 1e-4 --noise 2",
)
add(
    ledgers,
    "show",
    ledger.show,
    "Show what a site's accounts have spent.",
    "fedlearn ledger show state/cleveland",
    "fedlearn ledger show state/cleveland/ledgers/heart",
)
add(
    ledgers,
    "verify",
    ledger.verify,
    "Check a ledger's hashes and signatures.",
    "fedlearn ledger verify state/ledgers/heart --head remembered.json",
)
add(
    ledgers,
    "export",
    ledger.export,
    "Write a ledger as one JSON document.",
    "fedlearn ledger export state/ledgers/heart --out heart-ledger.json",
)
add(
    app,
    "audit",
    audit.audit,
    "Put a study's privacy claim to the test.",
    "fedlearn audit simulations/privacy/heart.toml --plot audit.png",
    "fedlearn audit simulations/privacy/heart.toml --set privacy.epsilon=1 --client hungary --shadows 0 --json",
    "fedlearn audit simulations/privacy/keyboard.toml --delta 1e-6 --canaries 2000",
)
add(
    app,
    "check-model",
    check_model.check_model,
    "Say whether a study's model can train privately.",
    "fedlearn check-model simulations/heart.toml",
    "fedlearn check-model study.toml --out model.diff",
)
app.add_typer(models, name="model")
app.add_typer(plans, name="privacy")
app.add_typer(ledgers, name="ledger")
app.add_typer(data, name="data")
app.add_typer(authority, name="certs")
app.add_typer(aggregation, name="secagg")
add(app, "strategies", catalogue.strategies, "List the federated algorithms.", "fedlearn strategies")
add(app, "exit-codes", catalogue.exit_codes, "List the exit codes.", "fedlearn exit-codes --json")
