"""From canned runs to JSON, tables and figures; and the page is what results/ say."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hymba.errors import UserError
from hymba.files import write_json
from hymba.lab import report
from hymba.lab.figures import draw, series
from hymba.lab.jobs import TASKS
from hymba.lab.options import main
from hymba.lab.report import BEGIN, END, gather, generate, kept_results, publish
from hymba.lab.sizes import SIZES
from hymba.lab.tables import document, spread, values
from hymba.lab.tasks import LESSONS
from hymba.lab.verdict import AGREES, DISAGREES, FINDINGS, UNDECIDED

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"hymba": 1.0, "llama": 1.2, "mamba": 1.1}
FACTS = {"device": "A Chip (TM)", "threads": 1, "precision": "float32", "hymba": "0", "torch": "2",
         "python": "3", "date": "2026-01-02"}  # fmt: skip


def cost(name: str) -> dict[str, Any]:
    speed = 100 * GOOD[name]
    return {
        "parameters": {"total": 2_000_000, "embedding": 500_000},
        "paper_cache_bytes": 1,
        "training": {"rows": 2, "length": 64, "tokens_per_s": [1000.0, 1010.0, 990.0]},
        "decoding": [
            {
                "context": context,
                "batch": 1,
                "tokens_per_s": [speed, speed + 1, speed - 1],
                "cache_bytes": {"at_context": int(context * speed), "meta_once": 0},
            }
            for context in (64, 256)
        ],
    }


def language(name: str, seed: int) -> dict[str, Any]:
    bits = GOOD[name] + 0.001 * seed
    return {
        "parameters": {"total": 2_000_000, "embedding": 500_000},
        "tokens": 1000,
        "seconds": 10.0,
        "tokens_per_s": 100.0,
        "corpus": {"distinct_tokens": 5000, "epochs": 0.2, "facts": ["a text"]},
        "bits_per_byte": bits,
        "held_out": {"bits_by_position": [bits + 1, bits], "edges": [0, 16, 32]},
        "longer": {
            "bits_per_byte": bits,
            "bits_by_position": [bits + 1, bits, None],
            "edges": [0, 16, 32, 64],
        },
        "curve": [[1, 3.0]],
    }


def recall(name: str, seed: int, task: str) -> dict[str, Any]:
    right = GOOD[name] - 0.5 + 0.001 * seed
    points = [
        {"at": p.at, "beyond": p.beyond, "chance": p.task.chance, "token_accuracy": right,
         "answer_accuracy": right / 2}
        for p in LESSONS[task].test(64)
    ]  # fmt: skip
    found = {"recall": right, "beyond": right / 2, "points": points, "tokens": 500, "seconds": 1.0}
    return found | {"parameters": {"total": 2_000_000}}


def runs() -> Iterator[dict[str, Any]]:
    for name in GOOD:
        yield {"part": "cost", "task": "", "variant": name, "seed": 0, **FACTS, **cost(name)}
        for seed in (0, 1, 2):
            common = {"variant": name, "seed": seed, **FACTS}
            yield {"part": "language", "task": "", **common, **language(name, seed)}
            for task in TASKS:
                yield {"part": "recall", "task": task, **common, **recall(name, seed, task)}


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """Runs on disk, as a laboratory leaves them, and published."""
    for number, run in enumerate(runs()):
        write_json(tmp_path / f"lab/small/{number}/result.json", run)
    publish(tmp_path / "lab", SIZES["small"], tmp_path / "results", tmp_path / "none.md")
    return tmp_path / "results"


def test_runs_become_one_file_a_device(kept: Path) -> None:
    pytest.importorskip("matplotlib")  # of the picture beside it
    assert sorted(path.name for path in kept.iterdir()) == [
        "lab-small-a-chip-tm.json",
        "lab-small-a-chip-tm.png",
    ]
    (data,) = kept_results(kept)
    assert data["size"] == "small" and data["decides"] and data["device"] == "A Chip (TM)"
    assert [row["variant"] for row in data["rows"]] == ["hymba", "llama", "mamba"]
    assert data["rows"][0]["language"]["bits_per_byte"] == [1.0, 1.001, 1.002]
    assert data["tokens"] == {"language": 1000, "recall": 500}


def test_metrics_are_read_off_rows(kept: Path) -> None:
    row = next(kept_results(kept))["rows"][1]
    assert values(row, "bits_per_byte") == [1.2, 1.201, 1.202]
    assert values(row, "recall") == pytest.approx([0.7, 0.701, 0.702])
    assert values(row, "decode") == [120.0, 121.0, 119.0]
    assert values(row, "cache") == [256 * 120]  # of the longest context
    del row["recall"]["mqar"]
    assert values(row, "recall") == []  # a mean over other tasks would be another figure
    assert len(values(row, "recall", ["copy"])) == 3 and values(row, "recall", []) == []


def test_recall_is_compared_over_the_tasks_that_both_have(kept: Path) -> None:
    data = next(kept_results(kept))
    for task in ("phonebook", "copy", "induction"):
        del data["rows"][1]["recall"][task]
    data["rows"][1]["recall"]["needle"]["recall"] = [0.1, 0.1, 0.1]
    (line,) = lines(document([data], {}), "| hybrid against attention | recall, lengths")
    assert "hymba 0.501, llama 0.400 (mqar, needle)" in line  # (0.701 + 0.1) / 2
    assert "| llama | attention only | 2.00 (1.50) | 1.2010 ± 0.0010 |  |" in document([data], {})


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


def test_tables_say_what_was_measured(kept: Path) -> None:
    text = generate(kept)
    (row,) = lines(text, "| llama | attention only")
    assert "2.00 (1.50) | 1.2010 ± 0.0010 | 0.701 ± 0.001 | 0.350 ± 0.001 | 120 | 1,000 |" in row
    assert "| hymba | 2.001 | 1.001 |  |" in text  # by position; nothing was read at 32-63
    assert "| a guess from what the row holds |" in text and "one of them holds there" in text
    (finding,) = lines(text, "| hybrid against attention | held-out bits per byte")
    assert "hymba 1.001, llama 1.201 | +0.2000 (0.0030)" in finding and AGREES in finding
    (finding,) = lines(text, "| hybrid against attention | recall, lengths")
    assert f"| {DISAGREES} |" in finding
    (finding,) = lines(text, "| hybrid against attention | cache")
    assert "×1.20 (×1.03)" in finding and AGREES in finding
    assert not lines(text, "| B: parallel")  # not run


def test_reasons_are_taken_from_their_file(kept: Path) -> None:
    key = "hybrid against attention: recall"
    write_json(kept / report.REASONS, {"small": {key: "because of that"}})
    (line,) = lines(generate(kept), "| hybrid against attention | recall, lengths")
    assert line.endswith("| because of that |")


def test_a_smoke_test_says_so_and_leaves_when_something_real_comes(kept: Path) -> None:
    toy = gather(SIZES["toy"], list(runs()))
    write_json(kept / "lab-toy-a-chip-tm.json", toy)
    both = generate(kept)
    assert "### small" in both and "### toy" in both
    assert both.count("| llama |") == generate_without(kept, "lab-toy*").count("| llama |")
    alone = generate_without(kept, "lab-small*")
    assert "Machinery smoke test: decides nothing" in alone
    assert AGREES not in alone and DISAGREES not in alone and UNDECIDED in alone
    assert document([], {}) == "No results are kept here."


def generate_without(kept: Path, pattern: str) -> str:
    away = [(path, path.read_text()) for path in kept.glob(pattern) if path.suffix == ".json"]
    for path, _ in away:
        path.unlink()
    text = generate(kept)
    for path, content in away:
        path.write_text(content)
    return text


def test_the_page_is_written_between_its_markers(kept: Path, tmp_path: Path) -> None:
    page = tmp_path / "lab.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    folder = str(tmp_path / "lab")
    argv = ["--report", "--size", "small", "--folder", folder, "--results", str(kept)]
    assert main([*argv, "--page", str(page)]) == 0
    assert page.read_text() == f"before\n{BEGIN}\n{generate(kept)}\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(UserError, match="needs the lines"):
        main([*argv, "--page", str(page)])
    with pytest.raises(UserError, match="no finished run of size 35m"):
        main(["--report", "--size", "35m", "--folder", folder])


def test_figures_have_one_line_an_axis(kept: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    data = next(kept_results(kept))
    points = data["rows"][0]["recall"]
    assert sorted(series(points["mqar"]["points"], "pairs")) == [2, 4, 8, 16]
    assert sorted(series(points["needle"]["points"], "length")) == [32, 64, 128, 256]
    assert sorted(series(points["copy"]["points"], "length")) == [32, 64, 128, 256]
    assert sorted(series(points["induction"]["points"], "length")) == [16, 32, 64, 128, 256]
    assert sorted(series(points["phonebook"]["points"], "entries")) == [3, 7, 15, 31]
    assert draw(data, tmp_path / "drawn.png") == tmp_path / "drawn.png"
    assert (tmp_path / "drawn.png").stat().st_size < 150_000


def test_spread_is_shown_where_there_is_one() -> None:
    assert spread([1.0, 3.0], ".2f") == "2.00 ± 1.41"
    assert spread([2.0], ".2f") == "2.00" and spread([], ".2f") == ""


def test_the_documents_tables_are_what_results_say() -> None:
    """`hymba lab --report` writes them; nobody else."""
    text = (ROOT / "docs/lab.md").read_text(encoding="utf-8")
    written = text.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    assert written == generate(ROOT / "results")


def test_reasons_are_of_findings_that_exist() -> None:
    keys = {finding.key for finding in FINDINGS}
    for size, said in report.reasons(ROOT / "results").items():
        assert size in SIZES and said.keys() <= keys, (size, said.keys() - keys)


def test_kept_results_have_no_paths_of_a_machine() -> None:
    for path in (ROOT / "results").glob("lab-*.json"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<!\w)/\w+/", text)  # any path from the root
        assert json.loads(text)
