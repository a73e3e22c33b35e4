"""A laboratory of a second: two steps a run, a corpus of a few files."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hymba.lab import sizes
from hymba.lab.jobs import Lab, Plan
from hymba.lab.sizes import Run, Shape, Size

SHAPE = Shape(16, 4, 2, 1, 32, window=4, meta_tokens=2, ssm_state=2, multiple=4, max_positions=300)
ATOM = Size(
    "atom",
    "two steps",
    SHAPE,
    Run(steps=4, rows=2, sequence_length=64, peak=1e-3),
    vocab_size=270,
    held_out_tokens=300,
    recall_shape=SHAPE,
    recall=Run(steps=2, rows=2, sequence_length=64, peak=1e-3),
    test_rows=2,
    contexts=(32,),
    batches=(1, 2),
    seeds=(0, 1),
)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def atom(monkeypatch: pytest.MonkeyPatch) -> Size:
    monkeypatch.setitem(sizes.SIZES, "atom", ATOM)
    return ATOM


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        words = " ".join(f"word{number * i % 17}" for i in range(60))
        (folder / f"{number}.txt").write_text(f"{number} {words}\n")
    return folder


@pytest.fixture
def lab(tmp_path: Path, texts: Path) -> Callable[..., Lab]:
    """A laboratory in a folder of its own; what it says is in `lab.said`."""

    def make(**settings: object) -> Lab:
        keys = {"size": "atom", "folder": tmp_path / "lab", "sources": (str(texts),)}
        said: list[str] = []
        found = Lab(Plan(**(keys | {"device": "cpu"} | settings)), said.append)
        found.said = said  # type: ignore[attr-defined]
        return found

    return make
