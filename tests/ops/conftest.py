"""Which kernels serve, where an op has two kinds."""

from __future__ import annotations

import pytest

from hymba.ops import nvrtc


@pytest.fixture(params=["triton", "cuda"])
def source(request: pytest.FixtureRequest, device: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels: Triton's everywhere, CUDA's where they can be."""
    if request.param == "cuda" and (device == "cpu" or not nvrtc.present()):
        pytest.skip("needs a GPU and cuda-core")
    monkeypatch.setattr(nvrtc, "present", lambda: request.param == "cuda")
    return request.param
