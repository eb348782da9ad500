"""Cut the excerpts in this folder out of Wycheproof's files: `python excerpt.py FOLDER`, with the folder that holds testvectors_v1.

Kept are, in the files' order, the first `EACH` tests of every flag and all that concern points of small order; of the fields those that the
tests here read.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

EACH = 8
ALL = {"LowOrderPublic", "NonCanonicalPublic", "InvalidCurveAttack"}
FIELDS = ("tcId", "flags", "result", "public", "private", "shared", "ikm", "salt", "info", "size", "okm")
FIELDS += ("key", "iv", "aad", "msg", "ct", "tag", "sig")
FILES = {
    "x25519_test.json": {},
    "hkdf_sha256_test.json": {},
    "aes_gcm_test.json": {"keySize": 256, "ivSize": 96},
    "ed25519_test.json": {},
    "ecdh_secp256r1_ecpoint_test.json": {},
    "ecdsa_secp256r1_sha256_test.json": {},
}


def excerpt(source: dict, wanted: dict) -> list[dict]:
    seen, kept = Counter(), []
    for group in source["testGroups"]:
        if any(group[name] != value for name, value in wanted.items()):
            continue
        public = group.get("publicKey", {})
        for test in group["tests"]:
            flags = test["flags"] or ["Normal"]
            if not ALL & set(flags) and all(seen[flag] >= EACH for flag in flags):
                continue
            seen.update(flags)
            row = {name: test[name] for name in FIELDS if name in test}
            if public:
                row["pk"] = public.get("pk") or public["uncompressed"]
            kept.append(row)
    return kept


def main() -> None:
    for name, wanted in FILES.items():
        (found,) = Path(sys.argv[1]).rglob(name)
        rows = excerpt(json.loads(found.read_text(encoding="utf-8")), wanted)
        lines = ",\n".join(json.dumps(row) for row in rows)
        (Path(__file__).parent / name).write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
