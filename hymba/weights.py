"""The one file format: a Hugging Face folder with the released checkpoints' names.

    config.json, model.safetensors (or shards and an index), tokenizer and generation files

Weights in few bits (`quantize`) are a folder too: tensors called `.tiles` instead of `.weight`,
laid out as kernels read them and mapped, not copied, and a `quantization_config` that says which
is in what scheme.

`load` and `save` are lossless both ways. Reading is strict: a missing, extra or misshaped tensor
is an error that names it. Writing goes to a temporary name first, so that an interrupted save
leaves what was there.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hymba.config import Config
from hymba.errors import UserError
from hymba.hub import find
from hymba.model.decoder import LanguageModel
from hymba.model.packed import make_room, packed_tiles, plan, schemes_of
from hymba.schemes import SCHEMES, Scheme, SchemeError, scheme_named
from hymba.tokenizer import TOKENIZER_FILES

# (official, ours): parts of tensor names. Official names start with "model.", ours "decoder.".
OFFICIAL_NAMES: tuple[tuple[str, str], ...] = (
    ("memory_tokens", "meta_tokens.weight"),
    ("final_layernorm.", "final_norm."),
    (".input_layernorm.", ".input_norm."),
    (".pre_moe_layernorm.", ".mlp_norm."),
    (".moe.experts.0.", ".mlp."),
    (".mamba.in_proj.", ".mixer.in_proj."),
    (".mamba.out_proj.", ".mixer.out_proj."),
    (".mamba.pre_avg_layernorm1.", ".mixer.attention_norm."),
    (".mamba.pre_avg_layernorm2.", ".mixer.ssm_norm."),
    (".mamba.fusion_scales.", ".mixer.scales."),  # ours: no released model has them
    (".mamba.conv1d.", ".mixer.ssm.conv."),
    (".mamba.x_proj.0.", ".mixer.ssm.x_proj."),
    (".mamba.dt_layernorm.", ".mixer.ssm.dt_norm."),
    (".mamba.B_layernorm.", ".mixer.ssm.B_norm."),
    (".mamba.C_layernorm.", ".mixer.ssm.C_norm."),
    (".mamba.dt_proj.0.weight", ".mixer.ssm.dt_proj.weight"),
    (".mamba.dt_proj.0.bias", ".mixer.ssm.dt_bias"),
    (".mamba.A_log.0", ".mixer.ssm.A_log"),
    (".mamba.D.0", ".mixer.ssm.D"),
)
# Files beside the weights that belong to a checkpoint and travel with it.
SIDE_FILES = (*TOKENIZER_FILES, "generation_config.json", "LICENSE")
QUANTIZED = "quantization_config"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MODEL_CARD = """---
library_name: hymba
pipeline_tag: text-generation
---
A hybrid-head language model: `hymba.load(folder)`, or `import hymba.hf` and then transformers'
`AutoModelForCausalLM.from_pretrained(folder)`.
"""


class WeightsError(UserError):
    """A checkpoint that cannot be loaded or saved; the message names the file or the tensors."""


class SavesItself(Protocol):
    def save(self, folder: str | Path) -> Any: ...


def to_ours(official: str) -> str:
    """model.layers.0.mamba.A_log.0 -> decoder.layers.0.mixer.ssm.A_log"""
    if not official.startswith("model."):
        return official
    name = "decoder." + official.removeprefix("model.")
    for theirs, ours in OFFICIAL_NAMES:
        name = name.replace(theirs, ours)
    return name


def to_official(ours: str) -> str:
    """The inverse of `to_ours`."""
    if not ours.startswith("decoder."):
        return ours
    name = "model." + ours.removeprefix("decoder.")
    for theirs, mine in OFFICIAL_NAMES:
        name = name.replace(mine, theirs)
    return name


def load(
    model: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    progress: Callable[[str, int, int | None], None] | None = None,
) -> LanguageModel:
    """Load a folder or a hub id ("nvidia/Hymba-1.5B-Base"). dtype None keeps the file's own; but on
    a CPU, numbers beside weights in few bits are float32.

    `quantize`, "int8", "int4" or "fp8", rounds the matrices to so many bits, one after the other:
    the model is never held in full. `progress` is told ("quantising", tensors done, of how many).

    Raises ConfigError, SchemeError or WeightsError, one line each."""
    kind = _dtype(dtype)
    scheme = None if quantize is None else scheme_named(quantize)
    target = usable_device(device, kind or torch.float32)
    folder = find(model)
    config = Config.from_folder(folder)
    with torch.device("meta"), _Unfilled():
        empty = LanguageModel(config)
    schemes = _schemes(folder, config, scheme)
    strange = schemes.keys() - plan(empty, SCHEMES["int8"]).keys()
    if strange:
        raise WeightsError(f"{folder}: config.json quantises {some(strange)}, which it has not")
    if scheme is not None:
        schemes = schemes or plan(empty, scheme)
    make_room(empty, schemes, config.tie_embeddings)
    if schemes and kind is None and target.type == "cpu":
        kind = torch.float32
    wanted = _shapes(empty, config)
    tensors: dict[str, Tensor] = {}
    for name, tensor in _read(folder, target, kind):
        if progress is not None and scheme is not None:
            progress("quantising", len(tensors), len(wanted))
        module, _, last = to_ours(name).rpartition(".")
        if last == "weight" and module in schemes:
            tensors[f"{module}.tiles"] = packed_tiles(name, tensor, schemes[module])
        elif scheme is not None and last != "tiles" and not bool(tensor.isfinite().all()):
            raise SchemeError(f"{name} holds numbers that are not finite: the model is broken")
        else:
            tensors[to_ours(name)] = tensor
    if config.tie_embeddings:
        _drop_tied_head(tensors, folder)
    _compare(wanted, {name: tuple(x.shape) for name, x in tensors.items()}, folder)
    _compare_tiles(_described_tiles(empty), folder)
    empty.load_state_dict(tensors, strict=False, assign=True)
    if config.tie_embeddings and schemes:
        empty.lm_head.tiles = empty.decoder.embed_tokens.tiles
    elif config.tie_embeddings:
        empty.lm_head.weight = empty.decoder.embed_tokens.weight
    empty.folder = folder
    return empty.eval()


class _Unfilled(TorchFunctionMode):
    """Modules are made without first values, which a file replaces: on the meta device torch would
    import its compiler for them, 150 MB."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return func(*args, **(kwargs or {}))


def save(
    model: LanguageModel,
    folder: str | Path,
    tokenizer: SavesItself | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write a folder that `load` and transformers read. Tokenizer and generation files come from
    `tokenizer` and from the folder the model was loaded from."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    origin = model.folder or target
    if origin.resolve() != target.resolve():
        for name in SIDE_FILES:
            if (origin / name).is_file():
                shutil.copyfile(origin / name, target / name)
    if tokenizer is not None:
        tokenizer.save(target)
    small: dict[Path, Callable[[Path], Any]] = {}
    if not (target / "generation_config.json").exists():
        generation = _generation_config(model.config)
        small[target / "generation_config.json"] = functools.partial(_fill_json, generation)
    if not (target / "README.md").exists():
        small[target / "README.md"] = functools.partial(_fill_text, MODEL_CARD)
    tied = {"lm_head.weight", "lm_head.tiles"} if model.config.tie_embeddings else set()
    state = {to_official(k): v for k, v in model.state_dict().items() if k not in tied}
    schemes, keys = schemes_of(model), model.config.to_dict()
    keys.pop(QUANTIZED, None)
    if schemes:
        keys[QUANTIZED] = _described(schemes)
        _write({target / SINGLE: functools.partial(_fill_packed, state, _described_tiles(model))})
        _remove_others(target, {SINGLE})
    else:
        _write_tensors(state, target, max_shard_bytes)
    keys["dtype" if "dtype" in keys else "torch_dtype"] = str(model.dtype).removeprefix("torch.")
    small[target / "config.json"] = functools.partial(_fill_json, keys)
    _write(small)


def usable_device(device: str | torch.device, dtype: torch.dtype = torch.float32) -> torch.device:
    """The device, which can compute in `dtype`. WeightsError if it does not exist or cannot."""
    try:
        found = torch.device(device)
    except RuntimeError:
        raise WeightsError(f"there is no device called {device!r}: try cpu or cuda") from None
    _check_device(found, dtype)
    return found


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype):
            raise WeightsError(f"there is no dtype called {dtype!r}: try float32 or bfloat16")
        dtype = found
    if dtype is not None and not dtype.is_floating_point:
        raise WeightsError(f"weights cannot be {dtype}: try float32 or bfloat16")
    return dtype


def _check_device(device: torch.device, dtype: torch.dtype) -> None:
    try:
        probe = torch.ones(2, 2, device=device, dtype=dtype)
        float((probe @ probe).sum())
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise WeightsError(f"{device} cannot compute in {dtype}: {reason}") from None


def _schemes(folder: Path, config: Config, wanted: Scheme | None) -> dict[str, Scheme]:
    """How the modules of a folder are packed, by our names; empty if they are not."""
    kept = config.source.get(QUANTIZED)
    if kept is None:
        return {}
    where = folder / "config.json"
    if not isinstance(kept, dict) or kept.get("quant_method") != "hymba":
        method = kept.get("quant_method", "?") if isinstance(kept, dict) else kept
        raise WeightsError(
            f"{where}: its weights are quantised by {method}, which cannot be read here: take the"
            " model as it was trained, and quantize it here"
        )
    if kept.get("version") != 1:
        raise WeightsError(f"{where}: quantised weights of version {kept.get('version')}, not 1")
    modules = kept.get("modules")
    if not (isinstance(modules, dict) and all(isinstance(x, list) for x in modules.values())):
        raise WeightsError(f"{where}: {QUANTIZED} does not say which modules are in which scheme")
    found = {
        to_ours(f"{name}.weight").removesuffix(".weight"): scheme_named(scheme)
        for scheme, names in modules.items()
        for name in names
    }
    if wanted is not None and kept.get("scheme") != wanted.name:
        raise WeightsError(
            f"{folder} is in {kept.get('scheme')} already: quantize the model that it was made from"
        )
    return found


def _described(schemes: Mapping[str, Scheme]) -> dict[str, Any]:
    """The `quantization_config` of a model: every packed module by its official name."""
    modules: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        official = to_official(f"{name}.weight").removesuffix(".weight")
        modules.setdefault(scheme.name, []).append(official)
    few = min(schemes.values(), key=lambda scheme: scheme.bits)
    return {"quant_method": "hymba", "version": 1, "scheme": few.name, "modules": modules}


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        try:
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = [folder / name for name in sorted(set(index.values()))]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise WeightsError(f"{folder / INDEX} is not a safetensors index") from None
    else:
        files = [folder / SINGLE]
    for file in files:
        if not file.is_file():
            raise WeightsError(f"{file} does not exist: the checkpoint is not complete")
    return files


def _read(
    folder: Path, device: torch.device, dtype: torch.dtype | None
) -> Iterable[tuple[str, Tensor]]:
    for file in _files(folder):
        try:
            with safe_open(str(file), framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    tensor = tensors.get_tensor(name)
                    tiles = tensor.dtype == torch.uint8 and name.endswith(".tiles")
                    if not (tensor.is_floating_point() or tiles):
                        kind = str(tensor.dtype).removeprefix("torch.")
                        raise WeightsError(f"{file}: {name} holds {kind}, which is no weight")
                    yield name, tensor.to(device=device, dtype=None if tiles else dtype)
        except SafetensorError as error:
            raise WeightsError(f"{file} is damaged or cut short ({error})") from None


def _shapes(model: LanguageModel, config: Config) -> dict[str, tuple[int, ...]]:
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    if config.tie_embeddings:
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith("lm_head.")}
    return shapes


def _drop_tied_head(tensors: dict[str, Tensor], folder: Path) -> None:
    """Some tools write the tied head too; that says nothing new unless it differs."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get("decoder.embed_tokens.weight")
    if head is None or embedding is None:
        return
    if head.shape != embedding.shape or not torch.equal(head, embedding):
        raise WeightsError(f"{folder}: lm_head.weight differs from the embedding it is tied to")
    del tensors["lm_head.weight"]


def _compare(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """Raise one line that names what is missing, extra or misshaped, by official names."""
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    both = [name for name in wanted if name in found]
    shapes = [
        f"{to_official(name)} is {found[name]}, not {wanted[name]}"
        for name in both
        if found[name] != wanted[name]
    ]
    parts = [
        f"missing {some(map(to_official, missing))}" if missing else "",
        f"not expected {some(map(to_official, extra))}" if extra else "",
        some(shapes) if shapes else "",
    ]
    if any(parts):
        faults = "; ".join(filter(None, parts))
        raise WeightsError(f"{folder}: tensors do not fit config.json: {faults}")


def _described_tiles(model: LanguageModel) -> dict[str, str]:
    """What packed modules hold, as files tell it: tiles are filled up, and those of int8 and of fp8
    are as large, so that their own shape does not say it."""
    packed = {name: model.get_submodule(name) for name in schemes_of(model)}
    return {
        to_official(f"{name}.tiles"): f"{x.rows} x {x.columns} in {x.scheme.name}"  # type: ignore[union-attr]
        for name, x in packed.items()
    }


def _compare_tiles(wanted: Mapping[str, str], folder: Path) -> None:
    for file in _files(folder) if wanted else ():
        with safe_open(str(file), framework="pt") as tensors:
            told = tensors.metadata() or {}
        strange = [
            f"{name} is {told[name]}, not {tiles}"
            for name, tiles in wanted.items()
            if told.get(name, tiles) != tiles
        ]
        if strange:
            raise WeightsError(f"{folder}: tensors do not fit config.json: {some(strange)}")


def some(names: Iterable[str], most: int = 8) -> str:
    """Names for one line: the first few, and how many more."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def _generation_config(config: Config) -> dict[str, Any]:
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
    }
    return {key: value for key, value in ids.items() if value is not None} | {"use_cache": True}


def _write_tensors(state: dict[str, Tensor], folder: Path, max_shard_bytes: int) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(state, max_shard_size=max_shard_bytes)
    files: dict[Path, Callable[[Path], Any]] = {}
    for file, names in split.filename_to_tensors.items():
        part = {name: state[name].detach() for name in names}
        files[folder / file] = functools.partial(_fill_tensors, part)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        files[folder / INDEX] = functools.partial(_fill_json, index)
    _write(files)
    _remove_others(folder, {*split.filename_to_tensors, INDEX if split.is_sharded else ""})


def _remove_others(folder: Path, kept: set[str]) -> None:
    """Files of an earlier save here, in other shards."""
    for old in (folder / INDEX, *folder.glob("model*.safetensors")):
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _fill_packed(tensors: dict[str, Tensor], told: dict[str, str], path: Path) -> None:
    """A safetensors file whose bytes start at multiples of 64, where wide loads want them: tiles
    first, each a multiple of 64 bytes long, and the header filled up with spaces. The library puts
    them after all wider numbers. `told` goes into the header."""
    ordered = sorted(tensors.items(), key=lambda item: item[1].dtype != torch.uint8)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **told}}
    end = 0
    for name, x in ordered:
        kind = _KINDS.get(x.dtype)
        if kind is None:
            raise WeightsError(f"{name} is {x.dtype}, which files of packed weights do not hold")
        start, end = end, end + x.nbytes
        header[name] = {"dtype": kind, "shape": list(x.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, x in ordered:
            file.write(x.detach().cpu().contiguous().view(torch.uint8).numpy().data)


_KINDS = {torch.uint8: "U8", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def _fill_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({k: x.cpu().contiguous() for k, x in tensors.items()}, path, {"format": "pt"})


def _fill_json(content: Any, path: Path) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _fill_text(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8")


def _write(files: Mapping[Path, Callable[[Path], Any]]) -> None:
    """Fill temporary files, all of them, then rename them: the old files or the new ones."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in files}
    try:
        for path, fill in files.items():
            fill(temporary[path])
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
