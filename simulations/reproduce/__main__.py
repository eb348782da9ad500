"""Comparisons: every arm over several seeds, a table with deviations, and a figure.

    python -m simulations.reproduce [drift-0.1 drift-0.5 text heart] [--seeds 5] [--jobs 2] [--out DIR] [--write]
    python -m simulations.reproduce privacy --seeds 3

What was run is kept in --out, so a second call goes on where the first one stopped. README.md says what the papers found and how far
this agrees; ../privacy/README.md what privacy costs. `privacy` stands for all comparisons whose names begin so.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from simulations.reproduce.runs import HERE, Comparison, figure, run, table


def _adam(client_lr: float, server_lr: float) -> tuple[str, ...]:
    return ("strategy.name=fedadam", f"train.lr={client_lr}", f"strategy.options.server_lr={server_lr}")


def _private(study: str, title: str, metric: str, none: tuple[str, ...] = (), **more: Any) -> Comparison:
    """Epsilon 1, 3, 8 of the study in ../privacy, and the same task without privacy: of that study with other settings, or of another."""
    arms = {f"epsilon {epsilon}": (f"privacy.epsilon={epsilon}",) for epsilon in (1, 3, 8)}
    return Comparison(
        f"../privacy/{study}", title, metric, {**arms, "none": none}, last=1, results="../privacy/results", **more
    )


_DRIFT = {
    "FedAvg": ("strategy.name=fedavg",),
    "FedProx, mu 0.1": ("strategy.name=fedprox", "strategy.options.mu=0.1"),
    "FedProx, mu 1": ("strategy.name=fedprox", "strategy.options.mu=1.0"),
    "SCAFFOLD": ("strategy.name=scaffold",),
}
COMPARISONS = {
    f"drift-{alpha}": Comparison(
        "drift",
        f"Digits, 10 clients, Dirichlet {alpha}",
        "accuracy",
        _DRIFT,
        (f"data.options.alpha={alpha}",),
        reach=reach,
    )
    for alpha, reach in ((0.1, 0.90), (0.5, 0.97))
} | {
    "text": Comparison(
        "text",
        "Next character, transformer, 10 of 463 people a round",
        "top1",
        {
            "FedAvg, client 0.1": ("train.lr=0.1",),
            "FedAvg, client 0.3": ("train.lr=0.3",),
            "FedAdam, client 0.1, server 0.01": _adam(0.1, 0.01),
            "FedAdam, client 0.3, server 0.01": _adam(0.3, 0.01),
        },
        reach=0.25,
    ),
    "heart": Comparison(
        "heart",
        "FLamby's 740 patients, one fold a seed",
        "accuracy",
        {
            "FedAvg": ("strategy.name=fedavg",),
            "FedProx, mu 0.01": ("strategy.name=fedprox", "strategy.options.mu=0.01"),
            "SCAFFOLD": ("strategy.name=scaffold",),
            "FedAdagrad": ("strategy.name=fedadagrad", "strategy.options.server_lr=0.1"),
            "FedAdam": ("strategy.name=fedadam", "strategy.options.server_lr=0.01"),
            "FedYogi": ("strategy.name=fedyogi", "strategy.options.server_lr=0.01"),
        },
        by_fold=True,
    ),
    "privacy-heart": _private(
        "heart", "Heart disease, four hospitals", "auc", by_fold=True, apart={"none": "../heart"}
    ),
    "privacy-digits": _private(
        "digits", "Digits, ten clients under label skew", "accuracy", apart={"none": "../digits"}
    ),
    "privacy-fraud": _private("fraud", "Card fraud, five banks", "average_precision", apart={"none": "../fraud"}),
    "privacy-keyboard": _private(
        "keyboard",
        "Next character, 635 people",
        "top1",
        ("privacy=none", "cohort.rate=none", "cohort.size=127"),
        backend="auto",
    ),
    "privacy-fashion": _private(
        "fashion", "Fashion-MNIST, ten clients", "accuracy", ("privacy=none",), data="fashion-mnist.npz"
    ),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(COMPARISONS)}; all without it")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--write", action="store_true", help="write tables and figures beside the studies")
    arguments = parser.parse_args()
    named = [
        name for name in COMPARISONS if not arguments.names or {name, name.partition("-")[0]} & set(arguments.names)
    ]
    unknown = [name for name in arguments.names if not any(name in {one, one.partition("-")[0]} for one in COMPARISONS)]
    if unknown or arguments.seeds < 2:
        parser.error(f"unknown: {', '.join(unknown)}" if unknown else "--seeds: expected 2 or more")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for name in named:
        comparison = COMPARISONS[name]
        if comparison.data and not Path(comparison.data).exists():
            sys.stderr.write(f"{name}: left out, {comparison.data} is not here; its study says how to make it\n")
            continue
        found = run(comparison, arguments.seeds, arguments.jobs, arguments.out)
        folder = HERE / comparison.results if arguments.write else arguments.out
        folder.mkdir(exist_ok=True)
        text = table(name, comparison, found)
        (folder / f"{name}.md").write_text(text, encoding="utf-8")
        figure(comparison, found, folder / f"{name}.png")
        sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
