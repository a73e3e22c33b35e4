"""`hymba serve MODEL`: an OpenAI-style server with a chat page."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from hymba.commands import bar, choose_threads, parse
from hymba.errors import UserError

if TYPE_CHECKING:
    from hymba.engine.llm import LLM
    from hymba.server import Settings
    from hymba.server.replicas import Share

EXAMPLES = (
    "runs/demo/hymba",
    "nvidia/Hymba-1.5B-Instruct --device cuda --dtype bfloat16 --port 9000",
    "runs/demo/hymba --host 0.0.0.0 --api-key SECRET --cors https://example.org",
    """runs/demo/hymba   then, from another terminal:

    curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"prompt": "import os", "max_tokens": 32}'

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")
    print(client.completions.create(model="hymba", prompt="import os").choices[0].text)""",
)
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Options:
    """Serve a model by OpenAI's API, with a chat page at /. Ctrl-C or SIGTERM finishes what runs
    and ends; a second one ends at once."""

    model: Annotated[str, tyro.conf.arg(metavar="MODEL")]
    """A model folder or a hub id."""
    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 lets other machines in (think of --api-key)."""
    port: int = 8000
    """Port (0: a free one)."""
    name: str | None = None
    """The model's name in the API; without it the hub id, or the folder's last part."""
    api_key: str | None = None
    """Calls must bring this key; without it HYMBA_API_KEY, which other users cannot see in ps."""
    cors: tuple[str, ...] = ()
    """Web pages from these origins may call ("*": all)."""
    max_sequences: int = 0
    """Sequences computed at once (0: chosen for the machine)."""
    max_tokens: int = 0
    """Tokens of one sequence, prompt and answer (0: the model's positions)."""
    max_prompt_tokens: int = 0
    """Tokens of one prompt (0: as many as fit)."""
    step_tokens: int = 0
    """Tokens computed in one step (0: chosen for the machine)."""
    cache_mb: int = 0
    """Megabytes of cache for all sequences (0: a share of what is free)."""
    queue: int = 256
    """Requests that may wait; more are answered 429."""
    timeout: float = 600.0
    """Seconds for one call, waiting included."""
    max_body_mb: float = 4.0
    """Megabytes of one call's body."""
    grace: float = 30.0
    """Seconds that running calls may take to finish after the first Ctrl-C or SIGTERM."""
    device: str | None = None
    """cpu, cuda, ...; without it a GPU where there is one."""
    dtype: str | None = None
    """float32, bfloat16, ...; without it the checkpoint's own."""
    kv_dtype: Annotated[str | None, tyro.conf.arg(metavar="{bfloat16,float32}")] = None
    """Keys and values in the cache, on a CPU: bfloat16 halves them; without it the model's."""
    quantize: Annotated[str | None, tyro.conf.arg(metavar="SCHEME")] = None
    """int8, int4 or fp8: the matrices in few bits (a folder made by `hymba quantize` has them)."""
    threads: int = 0
    """CPU threads (0: half the cores), of all replicas together."""
    replicas: int = 1
    """Models served at once behind the one address, by Ray: each has a GPU of its own, or a part of
    the CPU threads, and one that dies is replaced."""


def main(argv: Sequence[str]) -> int:
    options = parse(Options, argv, "serve", EXAMPLES)
    _check(options)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    from hymba.server import create_app
    from hymba.server.run import bind, run

    bound = bind(options.host, options.port)  # before the model, whose loading takes long
    choose_threads(options.threads)
    port = bound.getsockname()[1]

    def started() -> None:
        _tell(options.host, port, settings)

    if options.replicas > 1:
        from hymba.server.front import create_front
        from hymba.server.replicas import running

        options = replace(options, api_key=_api_key(options))  # theirs may be another machine
        settings, share = _settings(options), _share(options)
        with running(partial(_open_replica, options, share), share, f"hymba-{port}") as fleet:
            run(create_front(fleet, settings), bound, options.grace, started)
    else:
        llm, settings = _open(options)
        run(create_app(llm, settings), bound, options.grace, started)
    return 0


def _check(options: Options) -> None:
    for name in ("timeout", "max_body_mb"):
        if not getattr(options, name) > 0:
            raise UserError(f"--{name.replace('_', '-')} must be over 0")
    for name in ("port", "grace", "cache_mb", "max_prompt_tokens", "threads"):
        if not getattr(options, name) >= 0:
            raise UserError(f"--{name.replace('_', '-')} must be 0 or more")
    if not options.replicas >= 1:
        raise UserError("--replicas must be 1 or more")
    if options.replicas > 1 and (options.device or "cpu") not in ("cpu", "cuda"):
        raise UserError("--replicas are placed by Ray: --device is cpu or cuda")
    if options.queue < 1:
        raise UserError("--queue must be 1 or more: every request waits for the next step")
    if options.port > 65535:
        raise UserError(f"--port must be at most 65535, got {options.port}")
    if options.api_key == "":
        raise UserError("--api-key is empty: leave it out, or give a key")


def _open(options: Options) -> tuple[LLM, Settings]:
    from hymba.engine.limits import Limits
    from hymba.engine.llm import LLM
    from hymba.hub import find

    limits = Limits(
        max_sequences=options.max_sequences,
        max_tokens=options.max_tokens,
        step_tokens=options.step_tokens,
        cache_bytes=options.cache_mb * MEGABYTE,
        queue=options.queue,
        kv_dtype=options.kv_dtype,
    )
    folder = find(options.model)
    with bar() as progress:
        llm = LLM(
            folder,
            device=options.device,
            dtype=options.dtype,
            limits=limits,
            quantize=options.quantize,
            progress=progress,
        )
    return llm, _settings(options)


def _open_replica(options: Options, share: Share) -> tuple[LLM, Settings]:
    """In a replica's process: its share of the machine."""
    from hymba.engine.limits import HOST_SHARE, host_memory

    logging.basicConfig(
        level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    if not options.cache_mb and not share.gpus:
        most = int(HOST_SHARE * host_memory()) // options.replicas
        options = replace(options, cache_mb=max(1, most // MEGABYTE))
    if not share.gpus:
        choose_threads(share.cpus)
    return _open(options)


def _share(options: Options) -> Share:
    """A GPU for each replica, or a part of the CPU threads."""
    import torch

    from hymba.server.replicas import Share

    if options.device != "cpu" and (options.device or torch.cuda.is_available()):
        return Share(options.replicas, gpus=1, cpus=1)
    return Share(options.replicas, cpus=max(1, torch.get_num_threads() // options.replicas))


def _settings(options: Options) -> Settings:
    from hymba.hub import find
    from hymba.server.settings import Settings, defaults_of, eos_of

    generation = _generation_config(find(options.model))
    return Settings(
        model=options.name or _name(options.model),
        api_key=_api_key(options),
        cors_origins=options.cors,
        max_body_bytes=int(options.max_body_mb * MEGABYTE),
        max_prompt_tokens=options.max_prompt_tokens or None,
        timeout=options.timeout,
        eos_ids=eos_of(generation),
        defaults=defaults_of(generation),
    )


def _api_key(options: Options) -> str | None:
    return options.api_key or os.environ.get("HYMBA_API_KEY") or None


def _name(model: str) -> str:
    """A hub id as it is, a folder by its last part."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def _generation_config(folder: Path) -> dict[str, Any]:
    from hymba.engine.sampling import Sampling
    from hymba.server.settings import defaults_of, eos_of

    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    found = found if isinstance(found, dict) else {}
    try:
        defaults = defaults_of(found)
        Sampling(stop_ids=eos_of(found), **defaults | {"top_k": max(0, defaults.get("top_k", 0))})
    except UserError as error:  # now, and not with each call that leaves it open
        raise UserError(f"{path}: {error}") from None
    return found


def _tell(host: str, port: int, settings: Settings) -> None:
    here = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    key = ' -H "Authorization: Bearer $HYMBA_API_KEY"' if settings.api_key else ""
    defaults = ", ".join(f"{name} {value:g}" for name, value in settings.defaults.items())
    print(f"serving {settings.model} at {here}  (chat page: {here}/, Ctrl-C ends)")
    print(f'try    curl {here}/v1/completions{key} -H "Content-Type: application/json" \\')
    print("""         -d '{"prompt": "import os", "max_tokens": 32}'""")
    if defaults:
        print(f"where a call leaves it open, by generation_config.json: {defaults}")
    print(end="", flush=True)
