"""The figures: what they draw and print, and the page that carries them."""

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.style
import numpy as np
import pandas as pd
import pytest
import yaml
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import maskdm.report.report as report_module
import maskdm.report.texts as texts_module
from maskdm.config import ArmConfig
from maskdm.method.masks import Masking
from maskdm.report.comparison import Findings, final
from maskdm.report.figures import FIGURES, Picture, draw_figures, printed, save, small_print
from maskdm.report.figures.against_scratch import AGAINST_SCRATCH
from maskdm.report.figures.axes import Kind, compute_unit
from maskdm.report.figures.costs import TIME, TUNING
from maskdm.report.figures.curves import FID_VS_COMPUTE, LOSSES
from maskdm.report.figures.heat_map import HEAT_MAP
from maskdm.report.figures.looks import DPI, STYLE, WIDTH, arm_looks, short
from maskdm.report.figures.pictures import LINE, MASKED, MASKS, SAMPLES, STRIPE, draw_masks, image_grid, masked_image
from maskdm.report.figures.points import POINTS
from maskdm.report.numbers import score_text
from maskdm.report.report import render
from maskdm.report.statistics import estimate
from maskdm.report.texts import texts as texts_of
from maskdm.report.verdicts import Verdict
from maskdm.scoring.headline import Score
from tests.factories import protocol
from tests.report.made_up_results import (
    SCRATCH,
    findings,
    make_params,
    make_results,
    masked,
    seven_arms,
    thirteen_arms,
)

OF_IMAGES = [kind for kind in FIGURES if kind is not POINTS]  # test_points.py has that one
ROOT = Path(__file__).parents[2]
TRIALS = {"given": {}, "slow": {"finetune.lr": 1e-3}, "fast": {"finetune.lr": 8e-3}}
SMALLEST_PRINT = 8.0  # points


def few_arms(*arms: str) -> dict:
    return {"scratch": SCRATCH, **{arm: seven_arms()[arm] for arm in arms}}


def show(params=None, **how) -> Findings:
    """What the figures are drawn from; `how` as in make_results."""
    params = make_params() if params is None else params
    return findings(params, make_results(params, **how))


def draw(kind: Kind, shown: Findings) -> Figure:
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = kind.draw(shown)
        figure.draw_without_rendering()
    return figure


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text() and text.get_visible()]


def write(shown: Findings, folder: Path) -> list[Picture]:
    folder.mkdir()
    return draw_figures(shown, folder, texts_of(shown))


CASES = {
    "the default, one seed": lambda: show(make_params(seeds=(0,))),
    "three arms, tuned": lambda: show(make_params(few_arms("patch-m50", "crop-m75"), trials=TRIALS)),
    "thirteen arms, some missing": lambda: show(
        make_params(thirteen_arms(), trials=TRIALS), missing=["patch-m75", ("crop-m90", 1), ("crop-m90", 2)]
    ),
    "one arm, one milestone": lambda: show(make_params({"scratch": SCRATCH}, seeds=(3,), milestones=(1.0,))),
    "no scratch": lambda: show(make_params({"patch-m50": masked("patch", 0.5), "crop-m75": masked("crop", 0.75)})),
    "scratch is missing": lambda: show(make_params(few_arms("patch-m50"), seeds=(0, 1)), missing=["scratch"]),
    "colour, 64 pixels": lambda: show(
        make_params(few_arms("block2-m75"), seeds=(0,), source="image_folder", root="x", image_size=64, channels=3)
    ),
}


@pytest.fixture(scope="module", params=list(CASES))
def drawn(request, tmp_path_factory):
    """A case, its files and what stands beside them."""
    folder = tmp_path_factory.mktemp("figures") / "report"
    shown = CASES[request.param]()
    return SimpleNamespace(name=request.param, shown=shown, folder=folder, pictures=write(shown, folder))


def test_every_figure_is_drawn_and_none_else(drawn):
    assert {file.name for file in drawn.folder.iterdir()} == {picture.file for picture in drawn.pictures}
    arms = drawn.shown.params.arms
    has_reference = drawn.name not in ("one arm, one milestone", "no scratch", "scratch is missing")
    assert [picture.file for picture in drawn.pictures] == [
        *(["against_scratch.png"] if has_reference else []),
        "fid_vs_compute.png",
        *(["fid_heat_map.png"] if len(arms) > 1 else []),
        "samples.png",
        *(["masks.png"] if len(arms) > 1 else []),
        "losses.png",
        "time.png",
        *(["tuning.png"] if drawn.shown.params.tuning.enabled else []),
    ]


def test_figures_fit_a_page_and_are_not_blank(drawn):
    for picture in drawn.pictures:
        with Image.open(drawn.folder / picture.file) as image:
            assert not image.info.get("Software")
            assert image.info["dpi"] == pytest.approx((DPI, DPI), abs=0.5)
            pixels = np.asarray(image.convert("L"), dtype=float)
        height, width = pixels.shape
        assert width == WIDTH * DPI and 100 < height < 12 * DPI, picture.file
        assert pixels.var() > 100, picture.file


def test_scores_never_stand_in_a_figure_without_what_they_are_of(tmp_path):
    shown = CASES["three arms, tuned"]()
    runs = [replace(run, metrics={**run.metrics, "flip": 0.5}) for run in shown.results.runs]
    shown = replace(shown, results=replace(shown.results, runs=runs))
    said = small_print(shown.results)
    assert said == " ".join(f"{protocol().text} Trained with left-right flips of probability 0.5.".split())

    files = {picture.file for picture in write(shown, tmp_path / "report")}
    strip = round(printed(said).get_figheight() * DPI)
    for kind in [kind for kind in FIGURES if kind.file in files]:
        after = np.asarray(Image.open(tmp_path / "report" / kind.file))
        with matplotlib.style.context(STYLE, after_reset=True):
            save([kind.draw(shown)], tmp_path / "bare.png")
        before = np.asarray(Image.open(tmp_path / "bare.png"))
        np.testing.assert_array_equal(after[: len(before)], before)
        assert len(after) - len(before) == pytest.approx(strip if kind.has_scores else 0, abs=1)
        assert not kind.has_scores or after[len(before) :].min() < 150, "no ink"
    of_training = {"masks.png", "losses.png", "time.png"}
    assert {kind.file for kind in FIGURES if not kind.has_scores} == of_training


def test_small_print_is_as_wide_as_its_figure(tmp_path):
    arms = {f"patch-m{i}": masked("patch", i / 16) for i in range(1, 16)}
    shown = show(make_params({"scratch": SCRATCH, **arms}, seeds=(0,)))
    write(shown, tmp_path / "wide")
    with Image.open(tmp_path / "wide" / HEAT_MAP.file) as image:
        assert image.width > WIDTH * DPI


@pytest.mark.parametrize(
    "text", [protocol().text, "patch-m50, block2-m75, " * 40, "0123456789abcdef/" * 30, "a$\\x and d$e_f"]
)
def test_small_print_fits_its_strip(text):
    with matplotlib.style.context(STYLE, after_reset=True):
        figure = printed(text)
        figure.draw_without_rendering()
    assert_is_printed_whole(figure)


def test_captions_and_alt_texts_are_sentences(drawn):
    for picture in drawn.pictures:
        assert picture.title[0].isupper() and len(texts_of(drawn.shown)[picture.file]) == 3
        for text in (picture.caption, picture.alt):
            assert text[0].isupper() and text.endswith((".", "”.")), text
            assert "None" not in text and "nan" not in text and "  " not in text, text


@pytest.mark.parametrize("kind", OF_IMAGES, ids=lambda kind: kind.file)
def test_print_is_large_enough_and_nothing_is_cut(kind):
    assert_is_printed_whole(draw(kind, CASES["thirteen arms, some missing"]()))


def assert_is_printed_whole(figure):
    assert all(text.get_fontsize() >= SMALLEST_PRINT for text in figure.findobj(Text) if text.get_text())
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    slack = 0.01
    assert drawn.x0 >= -slack and drawn.y0 >= -slack and drawn.x1 <= width + slack and drawn.y1 <= height + slack


def test_equal_results_give_equal_bytes_whatever_a_users_matplotlibrc_says(tmp_path):
    case = CASES["three arms, tuned"]
    first = write(case(), tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert write(case(), tmp_path / "b") == first and len(first) == len(OF_IMAGES)
    for picture in first:
        assert (tmp_path / "a" / picture.file).read_bytes() == (tmp_path / "b" / picture.file).read_bytes()


# FID against compute


def test_milestones_stand_at_their_mean_with_the_t_interval_around():
    shown = show(make_params(few_arms("patch-m50")))
    [axes] = draw(FID_VS_COMPUTE, shown).axes
    lines = {line.get_label(): line for line in axes.lines}
    rows = shown.summary[shown.summary["arm"] == "patch-m50"]
    estimates = [estimate(at["fid"].to_numpy()) for _, at in rows.groupby("milestone")]
    assert lines["patch-m50"].get_ydata() == pytest.approx([e.mean for e in estimates])
    flops = rows.groupby("milestone")["flops"].mean()
    assert lines["patch-m50"].get_xdata() == pytest.approx(flops / 1e9)  # GFLOPs
    [band] = [c for c in axes.collections if to_hex(c.get_facecolor()[0]) == arm_looks(shown.params)["patch-m50"].color]
    ends = band.get_paths()[0].vertices[:, 1]
    assert ends.min() == pytest.approx(min(e.low for e in estimates))
    assert ends.max() == pytest.approx(max(e.high for e in estimates))


def test_two_seeds_have_their_range_as_the_band():
    shown = show(make_params({"scratch": SCRATCH}, seeds=(0, 1)))
    [axes] = draw(FID_VS_COMPUTE, shown).axes
    ends = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert ends.min() == pytest.approx(shown.summary["fid"].min())
    assert ends.max() == pytest.approx(shown.summary["fid"].max())
    assert "their range" in texts_of(shown)[FID_VS_COMPUTE.file][1]


def test_scratchs_final_fid_is_a_dashed_line_in_every_panel():
    shown = show(make_params(thirteen_arms()))
    figure = draw(FID_VS_COMPUTE, shown)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["patch", "block 2×2", "crop"]
    target = shown.compared["scratch"].scores["fid"].mean
    for axes in figure.axes:
        assert any(line.get_linestyle() == "--" and set(line.get_ydata()) == {target} for line in axes.lines)
        assert "scratch" in [line.get_label() for line in axes.lines]


@pytest.mark.parametrize(("milestones", "scale"), [((0.4, 1.0), "linear"), ((0.1, 0.5, 1.0), "log")])
def test_compute_is_logarithmic_where_milestones_lie_far_apart(milestones, scale):
    arms = {"scratch": SCRATCH, "patch-m50": masked("patch", 0.5, pretrain={"share": 0.05})}
    [axes] = draw(FID_VS_COMPUTE, show(make_params(arms, seeds=(0,), milestones=milestones))).axes
    assert axes.get_xscale() == scale


@pytest.mark.parametrize(("final", "scale"), [(0.45, "linear"), (0.05, "log")])
def test_fid_is_logarithmic_where_the_range_asks_for_it(final, scale):
    params = make_params(few_arms("patch-m50"), seeds=(0,), milestones=(1.0,))
    [axes] = draw(FID_VS_COMPUTE, show(params, fids={"scratch": (0.4,), "patch-m50": (final,)})).axes
    assert axes.get_yscale() == scale


def test_a_scale_far_off_is_named_and_a_near_one_drawn():
    params = make_params(few_arms("patch-m50"), seeds=(0,), milestones=(1.0,))
    shown = show(params, fids={"scratch": (0.2,), "patch-m50": (0.1,)})
    figure = draw(FID_VS_COMPUTE, shown)
    assert "↑ untrained: 31.40" in texts(figure)
    assert any("floor: real against real (0.0870)" in text for text in texts(figure))
    [axes] = figure.axes
    assert any(line.get_linestyle() == ":" and set(line.get_ydata()) == {0.087} for line in axes.lines)


@pytest.mark.parametrize("kind", [FID_VS_COMPUTE, LOSSES], ids=lambda kind: kind.file)
def test_legends_name_every_arm_and_those_missing(kind):
    shown = show(make_params(thirteen_arms(), seeds=(0,)), missing=["crop-m90"])
    [legend] = draw(kind, shown).legends
    names = [text.get_text() for text in legend.get_texts()]
    assert [n for n in names if n.split(":")[0] in shown.params.arms] == [*shown.arms, "crop-m90: missing"]


@pytest.mark.parametrize(
    ("flops", "unit"), [([1.0], "FLOPs"), ([5e11], "GFLOPs"), ([1e12, 4.7e18], "EFLOPs"), ([3e25], "EFLOPs")]
)
def test_compute_has_a_readable_unit(flops, unit):
    size, name = compute_unit(flops)
    assert name == unit and max(flops) >= size


# heat map


def heat_map_cells(shown: Findings) -> dict[tuple[str, str], str]:
    """The text of every cell by the names of its row and column."""
    [axes, *_] = draw(HEAT_MAP, shown).axes
    rows = [label.get_text() for label in axes.get_yticklabels()]
    columns = [label.get_text() for label in axes.get_xticklabels()]
    places = [(t.get_position(), t.get_text()) for t in axes.texts]
    return {(rows[int(y)], columns[int(x)]): text for (x, y), text in places}


def test_cells_say_the_mean_fid_and_the_paired_difference():
    fids = {"scratch": (0.50, 0.40, 0.60), "patch-m50": (0.45, 0.40, 0.65), "block2-m75": (0.40, 0.25, 0.40)}
    cells = heat_map_cells(show(fids=fids))
    assert cells["patch", "0.50"] == "0.500\n0.000"
    assert cells["block 2×2", "0.75"] == "0.350\n−0.150"
    assert [text for (row, _), text in cells.items() if row == "scratch"] == ["FID 0.500"]
    assert set(cells) == {
        *(("patch", "0.50"), ("patch", "0.75"), ("block 2×2", "0.50"), ("block 2×2", "0.75")),
        *(("crop", "0.438"), ("crop", "0.75"), ("scratch", "0.50")),
    }


def test_a_difference_is_over_the_seeds_that_both_have():
    fids = {"scratch": (0.50, 0.40, 0.60), "patch-m50": (0.45, 0.10, 0.10)}
    cells = heat_map_cells(show(fids=fids, missing=[("patch-m50", 1), ("patch-m50", 2)]))
    assert cells["patch", "0.50"] == "0.450\n−0.050\nn=1"


def test_one_seed_says_so_in_every_cell():
    cells = heat_map_cells(show(make_params(seeds=(0,))))
    assert all(text.endswith("n=1") for text in cells.values()) and len(cells) == 7


def test_missing_arms_are_marked_and_places_without_arms_are_empty():
    shown = show(missing=["patch-m75", "scratch"])
    assert heat_map_cells(shown)["patch", "0.75"] == "missing"
    assert heat_map_cells(shown)["scratch", "0.50"] == "missing"
    [axes, *bar] = draw(HEAT_MAP, shown).axes
    assert len(axes.patches) == len(seven_arms())  # none for patch and block at 0.44, and for crop at 0.5
    assert not bar  # nothing to be different from


def test_colours_are_white_at_scratch_and_symmetric():
    fids = {"scratch": (0.5,), "patch-m50": (0.6,), "patch-m75": (0.4,), "crop-m75": (0.5,)}
    shown = show(make_params({key: seven_arms()[key] for key in fids}, seeds=(0,)), fids=fids)
    [axes, _] = draw(HEAT_MAP, shown).axes
    _, worse, better, equal = (np.array(patch.get_facecolor()[:3]) for patch in axes.patches)  # scratch's comes first
    assert worse[0] > worse[2] and better[2] > better[0]  # orange, purple
    assert equal.min() > 0.94


def test_equal_strategy_and_rate_get_rows_of_their_own():
    arms = {**seven_arms(), "patch-m50-short": masked("patch", 0.5, pretrain={"share": 0.1})}
    cells = heat_map_cells(show(make_params(arms)))
    assert ("patch", "0.50") in cells and ("as patch-m50-short", "0.50") in cells


# each arm against scratch


def test_differences_and_their_intervals():
    fids = {"scratch": (0.50, 0.40, 0.60), "patch-m50": (0.45, 0.39, 0.52)}
    params = make_params(few_arms("patch-m50"))
    shown = show(params, fids=fids)
    left, right = draw(AGAINST_SCRATCH, shown).axes
    deltas = np.array([-0.05, -0.01, -0.08])
    drawn = [line.get_xdata() for line in left.lines]
    expected = estimate(deltas)
    assert any(np.allclose(sorted(x), sorted(deltas)) for x in drawn if len(x) == 3)
    assert any(np.allclose(x, [expected.low, expected.high]) for x in drawn if len(x) == 2)
    assert any(np.allclose(x, [expected.mean]) for x in drawn if len(x) == 1)
    crossed = shown.compared["patch-m50"].against.crossing
    ratio = crossed.at / shown.compared["scratch"].flops
    assert any(np.allclose(line.get_xdata(), [ratio]) for line in right.lines if len(line.get_xdata()) == 1)


def test_an_arm_that_never_gets_there_says_never():
    params = make_params(few_arms("patch-m50"), seeds=(0,))
    far = draw(AGAINST_SCRATCH, show(params, fids={"scratch": (0.3,), "patch-m50": (0.5,)}))
    near = draw(AGAINST_SCRATCH, show(params, fids={"scratch": (0.5,), "patch-m50": (0.3,)}))
    assert "never" in texts(far) and "never" not in texts(near)


def test_an_arm_that_was_there_at_once_says_at_most():
    params = make_params(few_arms("patch-m50"), seeds=(0,))
    figure = draw(AGAINST_SCRATCH, show(params, fids={"scratch": (0.5,), "patch-m50": (0.01,)}))
    assert "≤" in texts(figure)


def test_missing_arms_and_seeds_are_named():
    shown = show(missing=["patch-m75", ("crop-m75", 2)])
    found = texts(draw(AGAINST_SCRATCH, shown))
    assert "missing" in found and "crop-m75 (n=2)" in found and "patch-m50" in found


# losses, time, tuning


def test_losses_are_those_of_the_curves():
    shown = show(make_params(few_arms("patch-m50"), seeds=(0,)))
    left, right = draw(LOSSES, shown).axes
    assert [line.get_label() for line in left.lines] == ["patch-m50"]
    curve = next(run for run in shown.results.runs if run.arm == "patch-m50").finetune_curve
    [line] = [line for line in right.lines if line.get_label() == "patch-m50"]
    assert line.get_ydata() == pytest.approx(curve["loss"]) and line.get_xdata() == pytest.approx(curve["flops"] / 1e9)


def test_bars_are_mean_seconds_of_the_stages():
    shown = show(make_params(few_arms("patch-m50"), seeds=(0, 2)))
    [axes] = draw(TIME, shown).axes
    bars = {(round(bar.get_y() + bar.get_height() / 2), bar.get_x()): bar.get_width() for bar in axes.patches}
    widths = [width for (row, _), width in sorted(bars.items()) if row == 0]
    assert widths == pytest.approx([2.0, 21.0, 6.0, 4.5])  # finetune: 20 and 22
    assert len({bar.get_hatch() for bar in axes.patches}) == 4
    assert "wall-clock time (seconds)" in texts(draw(TIME, shown))


def test_time_names_the_missing_and_has_tuning_beside():
    shown = show(make_params(seeds=(0,), trials=TRIALS), missing=["patch-m75"])
    figure = draw(TIME, shown)
    assert texts(figure).count("missing") == 1 and "tuning, all trials" in texts(figure)
    [axes] = figure.axes
    assert sum(bar.get_width() == pytest.approx(33.0) for bar in axes.patches) == 7  # three trials of 11 s
    assert "tuning, all trials" not in texts(draw(TIME, show(make_params(seeds=(0,)))))


def test_a_trial_without_the_metric_has_not_failed():
    params = make_params(few_arms("patch-m50"), trials=TRIALS)
    shown = findings(params, make_results(params))
    del shown.results.choices["scratch"].trials[0].scores["kid"]
    shown.results.choices["patch-m50"].trials[1].scores["kid"] = None
    assert texts(draw(TUNING, shown)).count("no KID") == 2 and "× failed" not in texts(draw(TUNING, shown))


@pytest.mark.parametrize(("lower", "said"), [(True, "lowest"), (False, "highest")])
def test_the_best_trial_has_the_lowest_or_highest_score_by_the_metrics_direction(lower, said, monkeypatch):
    monkeypatch.setattr(texts_module, "SCORES", [Score("kid", "KID", is_lower_better=lower)])
    of = texts_of(show(make_params(few_arms("patch-m50"), trials=TRIALS)))
    assert f"with the {said} KID was chosen" in of["tuning.png"][1] and f"with the {said} KID" in of["tuning"][0]


def test_tuning_marks_the_chosen_and_the_failed():
    shown = show(make_params(seven_arms(), trials=TRIALS), failed_trials=("fast",))
    figure = draw(TUNING, shown)
    assert len(figure.axes) == 7 and texts(figure).count("× failed") == 7
    for axes, arm in zip(figure.axes, shown.params.arms, strict=True):
        assert axes.get_title(loc="left") == arm
        choice = shown.results.choices[arm]
        [star] = [line for line in axes.lines if line.get_marker() == "*"]
        [score] = [trial.scores["kid"] for trial in choice.trials if trial.name == choice.trial]
        assert star.get_xdata() == pytest.approx([1000 * score])
        assert star.get_ydata() == [list(TRIALS).index(choice.trial)]
        assert all(line.get_xdata()[0] >= 1000 * score for line in axes.lines)


# masks and samples


@pytest.mark.parametrize("arm", ["patch-m75", "block2-m50", "crop-m44"])
def test_masks_are_drawn_by_the_masking_of_training(arm, monkeypatch):
    params, seen = make_params(), []
    original = Masking.draw
    monkeypatch.setattr(Masking, "draw", lambda self, *args: seen.append(self) or original(self, *args))
    masks = draw_masks(params, arm)
    assert masks.shape == (2, 4, 4) and np.array_equal(masks, draw_masks(params, arm))
    assert masks.mean() == pytest.approx(params.mask_of(arm).realised_mask_rate)
    assert (seen[0].strategy, seen[0].block_size) == (params.arm(arm).strategy, params.arm(arm).block_size)


def test_masked_patches_are_grey_and_the_others_themselves():
    image = np.random.default_rng(0).integers(0, 100, (40, 40, 3), dtype=np.uint8)
    mask = np.array([[True, False], [False, False]])
    drawn = masked_image(image, mask)
    assert {tuple(pixel) for pixel in drawn[:20, :20].reshape(-1, 3).tolist()} == {MASKED, STRIPE}
    assert np.array_equal(drawn[21:, :20], image[21:, :20]) and np.array_equal(drawn[:20, 21:], image[:20, 21:])
    assert not np.array_equal(drawn[20, 21:], image[20, 21:])  # the grid's line
    assert np.abs(drawn[20, 21:].astype(int) - LINE).max() < np.abs(image[20, 21:].astype(int) - LINE).max()


def test_every_mask_says_its_realised_rate_below_the_same_images():
    shown = show(make_params(seeds=(0,)))
    figure = draw(MASKS, shown)
    assert len(figure.images) == 7  # the images themselves, and six masked arms
    found = texts(figure)
    assert {"masked 0.50", "masked 0.75", "masked 0.438", "real images", "crop-m44"} <= set(found)
    bare, *others = (image.get_array() for image in figure.images)
    for picture in others:
        same = (picture == bare).all(axis=-1)
        assert 0.2 < same.mean() < 0.7 and picture.shape == bare.shape


def test_samples_show_real_images_first_and_every_arm_with_its_fid():
    shown = show(make_params(seeds=(0, 1)), missing=["crop-m75", ("patch-m50", 0)])
    figure = draw(SAMPLES, shown)
    assert len(figure.images) == 7 and texts(figure)[0] == "real images"
    first = final(shown.summary).set_index(["arm", "seed"]).loc[("scratch", 0), "fid"]
    assert f"FID {score_text(first)}" in texts(figure)
    assert any(text.endswith("(seed 1)") for text in texts(figure))
    assert np.array_equal(figure.images[0].get_array(), image_grid(shown.results.real, 8))


def test_an_image_grid_keeps_every_pixel():
    images = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1)
    grid, scale, gap = image_grid(images, 2), 20, 4
    assert grid.shape == (16 * scale + gap, 16 * scale + gap, 3)
    assert np.array_equal(grid[: 8 * scale : scale, : 8 * scale : scale, 1], images[0, ..., 0])
    assert np.array_equal(grid[8 * scale + gap :: scale, 8 * scale + gap :: scale, 2], images[3, ..., 0])


def test_large_images_are_reduced_by_averaging():
    images = np.random.default_rng(0).integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)
    grid = image_grid(images, 4)
    assert 240 <= grid.shape[0] <= 340
    assert grid[0, 0] == pytest.approx(images[0, :4, :4].mean(axis=(0, 1)), abs=0.51)


# looks


def test_scratch_is_black_and_a_rate_has_one_marker():
    looks = arm_looks(make_params())
    assert looks["scratch"].color == "#000000"
    assert looks["patch-m50"].marker == looks["block2-m50"].marker != looks["patch-m75"].marker
    assert len({look.color for look in looks.values()}) == len(seven_arms())


def test_many_arms_look_different():
    arms = {**thirteen_arms(), "patch-m50-b": masked("patch", 0.5), "patch-m50-c": masked("patch", 0.5)}
    arms |= {f"block{size}-m{rate}": masked("block", rate / 100, size) for size in (1, 3, 4) for rate in (25, 50, 75)}
    assert len(set(arm_looks(make_params(arms)).values())) == len(arms) == 24


def test_long_names_are_cut_in_the_middle():
    first, second = (short(f"block4-m90-with-a-long-warm-up-{n}", 24) for n in (1, 2))
    assert len(first) == 24 and first != second and first.startswith("block4-m90") and first.endswith("up-1")
    assert short("patch-m50", 24) == "patch-m50"


# the page


def make_content(**changes) -> dict:
    """What write_report gives the templates."""
    return {
        "title": "Does it <pay>?",
        "answer": "1 of 2 arms & <b>.",
        "cautions": ["One seed | proves `nothing`."],
        "missing": ["crop-m75, seed 1: <no> file; run `maskdm evaluate --arm crop-m75 --seed 1`"],
        "verdicts": [Verdict("patch-m50", "same FID with 0.61× the compute (95 %: 0.55–0.70, n = 3)", "better")],
        "points": pd.DataFrame(),
        "points_notes": [],
        "table": pd.DataFrame({"arm": ["patch-m50", "real vs real"], "FID": ["0.40 [0.30, 0.50]", "0.09"]}),
        "table_notes": ["Means."],
        "notes": ["FID is biased."],
        "pictures": [Picture("losses.png", "Losses", "A caption {style} {{ title }}.", "An <alt> text.")],
        "facts": [("machine", "A <fast> CPU {body} {% if %}")],
        "tuning": pd.DataFrame({"arm": ["patch-m50"] * 13, "KID×1000": [str(k) for k in range(13)]}),
        "tuning_notes": ["Tuned: 13 trials."],
        **changes,
    }


def render_page(content: dict, folder: Path) -> str:
    return render("page.html.j2", content, folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (200, 100), "red").save(tmp_path / "losses.png")
    return tmp_path


def test_the_page_needs_nothing_else(folder):
    page = render_page(make_content(), folder)
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    [image] = [source for source in sources if not source.startswith("#")]
    assert image.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|<script|<link|<iframe|url\(|@import", page)
    assert all(f'id="{source[1:]}"' in page for source in sources if source.startswith("#"))


def test_the_page_escapes_what_it_was_given(folder):
    page = render_page(make_content(), folder)
    for raw, escaped in (
        ("<pay>", "&lt;pay&gt;"),
        ("arms & <b>", "arms &amp; &lt;b&gt;"),
        ("<no>", "&lt;no&gt;"),
        ("<fast>", "&lt;fast&gt;"),
        ("<alt>", "&lt;alt&gt;"),
    ):
        assert escaped in page and raw not in page, raw
    assert "A caption {style} {{ title }}." in page and "CPU {body} {% if %}" in page  # what looks like code is text


def test_the_page_says_everything(folder):
    page = render_page(make_content(), folder)
    assert '<span class="kind better">better</span> <strong>patch-m50</strong>: same FID with 0.61×' in page
    assert "(95\u00a0%: 0.55–0.70, n\u00a0=\u00a03)" in page
    assert "<code>maskdm evaluate --arm crop-m75 --seed 1</code>" in page
    assert "<small>[0.30, 0.50]</small>" in page and "real vs real" in page
    assert 'width="100" height="50"' in page
    assert "<details>\n<summary>All 13 trials</summary>" in page
    assert page.index("better</span>") < page.index("0.30, 0.50") < page.index("data:image") < page.index("CPU")


def test_a_short_tuning_table_is_open_and_empty_sections_are_left_out(folder):
    page = render_page(make_content(tuning=pd.DataFrame({"arm": ["patch-m50"]}), missing=[], verdicts=[]), folder)
    assert "<details>" not in page and "Tuned: 13 trials." in page
    assert "Missing" not in page and "Each arm against scratch" not in page


def test_the_page_adapts_to_dark_screens_phones_and_print(folder):
    page = render_page(make_content(), folder)
    for rule in ("prefers-color-scheme: dark", "@media print", "max-width: 40rem", 'name="viewport"'):
        assert rule in page


def test_markdown_links_its_figures_and_escapes():
    text = render("report.md.j2", make_content(), Path())
    assert "![An \\<alt\\> text.](losses.png)" in text
    assert "One seed \\| proves `nothing`." in text
    assert "- **patch-m50**: same FID with 0.61×" in text
    assert "`maskdm evaluate --arm crop-m75 --seed 1`" in text
    assert "\\<fast\\>" in text and "0.40 \\[0.30, 0.50\\]" in text
    assert text.index("## Missing") < text.index("## Result") < text.index("## Figures") < text.index("## What was run")


# what the engines show


def test_snakemake_has_a_caption_for_every_file_of_the_report():
    from jinja2 import Template

    template = Template((ROOT / "workflow" / "report" / "results.rst").read_text(encoding="utf-8"))
    names = [*(Path(kind.file).stem for kind in FIGURES), "report", "summary", "verdicts"]
    captions = [template.render(snakemake={"wildcards": {"name": name}}).strip() for name in names]
    assert all(caption.endswith(".") and len(caption) > 60 for caption in captions) and len(set(captions)) == len(names)


def test_dvc_shows_every_figure_and_its_template_exists():
    plots = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["plots"]
    files = {plot for plot in plots if isinstance(plot, str)}
    assert files == {f"results/report/{kind.file}" for kind in OF_IMAGES}
    templates = [settings["template"] for plot in plots if isinstance(plot, dict) for settings in plot.values()]
    assert templates and all((ROOT / ".dvc" / "plots" / f"{name}.json").is_file() for name in templates)


# what this room has never heard of: a strategy, sampler, metric or extractor that somebody adds elsewhere


def with_unknown_names() -> Findings:
    """Arms of strategy `checkerboard` between the others, scored by an extractor and drawn by a sampler of tomorrow."""
    params = make_params(few_arms("patch-m50", "block2-m50"), trials=TRIALS)
    board = {
        f"board-m{rate}": ArmConfig.model_construct(strategy="checkerboard", mask_rate=rate / 100) for rate in (50, 75)
    }
    sampling = params.sampling.model_copy(update={"sampler": "flow"})
    tuning = params.tuning.model_copy(update={"metric": "vendi"})
    params = params.model_copy(update={"arms": {**params.arms, **board}, "sampling": sampling, "tuning": tuning})
    results = make_results(params)
    for choice in results.choices.values():
        for trial in choice.trials:
            trial.scores["vendi"] = 2.0
    record = {**results.features_record, "extractor": "tomorrow/layer-9"}
    runs = [replace(run, metrics={**run.metrics, "vendi": 3.0}) for run in results.runs]
    results = replace(results, features_record=record, runs=runs)
    return findings(params, results)


def test_unknown_strategies_have_looks_of_their_own_after_the_known_ones():
    params = with_unknown_names().params
    looks, known = arm_looks(params), arm_looks(make_params(few_arms("patch-m50", "block2-m50")))
    assert len({looks[arm].color for arm in params.arms}) == len(params.arms)
    assert looks["block2-m50"].color != looks["board-m50"].color
    assert looks["board-m50"].marker == looks["patch-m50"].marker != looks["board-m75"].marker
    assert looks["scratch"] == known["scratch"]


def test_unknown_names_break_no_figure_table_or_sentence(tmp_path, monkeypatch):
    shown = with_unknown_names()
    drawn: list[Masking] = []
    original = Masking.draw

    def draw(self, *args):
        drawn.append(self)
        return original(replace(self, strategy="patch") if self.strategy == "checkerboard" else self, *args)

    monkeypatch.setattr(Masking, "draw", draw)
    monkeypatch.setattr(report_module, "read_results", lambda _: shown.results)
    report_module.write_report(shown.params, tmp_path)
    assert {kind.file for kind in OF_IMAGES} <= {file.name for file in tmp_path.iterdir()}
    assert {masking.strategy for masking in drawn} == {"patch", "block", "checkerboard"}
    cells = heat_map_cells(shown)
    assert ("checkerboard", "0.50") in cells and ("checkerboard", "0.75") in cells
    text = " ".join((tmp_path / "summary.md").read_text().replace("\\", "").split())
    for said in (
        "| checkerboard |",
        "board-m75",
        "flow, 50 steps",
        "with the lowest vendi",
        "features are those of tomorrow",
    ):
        assert said in text, said
    assert "checkerboard" in (tmp_path / "verdicts.csv").read_text()
