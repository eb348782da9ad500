"""`python -m fedlearn.cli` is `fedlearn`."""

from __future__ import annotations

import sys

from fedlearn.cli.entry import main

sys.exit(main())
