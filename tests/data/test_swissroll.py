"""The Swiss roll: the points, their distances, the primer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from maskdm.base.checksums import file_sha256
from maskdm.config import DatasetConfig, Params, load_params, parse_params, resolve
from maskdm.data.swissroll import NOISE, NUM_POINTS, RADIUS, TURNS, on_roll, open_swissroll, swissroll
from maskdm.scoring import points
from maskdm.stages.sample import PatchesAlone
from tests.report.made_up_results import make_params

if TYPE_CHECKING:
    from tests.conftest import Experiment

ROLL = {"source": "swissroll", "image_size": [1, 2], "channels": 1}
ARMS: dict[str, dict[str, Any]] = {"scratch": {"strategy": "none"}, "primer": {"strategy": "patch", "mask_rate": 0.5}}
STEP = 1 / 127.5  # of 8 bits
ROOT = Path(__file__).parents[2]


def pixels(**more: Any) -> np.ndarray:
    with open_swissroll(DatasetConfig.model_validate({**ROLL, **more})) as points:
        assert (points.class_names, points.labels) == (None, None)
        return np.stack([points.load(number) for number in range(len(points))])[..., None]


def roll_params(**sections: Any) -> Params:
    """An experiment on the roll, made up from that on digits."""
    plain = make_params(ARMS).model_dump(mode="json", exclude_unset=True)
    plain |= {"dataset": {**ROLL, "limit": 400}, "evaluation": {"features": "pixels"}}
    plain["model"] |= {"patch_size": 1}
    return parse_params({**plain, **sections})


# --- the points -----------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_bytes_and_another_does_not() -> None:
    assert np.array_equal(pixels(limit=300), pixels(limit=300))
    assert not np.array_equal(pixels(limit=300), pixels(limit=300, seed=1))


def test_points_are_images_of_two_pixels_and_as_many_as_asked() -> None:
    assert pixels(limit=300).shape == (300, 1, 2, 1)
    assert pixels(limit=300).dtype == np.uint8
    assert len(pixels()) == NUM_POINTS


def test_points_lie_on_the_roll_within_the_noise_and_the_rounding() -> None:
    found = points.points_of(pixels(limit=1000))
    roll = on_roll(np.linspace(*TURNS, 2000))
    off = np.linalg.norm(found[:, None] - roll[None], axis=2).min(axis=1)
    assert off.max() < 5 * NOISE + STEP
    # across the roll, the noise is that of one coordinate; rounding adds a little
    assert np.sqrt(np.mean(off**2)) == pytest.approx(NOISE, rel=0.1)


def test_the_roll_begins_and_ends_where_it_says_and_keeps_away_from_the_border() -> None:
    ends = on_roll(np.array(TURNS))
    assert np.linalg.norm(ends, axis=1) == pytest.approx([RADIUS / 3, RADIUS])
    assert np.abs(swissroll(NUM_POINTS, 0)).max() < 1.0


# --- the primer -----------------------------------------------------------------------------------------------


class SumOfPatches(nn.Module):
    """A network in which every patch sees the others, its place, the time and the class."""

    def forward(self, patches: Tensor, t: Tensor, visible_idx: Tensor, labels: Tensor | None = None) -> Tensor:
        whole = patches.sum(dim=1, keepdim=True) + t[:, None, None] + (0 if labels is None else labels[:, None, None])
        return patches + 10 * whole + 100 * visible_idx[:, :, None]


def test_patches_alone_do_not_see_each_other() -> None:
    patches, t, labels = torch.randn(4, 3, 2), torch.arange(4), torch.tensor([5, 6, 7, 8])
    visible_idx = torch.tensor([[0, 2, 5]]).expand(4, -1)
    network = SumOfPatches()
    found = PatchesAlone(network)(patches, t, visible_idx, labels)
    for i in range(3):
        alone = network(patches[:, i : i + 1], t, visible_idx[:, i : i + 1], labels)
        torch.testing.assert_close(found[:, i : i + 1], alone)


@pytest.fixture(scope="module")
def roll(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A tiny experiment on the roll, every stage but the report run; not to be changed."""
    from tests.conftest import Experiment

    experiment = Experiment(tmp_path_factory.mktemp("roll"))
    tiny = load_params(ROOT / "experiments" / "tiny" / "params.yaml").model_dump(mode="json", exclude_unset=True)
    experiment.rewrite(tiny).change(
        dataset={**ROLL, "limit": 400},
        model={"patch_size": 1},
        sampling={"primer": True, "num_samples": 200},
        evaluation={"features": "pixels"},
        compute={"device": "cpu"},
        tracking={"enabled": False},
    )
    content = experiment.content
    content["tuning"]["trials"] = {}
    arms = {"scratch": {"strategy": "none"}, "patch-m50": {"strategy": "patch", "mask_rate": 0.5}}
    experiment.rewrite({**content, "arms": arms})
    for stage in ("prepare", "features", "scale", "choose"):
        experiment.succeed(stage)
    for stage in ("pretrain", "finetune", "sample", "evaluate"):
        for arm in arms:
            experiment.succeed(stage, "--arm", arm, "--seed", "0")
    return experiment


def read(experiment: Experiment, place: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(experiment.path(place).read_text(encoding="utf-8"))
    return content


def test_the_primer_is_drawn_from_the_pretrained_weights_in_both_ways(roll: Experiment) -> None:
    info = read(roll, "results/samples/patch-m50/seed-0/samples.json")
    pretrained = file_sha256(roll.path("results/pretrain/patch-m50/seed-0/checkpoint.safetensors"))
    folder = roll.path("results/samples/patch-m50/seed-0")
    assert set(info["samples_sha256"]) == {"primer", "primer_alone", "0.600", "1.000"}
    drawn = {}
    for key in ("primer", "primer_alone"):
        assert info["weights_sha256"][key] == pretrained
        assert (folder / f"{key}.png").is_file()
        drawn[key] = np.load(folder / f"{key}.npy")
        assert drawn[key].shape == (200, 1, 2, 1)
    assert not np.array_equal(drawn["primer"], drawn["primer_alone"])


def test_the_primer_is_scored_beside_the_milestones_with_what_it_cost(roll: Experiment) -> None:
    metrics = read(roll, "results/metrics/patch-m50-seed-0.json")
    assert set(metrics["milestones"]) == {"0.600", "1.000"}
    last = metrics["milestones"]["1.000"]
    for key in ("primer", "primer_alone"):
        assert metrics[key].keys() == last.keys()
        assert 0 < metrics[key]["flops"] < metrics["milestones"]["0.600"]["flops"]
        assert metrics[key]["tokens_seen"] == metrics[key]["images_seen"]  # S = 1
    assert set(last["distances"]) == {"marginal_0", "marginal_1", "sliced_wasserstein", "energy"}


def test_scratch_has_no_primer(roll: Experiment) -> None:
    assert set(read(roll, "results/samples/scratch/seed-0/samples.json")["samples_sha256"]) == {"0.600", "1.000"}
    assert "primer" not in read(roll, "results/metrics/scratch-seed-0.json")
    assert not roll.path("results/samples/scratch/seed-0/primer.npy").exists()


def test_distances_are_those_of_the_published_points(roll: Experiment) -> None:
    drawn = points.points_of(np.load(roll.path("results/samples/patch-m50/seed-0/primer_alone.npy")))
    real = points.points_of(np.load(roll.path("results/data/images-00000.npy")))
    found = read(roll, "results/metrics/patch-m50-seed-0.json")["primer_alone"]["distances"]
    assert found == pytest.approx(points.distances(drawn, real), abs=1e-6)


def test_samples_of_other_pretrained_weights_are_refused(roll: Experiment, tmp_path: Path) -> None:
    other = roll.copy_to(tmp_path).change(pretrain={"lr": 1e-3})
    other.succeed("pretrain", "--arm", "patch-m50", "--seed", "0")
    for stage in ("finetune", "sample"):
        outcome = other.stage("evaluate", "patch-m50")
        assert outcome.code == 1
        assert f"results/pretrain/patch-m50/seed-0 has changed; run first: maskdm {stage} --arm" in outcome.err
        other.succeed(stage, "--arm", "patch-m50", "--seed", "0")
    other.succeed("evaluate", "--arm", "patch-m50", "--seed", "0")


def test_without_pretrained_weights_the_command_that_makes_them_is_named(roll: Experiment, tmp_path: Path) -> None:
    other = roll.copy_to(tmp_path)
    other.path("results/pretrain/patch-m50/seed-0/checkpoint.safetensors").unlink()
    outcome = other.stage("sample", "patch-m50")
    assert outcome.code == 1
    assert "maskdm pretrain --arm patch-m50 --seed 0" in outcome.err


def test_of_images_the_primer_is_drawn_whole(prepared: Experiment) -> None:
    """Masked patches are not drawn alone where pretraining saw several at a time."""
    prepared.change(sampling={"primer": True})
    for stage in ("pretrain", "finetune", "sample"):
        prepared.succeed(stage, "--arm", "patch-m50", "--seed", "0")
    folder = prepared.path("results/samples/patch-m50/seed-0")
    assert np.load(folder / "primer.npy").shape == (64, 8, 8, 1)
    assert not (folder / "primer_alone.npy").exists()


def test_the_report_of_a_run_goes_by_the_joint_distance(roll: Experiment, tmp_path: Path) -> None:
    other = roll.copy_to(tmp_path)
    printed = other.succeed("report").out
    assert "patch-m50:" in printed
    assert "sliced W₁×1000" in printed
    assert printed in other.succeed("summary").out
    found = read(other, "results/metrics/patch-m50-seed-0.json")["milestones"]["1.000"]["distances"]
    rows = pd.read_csv(other.path("results/report/summary.csv"))
    last = rows[(rows["arm"] == "patch-m50") & (rows["milestone"] == 1.0)].iloc[0]
    assert {name: last[f"distance_{name}"] for name in found} == found
    page = other.path("results/report/summary.md").read_text()
    assert "### Sliced W₁ against training compute" in page
    assert "### Final sliced W₁ by strategy and mask rate" in page
    assert "The answer and the verdicts therefore use sliced W₁" in page


def test_the_experiment_is_valid_and_sees_one_coordinate_at_a_time() -> None:
    params = load_params(ROOT / "experiments" / "swissroll" / "params.yaml")
    assert points.apply_to(params)
    masked = [arm for arm in params.arms if params.arm(arm).strategy != "none"]
    assert masked
    given: dict[str, Any] = {}  # as if the choice were made
    runs = [resolve(params, arm, 0, chosen=given) for arm in masked]
    assert all(run.pretrain.num_visible == 1 and run.has_primer for run in runs)
