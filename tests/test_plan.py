"""`maskdm plan`: units, memory, what is measured and kept, the words against a plan, and the command."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from maskdm.base.units import duration, flops, size
from maskdm.config import ComputeConfig, Params, Training, resolve
from maskdm.method.backbones.building import count_image_flops
from maskdm.plan import bench, calibration
from maskdm.plan.calibration import Calibration, calibrate, measured_shapes
from maskdm.plan.estimates import estimate, forward_flops, work_of
from maskdm.plan.findings import disk_warning, launch_warnings, memory_warning, threads_warning, time_ratio, warnings_of
from maskdm.plan.gpus import GPUS
from maskdm.plan.store import Measurement, MeasurementStore
from maskdm.plan.table import Outlook, format_table
from maskdm.training import devices
from maskdm.training.memory import PROCESS_BYTES, MemoryCounter, peak_alive_bytes, saved_bytes
from tests.factories import FP32, ArrayImages, tiny_params

if TYPE_CHECKING:
    from tests.conftest import Experiment

GIB = 2**30


# --- units ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.01, "< 0.1 s"),
        (2.04, "2.0 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (125, "2 min 5 s"),
        (599.7, "10 min"),
        (3575, "1 h"),
        (12_000, "3 h 20 min"),
        (35_980, "10 h"),
        (100_000, "28 h"),
        (172_000, "2 d"),
        (273_600, "3 d 4 h"),
        (863_900, "10 d"),
        (86_400 * 700, "700 d"),
        (86_400 * 365 * 23.1, "23.1 years"),
    ],
)
def test_durations_are_as_people_say_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (flops(4.684e18), "4.68 EFLOP"),
        (flops(999.6e9), "1 TFLOP"),
        (flops(748), "748 FLOP"),
        (size(1.2 * GIB), "1.2 GiB"),
        (size(1023.9 * 2**20), "1 GiB"),
        (size(871 * 1024), "871 KiB"),
        (size(0), "0 B"),
    ],
)
def test_amounts_have_a_prefix_and_three_digits(text: str, expected: str) -> None:
    assert text == expected


# --- steps and FLOPs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("match", ["flops", "images", "steps"])
@pytest.mark.parametrize("model", [{}, {"class_conditional": True, "mlp_time_embed": True, "depth": 5}], ids=str)
def test_a_plans_steps_cost_what_is_counted_on_the_network(match: str, model: dict[str, Any]) -> None:
    params = tiny_params(budget={"match": match, "unmasked_steps": 123}, model=model, pretrain={"batch_size": 24})
    for arm in params.arms:
        run = resolve(params, arm, 0)
        for stage in (run.pretrain, run.finetune):
            assert stage.flops_per_step == stage.batch_size * count_image_flops(params, stage.num_visible)


@pytest.mark.parametrize("model", [{}, {"mlp_time_embed": True, "class_conditional": True}], ids=str)
def test_an_evaluation_of_the_network_costs_what_is_counted(model: dict[str, Any]) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from tests.factories import tiny_model

    params = tiny_params(model=model)
    index = torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter, sdpa_kernel([SDPBackend.MATH]), torch.no_grad():
        tiny_model(params)(torch.zeros(1, 16, 4), torch.zeros(1), index, torch.zeros(1, dtype=torch.int64))
    assert forward_flops(params) == counter.get_total_flops()


# --- GPUs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "precision", "rate"),
    [
        ("V100", "bf16", 15.7e12),
        ("A100", "bf16", 312e12),
        ("H100", "bf16", 989e12),
        ("H200", "bf16", 989e12),
        ("V100", "fp32", 15.7e12),
        ("A100", "fp32", 156e12),
    ],
)
def test_time_on_a_gpu_is_flops_over_rate_times_utilisation(name: str, precision: str, rate: float) -> None:
    assert GPUS[name].seconds(6e18, precision, 0.4) == pytest.approx(6e18 / (rate * 0.4))


# --- memory ---------------------------------------------------------------------------------------------------


def test_saved_bytes_are_those_of_the_closed_form() -> None:
    """Linear keeps its input (and its weight, a parameter), GELU its input, square its input."""
    batch, wide = 5, 7
    net = nn.Sequential(nn.Linear(3, wide), nn.GELU(), nn.Linear(wide, 2))
    x = torch.zeros(batch, 3)
    expected = 4 * batch * (3 + wide + wide + 2)
    assert saved_bytes(lambda: net(x).square().sum(), net.parameters()) == expected


def test_a_storage_that_is_saved_twice_counts_once() -> None:
    x = torch.zeros(10, requires_grad=True)
    assert saved_bytes(lambda: (y := x * 1.0).sin() + y.cos(), [x]) == 40


def test_peak_alive_counts_what_is_alive_at_a_time() -> None:
    def run() -> None:
        for _ in range(3):
            torch.zeros(100).add(1)  # two of 400 bytes alive, then none

    assert peak_alive_bytes(run) == 800


def test_memory_of_training_is_states_activations_and_a_batch() -> None:
    params = tiny_params()
    counter = MemoryCounter(params, FP32)
    saved = counter.saved_for_backward(4, 8)
    batch = 12 * (8 * 8 + 8 * 4) * 4  # images and the noise of S patches, float32
    expected = 5 * 4 * counter.num_parameters + saved + batch + PROCESS_BYTES["cpu"]
    assert counter.training(12, 4, 8) == pytest.approx(expected)


@pytest.mark.parametrize("depth", [1, 3, 9])
def test_memory_of_deep_networks_is_that_of_the_whole_network(depth: int) -> None:
    """Counted on fake tensors, a pair of blocks for all: as much as a real forward pass keeps."""
    from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
    from maskdm.method.masks import Masking
    from tests.factories import tiny_model

    params = tiny_params(model={"depth": depth})
    model, masking, diffusion = (
        tiny_model(params),
        Masking("patch", params.grid, 0.5),
        Diffusion(2, "cosine", "epsilon"),
    )
    draws = draw_step(6, 4, masking, 2, 0.0, torch.Generator().manual_seed(0))
    x_0 = torch.zeros(6, 1, 8, 8)
    real = saved_bytes(lambda: masked_dsm_loss(model, diffusion, x_0, draws, 2), model.parameters())
    assert MemoryCounter(params, FP32).saved_for_backward(6, 8) == pytest.approx(real, rel=0.01)


def test_masks_and_micro_batches_save_memory_and_plain_attention_costs_some() -> None:
    counter = MemoryCounter(tiny_params(), FP32)
    assert counter.saved_for_backward(8, 4) < 0.5 * counter.saved_for_backward(8, 16)
    assert counter.training(64, 16, 16) < counter.training(64, 64, 16)
    assert counter.sampling(10, 100) < counter.sampling(1000, 1000)


# --- measuring ------------------------------------------------------------------------------------------------


class FakeBench:
    """Takes a thousandth of a second per image and patch, and counts what it is asked for."""

    asked: list[str]

    def __init__(self, *_: Any) -> None:
        pass

    def step(self, num_images: int, num_visible: int) -> Measurement:
        return self._answer(f"step {num_images} {num_visible}", 0.001 * num_images * num_visible)

    def update(self) -> Measurement:
        return self._answer("update", 0.01)

    def gather(self, batch_size: int) -> Measurement:
        return self._answer(f"gather {batch_size}", 0.0001 * batch_size)

    def evaluation(self, num_images: int) -> Measurement:
        return self._answer(f"evaluation {num_images}", 0.002 * num_images)

    def _answer(self, name: str, seconds: float) -> Measurement:
        self.asked.append(name)
        return Measurement(seconds, 0.1, "2024-02-03")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is measured, in a folder without any data; nothing really is."""
    monkeypatch.chdir(tmp_path)
    FakeBench.asked = []
    monkeypatch.setattr(calibration, "Bench", FakeBench)
    return FakeBench.asked


def measure(params: Params, compute: devices.Compute = FP32, **store: Any) -> Calibration:
    return calibrate(params, compute, work_of(params, compute), MeasurementStore(**store))


def test_every_shape_is_measured_once(asked: list[str]) -> None:
    found = measure(tiny_params())
    assert sorted(asked) == ["evaluation 250", "gather 8", "step 8 16", "step 8 4", "step 8 8", "update"]
    assert found.steps == {(8, 16): 0.128, (8, 8): 0.064, (8, 4): 0.032}
    assert (found.update, found.gathers, found.evaluation) == (0.01, {8: 0.0008}, 0.5)
    assert (found.day, found.is_real_data, found.num_missing) == ("2024-02-03", False, 0)


def test_what_was_measured_is_not_measured_again(asked: list[str]) -> None:
    first = measure(tiny_params())
    asked.clear()
    assert measure(tiny_params()) == first
    assert asked == []


def test_another_arm_costs_its_own_measurement_alone(asked: list[str]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(arms={"patch-m25": {"strategy": "patch", "mask_rate": 0.25}}))
    assert asked == ["step 8 12"]


def test_recalibrating_measures_all_again(asked: list[str]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(), forget=True)
    assert len(asked) == 6


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "maskdm-calibration/0", "measured": {}}'],
    ids=["empty", "cut", "list", "nothing", "old"],
)
def test_a_damaged_file_is_measured_anew_and_rewritten(asked: list[str], content: str) -> None:
    measure(tiny_params())
    file = Path(".work/calibration.json")
    file.write_text(content, encoding="utf-8")
    asked.clear()
    measure(tiny_params())
    assert len(asked) == 6
    assert len(json.loads(file.read_text(encoding="utf-8"))["measured"]) == 6


@pytest.mark.parametrize(
    "entry", [None, {"value": "x"}, {"value": -1.0, "spread": 0, "day": ""}, {"value": float("nan")}]
)
def test_a_damaged_entry_is_measured_anew(asked: list[str], entry: Any) -> None:
    measure(tiny_params())
    file = Path(".work/calibration.json")
    content = json.loads(file.read_text(encoding="utf-8"))
    content["measured"][next(iter(content["measured"]))] = entry
    file.write_text(json.dumps(content), encoding="utf-8")
    asked.clear()
    measure(tiny_params())
    assert len(asked) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(calibration, "machine", lambda: ("another CPU", 64, "9.9")),
        lambda patch: patch.setattr(devices.Compute, "describe", lambda self: {"precision": "bf16"}),
        lambda patch: patch.setattr(devices.Compute, "describe_device", lambda self: {"threads": 7}),
    ],
    ids=["machine", "precision", "threads"],
)
def test_another_machine_is_measured_anew(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[pytest.MonkeyPatch], None]
) -> None:
    measure(tiny_params())
    asked.clear()
    change(monkeypatch)
    measure(tiny_params())
    assert len(asked) == 6


@pytest.mark.parametrize(
    "section", [{"model": {"dim": 32}}, {"dataset": {"image_size": 16}, "model": {"patch_size": 4}}]
)
def test_another_network_is_measured_anew(asked: list[str], section: dict[str, Any]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(**section))
    assert len(asked) == 6


def test_a_dear_step_is_measured_on_a_part_and_scaled(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny_params(pretrain={"batch_size": 800}, finetune={"batch_size": 800})
    cap = 100 * count_image_flops(params, 4)
    monkeypatch.setitem(calibration.MAX_FLOPS, "cpu", cap)
    found = measure(params)
    assert {"step 100 4", "step 1 4"} <= set(asked)
    assert "step 800 16" not in asked
    assert found.steps == {(800, s): pytest.approx(0.8 * s) for s in (16, 8, 4)}


def test_what_costs_the_same_at_any_batch_size_is_not_scaled(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    params = tiny_params(pretrain={"batch_size": 800}, finetune={"batch_size": 800})
    monkeypatch.setitem(calibration.MAX_FLOPS, "cpu", 100 * count_image_flops(params, 4))
    monkeypatch.setattr(FakeBench, "step", lambda self, b, s: Measurement(0.05 + 0.001 * b * s, 0.1, "2024-02-03"))
    assert measure(params).steps == {(800, s): pytest.approx(0.05 + 0.8 * s) for s in (16, 8, 4)}


def test_masks_of_nearly_equal_size_share_a_measurement_where_steps_are_dear() -> None:
    params = tiny_params(dataset={"image_size": 32})  # 16×16 patches
    work = work_of(params, FP32)
    shapes = {(256, s) for s in (256, 230, 225, 26, 25)}
    work = type(work)(frozenset(shapes), work.batches, work.sampling_batch, work.num_patches, work.flops_of)
    dear = measured_shapes(work, 2 * work.flops_of(256))
    assert {v: of[1] for (_, v), of in dear.items()} == {256: 256, 230: 230, 225: 230, 26: 26, 25: 26}
    assert dear[256, 256] == (2, 256)
    cheap = measured_shapes(work, 1e30)
    assert cheap == {shape: shape for shape in shapes}


def test_a_busy_machine_measures_the_most_needed_and_scales_the_rest(
    asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "TOTAL_SECONDS", -1.0)
    found = measure(tiny_params())
    assert [name for name in asked if name.startswith("step")] == ["step 8 4"]
    assert found.num_missing == 2
    ratio = count_image_flops(tiny_params(), 16) / count_image_flops(tiny_params(), 4)
    assert found.steps[8, 16] == pytest.approx(0.032 * ratio)


def test_what_is_measured_are_real_steps() -> None:
    """Of the real bench: positive times, more for more images, and no gradient left to the sampling pass."""
    params = tiny_params(training={"grad_clip": 1.0}, model={"class_conditional": True})
    real = bench.Bench(params, FP32, 0.01)
    few, many = real.step(1, 4), real.step(512, 16)
    assert 0 < few.value < many.value
    assert all(p.grad is not None for n, p in real._model.named_parameters() if "label" not in n)
    for measurement in (real.update(), real.gather(16), real.evaluation(4)):
        assert measurement.value > 0
        assert measurement.spread >= 0


def test_getting_a_batch_is_measured_for_one_where_several_are_made_together() -> None:
    class Slow(ArrayImages):
        def gather(self, indices: np.ndarray) -> np.ndarray:
            time.sleep(1e-4 * len(indices))
            return super().gather(indices)

    slow = bench.Bench(tiny_params(), FP32, 0.3)
    slow.__dict__["_images"] = Slow(np.zeros((64, 8, 8, 1), dtype=np.uint8))
    assert 16e-4 <= slow.gather(16).value < 4 * 16e-4


# --- words against a plan -------------------------------------------------------------------------------------


def made_up(**changes: Any) -> Calibration:
    """A calibration of `tiny_params` in which time follows FLOPs."""
    params = tiny_params()
    steps = {(8, s): 1e-9 * 8 * count_image_flops(params, s) for s in (16, 8, 4)}
    content: dict[str, Any] = {"steps": steps, "update": 0.0, "gathers": {8: 0.0}, "evaluation": 0.1, **changes}
    return Calibration(**content)


def test_time_that_follows_flops_gives_no_warning() -> None:
    params = tiny_params()
    assert warnings_of(params, FP32, made_up()) == []
    seconds, of_flops = time_ratio(FP32, resolve(params, "block2-m75", 0), made_up())
    assert seconds == pytest.approx(of_flops)
    assert warnings_of(params, FP32, None) == []


def test_fixed_costs_that_eat_the_gain_are_named_with_the_arm() -> None:
    params, steps = tiny_params(), dict(made_up().steps)
    steps[8, 4] *= 2
    [warning] = warnings_of(params, FP32, made_up(steps=steps))
    assert warning.startswith("block2-m75: pretraining at S = 4, batch 8 costs 2.0× its FLOPs here")
    assert "a larger pretrain.batch_size amortises them" in warning


def test_arms_with_the_same_finding_share_a_line() -> None:
    arm = {"strategy": "patch", "mask_rate": 0.75}
    params, steps = tiny_params(arms={"a": arm, "b": arm, "scratch": {"strategy": "none"}}), dict(made_up().steps)
    steps[8, 4] *= 2
    [warning] = warnings_of(params, FP32, made_up(steps=steps))
    assert warning.startswith("a, b: pretraining at S = 4")


def test_a_step_that_waits_for_its_data_is_named() -> None:
    params = tiny_params(arms={"scratch": {"strategy": "none"}})
    step = made_up().steps[8, 16]
    assert warnings_of(params, FP32, made_up(gathers={8: 0.4 * step})) == []
    [warning] = warnings_of(params, FP32, made_up(gathers={8: step}))
    assert warning.startswith("scratch: 50% of a finetune step at S = 16, batch 8 is waiting for its images")


def test_measurements_that_scatter_claim_nothing() -> None:
    steps = dict(made_up().steps)
    steps[8, 4] *= 9
    [warning] = warnings_of(tiny_params(), FP32, made_up(steps=steps, uncertainty=0.9))
    assert "scatter by ±90%" in warning


def test_a_step_too_short_for_a_gpu_is_named() -> None:
    params = tiny_params()
    [warning] = launch_warnings(params, [GPUS["A100"], GPUS["H100"]], "bf16", 0.4)
    assert warning.startswith("A100, H100: the smallest step of all arms is less than 5 ms")
    large = tiny_params(finetune={"batch_size": 10**9}, pretrain={"batch_size": 10**9})
    assert launch_warnings(large, [GPUS["A100"]], "bf16", 0.4) == []


def test_what_does_not_fit_is_said() -> None:
    assert disk_warning(5 * GIB, 6 * GIB) is None
    assert disk_warning(5 * GIB, 4 * GIB) == "disk: the experiment writes 5 GiB, and 4 GiB are free here"
    assert memory_warning(1, 1) is None
    assert "a stage needs about 24 GiB, and there are 16 GiB" in str(memory_warning(24 * GIB, 16 * GIB))
    assert threads_warning(2, 2) is None
    assert "compute.threads is 8, and this machine has 2 cores" in str(threads_warning(8, 2))


# --- estimates and the table ----------------------------------------------------------------------------------


def estimates_of(params: Params, found: Calibration | None, folder: Path) -> Any:
    return estimate(params, FP32, found, MeasurementStore(folder / "calibration.json"))


def test_time_and_disk_of_an_arm_are_those_of_its_steps(tmp_path: Path) -> None:
    params = tiny_params(seeds=[0, 1, 2], finetune={"micro_batch_size": 4})
    found = made_up(steps={**made_up().steps, (4, 16): 0.25}, update=0.5, gathers={8: 0.125})
    estimates = estimates_of(params, found, tmp_path)
    pretrain, finetune, sample = estimates.arms["block2-m75"]
    run = resolve(params, "block2-m75", 0)
    assert pretrain.seconds == pytest.approx(run.pretrain.num_steps * (found.steps[8, 4] + 0.625))
    assert finetune.seconds == pytest.approx(run.finetune.num_steps * (2 * 0.25 + 0.625))
    assert sample.seconds == pytest.approx(2 * 50 * 4 * 0.1)  # milestones × steps × batches
    weights = 4 * MemoryCounter(params, FP32).num_parameters
    assert [s.disk for s in (pretrain, finetune, sample)] == [2 * weights, 2 * 2 * weights, 2 * 1000 * 64]
    arms = [stage for stages in estimates.arms.values() for stage in stages]
    assert estimates.seeds.flops == pytest.approx(3 * sum(stage.flops for stage in arms))
    assert estimates.seeds.seconds == pytest.approx(3 * sum(stage.seconds for stage in arms))
    assert estimates.seeds.memory == max(stage.memory for stage in arms)


def test_scratch_has_no_pretraining_but_its_initialisation(tmp_path: Path) -> None:
    estimates = estimates_of(tiny_params(), None, tmp_path)
    finetune, sample = estimates.arms["scratch"]
    assert (finetune.stage, sample.stage) == ("finetune", "sample")
    assert finetune.disk == sum(stage.disk for stage in estimates.arms["patch-m50"][:2])
    assert finetune.seconds is None
    assert estimates.seeds.seconds is None


def test_tuning_is_the_trials_of_all_arms(tmp_path: Path) -> None:
    trials = {"given": {}, "large": {"finetune.batch_size": 16, "finetune.lr": 1e-4}}
    tuning = {"seed": 9, "budget_fraction": 0.5, "trials": trials}
    params = tiny_params(tuning=tuning, sampling={"num_samples": 500})
    estimates = estimates_of(params, made_up(), tmp_path)
    assert estimates.tuning.num_trials == 6
    trained = sum(resolve(params, arm, 9, trial).flops for arm in params.arms for trial in trials)
    drawn = 6 * 500 * params.sampling.num_steps * forward_flops(params)
    assert estimates.tuning.total.flops == pytest.approx(trained + drawn)
    table = format_table(estimates, Outlook((GPUS["A100"],), 0.4, "bf16", None))
    assert [line.split("  ")[0] for line in table.splitlines()[-3:]] == [
        "all arms and seeds",
        "tuning: 6 trials",
        "with tuning",
    ]


def test_time_of_a_batch_that_was_not_measured_follows_the_nearest() -> None:
    def of(batch_size: int) -> Training:
        pretrain = resolve(tiny_params(), "block2-m75", 0).pretrain
        return replace(pretrain, config=pretrain.config.model_copy(update={"batch_size": batch_size}))

    found = made_up(steps={(8, 4): 0.5, (64, 4): 2.0}, gathers={8: 0.5})
    assert found.step_seconds(of(16), None) == pytest.approx(1.0 + 1.0)
    assert found.step_seconds(of(128), 64) == pytest.approx(4.0 + 8.0)


def test_gpus_of_equal_rates_share_a_column_and_the_table_is_aligned(tmp_path: Path) -> None:
    outlook = Outlook(tuple(GPUS.values()), 0.4, "bf16", made_up())
    lines = format_table(estimates_of(tiny_params(), made_up(), tmp_path), outlook).splitlines()
    assert lines[1].split()[-3:] == ["V100", "A100", "H100/H200"]
    assert "of 16" in lines[1]
    ruler = lines[2]
    assert {len(line) for line in lines[3:]} == {len(ruler)}
    assert len(ruler) <= 130
    assert lines[3].startswith("scratch ")
    assert [line.split()[0] for line in lines[4:6]] == ["finetune", "sample"]


# --- the command ----------------------------------------------------------------------------------------------


def rows_of(out: str) -> dict[str, list[str]]:
    """Words of the stages' rows by arm and stage."""
    rows, arm = {}, ""
    for line in out.split("\n\n")[0].splitlines()[3:]:
        if line.startswith("  "):
            rows[f"{arm} {line.split()[0]}"] = line.split()[1:]
        else:
            arm = line.split()[0]
    return rows


def test_plan_has_a_row_per_arm_and_stage_and_runs_nothing(tiny: Experiment) -> None:
    outcome = tiny.succeed("plan", "--no-calibration")
    rows = rows_of(outcome.out)
    assert "scratch pretrain" not in rows
    assert len(rows) == 8
    assert rows["scratch finetune"][:2] == ["16", "0"]
    assert rows["scratch finetune"][3:6] == ["20", "×", "32"]
    assert rows["patch-m50 pretrain"][:2] == ["8", "0.5"]
    assert rows["block2-m75 pretrain"][:2] == ["4", "0.75"]
    assert "This machine was not measured (--no-calibration)." in outcome.out
    assert outcome.err == ""
    assert not tiny.path("results").exists()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement is one repetition."""
    monkeypatch.setattr(calibration, "LONGEST_SECONDS", 0.0)


@pytest.mark.usefixtures("hasty")
def test_plan_measures_this_machine_once(tiny: Experiment) -> None:
    first = tiny.succeed("plan")
    assert "measuring this machine, once: " in first.err
    assert "machine" in first.out.splitlines()[1]
    second = tiny.succeed("plan")
    assert second.err == ""
    assert rows_of(second.out) == rows_of(first.out)
    assert "measuring" in tiny.succeed("plan", "--recalibrate").err


@pytest.mark.usefixtures("hasty")
def test_plan_measures_batches_from_the_prepared_data(prepared: Experiment) -> None:
    assert "with batches from results/data" in " ".join(prepared.succeed("plan").out.split())


def test_plan_shows_the_window_of_a_crop(tiny: Experiment) -> None:
    tiny.change(arms={"crop-m75": {"strategy": "crop", "mask_rate": 0.75}})
    assert "crop-m75 2×2" in " ".join(tiny.succeed("plan", "--no-calibration").out.split())


def test_plan_for_chosen_gpus_says_their_rates(tiny: Experiment) -> None:
    out = " ".join(
        tiny.succeed("plan", "--no-calibration", "--gpu", "v100", "--gpu", "A100", "--utilisation", "0.5").out.split()
    )
    assert "datasheet rate × 0.5" in out
    assert "V100 15.7, A100 312 (V100: float32, as it has no bf16)" in out
    assert "H100" not in out


def test_plan_in_float32_uses_the_rates_of_tf32(tiny: Experiment) -> None:
    tiny.change(compute={"precision": "fp32"})
    out = " ".join(tiny.succeed("plan", "--no-calibration").out.split())
    assert "dense TF32" in out
    assert "A100 156" in out


def test_plan_for_a_gpu_that_is_not_here_does_without_its_time(
    tiny: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tiny.change(compute={"device": "cuda"})
    out = " ".join(tiny.succeed("plan").out.split())
    assert "This machine was not measured: compute.device is cuda, but PyTorch sees no CUDA device" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "K80"], "invalid choice: 'K80' (choose from"),
        (["--utilisation", "0"], "expected a number in (0, 1], such as 0.4, got 0"),
        (["--utilisation", "1.1"], "expected a number in (0, 1], such as 0.4, got 1.1"),
        (["--utilisation", "nan"], "expected a number in (0, 1], such as 0.4, got nan"),
        (["--utilisation", "half"], "expected a number in (0, 1], such as 0.4, got half"),
        (["--recalibrate", "--no-calibration"], "not allowed with"),
    ],
)
def test_wrong_options_are_exit_2(tiny: Experiment, words: list[str], says: str) -> None:
    outcome = tiny.run("plan", *words)
    assert outcome.code == 2
    assert says in outcome.err
    assert "Traceback" not in outcome.err


def test_help_teaches(tiny: Experiment) -> None:
    out = tiny.succeed("plan", "--help").out
    for part in ("--utilisation", "--gpu", "V100", ".work/calibration.json", "examples:"):
        assert part in out


def test_threads_beyond_the_cores_are_not_measured() -> None:
    from maskdm.plan.command import _resolve, num_cores

    before = torch.get_num_threads()
    try:
        compute, missing = _resolve(ComputeConfig(device="cpu", precision="auto", threads=10_000))
        assert (compute.threads, missing) == (num_cores(), None)
    finally:
        torch.set_num_threads(before)
