"""The benchmarks: fair turns, right numbers, whole records; how fast anything is, is not looked at."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, reference, sampling, shapes
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.data import Decoded, write_jpegs
from benchmarks.kernels import OTHER, kind_of
from benchmarks.machine import slug
from benchmarks.outcome import Outcome, Table, Target, render, show
from benchmarks.record import FORMAT, default_path, read_record, summary
from benchmarks.scaling import exponent, exponents
from benchmarks.settings import Settings
from benchmarks.shapes import RATES, SHAPES, SMALL, TINY, Shape
from benchmarks.steps import StepMaker, random_arrays
from benchmarks.timing import Rounds, Spread, Task, interleave
from maskdm.compute import count_image_flops
from maskdm.errors import UserError
from tests.factories import CPU

NANO = Shape("tiny", 8, 1, {"patch_size": 2, "dim": 16, "depth": 3, "num_heads": 2, "mlp_ratio": 4.0}, 4)
MACHINE_KEYS = {"cpu", "cores", "threads", "memory_gib", "versions", "git_commit", "git_dirty", "date"}
TARGET_KEYS = {"what", "value", "bound", "sense", "is_met"}


needs_timm = pytest.mark.skipif(not reference.is_installed(), reason="timm is not installed")


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(tmp_path, rounds=1, is_quick=True, shapes=(NANO,), threads=1)


# --- timing


def test_tasks_take_turns_after_warming_up_each() -> None:
    done: list[str] = []
    tasks = {name: Task(lambda _, name=name: done.append(name) or 1.0) for name in "abc"}
    rounds = interleave(tasks, 3, "test")
    assert done == list("abc" * 4)
    assert rounds.seconds == {name: [1.0] * 3 for name in "abc"}


def test_a_short_task_is_repeated_until_its_measurement_is_long_enough() -> None:
    asked: list[int] = []
    task = Task(lambda times: asked.append(times) or 0.3 * times, least_seconds=1.0)
    task.warm_up()
    assert task.repetitions == 4
    assert task.measure() == pytest.approx(0.3)
    assert asked == [1, 1, 4]


def test_median_and_quartiles_are_those_of_the_definition() -> None:
    spread = Spread((5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread.as_dict() == {"median": 3.0, "low": 2.0, "high": 4.0, "raw": [5.0, 1.0, 3.0, 2.0, 4.0]}
    assert Spread((7.0,)).quartiles == (7.0, 7.0)


def test_ratios_are_taken_round_by_round() -> None:
    rounds = Rounds({"a": [2.0, 8.0, 30.0], "b": [1.0, 2.0, 3.0]})
    assert rounds.ratio("a", "b").raw == (2.0, 4.0, 10.0)
    assert rounds.ratio("a", "b", 0.5).raw == (1.0, 2.0, 5.0)
    assert rounds.rate("a", 16).raw == (8.0, 2.0, 16 / 30)
    assert rounds.of("b", 1e3).raw == (1e3, 2e3, 3e3)


# --- numbers


@pytest.mark.parametrize("power", [0.0, 1.0, 1.7])
def test_exponents_of_power_laws_are_found(power: float) -> None:
    sizes = [16, 64, 256]
    assert exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_every_round_has_its_own_exponent() -> None:
    rounds = Rounds({"2": [4.0, 2.0], "4": [16.0, 4.0], "8": [64.0, 8.0]})
    assert exponents(rounds, {"2": 2, "4": 4, "8": 8}).raw == pytest.approx((2.0, 1.0))


@pytest.mark.parametrize(
    ("value", "sense", "is_met"),
    [
        (1.0, "at most", True),
        (1.01, "at most", False),
        (1.0, "at least", True),
        (0.99, "at least", False),
        (math.nan, "at most", False),
        (math.nan, "at least", False),
    ],
)
def test_targets_hold_up_to_their_bound(value: float, sense: str, is_met: bool) -> None:
    assert Target("a number", value, 1.0, sense).is_met is is_met


def test_a_target_knows_two_senses() -> None:
    with pytest.raises(ValueError, match="'at most' or 'at least', got 'above'"):
        Target("a number", 1.0, 1.0, "above")


@needs_timm
@pytest.mark.parametrize("shape", [NANO, TINY, SMALL], ids=["nano", "tiny", "small"])
def test_the_reference_does_our_flops_but_for_the_long_skips(shape: Shape) -> None:
    ours = count_image_flops(shape.params(0.0, threads=1), shape.num_patches)
    dim, num_tokens = shape.model["dim"], shape.num_patches + 1
    skips = 3 * 2 * (shape.model["depth"] // 2) * num_tokens * 2 * dim**2  # forward, and twice that backward
    assert ours - reference.count_flops(shape) == skips


def test_the_tiny_shape_is_the_default_experiment() -> None:
    from maskdm.config import load_params

    default = load_params(shapes.ROOT / "params.yaml")
    params = TINY.params(0.0, threads=1)
    assert params.model == default.model
    assert params.dataset.image_size == default.dataset.image_size
    assert default.pretrain.batch_size == TINY.batch_size


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("aten::addmm", "linear layers"),
        ("mkldnn::_linear_pointwise", "linear layers"),
        ("aten::bmm", "attention products"),
        ("aten::_softmax", "softmax"),
        ("aten::_softmax_backward_data", "softmax"),
        ("aten::native_layer_norm_backward", "norms"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::_foreach_lerp_", "averaged weights"),
        ("aten::copy_", "casts and copies"),
        ("aten::gelu_backward", "GELU"),
        ("aten::randint", OTHER),
    ],
)
def test_operators_are_of_their_kind(operator: str, kind: str) -> None:
    assert kind_of(operator) == kind


@pytest.mark.parametrize(
    ("cell", "shown"),
    [
        (None, "–"),
        ("plain", "plain"),
        (12, "12"),
        (0.1234, "0.123"),
        (1234.5, "1,234"),
        ({"median": 2.0, "low": 1.5, "high": 2.25, "raw": []}, "2.00 [1.50, 2.25]"),
        ({"median": 2.0, "low": 2.0, "high": 2.001, "raw": []}, "2.00"),
    ],
)
def test_cells_show_what_can_be_seen(cell: Any, shown: str) -> None:
    assert show(cell) == shown


# --- real steps


@pytest.mark.parametrize("rate", RATES)
def test_steps_are_real_training_steps(rate: float, settings: Settings) -> None:
    steps = StepMaker(NANO, settings).steps(rate)
    state = steps.trainer.state
    before = [parameter.detach().clone() for parameter in state.model.parameters()]
    assert steps.run(3) > 0
    assert state.step == 3
    assert all(not torch.equal(old, new) for old, new in zip(before, state.model.parameters(), strict=True))
    assert steps.num_visible == round((1 - rate) * NANO.num_patches)
    steps.run(2)
    assert state.step == 5
    assert 0 < steps.waited < state.device_seconds


def test_the_update_alone_moves_weights_and_averages(settings: Settings) -> None:
    steps = StepMaker(NANO, settings, grad_clip=1.0).steps(0.0)
    steps.run(1)
    steps.fill_gradients()
    state = steps.trainer.state
    assert state.ema is not None
    averages = {name: tensor.clone() for name, tensor in state.ema.state_dict().items()}
    steps.update()
    assert all(not torch.equal(averages[name], tensor) for name, tensor in state.ema.state_dict().items())


@needs_timm
def test_the_reference_trains(settings: Settings) -> None:
    images = torch.from_numpy(random_arrays(settings.folder, 8, 1, 16).all())
    steps = reference.TimmSteps(NANO, images, "fp32", CPU)
    before = [parameter.detach().clone() for parameter in steps.model.parameters()]
    assert steps.run(2) > 0
    assert all(not torch.equal(old, new) for old, new in zip(before, steps.model.parameters(), strict=True))


def test_random_arrays_are_made_once(tmp_path: Path) -> None:
    first, again = (random_arrays(tmp_path, 8, 3, 10) for _ in range(2))
    assert first.shape == (8, 8, 3)
    assert len(first) == 10
    assert first.sha256 == again.sha256


def test_what_the_dataloader_decodes_are_the_images(tmp_path: Path) -> None:
    files = sorted(write_jpegs(tmp_path / "jpegs", 3, 16).iterdir())
    decoded = Decoded(files)
    assert len(decoded) == 3
    assert decoded[0].shape == (16, 16, 3)
    assert not torch.equal(decoded[0], decoded[1])


def test_the_gpu_benchmark_measures_every_variant(settings: Settings) -> None:
    outcome = gpu.measure(settings, (gpu.Case(NANO, (0.0, 0.5), 0.5, 0.4),))
    assert [row["what"] for row in outcome.tables[0].rows] == [
        "rate 0.0",
        "rate 0.5",
        "rate 0.5, eager",
        "rate 0.5, streamed",
    ]
    assert [target.bound for target in outcome.targets] == [0.4]


def test_without_a_gpu_the_record_says_so(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.run(settings).notes == ["no CUDA device: not measured"]


# --- quality


def test_quality_is_judged_against_the_spread_of_the_seeds() -> None:
    reference = sampling.Quality("ddim", 250, (1.0, 1.1, 1.2), (0.0, 0.0, 0.0))
    near, far = (sampling.Quality("unipc", n, fid, (0.0,) * 3) for n, fid in ((20, (1.1, 1.15, 1.2)), (50, (3.0,) * 3)))
    worse = sampling.Quality("ddpm", 20, (9.0, 9.0, 9.0), (0.0, 0.0, 0.0))
    targets = sampling.quality_targets([reference, near, worse, far])
    assert [target.is_met for target in targets] == [True, False]
    assert targets[0].what == "FID of unipc with 20 evaluations, less that of ddim with 250"
    assert targets[0].value == pytest.approx(0.05)
    assert targets[0].bound == pytest.approx(0.1)


def test_another_sampler_leaves_the_rest_of_the_experiment() -> None:
    params = NANO.params(0.0, threads=1)
    changed = sampling.with_sampler(params, "ddpm", 7, 3)
    assert (changed.sampling.sampler, changed.sampling.num_steps, changed.sampling.batch_size) == ("ddpm", 7, 3)
    assert changed.model_copy(update={"sampling": params.sampling}) == params


# --- the command


@pytest.mark.parametrize(
    "name",
    [
        "train_step",
        "data",
        "sampling",
        "ema_optimizer",
        "scaling",
        "attention",
        pytest.param("workflow", marks=pytest.mark.workflow),
    ],
)
def test_every_benchmark_writes_a_record(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(SHAPES, "tiny", NANO)
    out = tmp_path / "record.json"
    words = ["--quick", "--rounds", "1", "--threads", "1", "--only", name, "--shapes", "tiny", "--out", str(out)]
    assert main(words) == 0
    record = read_record(out)
    assert record["format"] == FORMAT
    assert record["rounds"] == 1
    assert record["is_quick"] is True
    assert {"cpu", "cores", "threads", "memory_gib", "versions", "git_commit", "git_dirty", "date"} <= set(
        record["machine"]
    )
    assert set(record["benchmarks"]) == {name}
    outcome = record["benchmarks"][name]
    assert outcome["tables"]
    for table in outcome["tables"]:
        assert table["rows"], table["title"]
        for row in table["rows"]:
            assert row.keys() == table["rows"][0].keys()
    assert all(set(target) == TARGET_KEYS for target in outcome["targets"])
    assert str(out) in capsys.readouterr().out


def test_a_record_is_shown_as_markdown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("speed", [{"what": "a", "s": Spread((1.0, 2.0, 3.0))}], "a note")
    outcome = Outcome([table], [Target("speed", 2.0, 1.0)], ["why"])
    file = tmp_path / "record.json"
    file.write_text(json.dumps({"format": FORMAT, "benchmarks": {"data": outcome.as_dict()}}), encoding="utf-8")
    assert main(["--table", str(file)]) == 0
    assert main(["--table", str(file), "--only", "scaling"]) == 0
    lines = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    assert "|a|2.00[1.50,2.50]|" in lines
    assert "|speed|2.00|atmost1.00|NO|" in lines
    assert "anote" in lines
    assert "why" in lines


def test_the_summary_counts_the_targets_that_hold() -> None:
    outcome = Outcome(targets=[Target("good", 0.5, 1.0), Target("bad", 2.0, 1.0)])
    text = summary({"benchmarks": {"one": outcome.as_dict()}})
    assert "1 of 2 targets hold" in text
    assert summary({"benchmarks": {"one": Outcome().as_dict()}}) == "no target was measured"


def test_a_record_is_named_after_its_day_and_machine() -> None:
    about = {"gpu": None, "cpu": "AMD EPYC (Zen 4)", "cores": 2, "date": "2030-01-02T03:04:05+00:00"}
    assert default_path({"machine": about}).name == "2030-01-02-amd-epyc-zen-4-2-cores.json"
    assert slug({**about, "gpu": "NVIDIA H100"}) == "nvidia-h100"


@pytest.mark.parametrize("content", ["", "[]", '{"format": "another"}'])
def test_what_is_no_record_is_refused(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"record\.json"):
        read_record(file)
    assert main(["--table", str(file)]) == 1
    assert "record.json" in capsys.readouterr().err


def test_unknown_names_are_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--only", "train_step,speed"])
    assert "unknown: speed; expected some of train_step, data" in capsys.readouterr().err


def test_help_names_every_benchmark(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in BENCHMARKS)


def test_plain_and_markdown_show_the_same_cells() -> None:
    outcome = Outcome([Table("t", [{"a": 1, "b": None}])]).as_dict()
    assert render(outcome, "simple").split()[0] == "t"
    assert "| 1" in render(outcome, "github")
