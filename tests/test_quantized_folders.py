"""Weights in few bits, from loading to every command: lossless on disk, refused where they would be
misread, token for token what the rounded matrices say."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import hymba
from hymba import weights
from hymba.cli import main
from hymba.config import Config
from hymba.engine import LLM, Sampling
from hymba.errors import UserError
from hymba.model.accounting import parameters
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.packed import PackedEmbedding, PackedLinear, plan, schemes_of
from hymba.ops.packed import dequantize, quantize
from hymba.schemes import SCHEMES, SchemeError

Tiny = Callable[[str], Config]
Lively = Callable[..., LanguageModel]
LAB = Path(__file__).parent.parent / "results/lab-models"
PLANS = ["hymba", "hymba-no-meta", "llama", "mamba", "samba", "concat", "scalars"]
IDS = torch.tensor([5, 9, 30, 2, 60, 17, 44, 8, 21, 3, 3, 58, 12])


@pytest.fixture
def kept(tiny: Tiny, lively: Lively, tmp_path: Path) -> Callable[[str], Path]:
    """kept(plan) -> a folder with a small model's float32 weights."""

    def make(name: str) -> Path:
        folder = tmp_path / name
        weights.save(lively(tiny(name)), folder)
        return folder

    return make


def rounded(folder: Path, scheme: str) -> LanguageModel:
    """The slow way: a model of floats, whose matrices are what their codes say."""
    model = weights.load(folder, dtype="float32")
    with torch.no_grad():
        for name, each in plan(model, SCHEMES[scheme]).items():
            weight = model.get_parameter(f"{name}.weight")
            weight.copy_(dequantize(quantize(weight, each)))
    return model


@torch.no_grad()
def said(model: LanguageModel) -> Tensor:
    return model.logits(model(IDS, Batch.of([5, 8])))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", PLANS)
def test_a_packed_model_says_what_its_rounded_matrices_say(
    kept: Callable[[str], Path], name: str, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HYMBA_BACKEND", "reference")
    from hymba.ops.backend import forget

    forget()
    folder = kept(name)
    packed = weights.load(folder, quantize=scheme)
    assert schemes_of(packed) and not any(
        type(m) in (nn.Linear, nn.Embedding) for m in packed.modules()
    )
    assert torch.allclose(said(packed), said(rounded(folder, scheme)), rtol=1e-4, atol=1e-4)
    forget()


@pytest.mark.parametrize(
    ("name", "scheme"), [*((name, "int4") for name in PLANS), ("hymba", "int8"), ("hymba", "fp8")]
)
def test_a_quantised_folder_is_lossless_mapped_and_small(
    kept: Callable[[str], Path], name: str, scheme: str, tmp_path: Path
) -> None:
    packed = weights.load(kept(name), quantize=scheme)
    weights.save(packed, tmp_path / "q")
    again = weights.load(tmp_path / "q")
    mine, theirs = packed.state_dict(), again.state_dict()
    assert mine.keys() == theirs.keys()
    for key, x in mine.items():
        assert x.dtype == theirs[key].dtype and torch.equal(x, theirs[key]), key
    assert all(x.data_ptr() % 64 == 0 for k, x in theirs.items() if k.endswith(".tiles"))
    assert torch.equal(said(packed), said(again))
    described = json.loads((tmp_path / "q/config.json").read_text())["quantization_config"]
    assert described["scheme"] == scheme and scheme in described["modules"]
    weights.save(again, tmp_path / "r")
    one, two = (tmp_path / n / "model.safetensors" for n in "qr")
    assert one.read_bytes() == two.read_bytes()
    assert (tmp_path / "q/config.json").read_text() == (tmp_path / "r/config.json").read_text()


def test_a_tied_head_is_kept_once_also_after_a_move(kept: Callable[[str], Path]) -> None:
    packed = weights.load(kept("hymba"), quantize="int8").to("cpu", torch.float64)
    embedding, head = packed.decoder.embed_tokens, packed.lm_head
    assert isinstance(embedding, PackedEmbedding) and isinstance(head, PackedLinear)
    assert head.tiles is embedding.tiles and packed.dtype == torch.float64


@pytest.mark.parametrize(("scheme", "most"), [("int8", 0.28), ("fp8", 0.28), ("int4", 0.17)])
def test_the_released_shape_fits_the_bounds(scheme: str, most: float) -> None:
    config = Config.preset("hymba-1.5b")
    with torch.device("meta"):
        model = LanguageModel(config)
    full = 4 * parameters(config)["total"]
    weights.make_room(model, plan(model, SCHEMES[scheme]), config.tie_embeddings)
    assert sum(x.nbytes for x in model.parameters()) < most * full


def test_a_float_model_saved_over_a_quantised_folder_is_whole(
    kept: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = kept("hymba")
    weights.save(weights.load(folder, quantize="int4"), tmp_path / "x")
    weights.save(weights.load(folder), tmp_path / "x")
    assert "quantization_config" not in json.loads((tmp_path / "x/config.json").read_text())
    assert torch.equal(said(weights.load(tmp_path / "x")), said(weights.load(folder)))


def fault(work: Callable[[], object]) -> str:
    with pytest.raises(UserError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_cannot_be_read_is_refused(kept: Callable[[str], Path], tmp_path: Path) -> None:
    folder, q = kept("hymba"), tmp_path / "q"
    weights.save(weights.load(folder, quantize="int4"), q)
    assert "is in int4 already" in fault(lambda: weights.load(q, quantize="int8"))
    assert schemes_of(weights.load(q, quantize="int4"))
    assert "int4, fp8; did you mean fp8" in fault(lambda: weights.load(folder, quantize="fp3"))
    whole = json.loads((q / "config.json").read_text())

    def with_keys(**keys: object) -> str:
        kept = {**whole, "quantization_config": {**whole["quantization_config"], **keys}}
        (q / "config.json").write_text(json.dumps(kept))
        return fault(lambda: weights.load(q))

    assert "quantised by gptq" in with_keys(quant_method="gptq")
    assert "of version 2, not 1" in with_keys(version=2)
    assert "does not say which modules" in with_keys(modules=None)
    assert "does not say which modules" in with_keys(modules={"int4": None})
    assert "there is no quantisation called 'int3'" in with_keys(modules={"int3": ["x"]})
    assert "quantises x.y, which it has not" in with_keys(modules={"int4": ["x.y"]})
    other = whole["quantization_config"]["modules"]
    swapped = {"int8": other["int4"], "int4": other["int8"]}
    assert ".tiles is" in with_keys(modules=swapped)
    (q / "config.json").write_text(json.dumps({**whole, "quantization_config": None}))
    assert "missing" in fault(lambda: weights.load(q)) and "tiles" in fault(lambda: weights.load(q))


@pytest.mark.parametrize(
    ("key", "told"), [("vocab_size", "61 x 32 in int8, not {} x 32"), ("intermediate_size", "40")]
)
def test_a_size_that_tiles_do_not_show_is_compared(
    kept: Callable[[str], Path], tmp_path: Path, key: str, told: str
) -> None:
    """A tile has 32 rows and a group 32 or 64 columns, filled up or not."""
    q = tmp_path / "q"
    weights.save(weights.load(kept("llama"), quantize="int4"), q)
    whole = json.loads((q / "config.json").read_text())
    for size in (whole[key] - 1, whole[key] + 1):
        (q / "config.json").write_text(json.dumps({**whole, key: size}))
        assert told.format(size) in fault(lambda: weights.load(q))


def test_a_scheme_that_tiles_do_not_show_is_compared(
    kept: Callable[[str], Path], tmp_path: Path
) -> None:
    q = tmp_path / "q"
    weights.save(weights.load(kept("llama"), quantize="int8"), q)
    text = (q / "config.json").read_text()
    (q / "config.json").write_text(text.replace('"int8"', '"fp8"'))
    assert "is 61 x 32 in int8, not 61 x 32 in fp8" in fault(lambda: weights.load(q))


def test_a_tensor_that_cannot_be_held_is_named(kept: Callable[[str], Path]) -> None:
    folder = kept("llama")
    model = weights.load(folder)
    with torch.no_grad():
        model.get_parameter("decoder.layers.1.mlp.up_proj.weight")[0, 0] = torch.inf
    weights.save(model, folder)
    with pytest.raises(SchemeError, match=r"up_proj.weight cannot be kept in int4: it holds"):
        weights.load(folder, quantize="int4")


def test_a_broken_model_is_not_quantised(kept: Callable[[str], Path]) -> None:
    """Also where the number is in a tensor that stays as it is."""
    folder = kept("llama")
    model = weights.load(folder)
    with torch.no_grad():
        model.get_parameter("decoder.layers.1.input_norm.weight")[3] = torch.nan
    weights.save(model, folder)
    with pytest.raises(SchemeError, match=r"layers.1.input_layernorm.weight holds .* not finite"):
        weights.load(folder, quantize="int8")


def test_transformers_and_training_refuse_a_quantised_folder(
    kept: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q = tmp_path / "q"
    weights.save(weights.load(kept("hymba"), quantize="int4"), q)
    pytest.importorskip("transformers")
    from hymba.hf import HymbaForCausalLM

    with pytest.raises(UserError, match="has quantised weights"):
        HymbaForCausalLM.from_pretrained(q)


# ---- the commands, on a model that was trained


def test_quantize_then_generate_says_the_same_as_quantising_when_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    q = tmp_path / "q"
    assert main(["quantize", str(LAB / "hymba"), str(q), "--scheme", "int8"]) == 0
    assert "51 in int8 of 51 matrices" in capsys.readouterr().out
    texts = []
    for model in ([str(q)], [str(LAB / "hymba"), "--quantize", "int8"]):
        assert main(["generate", model[0], "def f(x):", "--max-tokens", "20", *model[1:]]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].strip()
    assert main(["quantize", str(LAB / "hymba"), str(q)]) == 2
    assert "name a new folder" in capsys.readouterr().err
    assert main(["info", str(q)]) == 0
    assert "in int8" in capsys.readouterr().out.splitlines()[0]


def test_a_quantising_that_was_interrupted_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call, fill = ["quantize", str(LAB / "llama"), str(tmp_path / "q")], weights._fill_packed

    def interrupted(*args: object) -> None:
        fill(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(weights, "_fill_packed", interrupted)
    assert main(call) == 130
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    assert main(call) == 0
    assert schemes_of(weights.load(tmp_path / "q"))


def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(weights, "load", None)
    (tmp_path / "file").write_text("")
    assert main(["quantize", str(LAB / "llama"), str(tmp_path / "file" / "q")]) == 2
    assert "file/q: not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["int4", "fp8"])
def test_the_engine_gives_a_packed_model_s_rows_alone_and_together(scheme: str) -> None:
    llm = LLM(LAB / "hymba", device="cpu", quantize=scheme)
    prompts = ["import os\n", "class Node:\n    def", "x = ["]
    sampling = Sampling(max_tokens=24)
    together = [out.text for out in llm.generate(prompts, sampling)]
    alone = [next(llm.generate([prompt], sampling)).text for prompt in prompts]
    assert together == alone


def test_quantised_evaluations_are_kept_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "t.txt", tmp_path / "p.json"
    text.write_text(Path(hymba.__file__).read_text() * 4)  # 2,337 tokens
    call = ["eval", str(LAB / "llama"), "--suite", "perplexity", "--text", str(text)]
    call += ["--lengths", "256"]
    assert main([*call, "--out", str(out)]) == 0
    assert main([*call, "--quantize", "int4", "--out", str(out)]) == 2
    assert "--fresh" in capsys.readouterr().err
    assert main([*call, "--quantize", "int4", "--fresh", "--out", str(out)]) == 0
    assert "in int4" in json.loads(out.read_text())["of"]["model"]


def test_quantize_with_a_text_rounds_otherwise_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "t.txt"
    text.write_text("too short for a row")
    call = ["quantize", str(LAB / "llama"), str(tmp_path / "q"), "--text", str(text)]
    assert main(call) == 2
    assert "give more text" in capsys.readouterr().err and not (tmp_path / "q").exists()
    text.write_text(Path(weights.__file__).read_text())
    assert main(call) == 0
    mine, nearest = weights.load(tmp_path / "q"), weights.load(LAB / "llama", quantize="int4")
    name = "decoder.layers.0.mlp.up_proj.tiles"
    assert not torch.equal(mine.get_parameter(name), nearest.get_parameter(name))
