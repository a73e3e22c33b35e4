"""An exported model against the model: every plan, chunks and steps, float32 and few bits."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from hymba.config import Config
from hymba.export import Choices, ExportError, export
from hymba.export.decoder import Writer
from hymba.export.graph import PAGE, SMALL, Data
from hymba.export.meta import meta_states
from hymba.export.session import Session
from hymba.model.decoder import LanguageModel
from hymba.weights import load
from tests.onnx.conftest import Exported, assert_same_tokens, in_few_bits, logits_of, onnx
from tests.plans import plans

ort = pytest.importorskip("onnxruntime")
LAB = Path(__file__).parents[2] / "results" / "lab-models"
Lively = Callable[..., LanguageModel]


@pytest.mark.parametrize("plan", plans())
def test_every_plan_in_chunks_and_steps(
    plan: str, tiny: Callable[[str], Config], lively: Lively, exported: Exported, text: Callable
) -> None:
    """Chunks of all lengths, single tokens between them, rings of 5 + 8 places go round."""
    model, ids, at = lively(tiny(plan)), text(45).tolist(), 0
    session, ours = exported(model), logits_of(model, ids)
    for count in (1, 1, 7, 8, 2, 1, 1, 1, 8, 8, 3, 1, 3):
        theirs = session.feed(ids[at : at + count])
        at += count
        assert np.abs(theirs - ours[at - 1]).max() <= 1e-4 * ours.std(), f"after {at} tokens"
    assert at == len(ids)


@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        ({"mlp_activation": "relu2"}, 8),
        ({"ssm_conv": 1, "ssm_conv_bias": False}, 8),
        ({"ssm_state": 1, "num_kv_heads": 1}, 3),
        ({}, 1),
    ],
)
def test_other_sizes(
    changes: dict, chunk: int, tiny: Callable[[str], Config], lively: Lively, exported: Exported,
    text: Callable,
) -> None:  # fmt: skip
    """No gate, one tap, one state; a chunk shorter than the window, and steps alone."""
    model, ids = lively(tiny("hymba").replace(**changes)), text(30).tolist()
    session, ours = exported(model, chunk=chunk), logits_of(model, ids)
    for at in range(0, 30, 10):
        theirs = session.feed(ids[at : at + 10])
        assert np.abs(theirs - ours[at + 9]).max() <= 1e-4 * ours.std()


@pytest.mark.parametrize("plan", ["hymba", "samba", "llama-compressed-meta"])
def test_greedy_tokens_over_hundreds(
    plan: str, tiny: Callable[[str], Config], lively: Lively, exported: Exported, text: Callable
) -> None:
    model = lively(tiny(plan))
    assert_same_tokens(exported(model, 330), model, text(21).tolist(), 300, 1e-3)


@pytest.mark.skipif(not LAB.is_dir(), reason="the models are not in this copy")
@pytest.mark.parametrize("name", ["hymba", "llama", "mamba", "mamba-mlp", "samba"])
def test_trained_models_say_the_same(name: str, exported: Exported) -> None:
    """200 tokens of prompt and 300 more, where a ring has 256 + 128 places."""
    model = load(LAB / name, dtype="float32")
    prompt = torch.randint(3, 4096, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_same_tokens(exported(model, 501, chunk=128), model, prompt, 300, 1e-4)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("plan", ["hymba", "hymba-no-meta", "concat", "mamba-meta", "llama"])
def test_few_bits_are_the_weights_they_mean(
    scheme: str, plan: str, tiny: Callable[[str], Config], lively: Lively, exported: Exported,
    text: Callable,
) -> None:  # fmt: skip
    """Widths of 32, 40, 64 and 3 are no multiples of both groups. Tied and untied heads."""
    packed, meant = in_few_bits(lively(tiny(plan)), scheme)
    assert_same_tokens(exported(packed, 130, accuracy=1), meant, text(21).tolist(), 100, 1e-3)


@pytest.mark.skipif(not LAB.is_dir(), reason="the models are not in this copy")
@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_trained_model_in_few_bits(scheme: str, exported: Exported) -> None:
    packed, meant = in_few_bits(load(LAB / "hymba", dtype="float32"), scheme)
    prompt = torch.randint(3, 4096, (200,), generator=torch.Generator().manual_seed(1)).tolist()
    assert_same_tokens(exported(packed, 501, accuracy=1), meant, prompt, 300, 1e-4)


@pytest.mark.skipif(not LAB.is_dir(), reason="the models are not in this copy")
def test_int8_activations_are_near(exported: Exported) -> None:
    """Near, and not the same: the option reaches the products."""
    packed, meant = in_few_bits(load(LAB / "hymba", dtype="float32"), "int4")
    prompt = torch.randint(3, 4096, (100,), generator=torch.Generator().manual_seed(1)).tolist()
    ours = logits_of(meant, prompt)[-1]
    off = np.abs(exported(packed, 100, accuracy=4).feed(prompt) - ours).max() / ours.std()
    assert 1e-3 < off < 0.25


def test_bfloat16_is_exported_as_the_float32_it_is(
    tiny: Callable[[str], Config], lively: Lively, exported: Exported, text: Callable
) -> None:
    model, ids = lively(tiny("hymba"), dtype=torch.bfloat16), text(8).tolist()
    theirs = exported(model).feed(ids)
    ours = logits_of(model.float(), ids)
    assert np.abs(theirs - ours[-1]).max() <= 1e-4 * ours.std()


def test_meta_states_are_the_models(tiny: Callable[[str], Config], lively: Lively) -> None:
    model = lively(tiny("hymba"))
    with torch.no_grad():
        wanted = model.decoder.meta_states()
    for layer, mine, ours in zip(
        model.config.layers, meta_states(model.decoder), wanted, strict=True
    ):
        if not layer.owns_kv:  # a consumer is told its producer's, which the model does not keep
            mine = mine._replace(k=None, v=None)
        for got, want in zip(mine, ours, strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                assert torch.equal(got, want)


def test_without_a_binding_inputs_stay(
    tiny: Callable[[str], Config],
    lively: Lively,
    exported: Exported,
    text: Callable,
    tmp_path: Path,
) -> None:
    ids = text(6)
    bound = exported(lively(tiny("hymba")))
    start, model = (
        ort.InferenceSession(str(tmp_path / "onnx" / name)) for name in ("start.onnx", "model.onnx")
    )
    names = [output.name for output in start.get_outputs()]
    assert names == [f"past.{name}" for name in bound.told["cache"]]
    cache = dict(zip(names, start.run(None, {"room": np.array([64])}), strict=True))
    before = {name: array.copy() for name, array in cache.items()}
    past = np.array([0])
    logits, *after = model.run(None, {"ids": ids.numpy(), "past": past, **cache})
    for name, array in cache.items():
        np.testing.assert_array_equal(array, before[name])
        assert list(array.shape) == [
            64 if size == "room" else size for size in bound.told["cache"][name[5:]]
        ]
    np.testing.assert_array_equal(bound.feed(ids.tolist()), logits[0])
    for name, array in zip(names, after, strict=True):
        assert array.shape == before[name].shape and not np.array_equal(array, before[name]), name


@pytest.mark.parametrize("scheme", [None, "int4"])
def test_what_does_not_fit_ends_the_run(
    scheme: str | None, tiny: Callable[[str], Config], lively: Lively, exported: Exported,
    tmp_path: Path,
) -> None:  # fmt: skip
    """A chunk longer than the rings' room, a token beyond the vocabulary, one beyond the room."""
    model = lively(tiny("hymba"))
    if scheme:
        model, _ = in_few_bits(model, scheme)
    session = exported(model, room=10)
    session.told["chunk"] = 9  # as a program that does not read it
    with pytest.raises(Exception, match="out of data bounds"):
        session.feed([1] * 9)
    session.reset()
    with pytest.raises(Exception, match="out of data bounds"):
        session.feed([model.config.vocab_size])
    session.reset()
    session.feed([1] * 8)
    with pytest.raises(Exception, match="indice"):
        session.feed([1] * 3)


def test_weights_are_stored_once_outside_the_graphs(
    tiny: Callable[[str], Config], lively: Lively, exported: Exported, tmp_path: Path
) -> None:
    model = lively(tiny("hymba").replace(vocab_size=2000))
    exported(model)
    size = sum(p.nbytes for p in model.parameters())  # a tied head counted once
    spans = set()
    for name in ("model.onnx", "start.onnx"):
        graph = onnx.load(tmp_path / "onnx" / name, load_external_data=False).graph
        for tensor in graph.initializer:
            assert len(tensor.raw_data) < SMALL
            if tensor.external_data:
                entry = {item.key: item.value for item in tensor.external_data}
                spans.add((int(entry["offset"]), int(entry["length"])))
    assert all(offset % PAGE == 0 for offset, _ in spans)
    ordered = sorted(spans)
    assert all(a + b <= c for (a, b), (c, _) in zip(ordered, ordered[1:], strict=False))
    written = sum(length for _, length in spans)
    assert 0.8 * size < written < 1.2 * size
    assert (tmp_path / "onnx" / "weights.bin").stat().st_size < written + PAGE * (len(spans) + 1)


def test_two_views_of_one_packed_table(
    tiny: Callable[[str], Config], lively: Lively, exported: Exported, tmp_path: Path
) -> None:
    """Look-ups and the tied head read the same bytes."""
    packed, _ = in_few_bits(lively(tiny("hymba").replace(vocab_size=500)), "int4")
    exported(packed)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False).graph
    places = [
        {item.key: item.value for item in tensor.external_data}
        for tensor in graph.initializer
        if tensor.name.startswith("embed_tokens.codes")
    ]
    assert len(places) == 2 and places[0] == places[1]


def test_a_step_has_no_loop(
    tiny: Callable[[str], Config], lively: Lively, exported: Exported, tmp_path: Path
) -> None:
    model = lively(tiny("hymba"))
    exported(model)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx").graph
    assert not {"Loop", "Scan"} & {node.op_type for node in graph.node}
    choices = [node for node in graph.node if node.op_type == "If"]
    assert len(choices) == model.config.num_layers
    for node in choices:
        branches = {item.name: [n.op_type for n in item.g.node] for item in node.attribute}
        assert "Scan" in branches["else_branch"] and "Scan" not in branches["then_branch"]


def test_the_model_of_a_folder_is_told(
    tiny: Callable[[str], Config], lively: Lively, exported: Exported
) -> None:
    told = exported(lively(tiny("hymba")), chunk=6).told
    assert told["format"] == "hymba-onnx" and told["weights"] == ["float32"]
    assert (told["vocabulary"], told["chunk"], told["end"]) == (61, 6, [2])
    assert told["cache"]["0.key"] == [2, "room", 8] and told["cache"]["1.key"] == [2, 11, 8]
    assert "2.key" not in told["cache"] and told["cache"]["2.state"] == [4, 64]


def test_a_foreign_module_is_refused_by_name(
    tiny: Callable[[str], Config], lively: Lively, tmp_path: Path
) -> None:
    model = lively(tiny("llama"))
    mixer = model.decoder.layers[1].mixer
    mixer.out_proj = torch.nn.Sequential(mixer.out_proj)
    with pytest.raises(ExportError, match="1.out_proj is a Sequential, not a plain matrix"):
        export(model, tmp_path / "onnx")
    assert not list(tmp_path.iterdir())


def test_an_interrupted_export_leaves_what_was_there(
    tiny: Callable[[str], Config], lively: Lively, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = lively(tiny("llama")), tmp_path / "onnx"
    export(model, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupt(*args: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "mlp", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(model, folder, force=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["onnx"]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    """By the system's error, which numpy's own way to files does not have."""
    if not Path("/dev/full").exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "weights.bin").symlink_to("/dev/full")
    data = Data(tmp_path / "weights.bin")
    with pytest.raises(OSError) as caught:
        data.put("x", np.zeros(1 << 16, np.float32))
    assert caught.value.errno == errno.ENOSPC
    data._file.raw.close()  # type: ignore[attr-defined]


def test_folders_that_are_not_ours_stay(
    tiny: Callable[[str], Config], lively: Lively, tmp_path: Path
) -> None:
    model = lively(tiny("llama"))
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "one.txt").write_text("dear")
    for force in (False, True):
        with pytest.raises(ExportError, match="holds something else"):
            export(model, tmp_path / "letters", force=force)
        with pytest.raises(ExportError, match="is a file"):
            export(model, tmp_path / "letters" / "one.txt", force=force)
    (tmp_path / "empty").mkdir()
    export(model, tmp_path / "empty", Choices(chunk=4))
    with pytest.raises(ExportError, match="--force"):
        export(model, tmp_path / "empty")
    export(model, tmp_path / "empty", Choices(chunk=5), force=True)
    assert json.loads((tmp_path / "empty" / "hymba.json").read_text())["chunk"] == 5
    assert Session(tmp_path / "empty", 4, 1).feed([1, 2]).shape == (61,)


@pytest.mark.parametrize("plan", ["hymba", "windows", "mamba", "mamba-meta"])
def test_every_sequence_begins_anew(
    plan: str, tiny: Callable[[str], Config], lively: Lively, exported: Exported, text: Callable
) -> None:
    """What is written into one sequence's cache is not in what the next one starts from."""
    session, ids = exported(lively(tiny(plan))), text(20).tolist()
    first = session.feed(ids)
    session.reset()
    np.testing.assert_array_equal(session.feed(ids), first)
