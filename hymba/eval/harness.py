"""lm-eval with our models: its tasks, prompts and metrics, our way of computing. No other file here
knows lm-eval.

    lm = OurLM(load(folder), world)                  # or peer_lm(folder) for any other model
    shelf = Shelf.of(["arc_easy"], include_path=None)
    results = evaluate(lm, shelf, "arc_easy", shots=0)

A text becomes tokens as in lm-eval's own HFLM, special tokens and all, so that figures compare with
published ones. What differs: rows of any length go side by side without padding, what they share at
their beginnings is computed once (branches.py), and answers are written by our engine.
"""

from __future__ import annotations

import difflib
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy
import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
from lm_eval.evaluator import evaluate as run_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import AutoTokenizer

from hymba.engine import LLM, Limits, Sampling
from hymba.errors import UserError
from hymba.eval.branches import Ask, Scorer, deal
from hymba.eval.network import offline, offline_without_network
from hymba.model.decoder import LanguageModel
from hymba.tokenizer import Tokenizer
from hymba.train.parallel import World

STOPS = 16  # the engine's most; longer lists are cut afterwards
REFUSED = {
    "UNSAFE_CODE": "runs code that the model writes",
    "MULTIMODAL": "shows the model more than text",
}
BOOTSTRAPS = 1000  # for errors of figures that are no means
ANSWER = 256  # tokens of an answer where a task does not say
ELSEWHERE = {"social_iqa": "siqa"}  # the folder of a task that is named otherwise
TASKS = Path(lm_eval.tasks.__file__).parent
LOCAL = ("json", "csv", "text", "parquet", "arrow", "pandas")  # loaders of files, not of the hub


class EvalError(UserError):
    """An evaluation that cannot be done as asked; the message says what to do."""


@register_model("hymba")
class OurLM(TemplateLM):
    """A Hymba model as lm-eval asks for it. `batch` questions at a time; None: as fits."""

    def __init__(
        self,
        model: LanguageModel,
        folder: Path | None = None,
        world: World | None = None,
        batch: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__()
        self.model, self.world, self.batch = model, world or World(), batch
        self._device = model.device
        self.progress = progress and self.world.first
        folder = folder or model.folder
        if folder is None or not (folder / "tokenizer.json").is_file():
            raise EvalError(f"{folder or 'this model'} has no tokenizer.json: tasks are of text")
        with quiet():
            self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.own_tokenizer = Tokenizer.from_folder(folder)
        self.max_length = model.config.max_positions
        self.cut = 0  # questions whose beginning was left out, because they are too long
        self.scorer = Scorer(model, batch)
        self._llm: LLM | None = None

    # ---- what a template asks

    @property
    def eot_token_id(self) -> int:
        found: int | None = self.tokenizer.eos_token_id
        if found is None:
            raise EvalError("this tokenizer names no token that ends a text")
        return found

    @property
    def prefix_token_id(self) -> int:
        found: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if found is None else found

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """As HFLM: the tokenizer's own first token, unless the text (a rendered chat) has it."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer.encode(
            string, add_special_tokens=add_special_tokens, verbose=False
        )
        return ids

    @property
    def tokenizer_name(self) -> str:
        return self.own_tokenizer.fingerprint[:16]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    # ---- log-likelihoods

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asks = [self._ask(context, answer) for _, context, answer in requests]
        return [tuple(score) for score in self._score(asks, "questions")]

    def _ask(self, context: list[int], answer: list[int]) -> Ask:
        if not answer:
            raise EvalError("a task has an answer without tokens, whose likelihood is no question")
        if len(answer) > self.max_length:
            raise EvalError(
                f"an answer of this task has {len(answer)} tokens, and the model's context is"
                f" {self.max_length}: too short for this task"
            )
        row = context + answer
        self.cut += len(row) > self.max_length + 1
        return Ask(tuple(row[-self.max_length - 1 :]), len(answer))

    def _score(self, asks: Sequence[Ask], what: str) -> list[Any]:
        mine = deal(asks, self.world.size)[self.world.rank]
        with self._bar(len(mine), what) as bar:
            scores = self.scorer.score([asks[number] for number in mine], bar.update)
        return self._together(len(asks), dict(zip(mine, scores, strict=True)))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Whole texts; what is longer than the context in windows, each token predicted once."""
        asks: list[Ask] = []
        of: list[int] = []
        for number, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            )
            for context, answer in map(make_disjoint_window, windows):
                asks.append(Ask((*context, *answer), len(answer)))
                of.append(number)
        sums = [0.0] * len(requests)
        for number, score in zip(of, self._score(asks, "windows"), strict=True):
            sums[number] += score.logprob
        return sums

    # ---- answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers by the engine, which takes the next question when one is done."""
        asked = [self._question(*request.args) for request in requests]
        mine = range(self.world.rank, len(asked), self.world.size)
        texts: dict[int, str] = {}
        with self._bar(len(mine), "answers") as bar:
            for place, output in self.llm.run(asked[number][:2] for number in mine):
                if isinstance(output, UserError):
                    raise output
                ends = asked[mine[place]][2]
                texts[mine[place]] = postprocess_generated_text(output.text, ends, None)
                bar.update()
        return self._together(len(asked), texts)

    def _question(self, text: str, wishes: dict[str, Any]) -> tuple[list[int], Sampling, list[str]]:
        """Prompt, sampling and all strings that end the answer."""
        given = normalize_gen_kwargs(wishes, ANSWER)
        most = given["max_gen_toks"]
        room = self.max_length - most
        if room < 1:
            raise EvalError(
                f"answers of this task have up to {most} tokens, and the model's context is"
                f" {self.max_length}: too short for this task"
            )
        prompt = self.tok_encode(text)
        self.cut += len(prompt) > room
        ends = [end for end in given["until"] if end]
        sampled: dict[str, Any] = {"temperature": float(given.get("temperature", 0.0))}
        if sampled["temperature"]:
            names = ("top_p", "top_k", "min_p", "repetition_penalty")
            sampled |= {name: given[name] for name in names if name in given}
        return prompt[-room:], Sampling(max_tokens=most, stop=tuple(ends[:STOPS]), **sampled), ends

    @property
    def llm(self) -> LLM:
        if self._llm is None:
            limits = Limits(max_sequences=self.batch or 0)
            self._llm = LLM(self.model, tokenizer=self.own_tokenizer, limits=limits)
        return self._llm

    def _bar(self, total: int, what: str) -> Any:
        return tqdm(total=total, desc=what, unit="", disable=not self.progress, leave=False)

    def _together(self, count: int, mine: Mapping[int, Any]) -> list[Any]:
        """What all processes found, by number.

        Each is asked everything and does its share, rather than being asked a share by lm-eval:
        there a process draws the examples of its own questions alone, and draws others than one
        process that is asked all."""
        found = dict(mine)
        if self.world.joined:
            parts: list[Any] = [None] * self.world.size
            dist.all_gather_object(parts, found)
            found = {number: x for part in parts for number, x in part.items()}
        return [found[number] for number in range(count)]


def peer_lm(
    folder: Path, device: str, dtype: str | None, batch: int | None, progress: bool = True
) -> Any:
    """Any causal model of transformers, by lm-eval's own class (which pads)."""
    import hymba.hf  # noqa: F401  (so that our models are some of them)

    # Finding the largest batch means running out of memory, which a CPU does not do gracefully.
    size: int | str = batch or ("auto" if device.startswith("cuda") else 8)
    try:
        return HFLM(str(folder), device=device, dtype=dtype or "auto", batch_size=size)
    except UserError:
        raise
    except (ImportError, OSError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise EvalError(f"{folder} is no causal model that transformers knows: {reason}") from None


# ---- tasks


@dataclass
class Shelf:
    """The tasks that there are, or at least all that were asked for."""

    manager: TaskManager
    loaded: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of each loaded task, as it came

    @staticmethod
    def of(names: Sequence[str], include_path: Path | None = None) -> Shelf:
        """EvalError for a name that is no task, with what is near. Reading the descriptions of all
        tasks takes ten seconds, so those with a folder of that name are looked through first."""
        own = [] if include_path is None else [str(include_path)]
        near = [str(p) for p in sorted(TASKS.iterdir()) if p.is_dir() and _may_hold(p.name, names)]
        for some, rest in ((own, False), (near + own, False), (own, True)):
            shelf = Shelf(TaskManager(include_path=some, include_defaults=rest))
            unknown = [name for name in names if name not in shelf.manager.task_index]
            if not unknown:
                return shelf
        raise EvalError(f"there is no task {unknown[0]!r}; {shelf.near(unknown[0])}")

    def near(self, name: str) -> str:
        known = self.manager.all_tasks
        found = difflib.get_close_matches(name, known, n=4, cutoff=0.7)
        found = found or [other for other in known if name and name in other][:4]
        if not found:
            return "names of lm-eval, of its groups, or of files in --include-path are known"
        return "did you mean " + " or ".join(map(repr, found)) + "?"

    def load(self, name: str) -> dict[str, Any]:
        """A task, or a group's tasks, with its data. EvalError where that is not to be had."""
        if name not in self.loaded:
            if not self._is_local(name):
                offline_without_network()
            with quiet():
                try:
                    self.loaded[name] = self.manager.load([name])
                except (OSError, ValueError, RuntimeError) as error:
                    raise EvalError(_no_data(name, error)) from None
            for key, task in self.loaded[name]["tasks"].items():
                self.settings.setdefault(key, _settings(task))
        return dict(self.loaded[name])

    def _is_local(self, name: str) -> bool:
        cfg = self.manager.task_index[name].cfg or {}
        return cfg.get("dataset_path") in LOCAL or Path(str(cfg.get("dataset_path"))).exists()

    def describe(self, name: str) -> dict[str, Any]:
        """What decides a task, for a fingerprint: its tasks' settings, and its local files'."""
        return {key: self.settings[key] for key in sorted(self.load(name)["tasks"])}


def _may_hold(folder: str, names: Sequence[str]) -> bool:
    """Tasks of lm-eval mostly begin with the name of their folder, as arc_easy does."""
    folders = [ELSEWHERE.get(name, name) for name in names]
    return any(name == folder or name.startswith(f"{folder}_") for name in folders)


def _settings(task: Any) -> dict[str, Any]:
    config = task.dump_config() if hasattr(task, "dump_config") else {}
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    stats = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for path in _paths(files)
        if path.is_file()
    ]
    shots = task.get_config("num_fewshot")
    return {"config": config, "files": stats, "version": task.VERSION, "shots": shots}


def _paths(files: Any) -> Iterator[Path]:
    if isinstance(files, str):
        yield Path(files)
    elif isinstance(files, Mapping):
        for value in files.values():
            yield from _paths(value)
    elif isinstance(files, Sequence):
        for value in files:
            yield from _paths(value)


def _no_data(name: str, error: Exception) -> str:
    if offline():
        return (
            f"task {name!r} needs its data from the Hugging Face hub, which cannot be reached from"
            " here and is not in the cache: use a machine with a network, or local tasks"
            " (--include-path)"
        )
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f"the data of task {name!r} cannot be read: {reason}"


# ---- one task


def evaluate(
    lm: Any,
    shelf: Shelf,
    name: str,
    shots: int | None = None,
    limit: int | None = None,
    chat: bool = False,
    gen_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:
    """lm-eval's results of one task or group, with samples; None where another process has them."""
    if chat and not getattr(lm.tokenizer, "chat_template", None):
        raise EvalError("this tokenizer has no chat template: leave out --apply-chat-template")
    loaded = shelf.load(name)
    _prepare(loaded["tasks"], shelf, shots, gen_kwargs or {})
    before = getattr(lm, "cut", 0)
    try:
        with quiet():
            found = run_tasks(
                lm,
                loaded,
                limit=limit,
                bootstrap_iters=BOOTSTRAPS,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
    except (AssertionError, ValueError) as error:
        # What too few examples are to lm-eval, or to random.sample under it.
        said = "fewshot samples requested exceeds", "Sample larger than population"
        if not any(words in str(error) for words in said):
            raise
        raise EvalError(f"task {name!r} has too few examples: give a lower --num-fewshot") from None
    cut = getattr(lm, "cut", 0) - before
    return None if found is None else dict(found) | {"cut": cut}


def _prepare(
    tasks: Mapping[str, Any], shelf: Shelf, shots: int | None, gen_kwargs: Mapping[str, Any]
) -> None:
    """Seeds and wishes, as lm-eval's command has them. A task that says itself that it has no
    examples gets none."""
    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)
    for key, task in tasks.items():
        for what, why in REFUSED.items():
            if getattr(task, what, False):
                raise EvalError(f"task {key!r} {why}, which hymba eval does not do")
        if gen_kwargs and task.get_config("output_type") == "generate_until":
            task.set_config("generation_kwargs", dict(gen_kwargs), update=True)
        own = shelf.settings[key]["shots"]
        task.set_config("num_fewshot", own if own == 0 or shots is None else shots)
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


@contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say while they work, of which none is anything a user can mend."""
    names = ("lm_eval", "datasets", "huggingface_hub", "transformers", "httpx", "fsspec")
    before = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
