"""Scoring and exporting a model from a run folder."""

import csv
import json

import numpy as np
import pytest

import fedlearn
from fedlearn.cli import main
from fedlearn.cli.demo import split_by_hospital

STUDY = "simulations/heart.toml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    result = fedlearn.simulate(STUDY, rounds=2)
    return result, result.save(tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory):
    return {name: path for name, (path, _) in split_by_hospital(tmp_path_factory.mktemp("hospitals")).items()}


def scores(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def without(path, column, target):
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        del row[column]
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return target


def test_scores_are_the_models_own(capsys, trained, hospitals, tmp_path):
    result, folder = trained
    out = tmp_path / "scores.csv"
    assert main(["model", "predict", str(folder), "--data", str(hospitals["hungary"]), "--out", str(out)]) == 0
    import torch

    examples = result.task.load(hospitals["hungary"])
    x = result.task.prepare(examples, examples).test.x
    with torch.no_grad():
        expected = torch.sigmoid(result.model(torch.from_numpy(x))[:, 0]).numpy()
    got = np.array([float(row["probability_ill"]) for row in scores(out)])
    np.testing.assert_allclose(got, expected, atol=1e-6)
    assert [row["row"] for row in scores(out)] == [str(i + 1) for i in range(294)]
    err = capsys.readouterr().err
    assert "auc" in err
    assert "imputed from the scored file itself" in err


def test_a_file_without_labels_scores_the_same(capsys, trained, hospitals, tmp_path):
    _, folder = trained
    new = without(hospitals["cleveland"], "num", tmp_path / "new.csv")
    a, b = tmp_path / "a.csv", tmp_path / "b.csv"
    assert main(["model", "predict", str(folder), "--data", str(hospitals["cleveland"]), "--out", str(a)]) == 0
    capsys.readouterr()
    assert main(["model", "predict", str(folder), "--data", str(new), "--out", str(b)]) == 0
    assert a.read_bytes() == b.read_bytes()
    assert "auc" not in capsys.readouterr().err


def test_missing_values_come_from_the_reference(capsys, trained, hospitals, tmp_path):
    _, folder = trained
    one = tmp_path / "one.csv"
    # Swiss patients have no cholesterol: by itself the file gives the public constant, by Cleveland's its median.
    one.write_text("\n".join(hospitals["switzerland"].read_text().splitlines()[:2]) + "\n")
    argv = ["model", "predict", str(folder), "--data", str(one), "--json"]
    assert main(argv) == 0
    alone = json.loads(capsys.readouterr().out)
    assert main([*argv, "--reference", str(hospitals["cleveland"])]) == 0
    beside = json.loads(capsys.readouterr().out)
    assert beside["imputed_from"].endswith("patients.csv")
    assert alone["scores"][0]["probability_ill"] != beside["scores"][0]["probability_ill"]


def test_a_refusal_names_the_users_file(capsys, trained, hospitals, tmp_path):
    _, folder = trained
    bad = without(without(hospitals["cleveland"], "num", tmp_path / "x.csv"), "age", tmp_path / "bad.csv")
    assert main(["model", "predict", str(folder), "--data", str(bad)]) == 4
    assert f"{bad}: missing column 'age'" in capsys.readouterr().err


def test_scores_go_to_standard_output_without_a_file(capsys, trained, hospitals):
    _, folder = trained
    assert main(["model", "predict", str(folder), "--data", str(hospitals["switzerland"])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], len(lines)) == ("row,probability_ill", 124)


@pytest.mark.parametrize("kind", ["safetensors", "torchscript", "onnx"])
def test_an_exported_model_gives_the_same_outputs(capsys, trained, tmp_path, kind):
    result, folder = trained
    out = tmp_path / f"model.{kind}"
    assert main(["model", "export", str(folder), "--format", kind, "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["largest_difference"] < 1e-5
    import torch

    x = torch.randn(7, 23, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = result.model(x).numpy()
    if kind == "safetensors":
        from safetensors.numpy import load_file

        got = load_file(out)
        assert all(np.array_equal(got[name], array) for name, array in result.weights.items())
        return
    if kind == "torchscript":
        got = torch.jit.load(str(out))(x).detach().numpy()
    else:
        import onnxruntime

        got = onnxruntime.InferenceSession(str(out)).run(None, {"features": x.numpy()})[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_a_model_of_another_task_is_refused(capsys, trained, tmp_path):
    import shutil

    _, folder = trained
    other = shutil.copytree(folder, tmp_path / "other")
    study = json.loads((other / "study.json").read_text())
    study["task"]["options"] = {"hidden": 3}
    (other / "study.json").write_text(json.dumps(study))
    assert main(["model", "export", str(other), "--format", "safetensors", "--out", str(tmp_path / "x")]) == 5
    assert "model" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_each_hospital_gets_its_own_rows_and_no_names(hospitals):
    counts = {name: len(path.read_text().splitlines()) - 1 for name, path in hospitals.items()}
    assert counts == {"cleveland": 303, "hungary": 294, "switzerland": 123, "va-long-beach": 200}
    assert all("dataset" not in path.read_text() for path in hospitals.values())


def test_a_table_of_ones_own_is_trained_scored_and_exported(capsys, tmp_path):
    table = tmp_path / "table.csv"
    rows = [(i % 7, i % 3, "yes" if i % 7 > 3 else "no") for i in range(60)]
    table.write_text("a,b,ill\n" + "".join(f"{a},{b},{y}\n" for a, b, y in rows))
    study = tmp_path / "mine.toml"
    study.write_text(
        'name = "mine"\nrounds = 2\n[task]\nname = "tabular/csv"\n[task.options]\nlabel = "ill"\n'
        'features = ["a", "b"]\nclasses = ["no", "yes"]\n[data]\npartition = "iid"\nclients = 3\n'
    )
    folder = tmp_path / "run"
    assert main(["simulate", str(study), "--data", str(table), "--out", str(folder)]) == 0
    new = without(table, "ill", tmp_path / "new.csv")
    assert main(["model", "predict", str(folder), "--data", str(new), "--out", str(tmp_path / "s.csv")]) == 0
    assert set(scores(tmp_path / "s.csv")[0]) == {"row", "predicted", "probability_no", "probability_yes"}
    argv = ["model", "export", str(folder), "--format", "torchscript", "--out", str(tmp_path / "m.pt")]
    capsys.readouterr()
    assert main(argv) == 4
    assert "--data" in capsys.readouterr().err
    assert main([*argv, "--data", str(new)]) == 0
    assert (tmp_path / "m.pt").is_file()


def test_images_are_scored_by_class(capsys, tmp_path):
    folder = tmp_path / "run"
    small = ["--set", "train.max_steps=1", "--set", "data.clients=2", "--set", "evaluate.every=0"]
    assert main(["simulate", "simulations/digits.toml", "--rounds", "1", *small, "--out", str(folder)]) == 0
    images = tmp_path / "some.npz"
    generator = np.random.default_rng(1)
    x, y = generator.integers(0, 255, (5, 8, 8), dtype=np.uint8), np.arange(5)
    parts = {
        f"{part}_{kind}": a for part in ("train", "val", "test") for kind, a in (("images", x), ("labels", y[:, None]))
    }
    np.savez(images, **parts)
    capsys.readouterr()
    assert main(["model", "predict", str(folder), "--data", str(images), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert sum(v for k, v in report["scores"][0].items() if k.startswith("probability")) == pytest.approx(1, abs=1e-4)


def test_a_task_that_reads_rows_in_context_says_so(capsys, tmp_path):
    folder = tmp_path / "run"
    small = ["--set", "train.max_steps=1", "--set", "evaluate.every=0"]
    assert main(["simulate", "simulations/fraud.toml", "--rounds", "1", *small, "--out", str(folder)]) == 0
    assert main(["model", "predict", str(folder), "--data", "x.csv"]) == 14
    assert "in their context" in capsys.readouterr().err
