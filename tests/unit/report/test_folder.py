"""The run folder: everything that a run made, and what made it."""

from __future__ import annotations

import json

import pytest

import fedlearn
from fedlearn.arrays import digest
from fedlearn.errors import StateError
from fedlearn.report.folder import RunFolder
from tests.support.tiny_task import tiny_study


@pytest.fixture(scope="module")
def result():
    return fedlearn.simulate(tiny_study("rounds=2"))


def test_a_saved_run_comes_back(result, tmp_path):
    folder = RunFolder(result.save(tmp_path / "a" / "b"))
    assert sorted(p.name for p in folder.path.iterdir()) == [
        "curve.png",
        "history.csv",
        "history.json",
        "manifest.json",
        "model.safetensors",
        "study.json",
    ]
    assert folder.study() == result.study
    assert digest(folder.weights()) == digest(result.weights)
    assert json.loads((folder.path / "history.json").read_text()) == list(result.history)
    manifest = json.loads((folder.path / "manifest.json").read_text())
    assert manifest["study_sha256"] == result.study.digest
    assert manifest["mode"] == "seeded (not private)"
    assert {"fedlearn", "torch", "numpy", "flwr", "python", "seed", "threads"} <= set(manifest)


def test_a_folders_study_reproduces_its_model(result, tmp_path):
    folder = RunFolder(result.save(tmp_path))
    assert digest(fedlearn.simulate(folder.study()).weights) == digest(folder.weights())


def test_saving_again_replaces_the_files(result, tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"old")
    result.save(tmp_path)
    assert digest(folder.weights()) == digest(result.weights)
    assert not list(tmp_path.glob(".*.part"))


def test_what_cannot_be_written_or_read_says_so(result, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        result.save(tmp_path / "file")
    with pytest.raises(StateError, match=r"model\.safetensors cannot be read"):
        RunFolder(tmp_path).weights()
