"""`hymba lab`: the laboratory, which reads its own options (hymba/lab/options.py): it must also run
as `python -m hymba.lab` where tyro is not installed."""

from __future__ import annotations

from collections.abc import Sequence

from hymba.lab.options import main as lab


def main(argv: Sequence[str]) -> int:
    return lab(argv, "hymba lab")
