"""Checkpoints: lossless both ways, strict about every tensor, safe against interruption."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import hymba.hub
from hymba import weights
from hymba.config import Config
from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.weights import WeightsError, to_official, to_ours

GOLDEN = Path(__file__).parent / "golden"
CASES = ["plain", "swa_meta", "kvshare", "ntk", "full"]
PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba"]
Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A released checkpoint folder that a test may damage."""
    shutil.copytree(GOLDEN / "ntk", tmp_path / "released")
    return tmp_path / "released"


def tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, of however many files."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("io."):
            part = load_file(file)
            assert not found.keys() & part.keys()
            found |= part
    return found


def assert_equal(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


def change(folder: Path, edit: Callable[[dict[str, Tensor]], Any]) -> None:
    """Rewrite a folder's tensors, edited."""
    found = load_file(folder / SINGLE)
    edit(found)
    save_file(found, folder / SINGLE, {"format": "pt"})


def fault(folder: Path, **options: Any) -> str:
    """The one line that loading a damaged folder ends in."""
    with pytest.raises(WeightsError) as caught:
        weights.load(folder, **options)
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Round trips


@pytest.mark.parametrize("case", CASES)
def test_released_checkpoints_survive(case: str, tmp_path: Path) -> None:
    """The same tensors under the same names, the same config keys, and still no tied head."""
    model = weights.load(GOLDEN / case)
    assert not model.training and model.dtype == torch.float32
    weights.save(model, tmp_path)
    want = load_file(GOLDEN / case / SINGLE)
    assert_equal(load_file(tmp_path / SINGLE), want)
    assert "lm_head.weight" not in want
    keys = [json.loads((place / "config.json").read_text()) for place in (GOLDEN / case, tmp_path)]
    assert keys[0] == keys[1]
    with safe_open(tmp_path / SINGLE, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without it


@pytest.mark.parametrize("plan", PLANS)
def test_own_models_survive(plan: str, tiny: Tiny, lively: Lively, tmp_path: Path) -> None:
    """Every plan, with an untied head among them, loaded as exactly the same function."""
    model = lively(tiny(plan))
    weights.save(model, tmp_path)
    again = weights.load(tmp_path)
    assert again.config == model.config
    assert_equal(again.state_dict(), model.state_dict())
    assert ("lm_head.weight" in tensors(tmp_path)) == (not model.config.tie_embeddings)
    tokens, batch = torch.arange(9), Batch.of([9])
    with torch.no_grad():
        assert torch.equal(again(tokens, batch), model(tokens, batch))
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    """One tensor: trained, cast and saved as one."""
    model = weights.load(GOLDEN / "ntk")
    assert model.lm_head.weight is model.decoder.embed_tokens.weight
    with torch.no_grad():
        model.decoder.embed_tokens.weight += 1
    weights.save(model, tmp_path)
    again = weights.load(tmp_path, dtype="float64")
    assert again.lm_head.weight is again.decoder.embed_tokens.weight
    assert torch.equal(again.lm_head.weight, model.lm_head.weight.double())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_dtypes(dtype: str | torch.dtype) -> None:
    model = weights.load(GOLDEN / "ntk", dtype=dtype)
    want = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    assert {p.dtype for p in model.parameters()} == {want}
    official = load_file(GOLDEN / "ntk" / SINGLE)["model.layers.0.mamba.D.0"]
    assert torch.equal(model.decoder.layers[0].mixer.ssm.D, official.to(want))


def test_the_files_own_dtype(tmp_path: Path) -> None:
    """Loaded as it is unless told otherwise: a bfloat16 checkpoint costs 2 bytes a number."""
    weights.save(weights.load(GOLDEN / "ntk", dtype="bfloat16"), tmp_path)
    assert weights.load(tmp_path).dtype == torch.bfloat16
    assert {x.dtype for x in tensors(tmp_path).values()} == {torch.bfloat16}


def test_config_tells_the_dtype_that_was_saved(tmp_path: Path) -> None:
    """transformers reads it for dtype="auto": it must be that of the tensors beside it."""
    weights.save(weights.load(GOLDEN / "ntk", dtype="bfloat16"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_a_model_is_trainable_once_loaded() -> None:
    model = weights.load(GOLDEN / "ntk")
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(torch.arange(5), Batch.of([5])).sum().backward()
    assert all(p.grad is not None for p in model.decoder.parameters())


def test_files_beside_the_weights_travel_with_them(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    (folder / "LICENSE").write_text("theirs")
    (folder / "notes.txt").write_text("private")
    weights.save(weights.load(folder), tmp_path / "new")
    new = tmp_path / "new"
    assert (new / "LICENSE").read_text() == "theirs"
    assert json.loads((new / "generation_config.json").read_text()) == {"temperature": 0.7}
    assert {f.name for f in new.iterdir()} == {
        "LICENSE", "README.md", "config.json", "generation_config.json", SINGLE, "tokenizer.json",
    }  # fmt: skip


def test_a_model_of_no_folder_gets_what_is_needed(
    tiny: Tiny, lively: Lively, tmp_path: Path
) -> None:
    class Tokenizer:
        def save(self, folder: Path) -> None:
            (Path(folder) / "tokenizer.json").write_text("{}")

    weights.save(lively(tiny("hymba")), tmp_path / "a" / "b", Tokenizer())
    made = tmp_path / "a" / "b"
    generation = json.loads((made / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"]) == (1, 2)
    assert (made / "README.md").read_text().startswith("---\n")
    assert (made / "tokenizer.json").exists()


def test_saving_where_it_was_loaded_from(folder: Path) -> None:
    """Files that belong to it are kept, a card that someone wrote among them."""
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.json").write_text("{}")
    model = weights.load(folder)
    with torch.no_grad():
        model.decoder.final_norm.weight.fill_(3)
    weights.save(model, folder)
    assert (folder / "README.md").read_text() == "mine"
    assert (tensors(folder)["model.final_layernorm.weight"] == 3).all()


# Shards


def test_shards_in_and_out(tmp_path: Path) -> None:
    """Out as transformers writes them, in again, and back to one file."""
    want, model = load_file(GOLDEN / "ntk" / SINGLE), weights.load(GOLDEN / "ntk")
    sharded, single = tmp_path / "sharded", tmp_path / "single"
    weights.save(model, sharded, max_shard_bytes=200_000)
    files = sorted(f.name for f in sharded.glob("*.safetensors"))
    assert len(files) >= 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((sharded / INDEX).read_text())
    assert index["weight_map"].keys() == want.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in want.values())
    assert_equal(tensors(sharded), want)
    weights.save(weights.load(sharded), single)
    assert [f.name for f in single.glob("*.safetensors")] == [SINGLE]
    assert_equal(tensors(single), want)


@pytest.mark.parametrize("sizes", [(200_000, 10**9), (10**9, 200_000), (200_000, 400_000)], ids=str)
def test_saving_again_in_other_shards(sizes: tuple[int, int], tmp_path: Path) -> None:
    """No shard of the first save is left, none is missing."""
    model = weights.load(GOLDEN / "ntk")
    for size in sizes:
        weights.save(model, tmp_path, max_shard_bytes=size)
        with torch.no_grad():
            assert_equal(
                tensors(tmp_path), {to_official(n): p for n, p in model.named_parameters()}
            )
            model.decoder.final_norm.weight += 1
    assert (tmp_path / INDEX).exists() == (sizes[-1] < 10**9)
    weights.load(tmp_path)


def test_a_shard_is_missing(folder: Path, tmp_path: Path) -> None:
    weights.save(weights.load(folder), tmp_path, max_shard_bytes=200_000)
    gone = sorted(tmp_path.glob("model-*.safetensors"))[2]
    gone.unlink()
    assert f"{gone.name} does not exist" in fault(tmp_path)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": ["a"]}'])
def test_an_index_that_is_none(content: str, folder: Path) -> None:
    (folder / INDEX).write_text(content)
    assert "is not a safetensors index" in fault(folder)


# Strictness


NORM, EMBED = "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder, lambda found: found.pop(NORM))
    assert fault(folder).endswith(f"tensors do not fit config.json: missing {NORM}")


def test_an_extra_tensor_is_named(folder: Path) -> None:
    """A tensor that we would drop is a part of the model that we would not run."""
    change(
        folder, lambda found: found.update({"model.layers.1.mamba.q_norm.weight": torch.ones(3)})
    )
    assert "not expected model.layers.1.mamba.q_norm.weight" in fault(folder)


def test_a_misshaped_tensor_is_named(folder: Path) -> None:
    change(folder, lambda found: found.update({NORM: torch.ones(63)}))
    assert f"{NORM} is (63,), not (64,)" in fault(folder)


def test_all_kinds_at_once_and_no_more_than_a_few(folder: Path) -> None:
    def edit(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if "layers.2" in name]:
            del found[name]
        found["stranger"], found[NORM] = torch.ones(1), torch.ones(63)

    change(folder, edit)
    said = fault(folder)
    assert "missing model.layers.2." in said and " and 11 more" in said
    assert "not expected stranger" in said and f"{NORM} is (63,)" in said


def test_an_untied_model_needs_its_head(folder: Path) -> None:
    keys = json.loads((folder / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(keys))
    assert "missing lm_head.weight" in fault(folder)
    change(folder, lambda found: found.update({"lm_head.weight": 2 * found[EMBED]}))
    model = weights.load(folder)
    assert torch.equal(model.lm_head.weight, 2 * model.decoder.embed_tokens.weight)


def test_numbers_that_are_not_weights(folder: Path) -> None:
    """A quantised or damaged tensor must not be taken for its integer codes."""
    change(folder, lambda found: found.update({NORM: torch.ones(64, dtype=torch.int8)}))
    for dtype in (None, "float32"):
        assert NORM in fault(folder, dtype=dtype)


@pytest.mark.parametrize("left", [0, 4, 1000, 500_000, -8])
def test_a_truncated_file(left: int, folder: Path) -> None:
    content = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(content[:left])
    said = fault(folder)
    assert SINGLE in said and "damaged or cut short" in said


def test_no_weights_at_all(folder: Path) -> None:
    (folder / SINGLE).unlink()
    assert f"{SINGLE} does not exist" in fault(folder)


@pytest.mark.parametrize("dtype", ["float31", "int8", torch.int64, "complex64", "nn", "bool"])
def test_a_dtype_that_weights_cannot_have(dtype: Any) -> None:
    assert "try float32 or bfloat16" in fault(GOLDEN / "ntk", dtype=dtype)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn"])
def test_a_dtype_that_the_device_cannot_do(dtype: str) -> None:
    assert f"cpu cannot compute in torch.{dtype}" in fault(GOLDEN / "ntk", dtype=dtype)


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", "", "cpu:x"])
def test_a_device_that_is_not_there(device: str) -> None:
    said = fault(GOLDEN / "ntk", device=device)
    assert "there is no device called" in said or "cannot compute in" in said


# Where a model lives


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nothing", "no-such-model", "./a/b", "../x", "~/model", "a/b/c"):
        with pytest.raises(UserError, match="there is no model folder") as caught:
            weights.load(name)
        assert str(name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_hub_id_without_a_network(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line with the name in it; no traceback of eight libraries."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="nvidia/Hymba-1.5B-Base is no folder here") as caught:
        weights.load("nvidia/Hymba-1.5B-Base")
    assert "\n" not in str(caught.value) and caught.value.__suppress_context__
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("error", [OSError("no route\nto host"), RuntimeError(""), ValueError("x")])
def test_whatever_the_hub_says_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as caught:
        weights.load("someone/something")
    assert "\n" not in str(caught.value) and not str(caught.value).endswith(": ")


def test_a_hub_id_with_a_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[str] = []

    def download(name: str, **kwargs: Any) -> str:
        asked.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert weights.load("someone/something").config == Config.from_folder(folder)
    assert asked == ["someone/something"]
    assert hymba.hub.find(folder) == folder and len(asked) == 1  # a folder is not looked up


# Interruption


def interrupted(
    model: LanguageModel, folder: Path, monkeypatch: pytest.MonkeyPatch, after: int, **options: Any
) -> None:
    """Save, and be killed while the file number `after` is being written."""
    written: list[Path] = []

    def failing(tensors: dict[str, Tensor], path: Path, *rest: Any) -> None:
        save_file(tensors, path, *rest)
        written.append(Path(path))
        if len(written) > after:
            Path(path).write_bytes(Path(path).read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(weights, "save_file", failing)
        with pytest.raises(KeyboardInterrupt):
            weights.save(model, folder, **options)


ONE, SHARDS = 10**9, 200_000


@pytest.mark.parametrize("old", [ONE, SHARDS], ids=["old single", "old shards"])
@pytest.mark.parametrize(
    ("new", "after"),
    [(ONE, 0), (SHARDS, 0), (SHARDS, 2)],
    ids=["single", "first shard", "third shard"],
)
def test_an_interrupted_save_leaves_the_old_model(
    old: int, new: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole, never some shards of one save and some of another, which would load and be wrong."""
    model = weights.load(GOLDEN / "ntk")
    weights.save(model, tmp_path, max_shard_bytes=old)
    before = {to_official(n): p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    interrupted(model, tmp_path, monkeypatch, after, max_shard_bytes=new)
    left = weights.load(tmp_path)
    assert_equal({to_official(n): p.detach() for n, p in left.named_parameters()}, before)
    assert not list(tmp_path.glob(".*")) and not list(tmp_path.glob("*.tmp"))
    weights.save(model, tmp_path, max_shard_bytes=new)  # and the next save sets all right
    after_all = {to_official(n): p.detach() for n, p in model.named_parameters()}
    assert_equal(tensors(tmp_path), after_all)


def test_an_interrupted_first_save_is_no_model(
    tiny: Tiny, lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(lively(tiny("hymba")), tmp_path, monkeypatch, 0)
    assert not (tmp_path / SINGLE).exists()
    with pytest.raises(UserError):
        weights.load(tmp_path)


# Names


def test_names_are_one_to_one(tiny: Tiny) -> None:
    """For every plan: no two names meet, and each finds its way back."""
    for plan in PLANS:
        ours = [name for name, _ in LanguageModel(tiny(plan)).named_parameters()]
        official = [to_official(name) for name in ours]
        assert len(set(official)) == len(ours)
        assert [to_ours(name) for name in official] == ours
    assert to_ours("model.layers.10.mamba.A_log.0") == "decoder.layers.10.mixer.ssm.A_log"
    assert to_ours("model.memory_tokens") == "decoder.meta_tokens.weight"
    assert to_ours("lm_head.weight") == to_official("lm_head.weight") == "lm_head.weight"
