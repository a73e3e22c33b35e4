"""A corpus, a tokenizer and a model small enough to train in a second."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hymba import presets
from hymba.config import Config
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.train.sources import Texts
from hymba.train.store import TokenStore, prepare

WORDS = "the model reads a row of words and guesses what comes next in it".split()


def document(number: int) -> str:
    """Lines of words in an order that a small model can learn; 1 to about 200 tokens."""
    count = 1 + number * 37 % 90
    return " ".join(WORDS[(number + i * (1 + number % 3)) % len(WORDS)] for i in range(count))


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on more, by ten times where other processes want the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def texts() -> Texts:
    return Texts(tuple(document(i) for i in range(40)) + ("é🦊",))


@pytest.fixture(scope="session")
def tokenizer(texts: Texts) -> Tokenizer:
    return Tokenizer.train(texts, vocab_size=280)


@pytest.fixture(scope="session")
def store_folder(texts: Texts, tokenizer: Tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "train"
    prepare(folder, texts, tokenizer)
    return folder


@pytest.fixture(scope="session")
def store(store_folder: Path) -> TokenStore:
    return TokenStore.open(store_folder)


@pytest.fixture(scope="session")
def hybrid() -> Config:
    """All features of Hymba, 4 layers."""
    return presets.hymba(
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        intermediate_size=48,
        window=8,
        meta_tokens=3,
        vocab_size=280,
    )


@pytest.fixture
def new_model(hybrid: Config) -> Callable[[], LanguageModel]:
    """The same fresh model at every call."""
    return lambda: LanguageModel(hybrid).init_weights(seed=0)


@pytest.fixture(scope="session")
def root() -> Path:
    return Path(__file__).resolve().parents[2]
