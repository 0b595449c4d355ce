"""The stages on the tiny experiment: what they publish, that it is reproducible, and what they refuse."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import re
import shutil
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import Tensor

from maskdm.base import rng
from maskdm.base.checksums import CHECKSUM, checked, short_hash
from maskdm.base.publishing import publish_description
from maskdm.base.tensors import load_tensors
from maskdm.config import Params, Run, load_params
from maskdm.method.backbones import build_model, count_image_flops
from maskdm.training.state import StateStore

if TYPE_CHECKING:
    from tests.conftest import Experiment, Outcome

ARM = "patch-m50"
ARMS = ["scratch", ARM, "block2-m75"]
MASKED = ARMS[1:]
TRIALS = ["given", "lr-high"]
MILESTONES = ["0.600", "1.000"]
NUM_SAMPLES = 64
OF_ARM = ["--arm", ARM, "--seed", "0"]


def folder_of(experiment: Experiment, stage: str, arm: str = ARM, seed: int = 0) -> Path:
    return experiment.path("results", stage, arm, f"seed-{seed}")


def json_of(experiment: Experiment, place: str) -> dict[str, Any]:
    content = json.loads(experiment.path(place).read_text(encoding="utf-8"))
    return checked(content) if CHECKSUM in content else content


def record_of(experiment: Experiment, stage: str, arm: str = ARM) -> dict[str, Any]:
    return json_of(experiment, f"results/records/{stage}-{arm}-seed-0.json")


def curve_of(experiment: Experiment, stage: str, arm: str = ARM) -> pd.DataFrame:
    return pd.read_csv(folder_of(experiment, stage, arm) / "curve.csv")


def weights_of(experiment: Experiment, arm: str, which: str = "raw", seed: int = 0) -> dict[str, Tensor]:
    return load_tensors(folder_of(experiment, "pretrain", arm, seed) / "checkpoint.safetensors")[0][which]


def params_of(experiment: Experiment) -> Params:
    """What params.yaml says."""
    return load_params(experiment.file)


def run_of(experiment: Experiment, arm: str = ARM) -> Run:
    """An arm with the values that were chosen for it."""
    with contextlib.chdir(experiment.folder):
        return experiment.job("pretrain", arm, 0).run


def assert_equal_weights(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        assert torch.equal(tensor, expected[name]), name


def assert_refused(outcome: Outcome, *says: str) -> None:
    """The stage failed with one message, which holds all of `says`."""
    assert outcome.code == 1, outcome.err
    assert outcome.err.startswith("maskdm: error: ") or "\nmaskdm: error: " in outcome.err
    for part in says:
        assert part in outcome.err


def write_images(folder: Path, count: int, kind: str = "png") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 16, 16), dtype=np.uint8)
    for number, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{number:03d}.{kind}")


# --- what they publish ----------------------------------------------------------------------------------------


FEATURES = ("classifier.safetensors", "features.json", "reference.npy", "stamp.json", "statistics.safetensors")


def test_results_contain_exactly_these_files(finished_once: Experiment) -> None:
    data = ("images-00000.npy", "labels.npy", "manifest.json", "preview.png", "stamp.json")
    expected = {f"results/data/{name}" for name in data}
    expected |= {f"results/features/{n}" for n in FEATURES}
    expected |= {f"results/records/{stage}.json" for stage in ("prepare", "features", "scale", "choose")}
    expected |= {"results/metrics/scale.json", "results/tuning/README.md", "results/chosen/stamp.json"}
    for arm in ARMS:
        expected |= {f"results/tuning/{arm}/{trial}.json" for trial in TRIALS}
        expected |= {f"results/records/tune-{arm}-trial-{trial}.json" for trial in TRIALS}
        expected |= {f"results/chosen/{arm}.json"}
        pretrained = ("checkpoint.safetensors", "curve.csv", "stamp.json")
        expected |= {f"results/pretrain/{arm}/seed-0/{name}" for name in pretrained}
        finetuned = ["milestones.json", "stamp.json", "curve.csv", *(f"milestone-{m}.safetensors" for m in MILESTONES)]
        expected |= {f"results/finetune/{arm}/seed-0/{name}" for name in finetuned}
        drawn = ["samples.json", *(f"milestone-{m}.{kind}" for m in MILESTONES for kind in ("npy", "png"))]
        expected |= {f"results/samples/{arm}/seed-0/{name}" for name in (*drawn, "stamp.json")}
        expected |= {f"results/metrics/{arm}-seed-0.json"}
        stages = ("pretrain", "finetune", "sample", "evaluate")
        expected |= {f"results/records/{stage}-{arm}-seed-0.json" for stage in stages}
    found = set(finished_once.hashes("results"))
    reported = {f for f in found if f.startswith("results/report/")}
    assert found - reported == expected
    assert {f"results/report/{n}" for n in ("report.html", "summary.csv", "verdicts.csv", "summary.md")} <= reported
    left = {f for f in finished_once.path(".work").rglob("*") if f.is_file() and "previous" not in f.parts}
    assert {f.name for f in left} == {"lock", "record.json", "verified.json"}, "what a stage goes on from is gone"
    assert not finished_once.path("mlflow.db").exists(), "tracking is off"


def test_arms_spend_the_same_to_within_a_step(scored_once: Experiment) -> None:
    params = params_of(scored_once)
    step = params.finetune.batch_size * count_image_flops(params, params.grid.num_patches)
    spent = [json_of(scored_once, f"results/metrics/{arm}-seed-0.json")["flops"] for arm in ARMS]
    assert spent[0] == params.budget.unmasked_steps * step
    assert max(spent) - min(spent) <= step


def test_milestones_fall_where_the_budget_says(scored_once: Experiment) -> None:
    params = params_of(scored_once)
    step = params.finetune.batch_size * count_image_flops(params, params.grid.num_patches)
    for arm in ARMS:
        milestones = json_of(scored_once, f"results/finetune/{arm}/seed-0/milestones.json")
        assert list(milestones) == MILESTONES
        for key, milestone in milestones.items():
            assert abs(milestone["flops"] - float(key) * params.budget.unmasked_steps * step) <= step


def test_scratch_publishes_its_initialisation_and_a_curve_without_rows(scored_once: Experiment) -> None:
    model = build_model(params_of(scored_once), num_classes=10)
    model.initialise(rng.generator(0, "init"))
    for which in ("raw", "ema"):
        assert_equal_weights(weights_of(scored_once, "scratch", which), dict(model.state_dict()))
    text = (folder_of(scored_once, "pretrain", "scratch") / "curve.csv").read_text(encoding="utf-8")
    assert text == "step,loss,lr,images_seen,tokens_seen,flops\n"


def test_arms_of_a_seed_share_the_initial_weights_and_seeds_do_not(prepared: Experiment) -> None:
    prepared.change(pretrain={"share": 0.0}, seeds=[0, 1])  # no step: what is published is what they start from
    for arm, seed in [*((arm, 0) for arm in ARMS), ("scratch", 1)]:
        prepared.succeed("pretrain", "--arm", arm, "--seed", str(seed))
    initial = weights_of(prepared, "scratch")
    for arm in MASKED:
        assert_equal_weights(weights_of(prepared, arm), initial)
    other = weights_of(prepared, "scratch", seed=1)
    random_before = [n for n, w in initial.items() if w.unique().numel() > 1]
    assert random_before and all(not torch.equal(initial[name], other[name]) for name in random_before)


def test_pretraining_changes_the_weights_and_their_average_differs(scored_once: Experiment) -> None:
    initial, trained = weights_of(scored_once, "scratch"), weights_of(scored_once, ARM)
    average = weights_of(scored_once, ARM, "ema")
    assert all(torch.isfinite(w).all() for w in trained.values())
    assert sum(not torch.equal(initial[n], trained[n]) for n in initial) > len(initial) / 2
    assert any(not torch.equal(average[n], trained[n]) for n in initial)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
@pytest.mark.parametrize("arm", MASKED)
def test_curve_has_a_row_per_interval_and_milestone(scored_once: Experiment, stage: str, arm: str) -> None:
    run, curve = run_of(scored_once, arm), curve_of(scored_once, stage, arm)
    training = getattr(run, stage)
    steps = {*range(5, training.num_steps + 1, 5), training.num_steps, *training.milestones}
    assert list(curve.columns) == ["step", "loss", "lr", "images_seen", "tokens_seen", "flops"]
    assert list(curve["step"]) == sorted(steps)
    assert np.isfinite(curve["loss"]).all() and (curve["lr"] == training.config.lr).all()


@pytest.mark.parametrize("arm", MASKED)
def test_compute_in_the_curve_of_finetuning_starts_at_that_of_pretraining(scored_once: Experiment, arm: str) -> None:
    run = run_of(scored_once, arm)
    pretrained, finetuned = curve_of(scored_once, "pretrain", arm), curve_of(scored_once, "finetune", arm)
    for curve, stage, before in (
        (pretrained, run.pretrain, (0, 0, 0)),
        (finetuned, run.finetune, tuple(pretrained[["images_seen", "tokens_seen", "flops"]].iloc[-1])),
    ):
        images = curve["step"] * stage.batch_size
        assert (curve["images_seen"] == before[0] + images).all()
        assert (curve["tokens_seen"] == before[1] + images * stage.num_visible).all()
        assert (curve["flops"] == before[2] + curve["step"] * stage.flops_per_step).all()
    assert finetuned["flops"].iloc[-1] == run.flops


def test_samples_are_images_of_the_dataset(scored_once: Experiment) -> None:
    for arm, milestone in itertools.product(ARMS, MILESTONES):
        folder = folder_of(scored_once, "samples", arm)
        images = np.load(folder / f"milestone-{milestone}.npy")
        assert images.shape == (NUM_SAMPLES, 8, 8, 1) and images.dtype == np.uint8
        assert len(np.unique(images.reshape(NUM_SAMPLES, -1), axis=0)) == NUM_SAMPLES
        with Image.open(folder / f"milestone-{milestone}.png") as grid:
            assert min(grid.size) >= 4 * 8  # 16 images


def test_samples_say_what_they_were_drawn_from(scored_once: Experiment) -> None:
    info = json_of(scored_once, f"results/samples/{ARM}/seed-0/samples.json")
    weights = scored_once.hashes(f"results/finetune/{ARM}")
    place = f"results/finetune/{ARM}/seed-0"
    assert info["weights_sha256"] == {m: weights[f"{place}/milestone-{m}.safetensors"] for m in MILESTONES}
    assert info["num_samples"] == NUM_SAMPLES and info["sampler"] == "ddim" and info["num_steps"] == 5


SCORES = ["fid", "kid", "kid_std", "precision", "recall", "num_samples", "flops"]
ABOUT = ["arm", "seed", "strategy", "mask_rate", "block_size", "realised_mask_rate"]
ORIGIN = ["extractor", "extractor_sha256", "data_sha256"]
SCALE = ["fid_floor", "kid_floor", "floor_num_samples", "fid_untrained", "kid_untrained"]


@pytest.mark.parametrize(("arm", "rate", "block"), [("scratch", 0.0, None), (ARM, 0.5, None), ("block2-m75", 0.75, 2)])
def test_metrics_say_what_they_are_of(scored_once: Experiment, arm: str, rate: float, block: int | None) -> None:
    metrics = json_of(scored_once, f"results/metrics/{arm}-seed-0.json")
    features = json_of(scored_once, "results/features/features.json")
    scale = json_of(scored_once, "results/metrics/scale.json")
    assert set(metrics) == {
        *SCORES,
        *ABOUT,
        *ORIGIN,
        *SCALE,
        "protocol",
        "flip",
        "milestones",
        "stamp",
    }
    assert (metrics["arm"], metrics["seed"], metrics["block_size"]) == (arm, 0, block)
    assert metrics["realised_mask_rate"] == rate
    assert metrics["mask_rate"] == (rate or None)
    assert metrics["data_sha256"] == json_of(scored_once, "results/data/manifest.json")["sha256"]
    assert {k: metrics[k] for k in ORIGIN} == {k: features[k] for k in ORIGIN} == {k: scale[k] for k in ORIGIN}
    floor, untrained = scale["floor"], scale["untrained"]
    expected = [floor["fid"], floor["kid"], floor["num_samples"], untrained["fid"], untrained["kid"]]
    assert [metrics[k] for k in SCALE] == expected


def test_metrics_of_an_arm_are_those_of_its_last_milestone(scored_once: Experiment) -> None:
    for arm in ARMS:
        metrics = json_of(scored_once, f"results/metrics/{arm}-seed-0.json")
        finetuned = json_of(scored_once, f"results/finetune/{arm}/seed-0/milestones.json")
        assert list(metrics["milestones"]) == MILESTONES
        for key, milestone in metrics["milestones"].items():
            assert set(milestone) == {*SCORES, "step", "images_seen", "tokens_seen"}
            assert {k: milestone[k] for k in finetuned[key]} == finetuned[key]
            assert milestone["fid"] > 0 and milestone["num_samples"] == NUM_SAMPLES
            assert 0 <= milestone["precision"] <= 1 and 0 <= milestone["recall"] <= 1
        assert {k: metrics[k] for k in SCORES} == {k: metrics["milestones"]["1.000"][k] for k in SCORES}
        assert metrics["fid_untrained"] > metrics["fid"] > metrics["fid_floor"] > 0
        assert metrics["kid_untrained"] > metrics["kid"] > metrics["kid_floor"]


def test_records_say_what_made_them(scored_once: Experiment) -> None:
    for stage, arm in itertools.product(("pretrain", "finetune", "sample", "evaluate"), ARMS):
        record = record_of(scored_once, stage, arm)
        assert (record["stage"], record["arm"], record["seed"], record["trial"]) == (stage, arm, 0, None)
        assert record["params_fingerprint"] == short_hash(params_of(scored_once))
        assert record["versions"]["torch"] == torch.__version__
        assert record["wall_seconds"] > 0 and record["peak_memory_gib"] > 0 and record["machine"]["cores"] >= 1
        assert record["git_commit"] is None, "the folder is in no repository"
        assert (record["device"], record["threads"]) == ("cpu", 1)
        if stage != "evaluate":
            assert record["precision"] == record_of(scored_once, "pretrain", arm)["precision"]


@pytest.mark.parametrize("arm", ARMS)
def test_records_of_training_account_for_the_compute(scored_once: Experiment, arm: str) -> None:
    run, weights = run_of(scored_once, arm), weights_of(scored_once, arm)
    for stage in ("pretrain", "finetune"):
        record, planned = record_of(scored_once, stage, arm), getattr(run, stage)
        assert (record["steps"], record["num_visible"]) == (planned.num_steps, planned.num_visible)
        assert record["flops"] == planned.num_steps * planned.flops_per_step
        assert record["realised_mask_rate"] == 1 - planned.num_visible / 16
        assert record["num_parameters"] == sum(w.numel() for w in weights.values())
        assert (record["device_seconds"] > 0) == (planned.num_steps > 0)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_records_of_training_time_every_row_of_the_curve(scored_once: Experiment, stage: str, arm: str) -> None:
    record, curve = record_of(scored_once, stage, arm), curve_of(scored_once, stage, arm)
    columns = ["step", "device_seconds", "data_wait_seconds", "peak_memory_gib"]
    timings = pd.DataFrame(record["timings"], columns=columns)
    assert all(set(row) == set(columns) for row in record["timings"])
    assert list(timings["step"]) == list(curve["step"])
    if arm == "scratch" and stage == "pretrain":
        assert len(timings) == 0
        assert (record["device_seconds"], record["data_wait_seconds"], record["data_wait_share"]) == (0, 0, 0)
        return
    assert (timings["device_seconds"].diff().dropna() > 0).all(), "cumulative"
    assert (timings["data_wait_seconds"].diff().dropna() > 0).all()
    assert (timings["data_wait_seconds"] < timings["device_seconds"]).all()
    last = timings.iloc[-1]
    assert record["device_seconds"] == pytest.approx(last["device_seconds"], abs=1e-3)
    assert record["data_wait_seconds"] == pytest.approx(last["data_wait_seconds"], abs=1e-3)
    assert record["data_wait_share"] == pytest.approx(last["data_wait_seconds"] / last["device_seconds"], abs=1e-3)
    assert record["device_seconds"] < record["wall_seconds"], "logging, saving and publishing are not in it"


# --- the same again -------------------------------------------------------------------------------------------

OUTPUTS = {
    "prepare": "results/data",
    "features": "results/features",
    "scale": "results/metrics/scale.json",
    "tune": f"results/tuning/{ARM}/lr-high.json",
    "choose": "results/chosen",
    "pretrain": f"results/pretrain/{ARM}",
    "finetune": f"results/finetune/{ARM}",
    "sample": f"results/samples/{ARM}",
    "evaluate": f"results/metrics/{ARM}-seed-0.json",
    "report": "results/report",
}


@pytest.mark.parametrize("stage", ["tune", "report"])
def test_stage_run_again_gives_equal_bytes(finished: Experiment, stage: str) -> None:
    """The others: test_runner, by force."""
    before = finished.hashes(OUTPUTS[stage])
    finished.path(OUTPUTS[stage]).rename(finished.path("aside"))
    shutil.rmtree(finished.path(".work"))
    finished.succeed(stage, *(["--arm", ARM, "--trial", "lr-high"] if stage == "tune" else []))
    assert finished.hashes(OUTPUTS[stage]) == before


def test_seed_changes_what_is_trained(prepared: Experiment) -> None:
    prepared.change(seeds=[0, 1])
    first_losses = []
    for seed in (0, 1):
        prepared.succeed("pretrain", "--arm", ARM, "--seed", str(seed))
        first_losses.append(pd.read_csv(folder_of(prepared, "pretrain", seed=seed) / "curve.csv")["loss"].iloc[0])
    assert first_losses[0] != pytest.approx(first_losses[1])


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_samples_do_not_depend_on_their_batch(one_arm: Experiment, one_arm_once: Experiment, batch_size: int) -> None:
    if batch_size == 1:
        one_arm.change(sampling={"num_samples": 50})
    one_arm.change(sampling={"batch_size": batch_size}).succeed("sample", *OF_ARM)
    for milestone in MILESTONES:
        name = f"milestone-{milestone}.npy"
        drawn = np.load(folder_of(one_arm, "samples") / name)
        expected = np.load(folder_of(one_arm_once, "samples") / name)[: len(drawn)]
        assert (drawn == expected).mean() >= 0.999


def test_evaluation_hardly_depends_on_its_batch(one_arm: Experiment, one_arm_once: Experiment) -> None:
    one_arm.change(evaluation={"batch_size": 5})
    for words in (["features"], ["scale"], ["evaluate", *OF_ARM]):
        one_arm.succeed(*words)
    place = f"results/metrics/{ARM}-seed-0.json"
    got, expected = json_of(one_arm, place), json_of(one_arm_once, place)
    for score in ("fid", "kid", "precision", "recall"):
        assert got[score] == pytest.approx(expected[score], rel=1e-3, abs=1e-6)


def test_tracking_changes_no_byte_of_the_results_and_mlflow_gets_the_stage(
    scored_once: Experiment, tuned: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tuned.change(tracking={"enabled": True})
    for words in (["pretrain", *OF_ARM], ["track"]):
        process = tuned.start(*words)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert tuned.hashes(OUTPUTS["pretrain"]) == scored_once.hashes(OUTPUTS["pretrain"])
    with contextlib.closing(sqlite3.connect(tuned.path("mlflow.db"))) as database:
        of_stage = "in (select run_uuid from tags where key = 'maskdm.stage' and value = 'pretrain')"
        tags, params, metrics = (
            {key for (key,) in database.execute(f"select distinct key from {table} where run_uuid {of_stage}")}
            for table in ("tags", "params", "metrics")
        )
        runs = database.execute("select value from tags where key = 'maskdm.stage'").fetchall()
    assert ("pretrain",) in runs
    assert {"data_sha256", "params_fingerprint", "version.torch"} <= tags
    assert {"pretrain.lr", "pretrain.batch_size", "mask.strategy", "mask.mask_rate", "compute.device"} <= params
    assert {"loss", "flops", "images_per_second", "wall_seconds", "peak_memory_gib", "realised_mask_rate"} <= metrics


# --- resuming -------------------------------------------------------------------------------------------------


def work_of(experiment: Experiment, stage: str) -> Path:
    """Where a folder for each key holds what is unfinished."""
    return experiment.path(".work", "results", stage, ARM, "seed-0")


def more_steps(experiment: Experiment) -> Experiment:
    return experiment.change(
        budget={"unmasked_steps": 120}, training={"log_every": 1, "flip": 0.5}, saving={"every_seconds": 0.01}
    )


@pytest.fixture(scope="module")
def uninterrupted(prepared_once: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """An arm trained for more steps in one go."""
    experiment = more_steps(prepared_once.copy_to(tmp_path_factory.mktemp("uninterrupted")))
    for stage in ("pretrain", "finetune"):
        experiment.succeed(stage, *OF_ARM)
    return experiment


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_killed_training_resumes_and_ends_as_if_uninterrupted(
    uninterrupted: Experiment, tmp_path: Path, stop_when: Callable[..., Outcome], stage: str
) -> None:
    experiment = uninterrupted.copy_to(tmp_path)
    shutil.rmtree(folder_of(experiment, stage))
    shutil.rmtree(experiment.path(".work"))
    work = work_of(experiment, stage)
    # finetuning is killed after a milestone: its weights must survive too
    started = "*/state-*.safetensors" if stage == "pretrain" else "*/milestones/*.safetensors"
    outcome = stop_when(experiment.start(stage, *OF_ARM), lambda: any(work.glob(started)), signal.SIGKILL)
    assert outcome.code == -signal.SIGKILL and not folder_of(experiment, stage).exists()
    again = experiment.succeed(stage, *OF_ARM)
    step = re.search(rf"{stage} {ARM} seed 0: resuming from step (\d+)", again.out)
    assert step and 0 < int(step[1]) < getattr(run_of(experiment), stage).num_steps
    assert experiment.hashes(OUTPUTS[stage]) == uninterrupted.hashes(OUTPUTS[stage])
    assert {path.name for path in work.iterdir()} == {"lock", "record.json"}
    assert record_of(experiment, stage)["starts"] == 2


@pytest.fixture
def stopped(prepared: Experiment, monkeypatch: pytest.MonkeyPatch) -> Experiment:
    """An arm whose pretraining was interrupted at step 20, in this process."""
    from maskdm.training import trainer

    row_of = trainer.Progress.update_to

    def interrupt_at_20(self: Any, done: int, note: str = "") -> None:
        if done > 20:
            raise KeyboardInterrupt
        row_of(self, done, note)

    more_steps(prepared).change(saving={"every_seconds": 1e6, "every_steps": 10})
    with monkeypatch.context() as patched:
        patched.setattr(trainer.Progress, "update_to", interrupt_at_20)
        assert prepared.stage("pretrain").code == 130
    return prepared


def test_interrupted_training_resumes_from_its_last_row(stopped: Experiment, uninterrupted: Experiment) -> None:
    assert "resuming from step 20\n" in stopped.succeed("pretrain", *OF_ARM).out
    assert stopped.hashes(OUTPUTS["pretrain"]) == uninterrupted.hashes(OUTPUTS["pretrain"])


@pytest.fixture
def no_steps(stopped: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage takes no step: it only says what it would start from."""
    monkeypatch.setattr("maskdm.training.trainer.train", lambda *arguments: None)


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize(
    "change",
    [
        {"pretrain": {"lr": 1e-3}},
        {"pretrain": {"batch_size": 16}},
        {"budget": {"unmasked_steps": 100}},
        {"training": {"ema_decay": 0.9}},
        {"diffusion": {"prediction": "v"}},
        {"model": {"dim": 32}},
        {"arms": {ARM: {"strategy": "patch", "mask_rate": 0.75}}},
    ],
    ids=str,
)
def test_state_of_other_params_is_not_resumed(stopped: Experiment, change: dict[str, Any]) -> None:
    assert "resuming from" not in stopped.change(**change).succeed("pretrain", *OF_ARM).out
    assert len(list(work_of(stopped, "pretrain").glob("*/state-0000000020.safetensors"))) == 1, "it is kept"


@pytest.mark.usefixtures("no_steps")
def test_state_of_other_data_is_not_resumed(stopped: Experiment) -> None:
    stopped.change(dataset={"limit": 150}).succeed("prepare")
    assert "resuming from" not in stopped.succeed("pretrain", *OF_ARM).out


def test_work_of_earlier_params_is_resumed_when_they_return(stopped: Experiment, uninterrupted: Experiment) -> None:
    lr = stopped.content["pretrain"]["lr"]
    assert "resuming from" not in stopped.change(pretrain={"lr": 1e-3}).succeed("pretrain", *OF_ARM).out
    assert "resuming from step 20\n" in stopped.change(pretrain={"lr": lr}).succeed("pretrain", *OF_ARM).out
    assert stopped.hashes(OUTPUTS["pretrain"]) == uninterrupted.hashes(OUTPUTS["pretrain"])


@pytest.mark.usefixtures("no_steps")
@pytest.mark.parametrize("change", [{"saving": {"every_seconds": 5.0}}, {"sampling": {"num_steps": 3}}], ids=str)
def test_state_survives_what_does_not_change_the_training(stopped: Experiment, change: dict[str, Any]) -> None:
    assert "resuming from step 20\n" in stopped.change(**change).succeed("pretrain", *OF_ARM).out


@pytest.mark.parametrize(("damaged", "goes_on"), [([20], "resuming from step 10\n"), ([10, 20], None)])
def test_damaged_states_are_reported_and_the_result_is_the_same(
    stopped: Experiment, uninterrupted: Experiment, damaged: list[int], goes_on: str | None
) -> None:
    for step in damaged:
        (state,) = work_of(stopped, "pretrain").glob(f"*/state-{step:010d}.safetensors")
        state.write_bytes(state.read_bytes()[:-100])
    outcome = stopped.succeed("pretrain", *OF_ARM)
    assert outcome.err.count("is damaged and was renamed") == len(damaged)
    assert goes_on in outcome.out if goes_on else "resuming" not in outcome.out
    assert stopped.hashes(OUTPUTS["pretrain"]) == uninterrupted.hashes(OUTPUTS["pretrain"])


def test_loss_that_is_not_finite_ends_the_stage_and_keeps_the_last_good_state(prepared: Experiment) -> None:
    more_steps(prepared).change(pretrain={"lr": 1e12}, compute={"precision": "fp32"}, saving={"every_seconds": 1e-9})
    outcome = prepared.stage("pretrain")
    assert_refused(outcome, f"pretrain {ARM} seed 0: the loss is not finite at step ", "(learning rate 1e+12)")
    step = int(re.findall(r"not finite at step (\d+)", outcome.err)[0])
    (failed,) = work_of(prepared, "pretrain").glob("*/failed.json")
    assert "the loss is not finite" in json.loads(failed.read_text(encoding="utf-8"))["reason"]
    saved = StateStore(failed.parent, 60.0).load()
    assert saved is not None
    states, info = saved
    assert info["step"] == step >= 1
    assert all(torch.isfinite(w).all() for w in states["raw"].values())
    kept = re.search(r"The weights before that step are in (\S+)", outcome.err)
    assert kept and torch.equal(
        load_tensors(prepared.path(kept[1]))[0]["raw"]["norm.weight"], states["raw"]["norm.weight"]
    )
    assert not folder_of(prepared, "pretrain").exists()
    assert not prepared.path(f"results/records/pretrain-{ARM}-seed-0.json").exists()
    prepared.change(pretrain={"lr": 2e-3}).succeed("pretrain", *OF_ARM)


def test_loss_that_is_not_finite_between_two_rows_makes_no_update(
    prepared: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    from maskdm.training import loop

    states: list[loop.TrainState] = []

    def train(state: loop.TrainState, *arguments: Any) -> None:
        states.append(state)
        loop.train(state, *arguments)

    monkeypatch.setattr("maskdm.training.trainer.train", train)
    prepared.change(pretrain={"lr": 1e12}, compute={"precision": "fp32"}, training={"log_every": 1000})
    assert_refused(prepared.stage("pretrain"), "the loss is not finite at step ")
    assert all(torch.isfinite(weight).all() for weight in states[0].model.parameters())
    assert not folder_of(prepared, "pretrain").exists()


# --- what they refuse -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["finetune", "sample"])
@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model": {"dim": 32}}, "model.dim was 16, is 32"),
        ({"model": {"depth": 5}}, "model.depth was 3, is 5"),
        ({"diffusion": {"prediction": "v"}}, 'diffusion.prediction was "x_0", is "v"'),
        ({"training": {"flip": 0.5}}, "training.flip was 0.0, is 0.5"),
    ],
    ids=str,
)
def test_weights_trained_with_other_values_are_refused(
    one_arm: Experiment, stage: str, change: dict[str, Any], says: str
) -> None:
    before = one_arm.hashes(OUTPUTS[stage])
    outcome = one_arm.change(**change).stage(stage)
    assert_refused(outcome, f"results/pretrain/{ARM}/seed-0 is out of date: {says}")
    assert_refused(outcome, f"run first: maskdm pretrain --arm {ARM} --seed 0 ")
    assert one_arm.hashes(OUTPUTS[stage]) == before


def test_weights_trained_on_other_images_are_refused(one_arm: Experiment) -> None:
    one_arm.change(dataset={"limit": 1000}).succeed("prepare")
    outcome = one_arm.stage("finetune")
    assert_refused(outcome, "results/data has changed", f"run first: maskdm pretrain --arm {ARM} --seed 0 ")
    one_arm.succeed("pretrain", *OF_ARM)
    one_arm.succeed("finetune", *OF_ARM)


CHECKPOINTS = {
    "finetune": f"results/pretrain/{ARM}/seed-0/checkpoint.safetensors",
    "sample": f"results/finetune/{ARM}/seed-0/milestone-0.600.safetensors",
    "evaluate": "results/features/classifier.safetensors",
}


@pytest.mark.parametrize("content", [lambda old: old[: len(old) // 2], lambda old: b"", None])
@pytest.mark.parametrize("stage", CHECKPOINTS)
def test_weights_that_are_cut_off_or_gone_are_refused(
    one_arm: Experiment, stage: str, content: Callable[[bytes], bytes] | None
) -> None:
    before = one_arm.hashes(OUTPUTS[stage])
    path = one_arm.path(CHECKPOINTS[stage])
    path.write_bytes(content(path.read_bytes())) if content else path.unlink()
    makes = {"finetune": "pretrain", "sample": "finetune", "evaluate": "features"}[stage]
    why = f"{CHECKPOINTS[stage]} {'has' if content else 'is missing'}"
    assert_refused(one_arm.stage(stage), why, f"run first: maskdm {makes}")
    assert one_arm.hashes(OUTPUTS[stage]) == before


@pytest.mark.parametrize("stage", CHECKPOINTS)
def test_damaged_weights_of_the_right_size_are_refused(one_arm: Experiment, stage: str) -> None:
    before = one_arm.hashes(OUTPUTS[stage])
    path = one_arm.path(CHECKPOINTS[stage])
    path.write_bytes(b"\x80" * path.stat().st_size)
    says = f"{CHECKPOINTS[stage]} is not a readable safetensors file"
    assert_refused(one_arm.run(stage, *OF_ARM, "--force"), says, "Delete it and run the stage that makes it again")
    assert one_arm.hashes(OUTPUTS[stage]) == before


def npy_of(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(lambda size: b"no array", id="garbage"),
        pytest.param(lambda size: npy_of(np.array([{"a": 1}])), id="pickle"),
        pytest.param(lambda size: b"", id="empty"),
        pytest.param(lambda size: b"no array".ljust(size), id="garbage of the right size"),
        pytest.param(lambda size: npy_of(np.array([{"a": 1}])).ljust(size), id="pickle of the right size"),
        pytest.param(None, id="missing"),
    ],
)
def test_damaged_samples_are_refused(one_arm: Experiment, content: Callable[[int], bytes] | None) -> None:
    file = folder_of(one_arm, "samples") / "milestone-1.000.npy"
    size = file.stat().st_size
    file.write_bytes(content(size)) if content else file.unlink()
    before = one_arm.hashes(OUTPUTS["evaluate"])
    is_seen = not file.exists() or file.stat().st_size != size
    advice = "run first: maskdm sample" if is_seen else "delete its folder and run the sample stage again"
    assert_refused(one_arm.run("evaluate", *OF_ARM, "--force"), f"{file.relative_to(one_arm.folder)}", advice)
    assert one_arm.hashes(OUTPUTS["evaluate"]) == before


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("evaluate", "results/features/features.json"),
        ("evaluate", "results/features/reference.npy"),
        ("evaluate", "results/metrics/scale.json"),
        ("evaluate", f"results/finetune/{ARM}/seed-0/milestones.json"),
        ("sample", f"results/finetune/{ARM}/seed-0/milestones.json"),
    ],
)
def test_cut_off_description_is_refused(one_arm: Experiment, stage: str, file: str) -> None:
    path = one_arm.path(file)
    path.write_bytes(path.read_bytes()[:20])
    assert_refused(one_arm.stage(stage), file, "run first: maskdm ")


def test_features_of_another_classifier_are_refused(one_arm: Experiment, tmp_path: Path) -> None:
    """Two files of different runs in one folder, and nobody's stamp says so."""
    folder = one_arm.path("results/features")
    other = one_arm.copy_to(tmp_path / "other").change(evaluation={"classifier_epochs": 1})
    other.succeed("features")
    shutil.copy(other.path("results/features/classifier.safetensors"), folder)
    stamp = json_of(one_arm, "results/features/stamp.json")
    stamp["files"]["classifier.safetensors"]["size"] = (folder / "classifier.safetensors").stat().st_size
    publish_description(folder / "stamp.json", stamp)
    before = one_arm.hashes(OUTPUTS["evaluate"])
    outcome = one_arm.run("evaluate", *OF_ARM, "--force")
    assert_refused(outcome, "results/features was made with classifier", "run first: maskdm features --force")
    assert one_arm.hashes(OUTPUTS["evaluate"]) == before


def test_features_of_another_extractor_are_refused(one_arm: Experiment) -> None:
    outcome = one_arm.change(evaluation={"features": "vgg16"}).stage("evaluate")
    says = 'results/features is out of date: evaluation.features was "classifier", is "vgg16"'
    assert_refused(outcome, says, "run first: maskdm features")


@pytest.mark.parametrize("stage", ["evaluate", "scale"])
def test_features_of_other_data_are_refused(one_arm: Experiment, stage: str) -> None:
    one_arm.change(dataset={"limit": 150}).succeed("prepare")
    outcome = one_arm.run(stage, *(OF_ARM if stage == "evaluate" else []))
    assert_refused(outcome, "results/features is out of date: results/data has changed; run first: maskdm features ")


def test_samples_of_other_weights_are_refused(one_arm: Experiment) -> None:
    one_arm.change(finetune={"lr": 1e-3}).succeed("finetune", *OF_ARM)
    says = f"results/samples/{ARM}/seed-0 is out of date: results/finetune/{ARM}/seed-0 has changed"
    assert_refused(one_arm.stage("evaluate"), says, f"run first: maskdm sample --arm {ARM} --seed 0 ")


@pytest.mark.parametrize(
    ("change", "says"),
    [({"num_steps": 2}, "num_steps was 5, is 2"), ({"sampler": "ddpm"}, 'sampler was "ddim", is "ddpm"')],
    ids=str,
)
def test_samples_drawn_with_other_values_are_refused(one_arm: Experiment, change: dict[str, Any], says: str) -> None:
    one_arm.change(sampling=change).succeed("scale")
    before = one_arm.hashes(OUTPUTS["evaluate"])
    assert_refused(
        one_arm.run("evaluate", *OF_ARM),
        f"results/samples/{ARM}/seed-0 is out of date: sampling.{says}",
        f"run first: maskdm sample --arm {ARM} --seed 0 ",
    )
    assert one_arm.hashes(OUTPUTS["evaluate"]) == before
    one_arm.succeed("sample", *OF_ARM)
    one_arm.succeed("evaluate", *OF_ARM)


def test_a_scale_of_an_earlier_version_is_refused(one_arm: Experiment) -> None:
    scale = json_of(one_arm, "results/metrics/scale.json")
    version = scale["stamp"]["version"]
    scale["stamp"]["version"] -= 1
    publish_description(one_arm.path("results/metrics/scale.json"), scale)
    says = f"results/metrics/scale.json is out of date: version was {version - 1}, is {version}"
    assert_refused(one_arm.run("evaluate", *OF_ARM), says, "run first: maskdm scale ")


def test_params_of_finetuning_do_not_change_pretraining(prepared: Experiment) -> None:
    """A finished pretraining of days survives them."""
    prepared.succeed("pretrain", *OF_ARM)
    before = prepared.hashes(OUTPUTS["pretrain"])
    assert "up to date" in prepared.change(finetune={"lr": 1e-4}).succeed("pretrain", *OF_ARM).out
    assert prepared.hashes(OUTPUTS["pretrain"]) == before
    assert "up to date" not in prepared.change(pretrain={"lr": 1e-4}).succeed("pretrain", *OF_ARM).out


@pytest.mark.parametrize("count", [3, 4])
def test_the_scale_needs_four_real_images(prepared: Experiment, count: int) -> None:
    """Of which each half has a covariance, and each image another one beside it."""
    small = {"kid_subset_size": 2, "kid_subsets": 2, "prc_neighborhood": 1, "features": "pixels"}
    prepared.change(dataset={"limit": count}, evaluation=small, sampling={"num_samples": 3})
    if count == 3:
        says = "evaluation.reference train: 3 real images are too few to score samples against; use 4 or more"
        assert says in prepared.run("validate").err
        prepared.succeed("prepare")
        assert_refused(prepared.run("features"), "3 real images are too few: the scale of the metrics needs 4")
        assert not prepared.path("results/features").exists()
    else:
        prepared.succeed("prepare")
        prepared.succeed("features")
        assert json_of(prepared.run("scale") and prepared, "results/metrics/scale.json")["floor"]["num_samples"] == 2


def test_fewer_samples_than_the_metrics_need_are_refused(prepared: Experiment) -> None:
    prepared.change(dataset={"limit": 55}).succeed("prepare")
    says = "55 real images are fewer than the metrics need: 60"
    assert_refused(prepared.change(evaluation={"kid_subset_size": 60}).run("features"), says)
    assert_refused(prepared.run("prepare", "--force"), says)


def test_as_many_samples_are_scored_as_params_say(one_arm: Experiment) -> None:
    one_arm.change(sampling={"num_samples": 50}).succeed("sample", *OF_ARM)
    assert_refused(one_arm.run("evaluate", *OF_ARM), "scale.json", "run first: maskdm scale")  # its floor is of 64
    one_arm.succeed("scale")
    one_arm.succeed("evaluate", *OF_ARM)
    assert json_of(one_arm, OUTPUTS["evaluate"])["num_samples"] == 50


@pytest.mark.parametrize("kind", ["cut off", "text"])
def test_bad_jpeg_stops_prepare_and_leaves_the_old_data(prepared: Experiment, kind: str) -> None:
    images = prepared.path("images")
    write_images(images, 60, "jpg")
    bad = images / "001.jpg"
    bad.write_bytes(bad.read_bytes()[:200] if kind == "cut off" else b"no picture")
    prepared.change(dataset={"source": "image_folder", "root": "images"})
    before = prepared.hashes("results")
    assert_refused(prepared.run("prepare"), "001.jpg", "on_bad_image")
    assert prepared.hashes("results") == before


def test_bad_jpeg_is_left_out_when_params_say_so(prepared: Experiment) -> None:
    write_images(prepared.path("images"), 61, "jpg")
    prepared.path("images/001.jpg").write_bytes(b"no picture")
    prepared.change(dataset={"source": "image_folder", "root": "images", "on_bad_image": "skip"}).succeed("prepare")
    manifest = json_of(prepared, "results/data/manifest.json")
    assert manifest["count"] == 60
    assert [Path(s["file"]).name for s in manifest["skipped"]] == ["001.jpg"]


@pytest.mark.parametrize("exists", [True, False])
def test_empty_or_missing_image_folder_is_refused(prepared: Experiment, exists: bool) -> None:
    if exists:
        prepared.path("images").mkdir()
    prepared.change(dataset={"source": "image_folder", "root": "images"})
    before = prepared.hashes("results")
    assert_refused(prepared.run("prepare"), "dataset.root" if not exists else "images")
    assert prepared.hashes("results") == before


@pytest.fixture
def unlabelled(tiny: Experiment) -> Experiment:
    """The tiny experiment on images without classes."""
    write_images(tiny.path("images"), 60)
    tiny.change(dataset={"source": "image_folder", "root": "images"}, tuning={"trials": {}}).succeed("prepare")
    tiny.succeed("choose")
    return tiny


def test_class_conditional_model_needs_labels(unlabelled: Experiment) -> None:
    outcome = unlabelled.change(model={"class_conditional": True}).stage("pretrain")
    assert_refused(outcome, "model.class_conditional needs a dataset with labels")
    assert not unlabelled.path("results/pretrain").exists()


def test_classifier_needs_labels(unlabelled: Experiment) -> None:
    assert_refused(unlabelled.run("features"), "evaluation.features: classifier needs a dataset with labels")
    assert not unlabelled.path("results/features").exists()


def test_unlabelled_data_trains_an_unconditional_model(unlabelled: Experiment) -> None:
    unlabelled.succeed("pretrain", *OF_ARM)
    assert np.isfinite(curve_of(unlabelled, "pretrain")["loss"]).all()


@pytest.mark.parametrize("dataset", [{"image_size": 4}, {"image_size": 16}, {"channels": 3}], ids=str)
def test_data_of_another_shape_than_params_say_is_refused(prepared: Experiment, dataset: dict[str, int]) -> None:
    assert_refused(prepared.change(dataset=dataset).stage("pretrain"), "maskdm prepare")


def test_class_conditional_arm_goes_through_every_stage(one_arm: Experiment) -> None:
    one_arm.change(model={"class_conditional": True}).succeed("scale")
    for stage in ("pretrain", "finetune", "sample", "evaluate"):
        one_arm.succeed(stage, *OF_ARM)
    assert np.isfinite(json_of(one_arm, OUTPUTS["evaluate"])["fid"])


@pytest.mark.parametrize("strategy", ["crop", "none"])
def test_every_strategy_goes_through_training(prepared: Experiment, strategy: str) -> None:
    config = {"strategy": strategy} if strategy == "none" else {"strategy": strategy, "mask_rate": 0.75}
    prepared.change(arms={ARM: config})
    for stage in ("pretrain", "finetune"):
        prepared.succeed(stage, *OF_ARM)
    assert curve_of(prepared, "finetune")["flops"].iloc[-1] == run_of(prepared).flops


@pytest.mark.parametrize(("given", "used"), [("auto", 8), (16, 16)])
def test_resuming_keeps_micro_batches_only_if_they_were_found_automatically(
    stopped: Experiment, given: str | int, used: int
) -> None:
    (file,) = work_of(stopped, "pretrain").glob("*/state-0000000020.safetensors")
    store = StateStore(file.parent, 60.0)
    saved = store.load()
    assert saved is not None
    store.save(saved[0], {**saved[1], "micro_batch_size": 8})
    stopped.change(pretrain={"micro_batch_size": given}).succeed("pretrain", *OF_ARM)
    assert record_of(stopped, "pretrain")["micro_batch_size"] == used
