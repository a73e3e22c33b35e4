"""Documents are tested like code: links lead somewhere, maps name files that exist, code in them
runs and prints what they say, tables agree with the source.

In a document, a block that opens with ```python runnable is run, all blocks of a document in one
namespace; a block that opens with ```text output behind it is what it prints. Words and whole
numbers must be equal, fractions nearly so: another machine rounds differently.
"""

from __future__ import annotations

import ast
import importlib.util
import io
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.weights import to_official

ROOT = Path(__file__).resolve().parent.parent
ROOMS = "hymba", "docs", "examples", "tests", "bench"
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(x for r in ROOMS for x in sorted(ROOT.glob(f"{r}/**/*.md"))),
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
FENCE = re.compile(r"^```(\S*)[ ]?(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
PATH = re.compile(rf"(?<![\w./-])(?:{'|'.join(ROOMS)})/[\w./-]*\w")
NUMBER = re.compile(r"-?\d+\.\d+|-?\d+")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=named)


def blocks(document: Path) -> list[tuple[str, str, str]]:
    """(language, word behind it, content) of every fenced block."""
    return FENCE.findall(document.read_text(encoding="utf-8"))


def prose(document: Path) -> str:
    """The document without its fenced blocks."""
    return FENCE.sub("", document.read_text(encoding="utf-8"))


def anchors(document: Path) -> set[str]:
    """What a link may name behind #, made from the headings as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", prose(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_document
def test_links_lead_somewhere(document: Path) -> None:
    for target in LINK.findall(prose(document)):
        if re.match(r"[a-z]+:", target):
            continue  # the web: not a test's business
        name, _, anchor = target.partition("#")
        place = (document.parent / name).resolve() if name else document
        assert place.exists(), f"{target} leads nowhere"
        assert not anchor or anchor in anchors(place), f"{target}: there is no such heading"


@each_document
def test_named_files_exist(document: Path) -> None:
    """Paths that begin with a room (`hymba/cache.py`), in text and in code."""
    for name in PATH.findall(document.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or (ROOT / f"{name}.py").exists(), f"{name} does not exist"


def mapped(lines: list[str]) -> Iterator[str]:
    """Paths of a map: a block drawn as a tree, folders ending in a slash, files indented below."""
    folders: list[tuple[int, str]] = []
    for line in lines:
        bare = re.sub(r"[│├└─|]", " ", line)
        first, depth = (bare.split() or [""])[0].rstrip(","), len(bare) - len(bare.lstrip())
        while folders and folders[-1][0] >= depth:
            folders.pop()
        if first.endswith("/") or re.fullmatch(r"[\w.-]+\.(py|md|toml|txt|json)", first):
            yield "".join(name for _, name in folders) + first
        if first.endswith("/"):
            folders.append((depth, first))


@each_document
def test_maps_are_true(document: Path) -> None:
    for language, _, content in blocks(document):
        lines = [line for line in content.splitlines() if line.strip()]
        if language in ("", "text") and lines and re.match(rf"({'|'.join(ROOMS)})/", lines[0]):
            for path in mapped(lines):
                assert (ROOT / path).exists(), f"the map has {path}, which does not exist"


@each_document
def test_python_in_documents_compiles(document: Path) -> None:
    for language, _, content in blocks(document):
        if language == "python":
            ast.parse(content)


def runnable(document: Path) -> list[tuple[str, str]]:
    """(code, what the document says it prints)."""
    found = [*blocks(document), ("", "", "")]
    return [
        (code, then[2] if then[:2] == ("text", "output") else "")
        for (language, word, code), then in pairwise(found)
        if (language, word) == ("python", "runnable")
    ]


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if runnable(d)], ids=named)
def test_runnable_blocks_print_what_is_said(document: Path) -> None:
    names: dict[str, object] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        for code, said in runnable(document):
            printed = io.StringIO()
            with redirect_stdout(printed):
                exec(compile(code, named(document), "exec"), names)
            assert_same(printed.getvalue(), said)


def assert_same(printed: str, said: str) -> None:
    assert NUMBER.sub("0", printed) == NUMBER.sub("0", said), f"it prints:\n{printed}"
    for got, want in zip(NUMBER.findall(printed), NUMBER.findall(said), strict=True):
        slack = 0.02 * abs(float(want)) + 0.0006 if "." in want else 0.0
        assert abs(float(got) - float(want)) <= slack, f"it prints:\n{printed}"


def test_the_table_of_parameters_is_true() -> None:
    """Names and the 1.5B's shapes in docs/architecture.md; every kind of tensor is in it."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \| [^|]+ \| ([\d, ]+) \|$", text, re.MULTILINE)
    with torch.device("meta"):
        model = LanguageModel(Config.preset("hymba-1.5b"))
    layer = "decoder.layers.1."
    found = {n: tuple(p.shape) for n, p in model.named_parameters() if n.startswith(layer)}
    found |= {n: tuple(p.shape) for n, p in model.named_parameters() if ".layers." not in n}
    told = {}
    for ours, official, shape in rows:
        name = ours if ours.startswith("decoder.") else layer + ours
        assert to_official(name).removeprefix("model.layers.1.") == official
        told[name] = tuple(int(size) for size in shape.split(","))
    assert told == found


def test_the_arrows_drawn_are_the_arrows_kept() -> None:
    spec = importlib.util.spec_from_file_location("arrows", ROOT / "tests/test_arrows.py")
    assert spec and spec.loader
    arrows = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(arrows)
    drawn = next(c for _, word, c in blocks(ROOT / "docs/architecture.md") if word == "rooms")
    rows = [line.split(maxsplit=1)[1].split("|") for line in drawn.splitlines()]
    assert [[set(re.findall(r"\w+", room)) for room in row] for row in rows] == arrows.ROWS


@pytest.mark.parametrize("example", EXAMPLES, ids=named)
def test_examples_say_how_to_run_them(example: Path) -> None:
    told = ast.get_docstring(ast.parse(example.read_text(encoding="utf-8")))
    assert told and f"python {named(example)}" in told


def run(example: str, *arguments: str) -> str:
    command = [sys.executable, f"examples/{example}", *arguments]
    env = os.environ | {"PYTHONPATH": str(ROOT)}  # also where the package is not installed
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_example_runs() -> None:
    lines = run("compare_plans.py", "--budget", "40").splitlines()
    assert [line.split()[0] for line in lines] == ["plan", "hymba", "llama", "mamba", "samba"]


@pytest.mark.slow
def test_generating_example_runs() -> None:
    assert "cache bytes after" in run("load_and_generate.py")


@pytest.mark.slow
def test_batch_example_runs() -> None:
    printed = run("batch_generate.py")
    assert "5 cannot be answered" in printed and "tokens said" in printed
