"""Nothing here without numba, and little threads: the tests run side by side."""

from __future__ import annotations

import pytest

pytest.importorskip("numba")
