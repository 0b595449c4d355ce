"""The Swiss roll: the points, their distances, the primer, and what the report says of them."""

from __future__ import annotations

import json
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from maskdm.base.checksums import file_sha256
from maskdm.config import DatasetConfig, Params, load_params, parse_params, resolve
from maskdm.data.swissroll import NOISE, NUM_POINTS, RADIUS, TURNS, on_roll, open_swissroll, swissroll
from maskdm.report import cautions, prose
from maskdm.report import points as report
from maskdm.report.figures.against_scratch import AGAINST_SCRATCH
from maskdm.report.figures.curves import FID_VS_COMPUTE
from maskdm.report.figures.heat_map import HEAT_MAP
from maskdm.report.figures.looks import STYLE
from maskdm.report.figures.points import POINTS
from maskdm.report.results import Results
from maskdm.report.tables import (
    SCALES,
    SUMMARY_COLUMNS,
    TERMINAL_WIDTH,
    display_table,
    format_table,
    plain_table,
    verdict_columns,
    verdict_frame,
)
from maskdm.report.verdicts import answer, judge_arms
from maskdm.scoring import points
from maskdm.scoring.headline import FID
from maskdm.stages.sample import PatchesAlone
from tests.report.made_up_results import findings, make_params, make_results
from tests.report.test_figures import assert_is_printed_whole

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


# --- the report -----------------------------------------------------------------------------------------------


def scored(shift: float) -> dict[str, float]:
    return {"marginal_0": 0.01 + shift, "marginal_1": 0.02, "sliced_wasserstein": 0.02 + shift, "energy": 0.001 + shift}


def made_up(params: Params, gain: float = 0.5) -> Results:
    """Results whose distances fall with compute; those of `primer` by `gain` faster."""
    results = make_results(make_params(ARMS))
    runs = []
    for run in results.runs:
        faster = gain if run.arm == "primer" else 1.0
        milestones = {
            key: {**scores, "distances": scored(faster * (1.1 + 0.01 * run.seed - float(key)) / 10)}
            for key, scores in run.metrics["milestones"].items()
        }
        flops = {"flops": 1e11}
        primers = {"primer": {**flops, "distances": scored(0.2)}, "primer_alone": {**flops, "distances": scored(0.1)}}
        own = primers if run.arm == "primer" else {}
        runs.append(replace(run, metrics={**run.metrics, "milestones": milestones, **own}))
    floor = {"mean": scored(0.0), "std": dict.fromkeys(scored(0.0), 0.002), "draws": 10, "num_samples": 200}
    scale = {**results.scale, "distances": {"floor": floor, "untrained": scored(1.0)}}
    manifest = {**results.manifest, "shards": [{"file": "images-00000.npy"}]}
    return replace(results, runs=runs, scale=scale, manifest=manifest)


def test_the_table_has_the_primers_the_arms_and_both_ends_of_the_scale() -> None:
    params = roll_params()
    table = report.distance_table(params, made_up(params))
    alone, together = report.PRIMERS["primer_alone"], report.PRIMERS["primer"]
    assert list(table["arm"]) == [
        "scratch",
        f"primer: {alone}",
        f"primer: {together}",
        "primer",
        SCALES["floor"],
        SCALES["untrained"],
    ]
    assert table.loc[4, "W₁ of x ×1000"] == "10.0"
    assert table.loc[2, "sliced W₁ ×1000"] == "220 [220, 220]"
    assert "sliced W₁" in plain_table(table)


def test_the_answer_goes_by_the_joint_distance() -> None:
    params = roll_params()
    said = answer(findings(params, fid_against(made_up(params))))
    assert "clearly lower sliced W₁ than scratch" in said and "primer" in said


def fid_against(results: Results) -> Results:
    """The same, with a FID that orders the arms the other way round."""
    fids = {"scratch": 1.0, "primer": 2.0}
    runs = []
    for run in results.runs:
        milestones = {k: {**s, "fid": fids[run.arm]} for k, s in run.metrics["milestones"].items()}
        runs.append(replace(run, metrics={**run.metrics, "milestones": milestones}))
    return replace(results, runs=runs)


def test_the_tables_in_files_have_the_distances_with_their_scale() -> None:
    params = roll_params()
    found = findings(params, made_up(params))
    summary = found.summary
    first = summary[(summary["arm"] == "primer") & (summary["seed"] == 1)].iloc[-1]
    assert first["distance_sliced_wasserstein"] == pytest.approx(0.02 + 0.5 * 0.11 / 10)
    assert first["distance_marginal_1"] == 0.02
    assert (first["distance_energy_floor"], first["distance_energy_untrained"]) == (0.001, 1.001)
    assert tuple(summary)[: len(SUMMARY_COLUMNS)] == SUMMARY_COLUMNS
    row = verdict_frame(found, judge_arms(found)).set_index("arm").loc["primer"]
    assert row["delta_distance_sliced_wasserstein"] == pytest.approx(-0.0055)
    assert row["distance_sliced_wasserstein_std"] == pytest.approx(0.0005)
    assert row["compute_ratio"] == pytest.approx(0.8**0.55, rel=0.01)
    assert {"fid", "kid_std", "distance_marginal_0", "delta_distance_energy"} <= set(row.index)
    assert "delta_fid" not in row.index


def test_the_verdicts_go_by_the_joint_distance_whatever_fid_says() -> None:
    params = roll_params()
    found = findings(params, fid_against(made_up(params)))
    scratch, primer = judge_arms(found)
    assert scratch.text.startswith("what the others are compared with: sliced W₁×1000 31.00 (95 %: ")
    assert primer.kind == "better"
    assert primer.text.startswith("same sliced W₁ with 0.8")
    assert "; sliced W₁×1000 −5.50 at equal compute (95 %: −6.74 to −4.26)" in primer.text
    assert "FID" not in primer.text
    assert answer(found).startswith("1 of 1 masked arms had a clearly lower sliced W₁ than scratch")


def test_the_energy_distance_is_the_second_opinion() -> None:
    params = roll_params()
    results = made_up(params)
    for run in results.runs:
        for scores in run.metrics["milestones"].values():
            scores["distances"]["energy"] *= 100 if run.arm == "primer" else 1
    found = findings(params, results)
    assert "energy orders it and scratch the other way round (energy×1000 +" in judge_arms(found)[1].text


def test_the_table_goes_by_the_joint_distance_and_fits_a_terminal() -> None:
    params = roll_params()
    found = findings(params, made_up(params))
    verdicts = verdict_frame(found, judge_arms(found))
    whole = display_table(verdicts, found.summary)
    wanted = ["sliced W₁×1000 (n=3)", "Δsliced W₁×1000 (n=3)", "energy×1000 (n=3)", "FID (n=3)"]
    assert [name for name in whole if name in wanted] == wanted
    assert whole.set_index("arm").loc["primer", "Δsliced W₁×1000 (n=3)"] == "−5.50 [−6.74, −4.26]"
    assert list(whole["sliced W₁×1000 (n=3)"])[-2:] == ["20.00", "1020.00"]
    printed = format_table(verdicts, found.summary)
    assert all(name in printed for name in (*wanted[:3], "same sliced W₁ at (n=3)"))
    assert max(map(len, printed.splitlines())) <= TERMINAL_WIDTH


def test_the_figures_against_scratch_go_by_the_joint_distance() -> None:
    params = roll_params()
    one = findings(params, fid_against(made_up(params)))
    with matplotlib.style.context(STYLE, after_reset=True):
        left, right = AGAINST_SCRATCH.draw(one).axes
        (against,) = FID_VS_COMPUTE.draw(one).axes
        texts = [text.get_text() for text in HEAT_MAP.draw(one).axes[0].texts]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == (
        "sliced W₁ at equal compute",
        "compute at equal sliced W₁",
    )
    assert left.get_xlabel().startswith("sliced W₁ less scratch's")
    assert "primer −0.0055" in AGAINST_SCRATCH.alt(one)
    lines = {line.get_label(): line for line in against.get_lines()}
    assert lines["primer"].get_ydata() == pytest.approx(
        [0.02 + 0.5 * (1.11 - f) / 10 for f in params.budget.milestones]
    )
    assert against.get_ylabel() == "sliced W₁"
    assert any("0.0200" in text for text in [*lines, *(t.get_text() for t in against.texts)])  # the floor
    assert "0.0255\n−0.0055" in texts
    for kind in (AGAINST_SCRATCH, FID_VS_COMPUTE, HEAT_MAP):
        assert "FID" not in kind.caption(one) + kind.alt(one) + kind.title


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
    assert "The answer and the verdicts on the arms go by sliced W₁ instead" in page


def test_images_have_no_columns_of_distances() -> None:
    digits = make_params()
    found = findings(digits, make_results(digits))
    assert tuple(found.summary) == SUMMARY_COLUMNS
    assert tuple(verdict_frame(found, judge_arms(found))) == verdict_columns(FID, ("precision", "recall"))


def test_without_distances_nothing_is_said_of_them() -> None:
    digits, roll = make_params(), roll_params()
    assert report.distance_table(digits, make_results(digits)).empty
    assert report.distance_table(roll, make_results(make_params(ARMS))).empty
    assert not POINTS.applies(findings(digits, make_results(digits)))
    assert prose.distance_note(digits, make_results(digits)) == ""


def test_the_report_says_that_fid_is_blind_to_the_shape_of_points_alone() -> None:
    assert "blind to the shape" in cautions.shape_of_points(findings(roll_params(), made_up(roll_params())))
    assert cautions.shape_of_points(findings(make_params(), make_results(make_params()))) == ""


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with points where the stages publish them."""
    (tmp_path / "results/data").mkdir(parents=True)
    np.save(tmp_path / "results/data/images-00000.npy", pixels(limit=400))

    def samples(arm: str, *names: str) -> None:
        folder = tmp_path / "results/samples" / arm / "seed-0"
        folder.mkdir(parents=True)
        for name in names:
            np.save(folder / f"{name}.npy", pixels(limit=100, seed=1))

    samples("scratch", "milestone-1.000")
    samples("primer", "milestone-1.000", "primer", "primer_alone")
    return tmp_path


def test_the_points_that_are_there_are_drawn(published: Path) -> None:
    params = roll_params()
    with chdir(published):
        drawn = report.read_points(params, made_up(params))
        (published / "results/samples/primer/seed-0/primer_alone.npy").unlink()
        fewer = report.read_points(params, made_up(params))
    assert [len(values) for _, values in drawn] == [400, 100, 100, 100, 100]
    assert len(fewer) == 4
    assert drawn[0][0] == "data"
    assert drawn[0][1] == pytest.approx(points.points_of(pixels(limit=400)))


def test_the_figure_shows_every_distribution_and_every_distance(published: Path) -> None:
    params = roll_params()
    one = findings(params, made_up(params))
    assert POINTS.applies(one)
    with chdir(published), matplotlib.style.context(STYLE, after_reset=True):
        figure = POINTS.draw(one)
        figure.savefig(published / "points.png", backend="agg", metadata={"Software": None})
        assert_is_printed_whole(figure)
    above, below = figure.subfigs
    assert len(above.axes) == 5
    assert [axes.get_title(loc="left") for axes in below.axes] == list(report.NAMES.values())
    lines = {line.get_label(): line for line in below.axes[2].get_lines()}
    half = lines["primer"].get_ydata()
    assert half == pytest.approx([0.02 + 0.5 * (1.11 - f) / 10 for f in params.budget.milestones])
    assert "real against real" in lines
    assert f"primer: {report.PRIMERS['primer_alone']}" in lines
    assert (published / "points.png").stat().st_size > 20_000
    assert "primer 0.0" in POINTS.alt(one)
    assert "95 % interval" in POINTS.caption(one)


def test_the_experiment_is_valid_and_sees_one_coordinate_at_a_time() -> None:
    params = load_params(ROOT / "experiments" / "swissroll" / "params.yaml")
    assert points.apply_to(params)
    masked = [arm for arm in params.arms if params.arm(arm).strategy != "none"]
    assert masked
    given: dict[str, Any] = {}  # as if the choice were made
    runs = [resolve(params, arm, 0, chosen=given) for arm in masked]
    assert all(run.pretrain.num_visible == 1 and run.has_primer for run in runs)
