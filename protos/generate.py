"""Generate fedlearn/proto from protos/: `python protos/generate.py [--out DIR]`. The output is committed."""

from __future__ import annotations

import argparse
import importlib.resources
import sys
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent


def generate(out: Path) -> list[Path]:
    """Write `fedlearn/proto/*_pb2.py` under `out`; return the files written, sorted.

    Raises:
        RuntimeError: protoc refused a file.
    """
    from grpc_tools import protoc

    include = str(importlib.resources.files("grpc_tools") / "_proto")
    sources = sorted(PROTOS.glob("*.proto"))
    code = protoc.main(
        [
            "protoc",
            # The files are seen as fedlearn/proto/NAME.proto, so that imports and descriptor names fit the package.
            f"-Ifedlearn/proto={PROTOS}",
            f"-I{include}",
            f"--python_out={out}",
            *(f"fedlearn/proto/{source.name}" for source in sources),
        ]
    )
    if code != 0:
        raise RuntimeError(f"protoc ended with exit code {code}")
    return sorted((out / "fedlearn" / "proto").glob("*_pb2.py"))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT, help="folder that receives fedlearn/proto/")
    for path in generate(parser.parse_args().out):
        sys.stdout.write(f"{path}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
