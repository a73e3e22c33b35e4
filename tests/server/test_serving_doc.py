"""The examples of docs/serving.md work as they stand."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs/serving.md").read_text(encoding="utf-8")
WRITTEN = "http://127.0.0.1:8000"


@pytest.fixture
def hymba_server(serve: Any) -> Any:
    return serve(name="hymba")


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_curl(hymba_server: Any) -> None:
    commands = re.findall(r"^curl (?:.*\\\n)*.*$", DOCUMENT, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        here = command.replace(WRITTEN, hymba_server.url)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=30)
        assert '"choices"' in done.stdout and '"error"' not in done.stdout, done.stdout


def test_openai(hymba_server: Any) -> None:
    (code,) = re.findall(r"```python\n(from openai(?:.*\n)*?)```", DOCUMENT)
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(code.replace(WRITTEN, hymba_server.url), "docs/serving.md", "exec"), {})
    assert printed.getvalue()
