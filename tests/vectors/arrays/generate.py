"""Writes the vectors of this folder: bytes that `fedlearn.arrays.from_bytes` takes (good_*) or refuses (bad_*), with the reason.

    python tests/vectors/arrays/generate.py

The bytes are made here by hand from the format's description (8 bytes of header length, little-endian; a JSON header; data), not by the
library under test.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
F32 = struct.pack("<6f", 0.0, 1.0, -1.5, 2.25, 1e-30, -3e38)


def safetensors(header: object, data: bytes, *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(dtype: str, shape: list[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


GOOD: dict[str, tuple[bytes, dict[str, object]]] = {
    "good_matrix": (
        safetensors({"w": tensor("F32", [2, 3], 0, 24)}, F32),
        {
            "w": {
                "dtype": "float32",
                "values": [[0.0, 1.0, -1.5], [2.25, 1.0000000031710769e-30, -3.0000000054977558e38]],
            }
        },
    ),
    "good_scalar": (
        safetensors({"n": tensor("I64", [], 0, 8)}, struct.pack("<q", -7)),
        {"n": {"dtype": "int64", "values": -7}},
    ),
    "good_nothing": (safetensors({}, b""), {}),
    "good_empty_tensor": (
        safetensors({"e": tensor("F32", [0, 3], 0, 0)}, b""),
        {"e": {"dtype": "float32", "values": []}},
    ),
    "good_names": (
        safetensors({"b/ü": tensor("U8", [1], 0, 1), "a": tensor("U8", [1], 1, 2)}, b"\x05\x06"),
        {"a": {"dtype": "uint8", "values": [6]}, "b/ü": {"dtype": "uint8", "values": [5]}},
    ),
}

BAD: dict[str, tuple[bytes, str]] = {
    "bad_nothing_at_all": (b"", "update"),
    "bad_seven_bytes": (bytes(7), "update"),
    "bad_header_cut": (safetensors({"w": tensor("F32", [6], 0, 24)}, F32)[:20], "update"),
    "bad_header_longer_than_file": (safetensors({}, b"", length=1000), "update"),
    "bad_header_huge": (safetensors({}, b"", length=2**63), "limit"),
    "bad_header_over_limit": (safetensors({}, b"", length=16 * 1024**2 + 1), "limit"),
    "bad_header_not_json": (safetensors(b"{'w': 1}", F32), "update"),
    "bad_header_not_utf8": (safetensors(b'{"\xff\xfe": 1}', F32), "update"),
    "bad_header_is_a_list": (safetensors([1, 2], F32), "update"),
    "bad_data_cut": (safetensors({"w": tensor("F32", [6], 0, 24)}, F32[:-1]), "update"),
    "bad_data_left_over": (safetensors({"w": tensor("F32", [6], 0, 24)}, F32 + b"x"), "update"),
    "bad_offsets_outside": (safetensors({"w": tensor("F32", [6], 24, 48)}, F32), "update"),
    "bad_offsets_reversed": (safetensors({"w": tensor("F32", [6], 24, 0)}, F32), "update"),
    "bad_offsets_overlap": (
        safetensors({"a": tensor("F32", [3], 0, 12), "b": tensor("F32", [3], 8, 20)}, F32[:20]),
        "update",
    ),
    "bad_shape_larger_than_data": (safetensors({"w": tensor("F32", [2**40], 0, 24)}, F32), "update"),
    "bad_shape_overflows": (safetensors({"w": tensor("F32", [2**32, 2**32], 0, 24)}, F32), "update"),
    "bad_shape_negative": (safetensors({"w": tensor("F32", [-6], 0, 24)}, F32), "update"),
    "bad_dtype_unknown": (safetensors({"w": tensor("F33", [6], 0, 24)}, F32), "update"),
    "bad_dtype_bfloat16": (safetensors({"w": tensor("BF16", [12], 0, 24)}, F32), "update"),
    "bad_dtype_complex": (safetensors({"w": tensor("C64", [3], 0, 24)}, F32), "update"),
    "bad_dtype_uint16": (safetensors({"w": tensor("U16", [12], 0, 24)}, F32), "update"),
    "bad_nine_dimensions": (safetensors({"w": tensor("F32", [1] * 8 + [6], 0, 24)}, F32), "limit"),
    "bad_long_name": (safetensors({"w" * 1025: tensor("F32", [6], 0, 24)}, F32), "limit"),
    "bad_pickle": (
        b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
        "limit",
    ),
}


def main() -> None:
    for name, (data, values) in GOOD.items():
        (HERE / f"{name}.safetensors").write_bytes(data)
        (HERE / f"{name}.json").write_text(json.dumps(values, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, (data, _) in BAD.items():
        (HERE / f"{name}.safetensors").write_bytes(data)
    reasons = {name: kind for name, (_, kind) in BAD.items()}
    (HERE / "bad.json").write_text(json.dumps(reasons, indent=1) + "\n")


if __name__ == "__main__":
    main()
