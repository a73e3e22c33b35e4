"""`hymba generate --file`: batch jobs that survive everything."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")

from hymba.commands import generate_file, generate_lines  # noqa: E402
from hymba.tokenizer import Tokenizer  # noqa: E402
from tests.commands.generating import Ran, Run, as_jsonl, expected  # noqa: E402

FULL = Path("/dev/full")


# ---- batch jobs: what is asked, what is answered


def test_lines_in_lines_out(job: Callable[..., Ran], folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    messages = [{"role": "user", "content": "to be"}]
    asked = [
        {"prompt": "to be"},
        {"id": "b", "prompt": "or not", "max_tokens": 3},
        {"id": 77, "ids": [5, 6, 7]},
        {"id": "ü", "messages": messages, "stop": ["q", "z"]},
        {"prompt": "to be", "n": 2, "temperature": 1.5, "seed": 4},
        {"prompt": "to be", "logprobs": 2, "logit_bias": {"40": 5}, "stop_ids": [60]},
    ]
    ran = job(asked)
    assert ran.code == 0 and ran.err.startswith("6 answered (")
    found = {line["id"]: line for line in ran.lines}
    assert set(found) == {1, "b", 77, "ü", 5, 6}
    texts = expected(folder, ["to be", [5, 6, 7], tokenizer.chat(messages)])
    for name, output in zip((1, 77, "ü"), texts, strict=True):
        assert found[name]["prompt_tokens"] == len(output.prompt)
        if name != "ü":
            assert found[name]["text"] == output.text
            assert (found[name]["finish"], found[name]["tokens"]) == ("length", 6)
    assert found["ü"]["text"] == re.split("[qz]", texts[2].text)[0]
    assert found["b"]["tokens"] == 3 and "ids" not in found["b"]
    assert found[77]["ids"] == texts[1].tokens
    several = expected(folder, ["to be"], n=2, temperature=1.5, seed=4)[0].completions
    assert [x["text"] for x in found[5]["completions"]] == [x.text for x in several]
    [sure] = expected(folder, ["to be"], logprobs=2, logit_bias={40: 5}, stop_ids=(60,))
    [first, *_], [told, *_] = found[6]["logprobs"], sure.completions[0].logprobs
    assert first["token"] == told.token
    assert first["logprob"] == pytest.approx(told.logprob, abs=1e-4)  # neighbours round the logits
    assert [token for token, _ in first["top"]] == [token for token, _ in told.top]
    assert len(found[6]["logprobs"]) == found[6]["tokens"] and len(first["top"]) == 2
    assert all(value < 0 for _, value in first["top"])


def test_options_hold_where_a_line_says_nothing(job: Callable[..., Ran]) -> None:
    pytest.importorskip("xgrammar")
    asked = [{"prompt": "to be"}, {"prompt": "to be", "json_schema": {"const": 7}}]
    found = {line["id"]: line["text"] for line in job(asked, "--regex", "[0-9]{3}").lines}
    assert re.fullmatch("[0-9]{3}", found[1]) and found[2] == "7"


def test_bad_lines_lose_nothing_else(
    job: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_lines, "LONGEST", 20000)
    bad = {
        b"{": "not JSON",
        b"[1]": "a line is",
        b"7": "a line is",
        b"{}": "none was given",
        b'{"prompt": "a", "ids": [1]}': "prompt and ids",
        b'{"prompt": 7}': "prompt must be a string",
        b'{"prompt": "a", "temprature": 1}': "did you mean 'temperature'",
        b'{"prompt": "a", "temperature": -1}': "temperature",
        b'{"prompt": "a", "temperature": null}': "temperature",
        b'{"prompt": "a", "temperature": NaN}': "temperature",
        b'{"prompt": "a", "stop": ""}': "stop",
        b'{"prompt": "a", "logit_bias": {"x": 1}}': "logit_bias",
        b'{"prompt": "a", "logit_bias": {"9999": 1}}': "vocabulary",
        b'{"prompt": "a", "json_schema": "{"}': "json_schema",
        b'{"prompt": "a", "id": null}': "id must be",
        b'{"prompt": "a", "id": "\\ud800"}': "half a character",
        b'{"prompt": "\\ud800"}': "half a character",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}': "half a character",
        b'{"messages": []}': "messages must be",
        b'{"messages": [7]}': "messages must be",
        b'{"ids": ["a"]}': "token ids",
        b'{"ids": [true]}': "token ids",
        b'{"ids": []}': "empty",
        b'{"ids": [99999]}': "vocabulary",
        b'{"ids": [-1]}': "vocabulary",
        b'{"ids": [%s]}' % (b"1, " * 2500 + b"1"): "tokens",
        b'{"prompt": "%s"}' % (b"a" * 30000): "longer than",
        b"\xff\xfe{": "not UTF-8",
        b"[" * 10000: "not JSON",
    }  # fmt: skip
    lines = b"".join(b'{"prompt": "to be"}\n%s\n' % line for line in bad)
    ran = job(lines)
    assert ran.code == generate_file.SOME_FAILED == 3
    assert f'{len(bad)} answered, {len(bad)} could not be: see "error" in ' in ran.err
    found = {line["id"]: line for line in ran.lines}
    assert len(found) == 2 * len(bad)
    for number, (line, words) in enumerate(bad.items(), 1):
        assert found[2 * number - 1]["tokens"] == 6
        assert words in found[2 * number]["error"], line
        assert "\n" not in found[2 * number]["error"] and found[2 * number]["line"] == 2 * number
    again = job(lines)
    assert again.code == 3 and again.out == ran.out, "what failed again is not told again"
    assert f"0 answered, {len(bad)} answered before" in again.err


def test_a_line_that_was_mended_is_answered(job: Callable[..., Ran]) -> None:
    assert job([{"prompt": "to be"}, {"promt": "or"}]).code == 3
    ran = job([{"prompt": "to be"}, {"prompt": "or"}])
    assert ran.code == 0 and [line["id"] for line in ran.lines if "text" in line] == [1, 2]


def test_an_id_is_one_lines(job: Callable[..., Ran]) -> None:
    asked = [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, {"id": 4, "prompt": "x"}]
    ran = job([*asked, {"prompt": "x"}, {"id": "4", "prompt": "x"}])
    assert ran.code == 3
    good = [line["id"] for line in ran.lines if "text" in line]
    assert sorted(map(str, good)) == ["4", "4", "a"] and {4, "4"} < set(good)
    told = {line["line"]: line["error"] for line in ran.lines if "error" in line}
    assert set(told) == {2, 4} and "earlier line" in told[2]
    assert job([*asked, {"prompt": "x"}, {"id": "4", "prompt": "x"}]).out == ran.out


@pytest.mark.parametrize(
    "content",
    [
        b'\xef\xbb\xbf{"prompt": "to b\xc3\xa9"}\r\n\r\n  \n{"prompt": "or"}',
        b'{"prompt": "to b\\u00e9"}\n\n\n{"prompt": "or"}\n',
    ],
)
def test_line_ends_bom_and_unicode(job: Callable[..., Ran], folder: Path, content: bytes) -> None:
    ran = job(content)
    assert ran.code == 0
    found = {line["id"]: line["text"] for line in ran.lines}
    texts = [output.text for output in expected(folder, ["to bé", "or"])]
    assert found == {1: texts[0], 4: texts[1]}


def test_text_files_have_a_prompt_a_line(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.TXT"
    path.write_bytes('\ufeffto be\r\n\r\n {"prompt": 1}\n日本'.encode())
    ran = run("--file", path)
    prompts = ["to be", ' {"prompt": 1}', "日本"]
    texts = [output.text for output in expected(folder, prompts)]
    assert {line["id"]: line["text"] for line in ran.lines} == dict(
        zip((1, 3, 4), texts, strict=True)
    )


def test_a_model_without_a_tokenizer_takes_ids(
    job: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    from hymba.engine import LLM

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    asked = [{"ids": [5, 6]}, {"prompt": "to be"}, {"ids": [5], "stop": "a"}]
    ran = job([*asked, {"messages": [{"role": "user", "content": "x"}]}], model=bare)
    found = {line["id"]: line for line in ran.lines}
    [output] = LLM(bare, "cpu").generate([[5, 6]])
    assert ran.code == 3 and found[1]["ids"] == output.tokens[:6] and found[1]["text"] == ""
    assert all("tokenizer" in found[number]["error"] for number in (2, 3, 4))


def test_standard_input_to_standard_output(run: Run, folder: Path) -> None:
    ran = run("--file", "-", given=as_jsonl([{"prompt": "to be"}, {"prompt": "or"}, 7]))
    assert ran.code == 3 and "answered" in ran.err
    texts = [output.text for output in expected(folder, ["to be", "or"])]
    assert {line["id"]: line.get("text") for line in ran.lines} == {
        1: texts[0],
        2: texts[1],
        3: None,
    }


def test_nothing_asked(job: Callable[..., Ran]) -> None:
    for content in (b"", b"\n", b"\xef\xbb\xbf\r\n"):
        ran = job(content)
        assert ran.code == 0 and ran.out == "" and ran.err.startswith("0 answered")


def test_a_million_lines_are_read_as_they_are_needed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more questions are held than run and wait."""
    most = 0
    begin = generate_file.Job._asked

    def watched(self: Any, *args: Any) -> Any:
        nonlocal most
        for found in begin(self, *args):
            most = max(most, len(self._waiting))
            yield found

    monkeypatch.setattr(generate_file.Job, "_asked", watched)
    path = tmp_path / "many.jsonl"
    path.write_bytes(b'{"ids": [5], "max_tokens": 1}\n' * 3000)
    ran = run("--file", path)
    assert len(ran.lines) == 3000 and most <= 2 * 16 + 1


# ---- batch jobs: going on


def test_what_is_answered_is_not_asked_again(job: Callable[..., Ran], tmp_path: Path) -> None:
    asked = [{"prompt": f"to be {i}"} for i in range(12)]
    first = job(asked[:7])
    second = job(asked)
    assert second.out.startswith(first.out) and "5 answered, 7 answered before" in second.err
    third = job(asked)
    assert third.out == second.out and "0 answered, 12 answered before" in third.err
    cut = len(second.out.encode()) - 30
    (tmp_path / "out.jsonl").write_bytes(second.out.encode()[:cut])
    mended = job(asked)
    assert sorted(mended.out.splitlines()) == sorted(second.out.splitlines())
    assert "1 answered, 11 answered before" in mended.err
    alone = tmp_path / "out.jsonl"
    alone.write_bytes(b'{"i')
    assert len(job(asked).lines) == 12


def test_other_questions_and_models_are_refused(
    job: Callable[..., Ran], other: Path, run: Run, tmp_path: Path
) -> None:
    asked = [{"prompt": "to be"}, {"prompt": "or"}]
    first = job(asked)
    refused = [
        job(asked, "--temperature", "0.5", "--seed", "1"),
        job([{"prompt": "to bee"}, {"prompt": "or"}]),
        job([{"prompt": "to be"}, {"prompt": "or", "n": 2}]),
        job(asked, model=other),
        job(asked, "--dtype", "bfloat16"),
        run("--file", "-", "--out", tmp_path / "out.jsonl", "--top-k", 2, given=as_jsonl(asked)),
    ]
    for ran in refused:
        assert ran.code == 2 and ran.err.count("\n") == 1 and "--overwrite" in ran.err, ran.err
    assert "another model" in refused[3].err and "another model" in refused[4].err
    assert "out.jsonl answers 1 (line 1) for other settings" in refused[0].err
    assert (tmp_path / "out.jsonl").read_text() == first.out, "nothing was touched"
    # The same settings, said elsewhere, and in a line instead of an option.
    same = [line | {"max_tokens": 6} for line in asked]
    assert job(same, "--max-tokens", "9").out == first.out
    assert [line["id"] for line in job(asked, "--overwrite", model=other).lines] == [1, 2]


def test_a_moved_or_copied_model_is_the_same(
    job: Callable[..., Ran], folder: Path, tmp_path: Path
) -> None:
    import shutil

    first = job([{"prompt": "to be"}])
    shutil.copytree(folder, tmp_path / "copy")
    assert job([{"prompt": "to be"}], model=tmp_path / "copy").out == first.out


@pytest.mark.parametrize("content", [b"notes\n", b"my notes", b'{"id": 1}\n', b"[]\n{}", b"\xff\n"])
def test_other_files_are_left_alone(run: Run, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(content)
    ran = run("--file", "-", "--out", path, given=b'{"prompt": "to be"}')
    assert ran.code == 2 and "not a file of answers (line 1)" in ran.err
    assert path.read_bytes() == content


@pytest.mark.skipif(not FULL.exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(as_jsonl([{"prompt": "to be"}]))
    ran = run("--file", tmp_path / "in.jsonl", "--out", FULL)
    assert ran.code == 2 and ran.err.count("\n") == 1 and "no space left" in ran.err


def test_a_disk_that_fills_up_leaves_whole_lines(
    job: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = [{"prompt": f"to be {i}"} for i in range(6)]
    begin = generate_file.Answers.begin

    def small(self: Any, *args: Any) -> None:
        begin(self, *args)
        self._file = _Filling(self._file, 700)

    monkeypatch.setattr(generate_file.Answers, "begin", small)
    ran = job(asked)
    assert ran.code == 2 and ran.err.count("\n") == 1
    assert "no space left on device; the same command goes on" in ran.err
    assert 0 < len(ran.lines) < 6 and ran.out.endswith("\n")


class _Filling(io.RawIOBase):
    """A file on a disk with room for so many bytes."""

    def __init__(self, file: Any, room: int) -> None:
        self.file, self.room = file, room

    def write(self, content: Any) -> int:
        if not self.room:
            raise OSError(28, "No space left on device")
        wrote = self.file.write(content[: self.room])
        self.room -= wrote
        return wrote

    def truncate(self, size: int | None = None) -> int:
        return self.file.truncate(size)

    def flush(self) -> None:
        self.file.flush()


# ---- batch jobs in a process of their own


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Callable[..., subprocess.Popen]:
    """start() -> a job of 60 questions that has answered some and is not done."""
    asked = [{"prompt": f"to be {i}", "max_tokens": 100 + i} for i in range(60)]
    (tmp_path / "in.jsonl").write_bytes(as_jsonl(asked))

    def begin() -> subprocess.Popen:
        words = [sys.executable, "-m", "hymba", "generate", str(folder), "--file"]
        words += [str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl")]
        words += ["--device", "cpu", "--max-sequences", "4"]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(words, env=env, stderr=subprocess.PIPE, text=True)
        deadline = time.monotonic() + 90
        while _count(tmp_path / "out.jsonl") < 5:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return process

    return begin


def _count(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_killed_and_gone_on_with(
    start: Callable[..., subprocess.Popen], run: Run, tmp_path: Path
) -> None:
    process = start()
    busy = run("--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl")
    assert busy.code == 2 and "another job" in busy.err
    process.kill()
    process.communicate()
    path = tmp_path / "out.jsonl"
    before = path.read_bytes()
    assert 5 <= _count(path) < 60
    _goes_on(run, tmp_path, before)


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(
    start: Callable[..., subprocess.Popen], run: Run, tmp_path: Path
) -> None:
    process = start()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    told = err.splitlines()
    assert re.match(r"\d+ answered \(", told[0])
    assert told[1:] == ["hymba: interrupted; the same command goes on"]
    before = (tmp_path / "out.jsonl").read_bytes()
    assert before.endswith(b"\n")
    assert int(told[0].split()[0]) == before.count(b"\n") < 60
    _goes_on(run, tmp_path, before)


def _goes_on(run: Run, tmp_path: Path, before: bytes) -> None:
    files = "--file", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl"
    ran = run(*files, "--max-tokens", "64")
    assert ran.code == 0 and f"{before.count(10)} answered before" in ran.err
    content = (tmp_path / "out.jsonl").read_bytes()
    assert content.startswith(before[: before.rfind(b"\n") + 1])
    lines = [json.loads(line) for line in content.splitlines()]
    assert sorted(line["id"] for line in lines) == list(range(1, 61))
    assert all(line["tokens"] == 99 + line["id"] for line in lines)


def test_progress_without_a_terminal_is_a_line_now_and_then(
    job: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_file, "REPORT", 0.0)
    ran = job([{"prompt": "to be", "max_tokens": 1 + i} for i in range(9)])
    facts = re.compile(r"(\d+) of 9, [\d.]+ requests/s, [\d,]+ tokens/s(, \d+ (s|min) left)?")
    *lines, last = ran.err.splitlines()
    assert len(lines) > 3 and all(facts.fullmatch(line) for line in lines), ran.err
    assert re.fullmatch(r"9 answered \([\d.]+ requests/s, [\d,]+ tokens/s\)", last)


def test_a_bar_in_a_terminal(folder: Path, tmp_path: Path) -> None:
    pty = pytest.importorskip("pty", reason="pseudo-terminals are Unix's")
    (tmp_path / "in.jsonl").write_bytes(as_jsonl([{"prompt": "to be", "max_tokens": 400}] * 2))
    words = [sys.executable, "-m", "hymba", "generate", str(folder), "--device", "cpu", "--file"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"}
    end, side = pty.openpty()
    with open(tmp_path / "out.jsonl", "wb") as out:
        shown = subprocess.Popen([*words, tmp_path / "in.jsonl"], env=env, stdout=out, stderr=side)
    os.close(side)
    seen = b""
    while piece := _read(end):
        seen += piece
    assert shown.wait(timeout=60) == 0
    os.close(end)
    assert re.search(rb"[012] of 2, [\d.]+ requests/s, [\d,]+ tokens/s", seen), seen[-500:]
    assert b"2 answered (" in seen and _count(tmp_path / "out.jsonl") == 2


def _read(end: int) -> bytes:
    try:
        return os.read(end, 65536)
    except OSError:  # Linux: nobody has the other end open any more
        return b""
