"""`hymba generate MODEL PROMPT ...`: continue prompts, streaming where there is one.

With --file the prompts are a file's, and so are the answers: see generate_file.py.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.commands.chat import UNSEEN
from hymba.commands.generate_file import Answers, Job, interruptible
from hymba.commands.generate_lines import Questions
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine import LLM, Limits, Sampling

EXAMPLES = (
    'runs/demo/hymba "def fibonacci(n):"',
    'runs/demo/hymba "import os" "class Node:" --max-tokens 100 --temperature 0.8 --seed 1',
    'nvidia/Hymba-1.5B-Base "The capital of France is" --device cuda --dtype bfloat16',
    "runs/demo/hymba - < prompt.txt",
    "runs/demo/hymba --file prompts.jsonl --out answers.jsonl",
    "runs/demo/hymba --file prompts.txt --max-tokens 32 --stop ';' > answers.jsonl",
)
FEW = 16  # sequences: as many places in the cache as there are, rather than as many as fit
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Options:
    """Continue prompts. One streams; several run together and each gives the text it would give
    alone. With --file, a batch job: a line of JSON in, a line of JSON out, in the order in which
    they are done. The same command again goes on where it stopped. Exit codes: 0; 2 a mistake;
    3 done, but some lines hold errors; 130 interrupted."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""
    prompts: Annotated[tuple[str, ...], tyro.conf.arg(metavar="PROMPT ..."), tyro.conf.Positional]
    """Texts to continue; - reads one from standard input."""
    file: str | None = None
    """Prompts of a batch job: JSON lines, or with the ending .txt a prompt a line; - reads JSON
    lines from standard input. A line has prompt, messages or ids, maybe an id, and any of the
    options of sampling."""
    out: str = "-"
    """Where the answers of --file go (-: standard output)."""
    overwrite: bool = False
    """Begin --out anew, whatever it holds."""
    max_tokens: int = 64
    """New tokens at most."""
    temperature: float = 0.0
    """0 always takes the likeliest token."""
    top_k: int = 0
    """Choose among the k likeliest tokens (0: all)."""
    top_p: float = 1.0
    """Choose among the likeliest tokens that make up this probability."""
    min_p: float = 0.0
    """Choose among tokens at least so likely, as a share of the likeliest."""
    repetition_penalty: float = 1.0
    """Over 1: tokens of the prompt and the answer become less likely."""
    presence_penalty: float = 0.0
    """Taken off the logits of tokens that were said."""
    frequency_penalty: float = 0.0
    """The same, for each time they were said."""
    seed: int | None = None
    """The same seed gives the same text."""
    n: int = 1
    """Answers to each prompt."""
    stop: Annotated[tuple[str, ...], tyro.conf.arg(metavar="TEXT"), tyro.conf.UseAppendAction] = ()
    """The answer ends before this text; may be given several times."""
    ignore_eos: bool = False
    """Go on behind the token that ends a text."""
    json_schema: Annotated[str | None, tyro.conf.arg(metavar="FILE|JSON")] = None
    """The answer is JSON that follows this schema."""
    json_object: bool = False
    """The answer is a JSON object."""
    regex: str | None = None
    """The answer matches this regular expression."""
    logprobs: int | None = None
    """With --file: log-probabilities of the tokens, and of the k likeliest."""
    max_sequences: int = 0
    """Sequences computed at once (0: chosen for the machine)."""
    cache_mb: int = 0
    """Megabytes of cache for all sequences (0: a share of what is free)."""
    device: str | None = None
    """cpu, cuda, ...; without it a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, ...; without it the checkpoint's own."""
    kv_dtype: Annotated[str | None, tyro.conf.arg(metavar="{bfloat16,float32}")] = None
    """Keys and values in the cache, on a CPU: bfloat16 halves them; without it the model's."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME")] = None
    """int8, int4 or fp8: the matrices in few bits (a folder made by `hymba quantize` has them)."""
    threads: int = 0
    """CPU threads (0: half the cores)."""


SAMPLING = (
    "max_tokens temperature top_k top_p min_p repetition_penalty presence_penalty frequency_penalty"
    " seed n stop json_object regex logprobs"
).split()


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "generate", EXAMPLES)
    _check(options)
    prompts = [sys.stdin.read() if p == "-" else p for p in options.prompts]
    if not all(prompts):
        raise UserError(f"prompt {prompts.index('')} is empty: give some text to continue")
    sampling = _sampling(options)
    if options.file is None:
        return _answer_prompts(_open(options, len(prompts) * options.n), prompts, sampling)
    path = Path(options.model)
    name = path.resolve().name if path.is_dir() else options.model
    with (
        closing(Questions(options.file, sampling)) as questions,
        closing(
            Answers(options.out, options.file)
        ) as answers,  # before the model, which takes long
    ):
        return Job(questions, answers).run(_open(options), name, options.overwrite)


def _check(options: Options) -> None:
    if options.file is not None and options.prompts:
        raise UserError("give prompts or --file, not both")
    if options.file is None:
        if not options.prompts:
            raise UserError('no prompt given: hymba generate MODEL "some text", or --file')
        if options.out != "-" or options.overwrite or options.logprobs is not None:
            raise UserError("--out, --overwrite and --logprobs are for --file: give prompts by it")
    for name in ("max_sequences", "cache_mb", "threads"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more")


def _sampling(options: Options) -> Sampling:
    from hymba.engine import Sampling

    return Sampling(
        **{name: getattr(options, name) for name in SAMPLING},
        stop_ids=() if options.ignore_eos else None,
        json_schema=_schema(options.json_schema),
    )


def _schema(given: str | None) -> str | None:
    if given is None or given.lstrip().startswith("{"):
        return given
    try:
        return Path(given).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{given} is not UTF-8: give a file that holds a JSON schema") from None


def _open(options: Options, sequences: int = 0) -> LLM:
    """The model, with room for so many sequences (0: as many as fit)."""
    from hymba.engine import LLM

    choose_threads(options.threads)
    with bar() as progress:
        return LLM(
            options.model,
            options.device,
            options.dtype,
            _limits(options, sequences),
            quantize=options.quantize,
            progress=progress,
        )


def _limits(options: Options, sequences: int) -> Limits:
    from hymba.engine import Limits

    few = sequences if sequences <= FEW else 0
    return Limits(
        max_sequences=options.max_sequences or few,
        cache_bytes=options.cache_mb * MEGABYTE,
        kv_dtype=options.kv_dtype,
    )


def _answer_prompts(llm: LLM, prompts: list[str], sampling: Sampling) -> int:
    answer = _stream_one if len(prompts) * sampling.n == 1 else _answer_all
    start = time.perf_counter()
    with interruptible() as interrupted:

        def after_step() -> None:
            if interrupted():
                raise KeyboardInterrupt

        answer(llm, prompts, sampling, after_step)
    seconds = time.perf_counter() - start
    count = llm.engine.stats().generated_tokens
    device = llm.model.device.type
    print(f"{count} tokens, {count / seconds:.1f} tok/s, {device}", file=sys.stderr)
    return 0


def _stream_one(
    llm: LLM, prompts: list[str], sampling: Sampling, after_step: Callable[[], None]
) -> None:
    before = prompts[0]  # shown once it is taken
    for delta in llm.stream(prompts[0], sampling):
        _show(before + delta.text)
        before = ""
        after_step()
    _show("\n")


def _answer_all(
    llm: LLM, prompts: list[str], sampling: Sampling, after_step: Callable[[], None]
) -> None:
    """In the order of the prompts, each as soon as it and those before are done."""
    from hymba.engine.llm import in_order

    outputs = in_order(llm.run(((prompt, sampling) for prompt in prompts), after_step))
    for prompt, output in zip(prompts, outputs, strict=True):
        for completion in output.completions:
            _show(f"--- {prompt}{completion.text}\n")


def _show(text: str) -> None:
    """A model may say anything; a terminal does not obey its escape sequences."""
    print(text.translate(UNSEEN) if sys.stdout.isatty() else text, end="", flush=True)
