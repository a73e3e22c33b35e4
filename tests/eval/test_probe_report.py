"""Reports of every plan: whole, finite, readable, and safe whatever a text or a name says."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hymba.errors import UserError
from hymba.eval.probe import draw, report
from hymba.eval.probe import run as running
from hymba.eval.probe.against import ROWS, SAID, kept, note, pairs, refuse_twins
from hymba.eval.probe.figures import EVERY, figures, left_out
from hymba.eval.probe.findings import findings
from hymba.eval.probe.run import Limits, measure, steps
from hymba.eval.probe.texts import Text
from hymba.tokenizer import Tokenizer
from hymba.weights import save
from tests.plans import plans

ABOUT = {
    "model": "tiny</script><b>", "parameters": 1, "meta_tokens": 0, "date": "now", "device": "cpu",
    "command": "hymba probe", "versions": {"hymba": "0"}, "windows": [], "channels": "8 of 64",
    "texts": [{"name": "a", "tokens": 20, "note": ""}],
}  # fmt: skip
HOSTILE = '</script><img src=x onerror="alert(1)">'
SMALL = Limits(tokens=20, channels=8, shown=9, heads=False)
FULL = Limits(tokens=20, channels=8, shown=9)


@pytest.fixture
def texts(text: Callable[..., Tensor]) -> list[Text]:
    return [
        Text(name, text(20, seed=i).tolist(), [HOSTILE] * 20, True) for i, name in enumerate("ab")
    ]


def looked(model: Any, texts: list[Text], limits: Limits = SMALL) -> tuple[Any, Any]:
    result, maps = measure(model, texts, limits)
    about = {"meta_tokens": model.config.meta_tokens}
    about |= {"windows": [x.window for x in model.config.layers]}
    return ABOUT | about | result, maps


def numbers(x: Any) -> Iterator[float]:
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        for each in x:
            yield from numbers(each)
    elif isinstance(x, (int, float)) and not isinstance(x, bool):
        yield float(x)


class Page(HTMLParser):
    """Elements of a page, and what a reader is not told."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.mark.parametrize("plan", list(plans()))
def test_a_report_of_every_plan(
    plan: str, lively: Any, tiny: Any, texts: list[Text], tmp_path: Path
) -> None:
    model = lively(tiny(plan))
    limits = FULL if plan == "some-attention" else SMALL
    result, maps = looked(model, texts, limits)
    files = report.write(tmp_path / "out", result, maps)
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(files)
    assert not [path for path in tmp_path.iterdir() if path.name != "out"]
    written = json.loads((tmp_path / "out/probe.json").read_text())
    found = list(numbers(written))
    assert len(found) > 60 and all(map(math.isfinite, found))
    check_page((tmp_path / "out/index.html").read_text(), [x for x in files if x.endswith(".svg")])
    for name in files:
        if name.endswith(".svg"):
            picture = ET.parse(tmp_path / "out" / name).getroot()
            assert len(picture.attrib["aria-label"]) > 20 and picture.attrib["role"] == "img"
    check_says(model.config, written)


def check_page(page: str, pictures: list[str]) -> None:
    parsed = Page(page)
    assert "{{" not in page and "tiny</script>" not in page
    assert not parsed.all("img") and not parsed.all("b")
    assert all(svg.get("aria-label") for svg in parsed.all("svg"))
    assert len(parsed.all("svg")) == len(parsed.all("figcaption")) == len(pictures)
    labels = {label["for"] for label in parsed.all("label")}
    for control in (*parsed.all("select"), *parsed.all("input")):
        assert control["id"] in labels
    ids = [x["id"] for _, x in parsed.found if "id" in x]
    assert len(ids) == len(set(ids))
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", page), "the page asks for something"
    assert len(parsed.all("script")) == 2


def check_says(config: Any, result: Any) -> None:
    """What does not apply is said, and what applies is there."""
    said = " ".join(result["left_out"])
    assert ("no meta tokens" in said) == (config.meta_tokens == 0)
    assert ("No layer has an SSM" in said) == ("ssm" not in result["shares"])
    assert ("No layer has attention" in said) == ("attention" not in result["shares"])
    assert (result["kv"] is None) == (len(config.kv_owners) < 2)
    assert (result["meta"] is None) == (
        config.meta_tokens == 0 or "attention" not in result["shares"]
    )
    for rows in (result["shares"], result["shares_without_meta"] or {}):
        for branch in rows.values():
            for row in filter(None, branch["layers"]):
                total = sum(row[kind] for kind in ("meta", "first", "self", "cross"))
                assert total == pytest.approx(1, abs=1e-4)


def test_ticks_are_as_many_as_was_said(lively: Any, tiny: Any, texts: list[Text]) -> None:
    for plan, heads in (("hymba", None), ("hymba", False), ("mamba", True)):
        ticks: list[str] = []
        limits = Limits(tokens=20, channels=4, shown=5, heads=heads)
        result, _ = measure(lively(tiny(plan)), texts, limits, ticks.append)
        assert len(ticks) == steps(tiny(plan), len(texts), limits)
        said = "Single heads were not taken away" in " ".join(left_out(result))
        assert said == (heads is False)


def test_a_broken_model_is_one_clear_line(lively: Any, tiny: Any, texts: list[Text]) -> None:
    model = lively(tiny("hymba"))
    with torch.no_grad():
        model.decoder.layers[2].mixer.out_proj.weight[3] = float("inf")
    with pytest.raises(UserError, match="layer 2 gives numbers that are not finite"):
        measure(model, texts, SMALL)


def test_heads_leave_the_maps_where_they_are_many(
    lively: Any, tiny: Any, texts: list[Text], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = lively(tiny("hymba"))
    _, maps = measure(model, texts, SMALL)
    assert maps["heads"] and len(maps["texts"]["a"]["attention"][0]["heads"]) == 4
    monkeypatch.setattr(running, "MAP_BYTES", 100)
    _, maps = measure(model, texts, SMALL)
    assert not maps["heads"] and maps["texts"]["a"]["attention"][0]["heads"] is None
    assert maps["texts"]["a"]["attention"][0]["mean"].shape == (9, 12)


def test_maps_in_json_are_the_weights(lively: Any, tiny: Any, texts: list[Text]) -> None:
    _, maps = measure(lively(tiny("hymba")), texts, SMALL)
    mean = maps["texts"]["a"]["attention"][2]["mean"]
    rows = report.plain(maps)["texts"]["a"]["attention"][2]["mean"]
    assert [len(row) for row in rows] == list(range(4, 13))  # 3 meta tokens, and up to itself
    for i, row in enumerate(rows):
        assert row == pytest.approx(mean[i, : 4 + i].tolist(), abs=6e-5)
        assert not mean[i, 4 + i :].any()


def test_an_interruption_leaves_the_old_report(
    lively: Any, tiny: Any, texts: list[Text], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    report.write(out, *looked(lively(tiny("hymba")), texts))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result, maps = looked(lively(tiny("mamba")), texts)
    monkeypatch.setattr(report, "plain", lambda maps: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        report.write(out, result, maps)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyboardInterrupt):
        report.write(tmp_path / "new", result, maps)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    files = report.write(out, result, maps)
    assert {path.name for path in out.iterdir()} == set(files), "figures of the old model stay"


def test_where_a_report_cannot_go(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    for name, said in (("file", "is a file"), ("mine", "no report"), ("file/out", "is a file")):
        with pytest.raises(UserError, match=said):
            report.check_folder(tmp_path / name)
    (tmp_path / "killed/.unfinished-1").mkdir(parents=True)
    report.check_folder(tmp_path / "killed")
    report.check_folder(tmp_path / "new/deep")
    assert not (tmp_path / "new").exists()


def test_findings_are_rules() -> None:
    """Made-up numbers that say the opposite turn every verdict round."""

    def row(first: float, own: float, bits: float) -> dict[str, float]:
        return {"meta": 0.3, "first": first, "self": own, "cross": 0.7 - first - own,
                "entropy_bits": bits}  # fmt: skip

    def side(a: dict[str, float], s: dict[str, float]) -> Any:
        return {name: {"layers": [x], "mean": x} for name, x in (("attention", a), ("ssm", s))}

    def part(layer: int, branch: str, change: float) -> dict[str, Any]:
        return {"layer": layer, "branch": branch, "head": None, "change": change}

    def made(good: bool) -> Any:
        low, high = (1, 2) if good else (2, 1)
        return {
            "shares": side(row(0.014 * low, 0.1 * low, low), row(0.01, 0.1 * high, low)),
            "even": [{"first": 0.002}],
            "even_without_meta": [{"first": 0.005}],
            "shares_without_meta": side(row(0.03, 0.1, high), row(0.02, 0.1, high)),
            "meta": {
                "texts": ["a", "b"],
                "distance_between_texts": [{"texts": ["a", "b"], "bits": high}],
                "distance_within_text": {"a": low, "b": low},
            },
            "magnitudes": [{"attention": {"before": low}, "ssm": {"before": high}}],
            "importance": {
                "loss": 3.0,
                "parts": [part(0, "ssm", high), part(0, "attention", low)],
            },
            "field": {"mean": {"both": 3.0}},
        }

    agrees = [found.agrees for found in findings(made(True))]
    assert agrees == [True] * 8 + [None]
    assert [found.agrees for found in findings(made(False))] == [False] * 8 + [None]
    level = made(True) | {"even_without_meta": [{"first": 0.04}]}
    assert findings(level)[0].agrees is None and "no drain" in findings(level)[0].here


def test_two_models_decide_what_is_said_of_two(
    lively: Any, tiny: Any, texts: list[Text], tmp_path: Path
) -> None:
    """Both models' numbers are those of their own reports; a second model of the wrong kind leaves
    the verdict as it was, and is said to."""
    here, maps = looked(lively(tiny("hymba")), texts)
    others = {
        name: looked(lively(tiny(name)), texts)[0] for name in ("llama", "sequential", "mamba")
    }
    alone = findings(here)
    said = {}
    for name, other in others.items():
        result = here | {"against": kept(other | {"model": name})}
        found = findings(result)
        said[name] = [
            name in x.here and f"{name} has no" not in x.here and x.here != y.here
            for x, y in zip(found, alone, strict=True)
        ]
        for x, y in zip(found, alone, strict=True):
            assert x.agrees == y.agrees or name in x.here
        report.write(tmp_path / name, result, maps)
        written = json.loads((tmp_path / name / "probe.json").read_text())
        assert written["against"]["field"] == other["field"]
        assert all(math.isfinite(x) for x in numbers(written["pairs"]))
        page = (tmp_path / name / "index.html").read_text()
        assert "Beside a second model" in page and "tiny</script>" not in page
        found = {pair.what: pair for pair in pairs(result)}
        field = found["receptive field of all heads, tokens"]
        assert (field.here, field.there) == tuple(x["field"]["mean"]["both"] for x in (here, other))
        assert ("attention on the first token, %" in found) == (name != "mamba")
        assert ("entropy of the SSM seen as attention, bits" in found) == (name != "llama")
    drain, entropy, of_ssm, field = 0, 2, 3, 8  # decided by both
    assert [i for i in range(9) if said["llama"][i]] == [drain, entropy]
    assert [i for i in range(9) if said["sequential"][i]] == [drain, entropy, of_ssm, field]
    assert [i for i in range(9) if said["mamba"][i]] == [of_ssm]


def beside(one: Any, other: Any) -> Any:
    """The record of the first model, `one`, with the second's kept."""
    return one | {"model": "one", "against": kept(other | {"model": "other"})}


FIRST = "name the one that has them first"
TURNS = "--against a model that has both branches in different layers"


@pytest.mark.parametrize(
    ("one", "other", "drain", "entropy", "of_ssm", "field"),
    [
        ("hymba", "llama", "", "", "other has no SSM: --against a model that has", TURNS),
        ("hymba", "mamba", "other has no attention", "other has no attention", "", TURNS),
        ("hymba", "windows", *["other has meta tokens too"] * 3, f"no heads by turns: {TURNS}"),
        ("hymba", "samba", *["other has meta tokens too"] * 3, ""),
        ("sequential", "hymba", FIRST, FIRST, FIRST, "heads side by side first"),
        ("llama", "hymba", FIRST, FIRST, "the model has no SSM", "name other first"),
        ("llama", "mamba", *["neither one nor other has meta"] * 2, "the model has no SSM",
         "neither one nor other has heads side by side"),
        ("llama", "mamba-meta", *["one has no meta tokens, other no attention"] * 2,
         "the model has no SSM", "neither"),
        ("mamba-meta", "llama", "has no attention", "the model has no attention",
         "other has no SSM", "neither"),
    ],
)  # fmt: skip
def test_what_two_models_leave_open_says_what_is_missing(
    one: str, other: str, drain: str, entropy: str, of_ssm: str, field: str,
    lively: Any, tiny: Any, texts: list[Text],
) -> None:  # fmt: skip
    """Empty: the two decide it."""
    records = [looked(lively(tiny(plan)), texts)[0] for plan in (one, other)]
    found = findings(beside(*records))
    for i, why in {0: drain, 2: entropy, 3: of_ssm, 8: field}.items():
        here = found[i].here
        assert "needs a second model" not in here and why in here
        assert why or ("in other" in here or "other, by turns" in here), here
        assert why or "--against" not in here
    assert "needs a second model (--against)" in findings(records[0])[8].here


def test_a_pair_that_decides_nothing_is_one_sentence(
    lively: Any, tiny: Any, texts: list[Text], tmp_path: Path
) -> None:
    pytest.importorskip("tyro", reason="the command line needs tyro")
    from hymba.commands.probe import summary

    plans = ("hymba", "sequential", "llama", "mamba")
    looks = {plan: looked(lively(tiny(plan)), texts) for plan in plans}
    records = {plan: result for plan, (result, _) in looks.items()}
    result = beside(records["llama"], records["mamba"])
    said = note(result)
    assert said.startswith("No statement could be decided by the two, one and other, which share")
    assert said.count(".") == 1
    assert f"those of attention ({ROWS['attention']}), which other lacks" in said
    assert f"those of {SAID['ssm']} ({ROWS['ssm']}), which one lacks" in said
    assert said in list(summary(result))[-1]
    report.write(tmp_path / "out", result, looks["llama"][1])
    assert f"<p>{said}</p>" in (tmp_path / "out/index.html").read_text()
    # What is left out are those rows: none of attention, none of the SSM.
    assert not [pair for pair in pairs(result) if "attention" in pair.what]
    assert "No statement" in note(beside(records["sequential"], records["hymba"]))
    assert "what is missing" in note(beside(records["sequential"], records["hymba"]))
    assert note(beside(records["hymba"], records["sequential"])) == ""
    partly = note(beside(records["hymba"], records["llama"]))
    assert partly.startswith("Rows left out") and "which other lacks" in partly


def test_a_model_against_itself(lively: Any, tiny: Any, tmp_path: Path) -> None:
    """The same folder, or the same weights and config; another config of them is another model."""
    one, copy, other = (tmp_path / name for name in ("one", "copy", "other"))
    save(lively(tiny("hymba")), one)
    shutil.copytree(one, copy)
    save(lively(tiny("hymba"), seed=1), other)
    (tmp_path / "link").symlink_to(one)
    for same in (one, tmp_path / "link", one / ".." / "one"):
        with pytest.raises(UserError, match="is the model itself: name another"):
            refuse_twins(("one", one), (str(same), same))
    with pytest.raises(UserError, match="^one and copy are the same weights: name another"):
        refuse_twins(("one", one), ("copy", copy))
    refuse_twins(("one", one), ("other", other))
    keys = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(keys | {"rope_theta": 5000.0}))
    refuse_twins(("one", one), ("copy", copy))


def test_magnitudes_behind_the_norms_are_the_models_own(
    lively: Any, tiny: Any, texts: list[Text]
) -> None:
    result, _ = looked(lively(tiny("hymba")), texts)
    for number, row in enumerate(result["magnitudes"]):
        row["attention"]["behind"], row["ssm"]["behind"] = 1.0, 1.5 + number
    (found,) = [figure for figure in figures(result) if figure.name == "magnitudes"]
    assert found.says.endswith("behind them it is 1.50 to 8.50 times attention's.")


def test_a_second_model_on_the_command_line(
    lively: Any, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tyro", reason="the command line needs tyro")
    from hymba import cli

    tokenizer = Tokenizer.train(["to be or not to be\n"] * 9, 270)
    for name in ("hymba", "llama"):
        config = dataclasses.replace(tiny(name), vocab_size=tokenizer.vocab_size)
        save(lively(config), tmp_path / name, tokenizer)
    (tmp_path / "text.txt").write_text("to be or not to be\n" * 30)
    words = ["--text", str(tmp_path / "text.txt"), "--tokens", "20", "--heads", "none"]
    one = ["probe", str(tmp_path / "hymba"), "--out", str(tmp_path / "out"), *words]
    one += ["--device", "cpu", "--threads", "1"]
    assert cli.main([*one, "--against", str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err and not (tmp_path / "out").exists()
    assert cli.main([*one, "--against", str(tmp_path / "hymba")]) == 2
    assert "is the model itself" in capsys.readouterr().err and not (tmp_path / "out").exists()
    foreign = tmp_path / "gpt2"
    foreign.mkdir()
    (foreign / "config.json").write_text('{"model_type": "gpt2"}')
    for words in ([*one, "--against", str(foreign)], ["probe", str(foreign), *one[2:]]):
        assert cli.main(words) == 2
        err = capsys.readouterr().err
        assert f"{foreign}: config.json has model_type 'gpt2'" in err and err.count("\n") == 1
        assert "llama, mamba, samba" in err and not (tmp_path / "out").exists()
    assert cli.main([*one, "--against", str(tmp_path / "llama")]) == 0
    assert str(tmp_path / "llama") in capsys.readouterr().out
    written = json.loads((tmp_path / "out/probe.json").read_text())
    assert written["model"] == str(tmp_path / "hymba")
    assert written["against"]["model"] == str(tmp_path / "llama") and written["pairs"]


def test_verdicts_of_two_models_turn_with_their_numbers(
    lively: Any, tiny: Any, texts: list[Text]
) -> None:
    here, other = (looked(lively(tiny(plan)), texts)[0] for plan in ("hymba", "sequential"))

    def agrees(first: float, bits: float, tokens: float) -> list[bool | None]:
        """With these numbers in the second model: drain, entropies, field."""
        changed = json.loads(json.dumps(kept(other)))
        changed["shares"]["attention"]["mean"]["first"] = first
        for side in changed["shares"].values():
            for layer in filter(None, side["layers"]):
                layer["entropy_bits"] = bits
        changed["field"]["mean"]["both"] = tokens
        found = findings(here | {"against": changed})
        return [found[i].agrees for i in (0, 2, 3, 8)]

    reach = here["field"]["mean"]["both"]
    assert agrees(0.9, 99.0, 0.49 * reach) == [True] * 4
    assert agrees(1e-6, 1e-6, 0.51 * reach) == [None, False, False, False]


def test_drawings_are_well_formed_whatever_is_drawn() -> None:
    labels = ["0", "1", "2"]
    for values in ([0.0, 0.0, 0.0], [None, 1.0, None], [-1.0, 2.0, 1e-9], [1e6, 2.0, 3.0]):
        series: draw.Series = {"a < b & c": values, "d": [0.1, 0.2, 0.3]}
        panels = [
            draw.bars("t", labels, series),
            draw.lines("t", labels, series),
            draw.stacked("t", labels, {"x": [0.5] * 3, "y": [0.5, None, 0.2]}),
            draw.heat("t", ["r<"], labels, [values], "c", signed=True, numbers=True),
        ]
        picture = ET.fromstring(draw.svg(panels, 'says "more" & more'))
        assert picture.attrib["aria-label"] == 'says "more" & more'
        for element in picture.iter():
            for name in ("x", "y", "width", "height", "cx", "cy"):
                assert math.isfinite(float(element.attrib.get(name, 0)))
            assert float(element.attrib.get("height", 0)) >= 0


def test_bars_are_as_high_as_their_numbers() -> None:
    picture = ET.fromstring(draw.svg([draw.bars("t", ["0", "1"], {"a": [1.0, 3.0]})], "x"))
    high = [
        float(x.attrib["height"])
        for x in picture.iter()
        if x.tag.endswith("rect") and len(x)  # a bar has a title, the legend's square has none
    ]
    assert high[1] == pytest.approx(3 * high[0], abs=0.2)


def test_a_probe_leaves_the_model_as_it_was(lively: Any, tiny: Any, texts: list[Text]) -> None:
    model = lively(tiny("hymba"))
    before = {name: x.clone() for name, x in model.state_dict().items()}
    result, _ = looked(model, texts, FULL)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert tuple(figure.name for figure in figures(result)) == EVERY
