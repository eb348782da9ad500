"""What is committed under fedlearn/proto is what protos/ generates."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_generated_code_is_current(tmp_path):
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    written = module.generate(tmp_path)
    committed = sorted((ROOT / "fedlearn" / "proto").glob("*_pb2*"))
    assert [path.name for path in written] == [path.name for path in committed]
    assert len(written) == len(list((ROOT / "protos").glob("*.proto")))
    for new, old in zip(written, committed, strict=True):
        assert new.read_bytes() == old.read_bytes(), f"{old.name} is stale: run python protos/generate.py"
