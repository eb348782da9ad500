"""Fashion-MNIST's own files as one .npz that the task image/npz reads.

    python -m simulations.privacy.fashion FOLDER [--out fashion-mnist.npz] [--images 20000]

FOLDER holds train-images-idx3-ubyte.gz and its three siblings, as Debian's package dataset-fashion-mnist installs them.
"""

from __future__ import annotations

import argparse
import gzip
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

SPLITS = {"train": "train", "test": "t10k"}
UNSIGNED_BYTES = 8
"""IDX files name the kind of their numbers: these."""


def read_idx(path: Path) -> npt.NDArray[Any]:
    """One IDX file of unsigned bytes (LeCun, Cortes and Burges, the MNIST database).

    Raises:
        ValueError: it is none.
    """
    data = gzip.decompress(path.read_bytes())
    zero, kind, dimensions = struct.unpack_from(">HBB", data)
    shape = struct.unpack_from(f">{dimensions}I", data, 4)
    if zero or kind != UNSIGNED_BYTES or len(data) != 4 + 4 * dimensions + int(np.prod(shape)):
        raise ValueError(f"{path}: not an IDX file of unsigned bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * dimensions).reshape(shape)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("fashion-mnist.npz"))
    parser.add_argument("--images", type=int, help="the first so many of each part; all without it")
    arguments = parser.parse_args()
    arrays: dict[str, Any] = {
        f"{split}_{what}": read_idx(arguments.folder / f"{name}-{what}-idx{dimensions}-ubyte.gz")[: arguments.images]
        for split, name in SPLITS.items()
        for what, dimensions in (("images", 3), ("labels", 1))
    }
    np.savez_compressed(arguments.out, **arrays)
    sys.stdout.write(f"{arguments.out}: {sum(len(a) for name, a in arrays.items() if 'labels' in name)} images\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
