"""What the report says of points: their table, their figure, and verdicts by a distance that sees their shape."""

from __future__ import annotations

from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
import pytest

from maskdm.config import Params, parse_params
from maskdm.data.swissroll import swissroll
from maskdm.report import cautions
from maskdm.report import points as report
from maskdm.report.figures.against_scratch import AGAINST_SCRATCH
from maskdm.report.figures.curves import FID_VS_COMPUTE
from maskdm.report.figures.heat_map import HEAT_MAP
from maskdm.report.figures.looks import STYLE
from maskdm.report.figures.points import POINTS
from maskdm.report.results import Results
from maskdm.report.tables import SCALES, TERMINAL_WIDTH, display_table, format_table, plain_table, verdict_frame
from maskdm.report.texts import texts
from maskdm.report.verdicts import answer, judge_arms
from maskdm.scoring import points
from tests.report.made_up_results import findings, make_params, make_results
from tests.report.test_figures import assert_is_printed_whole

ROLL = {"source": "swissroll", "image_size": [1, 2], "channels": 1, "limit": 400}
ARMS: dict[str, dict[str, Any]] = {"scratch": {"strategy": "none"}, "primer": {"strategy": "patch", "mask_rate": 0.5}}


def pixels(limit: int, seed: int = 0) -> np.ndarray:
    """Points of a Swiss roll as images (N, 1, 2, 1)."""
    return np.uint8(np.round((swissroll(limit, seed) + 1) * 127.5)).reshape(-1, 1, 2, 1)


def roll_params() -> Params:
    """An experiment on the roll, made from one on digits."""
    plain = make_params(ARMS).model_dump(mode="json", exclude_unset=True)
    plain |= {"dataset": ROLL, "evaluation": {"features": "pixels"}}
    plain["model"] |= {"patch_size": 1}
    return parse_params(plain)


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
    ends = [f"{name}_{end}" for end in ("floor", "untrained") for name in report.NAMES]
    added = [f"distance_{name}" for name in (*report.NAMES, *ends)]
    assert list(summary)[-len(added) - 1 :] == ["num_trials", *added]
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
    assert scratch.text.startswith("the arm that the others are compared with: sliced W₁×1000 31.00 (95 %: ")
    assert primer.kind == "better"
    assert primer.text.startswith("reaches scratch's final sliced W₁ with 0.8")
    assert "; sliced W₁×1000 difference −5.50 at equal compute (95 %: −6.74 to −4.26)" in primer.text
    assert "FID" not in primer.text
    assert answer(found).startswith("1 of 1 masked arms had a clearly lower sliced W₁ than scratch")


def test_the_energy_distance_is_the_second_opinion() -> None:
    params = roll_params()
    results = made_up(params)
    for run in results.runs:
        for scores in run.metrics["milestones"].values():
            scores["distances"]["energy"] *= 100 if run.arm == "primer" else 1
    found = findings(params, results)
    assert "energy ranks it and scratch the other way round (energy×1000 difference +" in judge_arms(found)[1].text


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
        curves = FID_VS_COMPUTE.draw(one)
        cells = [text.get_text() for text in HEAT_MAP.draw(one).axes[0].texts]
    assert (left.get_title(loc="left"), right.get_title(loc="left")) == (
        "sliced W₁ at equal compute",
        "compute at equal sliced W₁",
    )
    assert left.get_xlabel().startswith("sliced W₁ minus scratch's")
    (against,) = curves.axes
    lines = {line.get_label(): line for line in against.get_lines()}
    assert lines["primer"].get_ydata() == pytest.approx(
        [0.02 + 0.5 * (1.11 - f) / 10 for f in params.budget.milestones]
    )
    assert curves.get_supylabel() == "sliced W₁"
    assert any("0.0200" in text for text in [*lines, *(t.get_text() for t in against.texts)])  # the floor
    assert "0.0255\n−0.0055" in cells
    for kind in (AGAINST_SCRATCH, FID_VS_COMPUTE, HEAT_MAP):
        assert "FID" not in " ".join(texts(one)[kind.file])


def test_without_distances_nothing_is_said_of_them() -> None:
    digits, roll = make_params(), roll_params()
    assert report.distance_table(digits, make_results(digits)).empty
    assert report.distance_table(roll, make_results(make_params(ARMS))).empty
    assert not POINTS.applies(findings(digits, make_results(digits)))
    assert texts(findings(digits, make_results(digits)))["distances"] == []


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
