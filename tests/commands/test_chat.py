"""`hymba chat`: with input piped in, and in a terminal with a person's Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")

from hymba import cli  # noqa: E402
from hymba.commands.chat import Conversation  # noqa: E402
from hymba.errors import UserError  # noqa: E402
from hymba.presets import hymba  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402

TEMPLATE = "<s>{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
FACTS = re.compile(r"(\d+) tokens · [\d.]+ tokens/s · first after [\d.]+ s · (\d+) of (\d+) prompt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, lively: Callable[..., Any]) -> Path:
    """A model without a chat template that never ends by itself, and says letters only."""
    import torch

    from hymba.weights import save

    tokenizer = Tokenizer.train(["to be or not to be, that is the question\n"] * 9, 300)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 40, "ssm_state": 4}
    heads = {"num_heads": 4, "num_kv_heads": 2, "window": 16, "meta_tokens": 3, "ssm_dt_rank": 3}
    config = hymba(
        num_layers=2, max_positions=9000, vocab_size=tokenizer.vocab_size, **sizes, **heads
    )
    model = lively(config.replace(tie_embeddings=False, eos_token_id=None))
    with torch.no_grad():
        for token in range(config.vocab_size):
            if not tokenizer.decode([token]).strip().isalpha():
                model.lm_head.weight[token] = 0
    folder = tmp_path_factory.mktemp("model")
    save(model, folder, tokenizer)
    return folder


Talk = Callable[..., tuple[int, list[str], str]]


@pytest.fixture
def talk(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Talk:
    """talk(lines, *options) -> exit code, what was printed, and what was said aside."""

    def run(lines: list[str], *options: str) -> tuple[int, list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        given = ["--max-tokens", "12", "--temperature", "0", "--threads", "1", "--device", "cpu"]
        code = cli.main(["chat", str(folder), *given, *options])
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_lines_are_messages_and_each_turn_sees_the_ones_before(
    talk: Talk, folder: Path, tmp_path: Path
) -> None:
    from hymba.engine import LLM, Sampling

    kept = tmp_path / "chat.json"
    lines = ["to be or not to be, that is", "", "  the question", "not", f"/save {kept}"]
    code, out, aside = talk(lines, "--system", "to be brief")
    assert code == 0
    assert aside.splitlines()[0].startswith("no chat template")
    messages = json.loads(kept.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 3]
    turns = [[int(number) for number in found] for found in FACTS.findall(aside)]
    assert turns[0][:2] == [12, 0]
    for (said, _, prompt), (_, cached, _) in pairwise(turns):
        assert cached == prompt + said - 1, "a turn computed the ones before it anew"
    llm = LLM(folder, device="cpu")
    ids = llm.encode("to be brief")
    for question, answer, shown in zip(messages[1::2], messages[2::2], out, strict=True):
        ids += llm.tokenizer_or_error().encode("\n" + question["content"])
        [output] = llm.generate([ids], Sampling(max_tokens=12))
        ids += output.tokens
        assert output.text == answer["content"] == shown


def test_the_chat_template_is_used_where_there_is_one(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    conversation = Conversation("short", [{"role": "user", "content": "to be"}])
    plain = tokenizer.encode("short\nto be", bos=True)
    assert conversation.ids(tokenizer) == plain
    files = tokenizer.files | {"chat_template.jinja": TEMPLATE.encode()}
    templated = Tokenizer(files)
    rendered = tokenizer.encode("[system] short\n[user] to be\n", bos=True)
    assert conversation.ids(templated) == rendered


def test_commands(talk: Talk, tmp_path: Path) -> None:
    saved = tmp_path / "x.json"
    lines = ["/help", "to be", "/system be brief", "/stats", f"/save {saved}", "/new", "/system -"]
    lines += ["/system", f"/load {saved}", "/system", " /etc", "/exit", "never read"]
    code, _, aside = talk(lines)
    assert code == 0
    assert "/save FILE" in aside and "a new conversation" in aside
    told = re.findall(r"system text: (.*)", aside)
    assert told == ["be brief", "(none)", "(none)", "be brief"]
    assert "2 messages written" in aside and "2 messages read" in aside
    assert re.search(r"cache [\d.]+ of [\d.]+ MB; prefix cache", aside)
    assert len(FACTS.findall(aside)) == 2


def test_the_same_seed_gives_the_same_answer(talk: Talk) -> None:
    warm = ["--temperature", "1.5", "--seed"]
    answers = [talk(["to be"], *warm, seed)[1] for seed in ("1", "1", "2")]
    assert answers[0] == answers[1] != answers[2]


def test_mistakes_are_a_line_each_and_the_talk_goes_on(talk: Talk, tmp_path: Path) -> None:
    bad = tmp_path / "bad.json"
    bad.write_text('{"messages": [{"role": "assistant", "content": "first"}]}')
    lines = ["/nothing", "/save", f"/save {tmp_path}", "/load nowhere.json", f"/load {bad}"]
    code, out, aside = talk([*lines, "to be " * 9000, "to be"])
    assert code == 2 and out
    errors = [line for line in aside.splitlines() if line.startswith("error: ")]
    assert len(errors) == 6
    words = ("no command /nothing", "/save chat.json", "directory", "No such file", "take turns")
    assert all(word in line for word, line in zip(words, errors, strict=False)), errors
    assert "tokens" in errors[-1]
    assert len(FACTS.findall(aside)) == 1, "what was refused is not part of the conversation"


@pytest.mark.parametrize("content", ["{", "7", '{"messages": [7]}', '[{"role": "x"}]'])
def test_what_is_no_conversation_is_not_loaded(content: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match="x.json"):
        Conversation.load(path)


def test_a_question_without_an_answer_is_left_out(tmp_path: Path) -> None:
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "x.json").write_text(json.dumps([*said, {"role": "user", "content": "c"}]))
    assert Conversation.load(tmp_path / "x.json").messages == said


def test_bad_options(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    for option, value in (("--temperature", "-1"), ("--top-p", "0"), ("--max-tokens", "0")):
        assert cli.main(["chat", str(folder), option, value]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and option[2:].replace("-", "_") in err
    assert cli.main(["chat", "./nowhere"]) == 2


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["chat", "--help"])
    text = capsys.readouterr().out
    assert "questions.txt" in text and "--system" in text


# ---- a terminal

pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix's")

# The child must own its terminal, or Ctrl-C typed there reaches nobody.
OWN = (
    "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    " os.execv(sys.executable, [sys.executable, '-m', 'hymba', *sys.argv[1:]])"
)


class Terminal:
    """A program in a terminal: `type` keys, `wait` until it shows something."""

    def __init__(self, *argv: str) -> None:
        self._end, other = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", OWN, *argv],
            stdin=other,
            stdout=other,
            stderr=other,
            start_new_session=True,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        )
        os.close(other)
        self.seen = ""

    def type(self, keys: str) -> None:
        os.write(self._end, keys.encode())

    def wait(self, pattern: str, seconds: float = 60) -> re.Match[str]:
        """What shows next and matches; everything up to it is forgotten."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._end], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"no {pattern!r} after {seconds} s in {self.seen[-2000:]!r}"
            self.seen += os.read(self._end, 65536).decode(errors="replace")
        self.seen = self.seen[found.end() :]
        return found

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._end)


@pytest.fixture
def terminal(folder: Path) -> Iterator[Terminal]:
    opened = Terminal("chat", str(folder), "--device", "cpu", "--max-tokens", "8000")
    yield opened
    opened.close()


def test_ctrl_c_stops_an_answer_and_the_talk_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    kept = tmp_path / "chat.json"
    for turn in (1, 2):
        terminal.wait(r"you> ")
        terminal.type(f"to be or not, {turn}\n")
        terminal.wait(rf"{turn}\r\n[^\r]*\w{{3}}")  # the echo, then an answer begins
        terminal.type("\x03")
        facts = terminal.wait(r"(\d+) tokens? ·.* of \d+ prompt tokens from the prefix cache · st")
        assert int(facts[1]) < 8000
    terminal.wait(r"you> ")
    terminal.type(f"/save {kept}\n")
    terminal.wait("4 messages written")
    messages = json.loads(kept.read_text())["messages"]
    assert [m["content"] for m in messages[::2]] == ["to be or not, 1", "to be or not, 2"]
    assert all(m["content"] for m in messages)
    for answer in ("Ctrl-C again leaves", ""):
        terminal.wait(r"you> ")
        time.sleep(0.5)  # the prompt is there a moment before readline listens for signals
        terminal.type("\x03")
        terminal.wait(answer)
    assert terminal.process.wait(timeout=30) == 0


def test_ctrl_d_leaves_and_lines_can_be_joined(terminal: Terminal, tmp_path: Path) -> None:
    kept = tmp_path / "chat.json"
    terminal.wait(r"you> ")
    terminal.type("to be \\\n")
    terminal.wait(r"\.\.\.> ")
    terminal.type("or not\n")
    terminal.wait(r"or not\r\n.*\w{3}")
    terminal.type("\x03")
    terminal.wait(r"you> ")
    terminal.type(f"/save {kept}\n")
    terminal.wait("messages written")
    assert json.loads(kept.read_text())["messages"][0]["content"] == "to be \nor not"
    terminal.wait(r"you> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0
