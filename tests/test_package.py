"""What a user gets: the wheel, built and installed in a clean environment, used from elsewhere.

The environment holds nothing but the core dependencies (torch, numpy, safetensors, transformers
and what these require), linked from the environment that runs the tests instead of installed
again. So the tests here also prove that no other package is needed, and that the wheel is whole.
"""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import hymba

ROOT = Path(__file__).resolve().parent.parent
CORE = ("torch", "numpy", "safetensors", "transformers")
COMMAND_LINE = ("tyro", "rich")  # core dependencies too, but the library does without them
NO_INDEX = re.compile("No module named pip|Could not find a version that satisfies|Connection")
pytestmark = pytest.mark.xdist_group("package")  # one worker, so that one wheel is built
# CUDA is compiled at run time, from its text; the server's chat page goes to browsers as it is.
SOURCES = {".py", ".cu", ".cuh", ".html", ".css", ".js"}


def run(*command: str | Path, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run away from the checkout: no PYTHONPATH, no hub."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built as pip builds it: isolated, with the build backend from the index."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--retries", "2")
    done = run(*pip, "--wheel-dir", folder, ROOT, cwd=folder, check=False)
    if done.returncode:
        # CI has an index, so there a failure is a failure.
        if NO_INDEX.search(done.stderr) and not os.environ.get("CI"):
            pytest.skip("no package index to take the build backend from")
        pytest.fail(done.stdout + done.stderr)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def user(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> "User":
    home = tmp_path_factory.mktemp("user")
    run(sys.executable, "-m", "venv", "--without-pip", home / "venv", cwd=home)
    user = User(home)
    install = ("install", "--quiet", "--no-deps", "--no-index", wheel)
    run(sys.executable, "-m", "pip", "--python", user.python, *install, cwd=home)
    link_distributions(required(CORE), home / "core")
    link_distributions(required(COMMAND_LINE) - required(CORE), home / "command_line")
    user.sees("core")
    return user


class User:
    """A person with a clean environment, in a folder of their own."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.python = home / "venv" / "bin" / "python"
        self.hymba = home / "venv" / "bin" / "hymba"

    def sees(self, *folders: str) -> None:
        """Put these folders of packages on the path, behind the environment's own."""
        (site,) = (self.home / "venv").glob("lib/python*/site-packages")
        (site / "zz_linked.pth").write_text("".join(f"{self.home / x}\n" for x in folders))

    def runs(self, *command: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run(*command, cwd=self.home, check=check)


def required(names: tuple[str, ...]) -> set[str]:
    """These distributions and all that they require here, by canonical name."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found or not installed(name):
            continue
        found.add(name)
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                waiting.append(need.name)
    return found


def installed(name: str) -> bool:
    try:
        return bool(metadata.version(name))
    except metadata.PackageNotFoundError:
        return False


def link_distributions(names: set[str], folder: Path) -> None:
    """Link the files of installed distributions into a folder that can be put on sys.path."""
    folder.mkdir()
    for name in names:
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or []}
        for top in tops - {"..", "__pycache__"}:
            source = Path(str(distribution.locate_file(top)))
            if source.suffix != ".pth" and source.exists() and not (folder / top).exists():
                (folder / top).symlink_to(source)


def modules() -> Iterator[str]:
    """Every module of the library; those that stand on an extra are left out."""
    for path in sorted((ROOT / "hymba").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        outer = ("hymba.commands", "hymba.server", "hymba.__main__", "hymba.finetune")
        outer += ("hymba.eval.harness", "hymba.eval.run", "hymba.export")
        kernels = "_triton" in name or ".cpu." in name  # where there is a compiler
        if not name.startswith(outer) and not kernels:
            yield name


def test_wheel_is_pure_and_complete(wheel: Path) -> None:
    assert wheel.name == f"hymba-{hymba.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = (path for path in (ROOT / "hymba").rglob("*") if path.suffix in SOURCES)
    code = {path.relative_to(ROOT).as_posix() for path in sources}
    assert code <= names
    extra = {name for name in names - code if ".dist-info/" not in name}
    assert not extra, "the package has no data files"
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_used_from_outside_the_checkout(user: User) -> None:
    where = user.runs(user.python, "-c", "import hymba; print(hymba.__file__)").stdout
    assert Path(where.strip()).is_relative_to(user.home)
    for command in ([user.hymba], [user.python, "-m", "hymba"]):
        assert user.runs(*command, "--version").stdout == f"hymba {hymba.__version__}\n"
    code = "from importlib.metadata import version; print(version('hymba'))"
    assert user.runs(user.python, "-c", code).stdout.strip() == hymba.__version__


def test_imports_with_minimal_dependencies(user: User) -> None:
    """A GPU host without a network often has torch, numpy, safetensors, transformers, no more."""
    user.sees("core")
    code = (
        "import importlib, sys, importlib.util as u\n"
        "assert not any(u.find_spec(x) for x in ('tyro', 'peft', 'matplotlib', 'pytest'))\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "import hymba; [getattr(hymba, name) for name in hymba.__all__]"
    )
    user.runs(user.python, "-c", code, *modules())


def test_command_line_without_tyro_says_so(user: User) -> None:
    user.sees("core")
    assert "usage: hymba" in user.runs(user.hymba, "--help").stdout
    done = user.runs(user.hymba, "info", "hymba-tiny", check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "hymba: error: " in done.stderr and "pip install tyro" in done.stderr
    assert done.stderr.count("\n") == 1


def test_command_line_works_where_it_is_installed(user: User) -> None:
    if not installed("tyro"):
        pytest.skip("tyro is not installed here")
    user.sees("core", "command_line")
    assert "1,522,797,824 parameters" in user.runs(user.hymba, "info", "hymba-1.5b").stdout


def test_readme_commands_are_make_targets() -> None:
    """The README's commands are the ones that exist, and it names those a newcomer needs."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, re.MULTILINE))
    code = re.findall(r"```.*?```|`[^`\n]+`", readme, re.DOTALL)
    named = set(re.findall(r"\bmake ([a-z]+)", "\n".join(code)))
    assert named <= targets
    assert {"demo", "test", "check"} <= named


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    direct = {Requirement(line).name.lower() for group in groups for line in group} - {"hymba"}
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins[pin.name.lower()] = pin
    assert direct == pins.keys()
    assert all(str(pin.specifier).startswith("==") for pin in pins.values())
