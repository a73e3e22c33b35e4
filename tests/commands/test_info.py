"""`hymba info`: the numbers of accounting.py, told to people and to programs; layers drawn."""

import json
from pathlib import Path

import pytest

pytest.importorskip("tyro", reason="the commands read their options with tyro")

from hymba import cli  # noqa: E402
from hymba.commands import info, info_compare  # noqa: E402
from hymba.config import Config, Layer  # noqa: E402
from hymba.model import accounting  # noqa: E402


def mistake(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["info", *argv]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("hymba: error: ") and err.count("\n") == 1, err
    return err


def run_info(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["info", *argv]) == 0
    return capsys.readouterr().out


def test_info_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        cli.main(["info", "--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0
    assert "hymba info hymba-1.5b" in text and "MODEL" in text and "--json" in text


def test_info_prints_the_costs(capsys: pytest.CaptureFixture[str]) -> None:
    text = run_info(capsys, "hymba-1.5b", "--context", "4096")
    assert "1,522,797,824 parameters, 3.05 GB" in text
    assert "G" + 14 * "w" + "G" + 15 * "w" + "G" in text  # first, middle, last
    assert "o" + 7 * "o<" + "oo<<" + 6 * "o<" + "o" in text
    assert "  4,096" in text and "note:" not in text
    assert "note:" in run_info(capsys, "hymba-1.5b", "--context", "9000")


def test_info_json_agrees_with_accounting(capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.preset("hymba-tiny")
    facts = json.loads(run_info(capsys, "hymba-tiny", "--context", "700", "--json"))
    assert facts["parameters"] == accounting.parameters(config)
    assert facts["flops_per_token"] == accounting.flops_per_token(config, 700)
    assert facts["cache_bytes"]["700"] == accounting.cache_bytes(config, 700)
    assert Config.from_dict(facts["config"]) == config
    assert list(facts["cache_bytes"]) == ["512", "700", "2048"]


@pytest.mark.parametrize("preset", info.PRESETS)
def test_info_draws_every_preset(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = run_info(capsys, preset)
    plan = info.plan(Config.preset(preset))
    assert all(row in text for row in plan.values()) or len(plan["mlp"]) > 40
    assert max(map(len, text.splitlines())) <= 100


def test_info_tells_a_fusion_that_is_not_the_mean() -> None:
    """Where there is something to join."""
    for name, told in (("hymba-tiny", True), ("llama-tiny", False)):
        config = Config.preset(name)
        assert "fusion" not in info.report("here", config, 100)
        text = info.report("here", config.replace(fusion="subtract"), 100)
        assert ("fusion     subtract: (a - s) / 2" in text) == told
        assert max(map(len, text.splitlines())) <= 100


def test_info_reads_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = Config.preset("hymba-tiny")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    expected = run_info(capsys, "hymba-tiny").splitlines()
    for name in (tmp_path, tmp_path / "config.json"):
        lines = run_info(capsys, str(name)).splitlines()
        assert "(folder)" in lines[0] and lines[1:] == expected[1:]


def test_info_asks_the_hub(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only config.json is fetched; without a network there is one clear line."""
    hub = pytest.importorskip("huggingface_hub")
    (tmp_path / "config.json").write_text(json.dumps(Config.preset("hymba-tiny").to_dict()))
    asked: list[str] = []
    monkeypatch.setattr(
        hub,
        "snapshot_download",
        lambda model, allow_patterns: asked.extend(allow_patterns) or tmp_path,
    )
    assert "some/model (hub): " in run_info(capsys, "some/model")
    assert asked == ["config.json"]

    def fails(model: str, allow_patterns: list[str]) -> Path:
        raise OSError("no network\nand much more")

    monkeypatch.setattr(hub, "snapshot_download", fails)
    assert cli.main(["info", "some/model"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("hymba: error: some/model") and last.endswith(": no network")


def test_far_sharing_is_spelled_out() -> None:
    """The drawing's "<" says "of the owner before it"; anything else gets a line."""
    layers = [Layer(), Layer(), Layer(kv_from=0), Layer(kv_from=1)]
    config = Config.preset("hymba-tiny").replace(layers=tuple(layers))
    text = info.report("here", config, 100)
    assert "oo<<" in text
    assert "layer 2 reads the K/V of layer 0" in text and "layer 3 reads" not in text


def test_many_layers_are_drawn_in_pieces() -> None:
    config = Config.preset("hymba-tiny").replace(layers=(Layer(),) * 95)
    lines = info.report("deep", config, 100).splitlines()
    drawn = [line.split()[1] for line in lines if line.startswith("  attention  G")]
    assert [len(piece) for piece in drawn] == [40, 40, 15]
    assert "layers       40        50        60        70" in lines


def test_sizes_are_rounded_for_people() -> None:
    counts = (0, 999, 1000, 3_045_595_648, 999_400_000, 999_600_000, 2e13)
    assert [info._short(n, "B") for n in counts] == [
        *("0 B", "999 B", "1.00 kB", "3.05 GB", "999 MB", "1.00 GB", "20.0 TB")
    ]


def test_compare_tells_the_papers_ratio_and_the_honest_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """11.67 by the paper's count; as allocated, from the bytes by hand (test_accounting.py)."""
    text = run_info(capsys, "hymba-1.5b", "--compare", "llama-3.2-3b", "hymba-1.5b")
    (llama,) = [line for line in text.splitlines() if line.strip().startswith("llama-3.2-3b")]
    held, meta, peer = 81_905_920, 11_345_920, 28 * 8192 * 2 * 8 * 128 * 2
    assert llama.split()[1:] == [
        *("917.5", "MB", "11.67x", "939.5", "MB", f"{peer / held:.2f}x"),
        *("939.5", "MB", f"{peer / (held + meta):.2f}x", "always"),
    ]
    assert "78.6 MB" in text and "1.00x" in text and "never" in text
    assert max(map(len, text.splitlines())) <= 100
    facts = json.loads(run_info(capsys, "hymba-1.5b", "--compare", "llama-3.2-3b", "--json"))
    found = facts["compare"]["llama-3.2-3b"]
    assert found["paper_ratio"] == pytest.approx(11.67, abs=0.005)
    assert found["cache_bytes"] == peer and found["ratio"] == peer / held
    assert "compare" not in json.loads(run_info(capsys, "hymba-1.5b", "--json"))


@pytest.mark.parametrize("other", ["llama-3.2-1b", "llama-3.2-3b", "qwen2.5-1.5b", "hymba-350m"])
def test_where_a_cache_becomes_the_smaller_one(other: str) -> None:
    """As counting every block up to 16,384 says."""
    mine, theirs = Config.preset("hymba-1.5b"), Config.preset(other)

    def larger(tokens: int) -> bool:
        parts = [accounting.cache_bytes(config, tokens) for config in (mine, theirs)]
        own, its = (part["total"] + part["meta"] for part in parts)
        return own >= its

    last = max((n for n in range(1, 16384) if larger(n)), default=0)
    found = info_compare.smaller_from(mine, theirs)
    assert found == (None if last == 16383 else last + 1)


def test_plot_draws_the_others_of_table_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one.svg", "two.svg"):
        run_info(capsys, "hymba-1.5b", "--plot", str(tmp_path / "in" / name))
    first, second = ((tmp_path / "in" / name).read_text() for name in ("one.svg", "two.svg"))
    assert all(f"<!-- {name} -->" in first for name in ("hymba-1.5b", *info_compare.PEERS))
    assert first.count("<!--") == second.count("<!--")
    run_info(capsys, "hymba-1.5b", "--compare", "llama-tiny", "--plot", str(tmp_path / "c.svg"))
    text = (tmp_path / "c.svg").read_text()
    assert "<!-- llama-tiny -->" in text and "<!-- llama-3.2-3b -->" not in text
    assert "format" in mistake(capsys, "hymba-tiny", "--compare", "hymba-1.5b", "--plot", "x.nope")


def test_compare_without_another_model(capsys: pytest.CaptureFixture[str]) -> None:
    """The one name is MODEL's, wherever it stands: nothing is compared, and that is said."""
    for words in (
        ["--compare", "llama-tiny"], ["--compare=llama-tiny"], ["llama-tiny", "--compare"],
        ["--json", "--compare", "llama-tiny"],
    ):  # fmt: skip
        said = mistake(capsys, *words)
        assert "llama-tiny is the only one named" in said
        assert "hymba info hymba-1.5b --compare llama-3.2-3b" in said
    assert "larger" in run_info(capsys, "--compare", "llama-tiny", "hymba-tiny")


def test_info_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "hymba-1.5b" in mistake(capsys, "hymba-1.5")
    assert "no folder" in mistake(capsys, "./nothing/here")
    assert "config.json" in mistake(capsys, str(tmp_path))
    assert "qwen2.5-1.5b" in mistake(capsys, "hymba-tiny", "--compare", "qwen2.5")
    assert "--context" in mistake(capsys, "hymba-tiny", "--context", "0")
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in mistake(capsys, str(tmp_path))
