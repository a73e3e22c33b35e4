"""The rooms of the house and who may know whom. Read from the source, so lazy imports count too.

A file imports from its own room or from rows above, never from below; rooms in one row are
siblings that do not know each other. `hymba/__init__.py` is the porch: it names what is inside
and imports it when asked, so it is left out.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hymba"

ROWS: list[list[set[str]]] = [
    [{"errors", "files"}],
    [{"schemes"}],
    [{"config", "presets"}, {"hub"}, {"ops"}, {"tokenizer"}],
    [{"cache"}],
    [{"model"}],
    [{"weights"}],
    [{"engine"}, {"train"}, {"hf"}, {"export"}, {"quant"}],
    [{"server"}, {"eval"}, {"finetune"}],
    [{"lab"}],
    [{"cli", "commands", "recipes", "__main__"}],
]
PORCH = "__init__"
TORCH_FREE = [
    "hymba",
    "hymba.errors",
    "hymba.files",
    "hymba.schemes",
    "hymba.config",
    "hymba.presets",
    "hymba.model.accounting",
    "hymba.cli",
    "hymba.commands",
    "hymba.train.config",
    "hymba.train.data",
    "hymba.recipes.pretrain",
    *(
        [f"hymba.commands.{name}" for name in "info train finetune eval probe export".split()]
        if find_spec("tyro")
        else []
    ),
]
# What transformers offers that only hf may touch: models, their configs, caches, generation.
# A tokenizer's chat template is nobody's model.
MODEL_CLASS = re.compile(
    r"Auto(?!Tokenizer)|For[A-Z]|Model$|Config$|Cache|Generation|Trainer(?!Callback)|^modeling|^models$"
)
# Packages that one place only may import: {package: where}.
ONLY_IN = {
    "triton": re.compile(r"_triton\.py$"),
    "cuda": re.compile(r"/nvrtc\.py$"),
    "numba": re.compile(r"^(ops|engine)/cpu/"),
    "llvmlite": re.compile(r"^(ops|engine)/cpu/"),
    **dict.fromkeys(("onnx", "onnxruntime"), re.compile(r"^export/")),
    "ray": re.compile(r"^server/replicas\.py$"),
    "xgrammar": re.compile(r"^engine/grammar\.py$"),
    "trl": re.compile(r"^finetune/"),
    "peft": re.compile(r"^finetune/"),
    "lm_eval": re.compile(r"^eval/harness\.py$"),
    **dict.fromkeys(
        ("fastapi", "starlette", "uvicorn", "pydantic", "prometheus_client"),
        re.compile(r"^server/"),
    ),
}


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def where(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def room(path: Path) -> str:
    """The room a file is in: `model/ssm.py` is in model, `cache.py` in cache."""
    return where(path).split("/")[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Every (module, name) that a file imports; name is "" for `import module`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((absolute(path, node), alias.name) for alias in node.names)


def absolute(path: Path, node: ast.ImportFrom) -> str:
    """`from ..cache import x` inside hymba/model/ssm.py is from hymba.cache."""
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    parts = package[: len(package) - node.level + 1]
    return ".".join([*parts, *filter(None, [node.module])])


def rooms_known(path: Path) -> set[str]:
    """The rooms of hymba that a file imports from, but for its own."""
    known = set()
    for module, name in imports(path):
        top, *inner = module.split(".")
        if top == "hymba":
            inner = inner or [name]
            if inner[0] in PLACE:
                known.add(inner[0])
    return known - {room(path)}


PLACE = {name: (i, j) for i, row in enumerate(ROWS) for j, s in enumerate(row) for name in s}


def may_know(this: str, other: str) -> bool:
    (row, sibling), (other_row, other_sibling) = PLACE[this], PLACE[other]
    return other_row < row or (other_row, other_sibling) == (row, sibling)


def test_every_file_has_a_room() -> None:
    homeless = {room(path) for path in sources()} - PLACE.keys() - {PORCH}
    assert not homeless, f"give {homeless} a place in ROWS"


@pytest.mark.parametrize("path", sources(), ids=where)
def test_imports_point_up(path: Path) -> None:
    if room(path) == PORCH:
        return
    wrong = sorted(other for other in rooms_known(path) if not may_know(room(path), other))
    assert not wrong, f"{where(path)} must not import from {wrong}"


@pytest.mark.parametrize("path", sources(), ids=where)
def test_guests_stay_in_their_room(path: Path) -> None:
    for module, name in imports(path):
        package, *inner = module.split(".")
        allowed = ONLY_IN.get(package)
        assert allowed is None or allowed.search(where(path)), f"{where(path)} imports {module}"
        if package == "transformers" and room(path) != "hf":
            assert name, f"{where(path)}: write `from transformers import ...`, so that it shows"
            touched = [word for word in (*inner, name) if MODEL_CLASS.search(word)]
            assert not touched, f"{where(path)} imports {touched} of transformers; only hf may"


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"{{name}} is blocked in this test", name=name)
sys.meta_path.insert(0, Block())
"""


def run_blocked(code: str, *blocked: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter where importing the blocked packages fails."""
    command = [sys.executable, "-c", BLOCK.format(blocked=blocked) + code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("module", TORCH_FREE)
def test_imports_without_torch(module: str) -> None:
    done = run_blocked(f"import {module}", "torch", "transformers", "numpy")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(find_spec("tyro") is None, reason="commands need tyro")
def test_costs_are_told_without_torch() -> None:
    code = "from hymba.cli import main; sys.exit(main(['info', 'hymba-1.5b', '--json']))"
    done = run_blocked(code, "torch", "transformers", "numpy")
    assert done.returncode == 0, done.stderr
    assert "1522797824" in done.stdout


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_help_imports_nothing_heavy(argument: str) -> None:
    code = f"from hymba.cli import main; main(['{argument}']); print(*sys.modules)"
    loaded = set(run_blocked(code).stdout.split())
    assert "hymba.cli" in loaded
    assert not loaded & {"torch", "numpy", "transformers", "tyro", "rich", "tokenizers"}
