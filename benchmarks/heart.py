"""What federation gives each of four hospitals: local-only, federated and pooled training on UCI heart disease.

Repeated stratified 5-fold cross-validation over 10 seeds, with the real engine and the study as it ships: the same model, optimiser
and number of passes everywhere. "Local-only" trains each hospital alone; "pooled" pretends that all rows may lie in one place;
"local LR" is scikit-learn's logistic regression at each hospital, a second opinion on what one site can do alone.

Two intervals stand beside each difference, because they answer different questions:

  splits    t-interval over the seeds' out-of-fold AUCs: these patients, other splits and initial weights.
  patients  bootstrap over patients of the out-of-fold scores averaged over seeds, 2,000 draws, paired: other patients
            from the same hospitals. It is the wider one, and with 51 healthy patients at VA it stays wide.

    python benchmarks/heart.py [--flamby] [--seeds 10] [--jobs 2] [--json] [--write]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import multiprocessing  # noqa: E402  # after the path is set, as the next one

from fedlearn import seeds  # noqa: E402
from fedlearn.data.population import build_population  # noqa: E402
from fedlearn.learning.metrics import roc_auc  # noqa: E402
from fedlearn.learning.population import Population  # noqa: E402
from fedlearn.learning.task import Batch, ClientData  # noqa: E402
from fedlearn.study import Study, load_study  # noqa: E402
from fedlearn.tasks import load_task  # noqa: E402

FOLDS = 5
DRAWS = 2_000
WAYS = ("local", "local LR", "federated", "pooled")
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
WITHIN_OF_POOLED = 0.02
MUST_GAIN = "va-long-beach"


@dataclasses.dataclass(frozen=True)
class Together(Population):
    """All hospitals' prepared rows as one client, each imputed at home, so that only the training differs."""

    def client(self, client_id: str) -> ClientData:
        if client_id != "pooled":
            return super().client(client_id)
        parts = [super(Together, self).client(hospital) for hospital in self.rows if hospital != "pooled"]

        def join(batches: list[Batch]) -> Batch:
            return Batch(np.concatenate([b.x for b in batches]), np.concatenate([b.y for b in batches]))

        return ClientData(join([p.train for p in parts]), join([p.test for p in parts]))

    @property
    def client_ids(self) -> tuple[str, ...]:
        return ("pooled",)


def one_split(study_json: str, seed: int, fold: int) -> tuple[int, dict[str, dict[str, dict[int, float]]]]:
    """Out-of-fold scores of one split: way, hospital, row number, score."""
    import torch
    from sklearn.linear_model import LogisticRegression

    from fedlearn.simulation.run import simulate_population

    torch.set_num_threads(1)
    study = Study.model_validate_json(study_json)
    tree = study.model_dump() | {"seed": seed}
    tree["data"] |= {"folds": FOLDS, "fold": fold}
    tree["evaluate"] |= {"every": 0}
    study = Study.model_validate(tree)
    alone = Study.model_validate(tree | {"cohort": {"minimum": 1}})
    task = load_task(study.task.name, study.task.options)
    population = build_population(study, task)
    arguments = (task, population.examples, population.rows, population.seed, FOLDS, fold)

    def scores(model: torch.nn.Module, hospital: str) -> list[float]:
        with torch.no_grad():
            return torch.sigmoid(model(torch.from_numpy(population.client(hospital).test.x))[:, 0]).tolist()

    federated = simulate_population(study, population).model
    pooled = simulate_population(alone, Together(*arguments)).model
    out: dict[str, dict[str, dict[int, float]]] = {way: {} for way in WAYS}
    for hospital, rows in population.rows.items():
        data = population.client(hospital)
        local = simulate_population(alone, dataclasses.replace(population, rows={hospital: rows})).model
        regression = np.full(len(data.test), data.train.y.mean())
        if 0 < data.train.y.mean() < 1:  # one healthy patient in FLamby's Switzerland: some folds train without
            fitted = LogisticRegression(max_iter=2_000).fit(data.train.x, data.train.y)
            regression = fitted.predict_proba(data.test.x)[:, 1]
        found = {
            "local": scores(local, hospital),
            "local LR": regression.tolist(),
            "federated": scores(federated, hospital),
            "pooled": scores(pooled, hospital),
        }
        mine = population.examples.take(rows)
        _, test = task.split(mine, seeds.derive(population.seed, "split", hospital), FOLDS, fold)
        for way, values in found.items():
            out[way][hospital] = dict(zip(rows[test].tolist(), values, strict=True))
    return seed, out


def t_interval(values: np.ndarray) -> tuple[float, float]:
    half = T_975[len(values)] * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def bootstrap(a: np.ndarray, b: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """95 % percentile interval of AUC(a) - AUC(b) over resampled patients; draws with one class only are drawn again."""
    g = np.random.default_rng(0)
    differences = []
    while len(differences) < DRAWS:
        i = g.integers(0, len(y), len(y))
        if 0 < y[i].sum() < len(y):
            differences.append(roc_auc(a[i], y[i]) - roc_auc(b[i], y[i]))
    low, high = np.percentile(differences, [2.5, 97.5])
    return float(low), float(high)


def summarise(splits: list, y: np.ndarray, hospitals: dict[str, np.ndarray]) -> dict:
    by_seed: dict[int, dict[str, dict[int, float]]] = {}
    for seed, out in splits:
        scores = by_seed.setdefault(seed, {way: {} for way in WAYS})
        for way in WAYS:
            for part in out[way].values():
                scores[way].update(part)
    groups = {**hospitals, "all patients": np.concatenate(list(hospitals.values()))}
    report: dict[str, dict] = {}
    for name, rows in groups.items():
        table = {w: np.array([[s[w][r] for r in rows.tolist()] for s in by_seed.values()]) for w in WAYS}
        auc = {w: np.array([roc_auc(one, y[rows]) for one in table[w]]) for w in WAYS}
        pairs = [("federated", "local"), ("federated", "local LR"), ("federated", "pooled")]
        report[name] = {
            "patients": len(rows),
            "healthy": int((y[rows] == 0).sum()),
            "auc": {w: {"mean": float(auc[w].mean()), "splits": t_interval(auc[w])} for w in WAYS},
            "difference": {
                f"{a} - {b}": {
                    "mean": float((auc[a] - auc[b]).mean()),
                    "splits": t_interval(auc[a] - auc[b]),
                    "patients": bootstrap(table[a].mean(axis=0), table[b].mean(axis=0), y[rows]),
                }
                for a, b in pairs
            },
        }
    return report


def markdown(report: dict, verdict: dict, study: Study, n_seeds: int, seconds: float) -> str:
    def span(pair: tuple[float, float]) -> str:
        return f"{pair[0]:+.3f} to {pair[1]:+.3f}"

    lines = [
        f"# {study.description}",
        "",
        f"`python benchmarks/heart.py`: stratified {FOLDS}-fold over {n_seeds} seeds, study `{study.name}` as it ships, {seconds:.0f} s.",
        "Out-of-fold AUC, mean over seeds.",
        "",
        "| | patients (healthy) | " + " | ".join(WAYS) + " |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for name, row in report.items():
        cells = " | ".join(f"{row['auc'][way]['mean']:.3f}" for way in WAYS)
        lines.append(f"| {name} | {row['patients']} ({row['healthy']}) | {cells} |")
    lines += [
        "",
        "| | difference | mean | 95 % over splits | 95 % over patients |",
        "|---|---|---|---|---|",
    ]
    for name, row in report.items():
        for pair, d in row["difference"].items():
            lines.append(f"| {name} | {pair} | {d['mean']:+.3f} | {span(d['splits'])} | {span(d['patients'])} |")
    lines += [
        "",
        "Splits: t-interval over the seeds, these patients. Patients: bootstrap over patients of seed-averaged scores; the wider, and the one",
        "that speaks about patients not yet seen. Local models are not comparable across hospitals, so their AUC over all patients",
        "also rewards knowing each hospital's share of ill patients. With a handful of healthy patients, as in Switzerland, an AUC is",
        "the rank of those few, and a local model scores each of them without having seen its like: read it with its interval, or not at all.",
        "",
    ]
    lines += [f"- {claim}: **{'holds' if held else 'does not hold'}**" for claim, held in verdict.items()]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flamby", action="store_true", help="FLamby's 740 patients, for comparison only")
    parser.add_argument("--seeds", type=int, default=10, choices=sorted(T_975))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/results/")
    arguments = parser.parse_args()
    name = "heart_flamby" if arguments.flamby else "heart"
    study = load_study(ROOT / "simulations" / f"{name}.toml")
    work = [(study.to_json(), seed, fold) for seed in range(arguments.seeds) for fold in range(FOLDS)]
    started = time.monotonic()
    splits = []
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, split in enumerate(pool.map(one_split, *zip(*work, strict=True)), start=1):
            splits.append(split)
            print(f"\r{number}/{len(work)} splits", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    population = build_population(study, load_task(study.task.name, study.task.options))
    report = summarise(splits, population.examples.y, dict(population.rows))
    everyone = report["all patients"]["difference"]["federated - pooled"]["mean"]
    gain = report[MUST_GAIN]["difference"]["federated - local"]
    verdict = {
        f"federated within {WITHIN_OF_POOLED} of pooled over all patients ({everyone:+.3f})": abs(everyone)
        <= WITHIN_OF_POOLED,
        f"{MUST_GAIN}: federated above local-only, 95 % over splits": gain["splits"][0] > 0,
        f"{MUST_GAIN}: federated above local-only, 95 % over patients": gain["patients"][0] > 0,
    }
    text = markdown(report, verdict, study, arguments.seeds, time.monotonic() - started)
    print(json.dumps({"report": report, "verdict": verdict}, indent=1) if arguments.json else text)
    if arguments.write:
        results = ROOT / "benchmarks" / "results"
        results.mkdir(exist_ok=True)
        (results / f"{name}.md").write_text(text, encoding="utf-8")
    return 0 if all(verdict.values()) or arguments.flamby else 1


if __name__ == "__main__":
    sys.exit(main())
