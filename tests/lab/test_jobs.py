"""Runs as folders: done once, stopped and gone on with exactly, repeated by one command."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from hymba.errors import UserError
from hymba.lab import jobs as machinery
from hymba.lab import training
from hymba.lab.jobs import Lab, Plan, jobs, results
from hymba.lab.options import main, read
from hymba.lab.sizes import LabError
from hymba.lab.variants import VARIANTS

MakeLab = Callable[..., Lab]
LANGUAGE = {"part": ("language",), "only": ("hymba",), "seeds": (0,)}


def test_seeds_are_the_outermost_loop() -> None:
    plan = Plan(size="atom", part=("recall",), only=("hymba", "llama"), tasks=("mqar", "copy"))
    order = [(job.seed, job.task, job.variant.name) for job in jobs(plan)]
    assert order == [
        (seed, task, name)
        for seed in (0, 1)
        for task in ("mqar", "copy")
        for name in ("hymba", "llama")
    ]


def test_language_models_have_one_seed_but_for_those_that_show_the_spread() -> None:
    found = [(job.variant.name, job.seed) for job in jobs(Plan(size="atom", part=("language",)))]
    assert len(found) == len(VARIANTS) + 2
    assert {name for name, seed in found if seed == 1} == {"hymba", "llama"}
    some = jobs(Plan(size="atom", part=("language",), seeds=(3, 4), only=("samba",)))
    assert [job.seed for job in some] == [3, 4]


def test_every_run_has_a_place_and_a_command_of_its_own() -> None:
    plan = Plan(size="atom")
    places, commands = [], {}
    for job in jobs(plan):
        places.append(job.place)
        words = shlex.split(job.command)
        options = read(words[2:], "hymba lab")
        again = Plan(
            size=options.size,
            only=tuple(options.only),
            part=tuple(options.part),
            tasks=tuple(options.tasks),
            seeds=tuple(options.seeds),
        )
        assert [other.place for other in jobs(again)] == [job.place]
        commands[job.command] = job
    assert len(set(places)) == len(places) == len(commands)


def test_all_parts_run_once(lab: MakeLab, tmp_path: Path) -> None:
    whole = lab(only=("hymba", "mamba"), tasks=("mqar", "needle"), seeds=(0,))
    assert whole.run()
    found = {(r["part"], r["task"], r["variant"]): r for r in results(tmp_path / "lab", "atom")}
    assert len(found) == len(jobs(whole.plan)) == 8
    cost = found["cost", "", "hymba"]
    assert [row["batch"] for row in cost["decoding"]] == [1, 2]
    for held in (row["cache_bytes"] for row in cost["decoding"]):  # the engine's own count
        assert held["held"] == held["predicted"] >= held["at_context"] > 0
    language = found["language", "", "hymba"]
    assert language["held_out"]["length"] == 64 and language["longer"]["length"] == 256
    assert language["corpus"]["distinct_tokens"] > 1000
    recall = found["recall", "mqar", "mamba"]
    assert 0 <= recall["recall"] <= 1 and len(recall["points"]) == 9
    assert all(key in recall for key in ("device", "torch", "date", "command", "seconds"))
    place = tmp_path / "lab/atom/language/hymba/seed-0"
    assert (place / "model/model.safetensors").is_file() and not list(place.rglob("checkpoints"))

    again = lab(only=("hymba", "mamba"), tasks=("mqar", "needle"), seeds=(0,))
    assert again.run() and not again.said


def figures(folder: Path) -> dict:
    record = json.loads(next(folder.rglob("result.json")).read_text())
    return {key: record[key] for key in ("bits_per_byte", "held_out", "longer", "curve")}


def test_stopped_by_the_clock_it_goes_on_exactly(
    lab: MakeLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same figures as a run that was never stopped, to the last digit."""
    assert lab(folder=tmp_path / "whole", **LANGUAGE).run()
    original = training.Trainer

    class Stopped(original):
        """Out of time after its first step."""

        def _late(self) -> bool:
            return self.step >= 1

    monkeypatch.setattr(training, "Trainer", Stopped)
    first = lab(minutes=1000, **LANGUAGE)
    assert not first.run() and first.stopped
    assert not list((tmp_path / "lab").rglob("result.json"))
    assert list((tmp_path / "lab").rglob("step_000001"))
    monkeypatch.setattr(training, "Trainer", original)
    second = lab(**LANGUAGE)
    assert second.run()
    assert any("going on after step 1" in line for line in second.said)
    assert figures(tmp_path / "lab") == figures(tmp_path / "whole")


def test_no_run_begins_after_time_is_over(lab: MakeLab, tmp_path: Path) -> None:
    late = lab(minutes=1e-9, part=("cost",), only=("hymba", "llama"))
    assert not late.run() and not late.stopped
    assert "2 runs are left" in late.said[0] and not list((tmp_path / "lab").rglob("*.json"))


def test_results_of_other_settings_are_not_taken(lab: MakeLab, texts: Path) -> None:
    assert lab(part=("recall",), tasks=("copy",), only=("mamba",), seeds=(0,)).run()
    path = next(lab().plan.folder.rglob("result.json"))
    record = json.loads(path.read_text())
    record["settings"]["run"]["steps"] += 1
    path.write_text(json.dumps(record))
    with pytest.raises(LabError, match="other settings"):
        lab(part=("recall",), tasks=("copy",), only=("mamba",), seeds=(0,)).run()


@pytest.mark.parametrize("content", ["", '{"settings": ', "[]", "{}", "null"])
def test_a_damaged_result_is_told(lab: MakeLab, content: str) -> None:
    some = lab(part=("cost",), only=("hymba",))
    (job,) = jobs(some.plan)
    path = some.plan.folder / job.place / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(LabError, match="result.json is damaged: delete its folder"):
        some.run()
    with pytest.raises(LabError, match="result.json is damaged: delete its folder"):
        list(results(some.plan.folder, some.plan.size))


def test_weights_are_the_same_for_all_fusions_and_seeds_differ(lab: MakeLab) -> None:
    """A seed decides the weights and the rows; the device does not."""
    from hymba.lab.training import Device, new_model

    size = lab().plan.size
    shape = machinery.size_named(size).shape
    models = [
        new_model(VARIANTS[name].config(shape, 64), seed, Device("cpu"))
        for name, seed in (("hymba", 0), ("subtract", 0), ("hymba", 1))
    ]
    first, same, other = (model.decoder.embed_tokens.weight for model in models)
    assert first.equal(same) and not first.equal(other)


@pytest.mark.parametrize(
    "wrong",
    [
        {"size": "huge"},
        {"only": ("hymbo",)},
        {"part": ("languages",)},
        {"tasks": ("needles",)},
        {"minutes": 0.0},
        {"minutes": float("nan")},
        {"seeds": (-1,)},
        {"seeds": (2**32,)},
    ],
)
def test_mistakes_are_told(wrong: dict) -> None:
    with pytest.raises(LabError):
        Plan(**wrong)


def test_the_list_has_each_row_and_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--size", "20m", "--part", "recall"]) == 0
    printed = capsys.readouterr().out
    for name in VARIANTS:
        assert f"hymba lab --size 20m --only {name} --part recall" in printed
    assert "HhhhhHhhhhhH" in printed and printed.count(" M parameters, layers") == len(VARIANTS)


def test_what_another_process_has_begun_is_left_to_it(lab: MakeLab, tmp_path: Path) -> None:
    plan = {"part": ("recall",), "only": ("hymba", "mamba"), "tasks": ("mqar",), "seeds": (0,)}
    ours = lab(**plan)
    first, second = jobs(ours.plan)
    with machinery.claimed(ours.plan.folder / first.place) as mine:
        assert mine
        assert not ours.run()  # not done: one run is missing
        assert ours.result(first) is None and ours.result(second) is not None
    assert lab(**plan).run() and ours.result(first) is not None


def test_a_device_that_is_not_there_is_a_line(tmp_path: Path) -> None:
    for name in ("tpu", "cuda:77"):
        with pytest.raises(UserError, match=name):
            training.Device.find(name)
