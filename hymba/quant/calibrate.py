"""A whole model, rounded layer by layer with a text in front of it.

Rows of text run through one layer at a time. The first run gathers, of every projection, which
inputs it reads (X^T X, by a hook on the module); then its projections are rounded; the second run
makes the next layer's inputs with the rounded ones, so that each layer sees, and makes good in
part, what those before it have lost. Meta tokens run in front of each batch, as in training.

The embedding, and a head tied to it, is rounded to nearest: a look-up has no inputs to weigh.
Memory: the model in its dtype, hidden states of all rows, one layer's X^T X.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from hymba.errors import UserError
from hymba.model.batch import Batch
from hymba.model.decoder import LanguageModel
from hymba.model.hybrid import Before, Left
from hymba.model.layers import rope_tables
from hymba.model.packed import make_room, packed_tiles, plan, schemes_of
from hymba.quant.gptq import gptq
from hymba.schemes import Scheme, SchemeError, scheme_named
from hymba.tokenizer import Tokenizer
from hymba.weights import load, to_official

ROWS, LENGTH = 128, 512
AT_ONCE = 4096  # tokens of a forward
EMBEDDING, HEAD = "decoder.embed_tokens", "lm_head"

Progress = Callable[[str, int, int], None]  # what, done, of how many


class CalibrationError(UserError):
    """Text that a model cannot be calibrated with; the message says what to do."""


def text_rows(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    count: int = ROWS,
    length: int = LENGTH,
    seed: int = 0,
) -> Tensor:
    """At most `count` rows of `length` token ids (R, T), from places all over the texts, drawn by
    `seed`; each begins as texts of this tokenizer do.

    CalibrationError where the texts together are shorter than one row."""
    draw = random.Random(seed)
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    size = length - len(begin)
    share = -(-count // max(1, len(texts)))  # of the rows, that one text may have
    found: list[list[int]] = []
    spare: list[list[int]] = []
    rest: list[int] = []
    for text in draw.sample(list(texts), len(texts)):
        ids = rest + tokenizer.encode(text)
        pieces = [ids[at : at + size] for at in range(0, len(ids) - size + 1, size)]
        rest = ids[len(pieces) * size :]
        draw.shuffle(pieces)
        found += pieces[:share]
        spare += pieces[share:]
        if len(found) >= count:
            break
    found += draw.sample(spare, min(len(spare), max(0, count - len(found))))
    if not found:
        raise CalibrationError(
            f"the text has {len(rest)} tokens, and a row of calibration {length}: give more text"
        )
    return torch.tensor([begin + row for row in found[:count]])


@torch.no_grad()
def calibrate(
    model: LanguageModel | str | Path,
    scheme: str,
    rows: Tensor,
    progress: Progress | None = None,
) -> LanguageModel:
    """The model with its matrices in few bits, chosen by GPTQ as it reads `rows` (R, T) of token
    ids. A folder or hub id is taken in float32; a model that is given is changed and given back.

    Modules and schemes are those of `hymba.load(..., quantize=scheme)`, and so are the files.
    `progress("layers", done, count)` after each. Raises SchemeError, WeightsError, ConfigError,
    CalibrationError."""
    wanted = scheme_named(scheme)
    if rows.ndim != 2 or not rows.numel() or rows.is_floating_point():
        told = f"{tuple(rows.shape)} of {str(rows.dtype).removeprefix('torch.')}"
        raise CalibrationError(f"rows are token ids (R, T), not {told}: text_rows makes them")
    if not isinstance(model, LanguageModel):
        model = load(model, dtype=torch.float32)
    if schemes_of(model):
        raise SchemeError(f"{model.folder or 'the model'} is quantised already: take its original")
    schemes = plan(model, wanted)
    tied = model.config.tie_embeddings
    _round_to_nearest(model, {x: schemes[x] for x in (EMBEDDING, HEAD)[: 1 + tied]})
    walk = _Walk(model.eval(), rows)
    count = len(model.config.layers)
    for number in range(count):
        names = [name for name in schemes if name.startswith(f"decoder.layers.{number}.")]
        with _inputs(model, names) as seen:
            walk.look(number)
        for name in names:
            _round(model, name, seen.pop(name), schemes[name])
        walk.go(number)
        if progress is not None:
            progress("layers", number + 1, count)
    if not tied:
        with _inputs(model, [HEAD]) as seen:
            walk.end()
        _round(model, HEAD, seen[HEAD], schemes[HEAD])
    return model


class _Walk:
    """All rows, in batches, on their way through the layers."""

    def __init__(self, model: LanguageModel, rows: Tensor) -> None:
        self.model, decoder, device = model, model.decoder, model.device
        self.hidden: list[Tensor] = []  # of each batch (meta + N, D)
        self.batches: list[Batch] = []
        for some in rows.to(device).split(max(1, AT_ONCE // rows.shape[1])):
            batch, x = (
                Batch.of([some.shape[1]] * len(some), device=device),
                decoder.embed(some.flatten()),
            )
            if decoder.meta_tokens is not None:
                batch = batch.with_meta(model.config.meta_tokens)
                x = torch.cat([decoder.meta_tokens().to(x.dtype), x])
            self.hidden.append(x)
            self.batches.append(batch)
        self.lefts: list[dict[int, Left]] = [{} for _ in self.batches]  # of layers others look at

    def look(self, number: int) -> None:
        """Run a layer for its hooks alone."""
        for _ in self._run(number):
            pass

    def go(self, number: int) -> None:
        """Run a layer, and stand behind it."""
        later = [layer.kv_from for layer in self.model.config.layers[number + 1 :]]
        for at, (x, left) in enumerate(self._run(number)):
            self.hidden[at] = x
            if number in later:
                self.lefts[at][number] = left
            self.lefts[at] = {i: kept for i, kept in self.lefts[at].items() if i in later}

    def end(self) -> None:
        """Run the head for its hooks alone."""
        for x, batch in zip(self.hidden, self.batches, strict=True):
            self.model.logits(self.model.decoder.final_norm(x[batch.meta :]))

    def _run(self, number: int) -> Iterator[tuple[Tensor, Left]]:
        config = self.model.config
        block, producer = self.model.decoder.layers[number], config.layers[number].kv_from
        for x, batch, lefts in zip(self.hidden, self.batches, self.lefts, strict=True):
            meta = torch.arange(batch.meta, device=x.device)
            positions = torch.cat([meta, batch.positions + config.meta_tokens])
            rope = rope_tables(positions, config.head_dim, config.rope_base)
            yield block(x, rope, batch, Before(), None if producer is None else lefts[producer])


@contextmanager
def _inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """X^T X (columns, columns) of what each projection reads meanwhile. The hooks also make a
    layer call its projections as modules, where it would else read their weights itself."""
    seen: dict[str, Tensor] = {}
    hooks = []
    for name in names:
        module = model.get_submodule(name)
        columns: int = module.in_features  # type: ignore[assignment]
        seen[name] = torch.zeros(columns, columns, device=module.weight.device)  # type: ignore

        def note(_: nn.Module, args: tuple[Tensor, ...], total: Tensor = seen[name]) -> None:
            x = args[0].reshape(-1, len(total)).float()
            total.addmm_(x.T, x)

        hooks.append(module.register_forward_pre_hook(note))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _round(model: LanguageModel, name: str, hessian: Tensor, scheme: Scheme) -> None:
    weight = model.get_submodule(name).weight
    try:
        tiles = gptq(weight, hessian, scheme).tiles  # type: ignore[arg-type]
    except SchemeError as error:
        official = to_official(f"{name}.weight")
        raise SchemeError(f"{official} cannot be kept in {scheme.name}: {error}") from None
    make_room(model, {name: scheme}, tied=False)
    model.get_submodule(name).tiles.data = tiles


def _round_to_nearest(model: LanguageModel, schemes: dict[str, Scheme]) -> None:
    """The embedding, and the head where it is the same matrix."""
    scheme = schemes[EMBEDDING]
    weight = model.decoder.embed_tokens.weight
    tiles = packed_tiles(to_official(f"{EMBEDDING}.weight"), weight, scheme)
    make_room(model, schemes, tied=HEAD in schemes)
    model.decoder.embed_tokens.tiles.data = tiles
