"""`maskdm plan`: units, memory, what is measured and kept, the words against a plan, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from maskdm import plan
from maskdm.base.units import duration, flops, size
from maskdm.config import Params, resolve
from maskdm.method.backbones import build_model, count_image_flops
from maskdm.method.diffusion import Diffusion, draw_step, masked_dsm_loss
from maskdm.method.masks import Masking
from maskdm.plan import (
    GPUS,
    Gpus,
    Machine,
    Measurement,
    Plan,
    activation_bytes,
    format_table,
    forward_flops,
    launch_warnings,
    measured_warnings,
    warnings,
    words,
)
from maskdm.training import devices
from tests.factories import BF16, FP32, tiny_model, tiny_params

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
    assert Gpus((name,), precision, 0.4).seconds(name, 6e18) == pytest.approx(6e18 / (rate * 0.4))


# --- memory ---------------------------------------------------------------------------------------------------


def saved_bytes(params: Params, compute: devices.Compute, batch_size: int, num_visible: int) -> int:
    """What autograd really keeps of a forward pass of the loss: every storage once, parameters left out."""
    model, grid = tiny_model(params), params.grid
    masking = Masking("patch", grid, 1 - num_visible / grid.num_patches)
    diffusion, generator = Diffusion(2, "cosine", "epsilon"), torch.Generator().manual_seed(0)
    draws = draw_step(batch_size, params.patch_dim, masking, 2, 0.0, generator)
    x_0 = torch.zeros(batch_size, params.dataset.channels, params.dataset.height, params.dataset.width)
    excluded = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in excluded:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), compute.context():
        kept = masked_dsm_loss(model, diffusion, x_0, draws, params.model.patch_size)
    del kept
    return sum(storages.values())


@pytest.mark.parametrize("depth", [1, 3, 9])
@pytest.mark.parametrize("compute", [FP32, BF16], ids=["fp32", "bf16"])
def test_activations_in_closed_form_are_those_that_a_real_step_keeps(compute: devices.Compute, depth: int) -> None:
    """Without what does not grow with the batch, such as weights that autocast casts."""
    model = {"depth": depth, "dim": 64, "num_heads": 4}
    params = tiny_params(model=model, compute={"attention": "plain"})
    many, few = (saved_bytes(params, compute, batch_size, 8) for batch_size in (24, 8))
    assert activation_bytes(params, compute, 8, trains=True) == pytest.approx((many - few) / 16, rel=0.1)


def memory_of(**changes: Any) -> dict[str, float]:
    """Bytes of the stages of an arm with 4 of 16 patches, and of an unmasked one."""
    arms = Plan(tiny_params(**{"model": {"dim": 64, "depth": 9}, **changes}), FP32).arms
    return {f"{arm} {row.name}": row.memory for arm in ("scratch", "block2-m75") for row in arms[arm]}


def test_memory_of_training_is_states_activations_and_a_batch() -> None:
    params = tiny_params(finetune={"batch_size": 12, "micro_batch_size": 4})
    [finetune] = [row for row in Plan(params, FP32).arms["scratch"] if row.name == "finetune"]
    with torch.device("meta"):
        weights = 4 * sum(p.numel() for p in build_model(params, 10).parameters())
    batch = 12 * (8 * 8 + 16 * 4) * 4  # images and the noise of all patches, float32
    activations = 4 * activation_bytes(params, FP32, 16, trains=True)
    assert finetune.memory == pytest.approx(0.4 * GIB + 6 * weights + activations + batch)


def test_masks_micro_batches_and_recomputed_activations_save_memory() -> None:
    large = {"pretrain": {"batch_size": 4096}, "finetune": {"batch_size": 4096}}
    own = memory_of(**large)
    assert own["block2-m75 pretrain"] - 0.4 * GIB < 0.5 * (own["block2-m75 finetune"] - 0.4 * GIB)
    in_parts = memory_of(finetune={"batch_size": 4096, "micro_batch_size": 64}, pretrain=large["pretrain"])
    assert in_parts["scratch finetune"] < own["scratch finetune"]
    again = memory_of(**large, compute={"activation_checkpointing": True})
    assert again["scratch finetune"] < own["scratch finetune"]
    assert memory_of(sampling={"batch_size": 10})["scratch sample"] < own["scratch sample"]


@pytest.mark.parametrize(("fits", "shown"), [(24, "24"), (8, "24 (by 8)"), (1, "24 (by 1)"), (0, "24 (by 1)")])
def test_auto_on_a_gpu_is_planned_with_the_most_that_fit(
    monkeypatch: pytest.MonkeyPatch, fits: int, shown: str
) -> None:
    """The stage itself finds out by trying; on a CPU it takes the whole batch."""
    params = tiny_params(finetune={"batch_size": 24, "micro_batch_size": "auto"}, arms={"a": {"strategy": "none"}})
    gpu = replace(FP32, device=torch.device("cuda"))
    stage = resolve(params, "a", 0).finetune
    needed = Plan(params, FP32)._training_memory(stage, fits) - 0.4 * GIB
    monkeypatch.setattr(plan, "total_memory", lambda _: needed + 1)
    assert Plan(params, gpu).arms["a"][0].cells[3].endswith(f"× {shown}")
    assert Plan(params, FP32).arms["a"][0].cells[3].endswith("× 24")


# --- measuring ------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is measured, in a folder without any data; nothing really is: a call takes a second."""
    monkeypatch.chdir(tmp_path)
    pieces: list[str] = []

    def measure(self: Machine, run: Callable[[], object], num_units: float) -> Measurement:
        pieces.append(f"{run.__qualname__.split('.')[1]} {num_units:g}")
        return Measurement(1 / num_units, 0.1, "2024-02-03")

    monkeypatch.setattr(Machine, "_measure", measure)
    return pieces


def measure(params: Params, forget: bool = False) -> Plan:
    machine = Machine(params, FP32, forget)
    found = Plan(params, FP32, machine)
    machine.save()
    return found


EVERYTHING = ["classifier 320", "draw 500", "metrics 1", "step 8", "step 8", "step 8"]


def test_every_shape_is_measured_once(asked: list[str]) -> None:
    found = measure(tiny_params())
    assert sorted(asked) == EVERYTHING
    assert found.machine is not None
    assert found.machine.step(8, 4) == 1 / 8
    assert "measured on 2024-02-03" in found.machine.title


def test_what_was_measured_is_not_measured_again(asked: list[str]) -> None:
    first = measure(tiny_params())
    asked.clear()
    assert measure(tiny_params()).arms == first.arms
    assert asked == []


def test_another_arm_costs_its_own_measurement_alone(asked: list[str]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(arms={"patch-m25": {"strategy": "patch", "mask_rate": 0.25}}))
    assert asked == ["step 8"]


def test_recalibrating_measures_all_again(asked: list[str]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(), forget=True)
    assert sorted(asked) == EVERYTHING


KEPT = '{"0123456789abcdef": %s}'


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "maskdm-calibration/1", "measured": {}}', "\xff"]
    + [KEPT % entry for entry in ("null", '["x", 0, ""]', '[-1.0, 0, ""]', '[NaN, 0, ""]', "[1.0, 0.1]")],
)
def test_a_damaged_file_is_measured_anew_and_rewritten(asked: list[str], content: str) -> None:
    measure(tiny_params())
    plan.KEPT.write_text(content, encoding="latin-1")
    asked.clear()
    measure(tiny_params())
    assert sorted(asked) == EVERYTHING
    assert len(json.loads(plan.KEPT.read_text(encoding="utf-8"))) == 6


def test_a_folder_that_cannot_be_written_is_told_of(asked: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path(".work").write_text("a file in the way", encoding="utf-8")
    measure(tiny_params())
    assert "the measurements are not kept: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(plan, "cpu_name", lambda: "another CPU"),
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
    assert sorted(asked) == EVERYTHING


@pytest.mark.parametrize(
    "section", [{"model": {"dim": 32}}, {"dataset": {"image_size": 16}, "model": {"patch_size": 4}}]
)
def test_another_network_is_measured_anew(asked: list[str], section: dict[str, Any]) -> None:
    measure(tiny_params())
    asked.clear()
    measure(tiny_params(**section))
    assert sorted(asked) == EVERYTHING


def test_a_dear_step_is_measured_on_a_part_and_scaled(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """On fewer images while one is affordable, then on fewer patches, by their FLOPs."""
    params = tiny_params()
    of = {visible: count_image_flops(params, visible) for visible in (16, 8, 4)}
    monkeypatch.setitem(plan.MAX_FLOPS, "cpu", 1.5 * of[8])
    machine = Machine(params, FP32)
    assert machine.step(800, 8) == 1.0
    assert machine.step(800, 4) == 1 / int(1.5 * of[8] / of[4])
    assert machine.step(800, 16) == pytest.approx(of[16] / of[8])
    assert asked == ["step 1", f"step {int(1.5 * of[8] / of[4])}", f"step {of[8] / of[16]:g}"]


def test_what_is_measured_is_real_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every measurement takes time; how much is not tested, because the machine may be busy."""
    monkeypatch.setattr(plan, "MIN_SECONDS", 0.05)
    changes = {"training": {"grad_clip": 1.0}, "model": {"class_conditional": True, "dim": 64}}
    changes["evaluation"] = {"kid_subsets": 1}
    machine = Machine(tiny_params(**changes), FP32, forget=True)
    assert min(machine.step(256, 4), machine.draw(4), machine.classifier(), machine.metrics(64, 64)) > 0


@pytest.mark.parametrize("features", ["classifier", "pixels", "inception-v3-compat"])
def test_scoring_is_planned_where_it_can_be_measured(asked: list[str], features: str) -> None:
    found = measure(tiny_params(evaluation={"features": features}))
    metrics, classifier = 1.0, 1 / 320  # seconds of a milestone, of an image in an epoch
    extract = {"classifier": classifier / 3, "pixels": 0.0}
    if features in extract:
        evaluate = 2 * (1000 * extract[features] + metrics)
        assert [row.seconds for rows in found.arms.values() for row in rows if row.name == "evaluate"] == 3 * [
            pytest.approx(evaluate)
        ]
        drawn = 1000 * 50 / 500
        assert found.shared[1].seconds == pytest.approx(drawn + 1000 * extract[features] + 2 * metrics)
        trained = 20 * 1797 * classifier if features == "classifier" else 0.0
        assert found.shared[0].seconds == pytest.approx(trained + 1797 * extract[features])
    else:
        assert [found.arms["scratch"][-1].seconds, found.shared[0].seconds] == [None, None]
        text = " ".join(words(found, Gpus(("A100",), "bf16"), None))
        assert f"scoring with the features {features}" in text
        assert "?" in format_table(found, Gpus(("A100",), "bf16")).splitlines()[6].split()


def test_features_are_left_out_where_the_number_of_images_is_not_known(asked: list[str]) -> None:
    found = measure(tiny_params(dataset={"source": "image_folder", "root": "images"}))
    assert found.shared[0].seconds is None
    assert found.arms["scratch"][-1].seconds is not None
    text = " ".join(words(found, Gpus(("A100",), "bf16"), None))
    assert "not estimated: prepare, choose and report; " in text
    assert "features, as params.yaml does not tell the number of images" in text


# --- words against a plan -------------------------------------------------------------------------------------


class MadeUp(Machine):
    """Takes a nanosecond per FLOP, times a factor that is given for shapes of a step."""

    uncertainty, steps = 0.2, {}  # type: ignore[var-annotated]

    def __init__(self, params: Params, **given: Any) -> None:
        super().__init__(params, FP32, forget=True)
        self.__class__ = type("Given", (MadeUp,), given)

    def step(self, num_images: int, num_visible: int) -> float:
        return 1e-9 * count_image_flops(self.params, num_visible) * self.steps.get(num_visible, 1)

    def draw(self, batch_size: int) -> float:
        return 0.001

    def metrics(self, num_samples: int, num_real: int) -> float:
        return 3.0

    def classifier(self) -> float:
        return 0.004


def planned(params: Params, **given: Any) -> Plan:
    return Plan(params, FP32, MadeUp(params, **given))


def test_time_that_follows_flops_gives_no_warning() -> None:
    assert measured_warnings(planned(tiny_params())) == []
    assert measured_warnings(Plan(tiny_params(), FP32)) == []


def test_fixed_costs_that_eat_the_gain_are_named_with_the_arm() -> None:
    [warning] = measured_warnings(planned(tiny_params(), steps={4: 2}))
    assert warning.startswith("block2-m75: pretraining at S = 4, batch 8 costs 2.0× its FLOPs here")
    assert "a larger pretrain.batch_size amortises them" in warning


def test_arms_with_the_same_finding_share_a_line() -> None:
    arm = {"strategy": "patch", "mask_rate": 0.75}
    params = tiny_params(arms={"a": arm, "b": arm, "scratch": {"strategy": "none"}})
    [warning] = measured_warnings(planned(params, steps={4: 2}))
    assert warning.startswith("a, b: pretraining at S = 4")


def test_measurements_that_scatter_claim_nothing() -> None:
    [warning] = measured_warnings(planned(tiny_params(), steps={4: 9}, uncertainty=0.9))
    assert "scatter by ±90%" in warning


def test_a_step_too_short_for_a_gpu_is_named() -> None:
    gpus = Gpus(("A100", "H100"), "bf16", 0.4)
    [warning] = launch_warnings(Plan(tiny_params(), FP32), gpus)
    assert warning.startswith("A100, H100: the smallest step of all arms is less than 5 ms")
    large = tiny_params(finetune={"batch_size": 10**9}, pretrain={"batch_size": 10**9})
    assert launch_warnings(Plan(large, FP32), gpus) == []


def test_what_does_not_fit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    large = tiny_params(finetune={"batch_size": 10**9}, pretrain={"batch_size": 10**9}, compute={"threads": 8})
    found, gpus = Plan(large, FP32), Gpus(("A100",), "bf16")
    there = {"num_cores": 8, "total_memory": found.seeds.memory, "free_bytes": found.seeds.disk + found.resumable}
    for name, number in there.items():
        monkeypatch.setattr(plan, name, lambda *_, number=number: number)
    assert warnings(found, gpus) == []
    for name in there:
        monkeypatch.setattr(plan, name, lambda *_: 2)
    threads, memory, disk = warnings(found, gpus)
    assert threads.startswith("compute.threads is 8, but this machine has 2 cores: ")
    assert memory.startswith(f"memory: a stage needs about {size(found.seeds.memory)}, but there are only 2 B in all; ")
    assert disk == f"disk: the experiment writes {size(found.seeds.disk + found.resumable)}, but only 2 B are free here"


# --- what it costs, and the table -----------------------------------------------------------------------------


def test_time_and_disk_of_an_arm_are_those_of_its_steps() -> None:
    params = tiny_params(seeds=[0, 1, 2], finetune={"micro_batch_size": 4})
    found = planned(params)
    pretrain, finetune, sample, evaluate = found.arms["block2-m75"]
    run, of = resolve(params, "block2-m75", 0), {s: 1e-9 * count_image_flops(params, s) for s in (4, 16)}
    assert pretrain.seconds == pytest.approx(run.pretrain.num_steps * 8 * of[4])
    assert finetune.seconds == pytest.approx(run.finetune.num_steps * 8 * of[16])
    assert finetune.cells[3].endswith("× 8 (by 4)")
    assert sample.seconds == pytest.approx(2 * 50 * 1000 * 0.001)  # milestones × steps × images
    assert evaluate.seconds == pytest.approx(2 * (1000 * 0.004 / 3 + 3))
    weights = 4 * sum(p.numel() for p in build_model(params, 10).parameters())
    assert [row.disk for row in (pretrain, finetune, sample)] == [2 * weights, 2 * 2 * weights, 2 * 1000 * 64]
    rows = [row for rows in found.arms.values() for row in rows]
    assert found.seeds.flops == pytest.approx(3 * sum(row.flops for row in rows))
    assert found.seeds.seconds == pytest.approx(3 * sum(row.seconds or 0.0 for row in rows))
    assert found.seeds.memory == max(row.memory for row in rows)


def test_what_all_arms_have_in_common_is_planned_once() -> None:
    params = tiny_params(seeds=[0, 1], dataset={"held_out": 0.5}, evaluation={"reference": "held_out"})
    features, scale = planned(params).shared
    assert (features.name, features.flops, scale.name) == ("features", 0, "scale")
    assert features.seconds == pytest.approx(898 * 0.004 / 3 + 20 * 1796 * 0.004)
    assert scale.seconds == pytest.approx(1000 * 50 * 0.001 + 1000 * 0.004 / 3 + 2 * 3)
    assert scale.flops == pytest.approx(1000 * 50 * forward_flops(params))


def test_scratch_has_no_pretraining_but_its_initialisation() -> None:
    found = Plan(tiny_params(), FP32)
    finetune, sample, evaluate = found.arms["scratch"]
    assert (finetune.name, sample.name, evaluate.name) == ("finetune", "sample", "evaluate")
    assert finetune.disk == sum(row.disk for row in found.arms["patch-m50"][:2])
    assert finetune.seconds is None
    assert found.seeds.seconds is None


def test_tuning_is_the_trials_of_all_arms() -> None:
    trials = {"given": {}, "large": {"finetune.batch_size": 16, "finetune.lr": 1e-4}}
    tuning = {"seed": 9, "budget_fraction": 0.5, "trials": trials}
    params = tiny_params(tuning=tuning, sampling={"num_samples": 500})
    found = planned(params)
    tune = found.shared[-1]
    runs = [resolve(params, arm, 9, trial) for arm in params.arms for trial in trials]
    assert tune.flops == pytest.approx(sum(run.flops for run in runs) + 6 * 500 * 50 * forward_flops(params))
    scored = 6 * (500 * 50 * 0.001 + 500 * 0.004 / 3 + 3)
    assert tune.seconds == pytest.approx(1e-9 * sum(run.flops for run in runs) + scored)
    assert tune.disk == 0
    table = format_table(Plan(params, FP32), Gpus(("A100",), "bf16"))
    names = [line.split("  ")[0] for line in table.splitlines()[-5:]]
    assert names == ["features", "scale", "tune: 6 trials", "all arms, seeds", "in all"]
    assert "a chosen batch size changes them" in words(Plan(params, FP32), Gpus(("A100",), "bf16"), None)[-1]


def test_gpus_of_equal_rates_share_a_column_and_the_table_is_aligned() -> None:
    lines = format_table(planned(tiny_params()), Gpus(tuple(GPUS), "bf16")).splitlines()
    assert lines[1].split()[-3:] == ["V100", "A100", "H100/H200"]
    assert "of 16" in lines[1]
    ruler = lines[2]
    assert max(map(len, lines)) == len(ruler) <= 130
    assert lines[3].startswith("scratch ")
    assert [line.split()[0] for line in lines[4:7]] == ["finetune", "sample", "evaluate"]


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
    assert len(rows) == 8 + 3
    assert rows["scratch finetune"][:2] == ["16", "0"]
    assert rows["scratch finetune"][3:6] == ["20", "×", "32"]
    assert rows["patch-m50 pretrain"][:2] == ["8", "0.5"]
    assert rows["block2-m75 pretrain"][:2] == ["4", "0.75"]
    assert rows["patch-m50 evaluate"] == ["2", "×", "64"]
    assert "This machine was not measured (--no-calibration)." in outcome.out
    assert outcome.err == ""
    assert not tiny.path("results").exists()
    assert not tiny.path(".work").exists()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each measurement is one repetition."""
    monkeypatch.setattr(plan, "MIN_SECONDS", 1e-9)


@pytest.mark.usefixtures("hasty")
def test_plan_measures_this_machine_once(tiny: Experiment) -> None:
    first = tiny.succeed("plan")
    assert first.err == "measuring this machine, once: a few seconds of real work …\n"
    assert "machine" in first.out.splitlines()[1]
    second = tiny.succeed("plan")
    assert second.err == ""
    assert rows_of(second.out) == rows_of(first.out)
    assert "measuring" in tiny.succeed("plan", "--recalibrate").err


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
    before = torch.get_num_threads()
    try:
        compute, missing = plan.resolve_compute(tiny_params(compute={"threads": 10_000}))
        assert (compute.threads, missing) == (plan.num_cores(), None)
    finally:
        torch.set_num_threads(before)
