"""The report: its numbers against hand computation, its verdicts, and what it does with what is missing."""

import csv
import html
import json
import re
import shutil
import statistics
from collections.abc import Sequence
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import maskdm.report.report as report_module
from maskdm.base.checksums import CHECKSUM
from maskdm.base.errors import UserError
from maskdm.base.publishing import publish_description
from maskdm.config import Params, parse_params, paths
from maskdm.config.jobs import Jobs
from maskdm.report import Report, print_report, print_summary, write_report
from maskdm.report.numbers import decimals, number_text, signed
from maskdm.report.results import read_results
from maskdm.report.tables import format_table
from tests.factories import protocol
from tests.report.made_up_results import stamp_outputs

ARMS = {
    "scratch": {"strategy": "none"},
    "patch-m25": {"strategy": "patch", "mask_rate": 0.25},
    "patch-m50": {"strategy": "patch", "mask_rate": 0.5},
    "patch-m75": {"strategy": "patch", "mask_rate": 0.75},
    "block2-m50": {"strategy": "block", "block_size": 2, "mask_rate": 0.5},
    "block2-m75": {"strategy": "block", "block_size": 2, "mask_rate": 0.75},
    "crop-m45": {"strategy": "crop", "mask_rate": 0.45},
}
FINAL_FIDS = {  # by arm: seeds 0, 1, 2
    "scratch": (10.0, 12.0, 11.0),
    "patch-m25": (9.0, 10.9, 9.8),  # better with all by about as much
    "patch-m50": (11.0, 11.5, 11.2),
    "patch-m75": (14.0, 15.8, 15.1),
    "block2-m50": (10.5, 13.0, 11.2),
    "block2-m75": (16.0, 15.0, 15.5),
    "crop-m45": (20.0, 22.3, 20.9),
}
TRIALS = {
    "low": {"pretrain.lr": 1e-3, "finetune.lr": 1e-3},
    "given": {},  # both 2e-3
    "high": {"pretrain.lr": 4e-3, "finetune.lr": 4e-3},
    "smaller": {"finetune.batch_size": 64},
}
THREE = {key: ARMS[key] for key in ("scratch", "patch-m50", "crop-m45")}
PAIR = {"scratch": ARMS["scratch"], "patch-m50": ARMS["patch-m50"]}
BUDGET_FLOPS = 4.2e13
DATA_SHA, EXTRACTOR_SHA = "d" * 64, "e" * 64
RAN_WITH = {
    **{"device": "cpu", "device_name": "cpu", "threads": 1, "precision": "fp32", "compile": "off"},
    **{"attention": "plain", "activation_checkpointing": False, "devices": 1},
}
SECONDS_PER_STEP, WAIT_PER_STEP = 0.04, 0.001
# Of the CSV files, which other programs read.
SUMMARY_COLUMNS = (
    "arm,seed,strategy,block_size,mask_rate,realised_mask_rate,num_visible,milestone,step,flops,images_seen,tokens_seen,"
    "device_seconds,data_wait_share,peak_memory_gib,fid,kid,kid_std,precision,recall,num_samples,fid_floor,kid_floor,"
    "floor_num_samples,fid_untrained,kid_untrained,extractor,extractor_sha256,data_sha256,trial,num_trials"
)
VERDICT_COLUMNS = (
    "arm,strategy,block_size,mask_rate,realised_mask_rate,num_seeds,fid,fid_std,fid_low,fid_high,delta_fid,delta_fid_low,"
    "delta_fid_high,p_value,p_holm,kid,kid_std,delta_kid,delta_kid_low,delta_kid_high,precision,precision_std,recall,"
    "recall_std,flops,images_seen,device_seconds,compute_ratio,compute_ratio_low,compute_ratio_high,flops_at_equal_fid,"
    "device_seconds_at_equal_fid,trial,num_trials,conclusive,kind,verdict"
)
Fids = dict[str, Sequence[float | Sequence[float]]]


def make_params(
    arms: dict | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    milestones: Sequence[float] = (0.5, 0.75, 1.0),
    trials: dict | None = None,
    match: str = "flops",
) -> Params:
    return parse_params(
        {
            "name": "digits-test",
            "seeds": list(seeds),
            "dataset": {"source": "digits", "image_size": 8, "channels": 1},
            "datasets": {},
            "model": {"patch_size": 2, "dim": 64, "depth": 5, "num_heads": 4},
            "diffusion": {"schedule": "cosine", "prediction": "x_0"},
            "budget": {"match": match, "unmasked_steps": 1000, "milestones": list(milestones)},
            "training": {},
            "pretrain": {"share": 0.3, "lr": "2e-3", "batch_size": 128},
            "finetune": {"lr": "2e-3", "batch_size": 128},
            "sampling": {},
            "compute": {"device": "cpu", "precision": "fp32"},
            "evaluation": {},
            "tuning": {"seed": 1000, "budget_fraction": 0.3, "trials": trials or {}},
            "arms": ARMS if arms is None else arms,
        }
    )


def write_results(params: Params, fids: Fids | None = None) -> None:
    """Everything the report reads, in the working directory, stamped; numbers that depend on arm and seed alone.

    Args:
        params: what they are results of.
        fids: by arm, for each seed the final FID, or the FIDs of all milestones.
    """
    rng = np.random.default_rng(0)
    write_data(params, rng)
    write_scale()
    write_json(paths.record("choose"), make_record())
    for number, arm in enumerate(params.arms):
        write_tuning(params, arm)
        for place, seed in enumerate(params.seeds):
            fid = (fids or FINAL_FIDS).get(arm, (10.0 + number / 3,) * 9)[place]
            write_json(paths.metrics(arm, seed), make_metrics(params, arm, seed, fid))
            write_training(params, arm, seed)
            write_samples(params, arm, seed, rng)
    stamp_outputs(params)


def write_data(params: Params, rng: np.random.Generator) -> None:
    size, channels = params.dataset.image_size, params.dataset.channels
    manifest = {
        "count": 1797,
        "shape": [size, size, channels],
        "sha256": DATA_SHA,
        "source": {"kind": "digits"},
        "protocol": {"crop": "8×8 | as <shipped>", "resize_filter": "lanczos"},
        "labels": True,
        "shards": [{"file": "images-00000.npy", "count": 100}],
    }
    write_json(paths.DATA / "manifest.json", manifest)
    np.save(paths.DATA / "images-00000.npy", rng.integers(0, 256, (100, size, size, channels), dtype=np.uint8))
    write_json(paths.record("prepare"), make_record())
    write_json(paths.FEATURES / "features.json", origin())
    write_json(paths.record("features"), make_record(**origin(), classifier_accuracy=0.9731))


def write_scale() -> None:
    def scores(fid: float) -> dict:
        return {"fid": fid, "kid": fid / 3000, "kid_std": 0.1, "precision": 0.9, "recall": 0.8, "num_samples": 898}

    ends = {"floor": scores(3.25), "untrained": scores(95.5)}
    write_json(paths.SCALE, {**ends, **origin(), "protocol": protocol().as_dict()})
    write_json(paths.record("scale"), make_record())


def write_tuning(params: Params, arm: str) -> None:
    """Trials whose KID falls along their list, so that the last one that did not fail is the best."""
    trials, best = params.tuning.trials, "given"
    for place, (trial, values) in enumerate(trials.items()):
        result = {
            **{"arm": arm, "trial": trial, "values": values, "seed": 1000, "budget_fraction": 0.3},
            **{"failed": None, "fid": 30.0 - place, "kid": (30.0 - place) / 3000, **origin()},
        }
        write_json(paths.trial(arm, trial), result)
        write_json(paths.record("tune", arm, trial=trial), make_record(wall_seconds=5.0))
        best = trial
    publish_description(paths.chosen(arm), {"arm": arm, "trial": best, "values": trials.get(best, {})})


def write_json(file: Path, content: dict) -> None:
    """As the stages do, with a checksum."""
    file.parent.mkdir(parents=True, exist_ok=True)
    publish_description(file, {key: value for key, value in content.items() if key != CHECKSUM})


def origin() -> dict[str, str]:
    return {"extractor": "classifier", "extractor_sha256": EXTRACTOR_SHA, "data_sha256": DATA_SHA}


def make_record(**entries: object) -> dict:
    return {
        "wall_seconds": 1.0,
        "peak_memory_gib": 0.61,
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.8.0"},
        "machine": {"cpu": "A <fast> CPU", "cores": 2},
        **entries,
    }


def make_metrics(params: Params, arm: str, seed: int, fids: float | Sequence[float]) -> dict:
    fractions = params.budget.milestones
    if isinstance(fids, float):
        fids = [fids * (1 + 1.5 * (1 - fraction)) for fraction in fractions]
    config = params.arm(arm)
    return {
        **{"arm": arm, "seed": seed},
        **{key: getattr(config, key) for key in ("strategy", "mask_rate", "block_size")},
        "realised_mask_rate": params.mask_of(arm).realised_mask_rate,
        "flip": 0.0,
        **origin(),
        "milestones": {f"{at:.3f}": make_milestone(at, fid) for at, fid in zip(fractions, fids, strict=True)},
    }


def make_milestone(fraction: float, fid: float) -> dict:
    return {
        "step": round(1000 * fraction),
        "flops": BUDGET_FLOPS * fraction,
        "images_seen": round(128000 * fraction),
        "tokens_seen": round(2048000 * fraction),
        "fid": fid,
        "kid": fid / 3000,
        "kid_std": 0.0007,
        "precision": 0.8 - fid / 100,
        "recall": 0.7 - fid / 100,
        "num_samples": 1000,
    }


def write_training(params: Params, arm: str, seed: int) -> None:
    """Curves and records: pretraining of 100 steps, finetuning of 1000 that holds every milestone."""
    share, slower = params.pretrain_of(arm).share, 1 + 0.1 * seed
    steps = {"pretrain": range(5, 101 if share > 0 else 0, 5), "finetune": range(5, 1001, 5)}
    for stage, folder in (("pretrain", paths.pretrain(arm, seed)), ("finetune", paths.finetune(arm, seed))):
        folder.mkdir(parents=True, exist_ok=True)
        lines = ["step,loss,lr,images_seen,tokens_seen,flops"]
        lines += [f"{s},{0.05 + 1 / s},0.002,{s * 128},{s * 2048},{s * BUDGET_FLOPS / 1000}" for s in steps[stage]]
        (folder / "curve.csv").write_text("\n".join(lines) + "\n")
        timings = [
            {
                "step": s,
                "device_seconds": slower * SECONDS_PER_STEP * s,
                "data_wait_seconds": WAIT_PER_STEP * s,
                "peak_memory_gib": 0.5 + s / 10_000,
            }
            for s in steps[stage]
        ]
        last = timings[-1] if timings else {"device_seconds": 0.0, "data_wait_seconds": 0.0}
        totals = {key: last[key] for key in ("device_seconds", "data_wait_seconds")}
        num_visible = params.mask_of(arm).num_visible if stage == "pretrain" else params.grid.num_patches
        facts = {"steps": len(steps[stage]) * 5, "num_visible": num_visible, **totals, **RAN_WITH}
        write_json(paths.record(stage, arm, seed), make_record(timings=timings, **facts))
    for stage in ("sample", "evaluate"):
        write_json(paths.record(stage, arm, seed), make_record(wall_seconds=3.0))


def write_samples(params: Params, arm: str, seed: int, rng: np.random.Generator) -> None:
    size, channels = params.dataset.image_size, params.dataset.channels
    folder = paths.samples(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (80, size, size, channels), dtype=np.uint8)
    np.save(folder / f"milestone-{params.budget.milestones[-1]:.3f}.npy", images)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in them is another file's test, and drawing them takes seconds."""
    monkeypatch.setattr(report_module, "draw_figures", lambda *_: [])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The report of 7 arms × 3 seeds × 3 milestones, figures and all: its folder and what write_report returned."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("report")
        patch.chdir(root)
        write_results(make_params())
        written = report_on(make_params())
    return root / paths.REPORT, written


def report_on(params: Params) -> Report:
    """Write the report where its stage puts it."""
    shutil.rmtree(paths.REPORT, ignore_errors=True)
    paths.REPORT.mkdir(parents=True)
    return write_report(params, paths.REPORT)


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def verdict_rows(folder: Path = paths.REPORT) -> dict[str, dict[str, str]]:
    return {row["arm"]: row for row in read_rows(folder / "verdicts.csv")}


def verdicts_of(params: Params, fids: Fids) -> dict[str, str]:
    """The verdict of every arm in a report of made-up FIDs."""
    write_results(params, fids)
    return dict(zip(params.arms, report_on(params).verdicts["verdict"], strict=True))


def page_text() -> str:
    """What summary.md says, in one line, unescaped."""
    return " ".join(re.sub(r"\\(.)", r"\1", (paths.REPORT / "summary.md").read_text()).split())


def edit_json(params: Params, file: Path, **entries: object) -> None:
    """Change entries of a file, as if it had been made so."""
    write_json(file, {**json.loads(file.read_text()), **entries})
    stamp_outputs(params)


def edit_record(stage: str, arm: str, seed: int, **entries: object) -> None:
    """Change entries of a record, which has no stamp."""
    file = paths.record(stage, arm, seed)
    write_json(file, {**json.loads(file.read_text()), **entries})


def edit_milestones(params: Params, arm: str, **factors: float) -> None:
    """Multiply numbers of every seed's milestones, as if they had been made so."""
    for seed in params.seeds:
        edit_metrics(arm, seed, **factors)
    stamp_outputs(params)


def edit_metrics(arm: str, seed: int, **factors: float) -> None:
    metrics = json.loads(paths.metrics(arm, seed).read_text())
    for milestone in metrics["milestones"].values():
        for key, factor in factors.items():
            milestone[key] *= factor
    write_json(paths.metrics(arm, seed), metrics)


class TestSummary:
    def test_a_row_per_arm_seed_and_milestone_in_the_order_of_params(self, report):
        rows = read_rows(report[0] / "summary.csv")
        expected = [(a, s, m) for a in ARMS for s in (0, 1, 2) for m in (0.5, 0.75, 1.0)]
        assert [(r["arm"], int(r["seed"]), float(r["milestone"])) for r in rows] == expected
        assert list(rows[0]) == SUMMARY_COLUMNS.split(",")

    def test_the_milestone_s_numbers_to_the_last_digit(self, report):
        row = next(r for r in read_rows(report[0] / "summary.csv") if r["arm"] == "block2-m75" and r["seed"] == "1")
        metrics = make_metrics(make_params(), "block2-m75", 1, 15.0)
        for name, value in metrics["milestones"]["0.500"].items():
            assert float(row[name]) == value, name
        for name in ("realised_mask_rate", "block_size", "mask_rate"):
            assert float(row[name]) == metrics[name], name
        assert (row["strategy"], row["extractor"], row["data_sha256"]) == ("block", "classifier", DATA_SHA)
        assert (row["num_visible"], row["trial"], row["num_trials"]) == ("4", "given", "1")

    def test_the_scales_stand_in_every_row(self, report):
        for row in read_rows(report[0] / "summary.csv"):
            assert (row["fid_floor"], row["fid_untrained"], row["floor_num_samples"]) == ("3.25", "95.5", "898")
            assert float(row["kid_untrained"]) == 95.5 / 3000

    def test_seconds_are_those_until_the_milestone_pretraining_included(self, report):
        rows = [r for r in read_rows(report[0] / "summary.csv") if r["arm"] == "patch-m50" and r["seed"] == "2"]
        for row, steps in zip(rows, (500, 750, 1000), strict=True):
            seconds = 1.2 * SECONDS_PER_STEP * (100 + steps)
            assert float(row["device_seconds"]) == pytest.approx(seconds)
            assert float(row["data_wait_share"]) == pytest.approx(WAIT_PER_STEP * (100 + steps) / seconds)
            assert float(row["peak_memory_gib"]) == pytest.approx(0.5 + steps / 10_000)
        scratch = read_rows(report[0] / "summary.csv")[0]
        assert float(scratch["device_seconds"]) == pytest.approx(SECONDS_PER_STEP * 500)

    def test_whole_numbers_stay_whole_and_nulls_empty(self, report):
        scratch = read_rows(report[0] / "summary.csv")[0]
        assert (scratch["step"], scratch["images_seen"], scratch["seed"]) == ("500", "64000", "0")
        assert (scratch["mask_rate"], scratch["block_size"], scratch["realised_mask_rate"]) == ("", "", "0.0")


class TestVerdictNumbers:
    def test_means_standard_deviations_and_intervals_are_the_seeds(self, report):
        for arm, row in verdict_rows(report[0]).items():
            fids = FINAL_FIDS[arm]
            interval = stats.ttest_1samp(fids, 0.0).confidence_interval(0.95)
            assert float(row["fid"]) == pytest.approx(statistics.mean(fids), rel=1e-12)
            assert float(row["fid_std"]) == pytest.approx(statistics.stdev(fids), rel=1e-12)
            assert (float(row["fid_low"]), float(row["fid_high"])) == pytest.approx((interval.low, interval.high))
            assert float(row["kid"]) == pytest.approx(statistics.mean(fids) / 3000, rel=1e-12)
            assert float(row["precision"]) == pytest.approx(0.8 - statistics.mean(fids) / 100, rel=1e-12)
            assert float(row["recall_std"]) == pytest.approx(statistics.stdev(fids) / 100, rel=1e-9)
            assert (float(row["flops"]), row["images_seen"]) == (pytest.approx(BUDGET_FLOPS), "128000")
        assert list(row) == VERDICT_COLUMNS.split(",")

    def test_differences_are_paired_by_seed_and_their_p_values_holm_s(self, report):
        rows, base = verdict_rows(report[0]), FINAL_FIDS["scratch"]
        raw = {arm: stats.ttest_rel(FINAL_FIDS[arm], base) for arm in ARMS if arm != "scratch"}
        for arm, test in raw.items():
            interval = test.confidence_interval(0.95)
            deltas = [ours - theirs for ours, theirs in zip(FINAL_FIDS[arm], base, strict=True)]
            assert float(rows[arm]["delta_fid"]) == pytest.approx(statistics.mean(deltas))
            low, high = float(rows[arm]["delta_fid_low"]), float(rows[arm]["delta_fid_high"])
            assert (low, high) == pytest.approx((interval.low, interval.high))
            assert float(rows[arm]["delta_kid_high"]) == pytest.approx(interval.high / 3000)
            assert float(rows[arm]["p_value"]) == pytest.approx(test.pvalue)
        smallest = min(raw, key=lambda arm: raw[arm].pvalue)
        assert float(rows[smallest]["p_holm"]) == pytest.approx(6 * raw[smallest].pvalue)
        assert rows["scratch"]["delta_fid"] == rows["scratch"]["p_holm"] == rows["scratch"]["compute_ratio"] == ""

    @pytest.mark.usefixtures("_no_figures")
    def test_compute_at_equal_fid_is_interpolated_in_log_compute_and_seconds_along_the_arm(self):
        params = make_params(PAIR, seeds=(0,))
        verdicts_of(params, {"scratch": ((20.0, 15.0, 10.0),), "patch-m50": ((14.0, 12.0, 6.0),)})
        row = verdict_rows()["patch-m50"]
        ratio = 0.75 * (1 / 0.75) ** (1 / 3)  # 10 is a third of the way from 12, at 0.75, to 6, at 1.0
        assert float(row["compute_ratio"]) == pytest.approx(ratio)
        assert float(row["flops_at_equal_fid"]) == pytest.approx(ratio * BUDGET_FLOPS)
        # 0.04 s a step, 1000 steps after 100 of pretraining; steps are linear in compute
        assert float(row["device_seconds_at_equal_fid"]) == pytest.approx(SECONDS_PER_STEP * (100 + 1000 * ratio))
        assert row["compute_ratio_low"] == row["compute_ratio_high"] == ""

    @pytest.mark.usefixtures("_no_figures")
    def test_two_seeds_have_spread_and_no_interval(self):
        params = make_params(PAIR, seeds=(0, 1))
        verdicts_of(params, FINAL_FIDS)
        row = verdict_rows()["patch-m50"]
        assert float(row["fid_std"]) == pytest.approx(statistics.stdev((11.0, 11.5)))
        for name in ("fid_low", "fid_high", "delta_fid_low", "p_value", "p_holm", "compute_ratio_high"):
            assert row[name] == "", name


STEEP = (20.0, 15.0, 10.0)  # FIDs at 0.5, 0.75 and 1.0 of the budget


def shifted(curve: Sequence[float], *shifts: float) -> list[list[float]]:
    """A curve for every seed."""
    return [[fid + shift for fid in curve] for shift in shifts]


@pytest.mark.usefixtures("_no_figures")
class TestVerdicts:
    SEEDS = (-0.1, 0.0, 0.1)
    params = make_params(PAIR)
    tuned = make_params(PAIR, trials=TRIALS)

    def verdict(self, curve: Sequence[float], params: Params = params, noise: float = 0.02) -> str:
        """Of an arm with this curve, its seeds a little off."""
        ours = shifted(curve, *(shift + noise * (-1) ** n for n, shift in enumerate(self.SEEDS)))
        found = verdicts_of(params, {"scratch": shifted(STEEP, *self.SEEDS), "patch-m50": ours})
        assert verdict_rows()["patch-m50"]["verdict"] == found["patch-m50"]
        return found["patch-m50"]

    def test_a_better_arm(self):
        text = self.verdict((14.0, 10.0, 8.0))
        assert re.match(
            r"reaches scratch's final FID with 0\.75× the compute \(95 %: 0\.7\d–0\.7\d, n = 3\) and 0\.85× the device "
            r"seconds; FID difference −1\.99 at equal compute \(95 %: −2\.0\d to −1\.9\d\); hyperparameters given, not "
            r"tuned$",
            text,
        )

    def test_saves_is_said_where_both_were_tuned(self):
        text = self.verdict((14.0, 10.0, 8.0), self.tuned)
        assert (
            text.startswith("saves 25 % of the compute: reaches scratch's final FID with 0.75× the compute")
            and "given" not in text
        )

    def test_saves_is_said_nowhere_where_scratch_was_not_tuned(self):
        self.verdict((14.0, 10.0, 8.0))
        assert "save" not in page_text()
        assert "save" not in (paths.REPORT / "verdicts.csv").read_text()
        assert "hyperparameters of scratch were given, not tuned" in page_text()

    def test_saves_is_not_said_where_the_interval_reaches_beyond_what_scratch_spent(self):
        """An arm that spends 1.3 times as much, clearly better at the end, and not clearly before."""
        at_each = {"patch-m50": [(14.0, 9.9, 8.0), (14.0, 9.0, 8.01), (14.0, 10.6, 8.02)]}
        write_results(self.tuned, {"scratch": [10.0, 10.01, 10.02], **at_each})
        edit_milestones(self.tuned, "patch-m50", flops=1.3)
        report_on(self.tuned)
        row = verdict_rows()["patch-m50"]
        assert float(row["compute_ratio"]) < 1 < float(row["compute_ratio_high"]) and float(row["p_holm"]) < 0.05
        assert row["verdict"].startswith("reaches scratch's final FID with 0.96× the compute (95 %: 0.85–1.12")
        assert "saves" not in page_text()

    def test_a_censored_crossing_is_at_most(self):
        text = self.verdict((9.0, 8.5, 8.0), self.tuned)
        assert text.startswith("saves at least 50 % of the compute: reaches scratch's final FID with at most 0.50× the")
        assert "95 %: up to 0.50, n = 3" in text
        assert "≤ 0.50× […, 0.50]" in (paths.REPORT / "summary.md").read_text().replace("\\", "")

    def test_an_arm_that_is_never_better(self):
        text = self.verdict((21.0, 16.0, 12.0))
        assert text.startswith(
            "no better than scratch at any milestone: FID difference +2.01 at equal compute (95 %: +1.9"
        )
        assert "reaches" not in text and verdict_rows()["patch-m50"]["compute_ratio"] == ""

    def test_an_arm_that_was_better_earlier(self):
        text = self.verdict((18.0, 14.0, 12.0))
        assert text.startswith("worse than scratch at the end, though better on average at 0.5 and 0.75 of the budget:")

    def test_an_arm_that_cannot_be_told_from_scratch(self):
        text = self.verdict((19.0, 14.0, 9.8), noise=0.3)
        assert re.match(
            r"not distinguishable from scratch at equal compute: FID difference −0\.10 \(95 %: −0\.\d+ to \+0\.\d+, "
            r"n = 3\); its mean reaches scratch's final FID with 0\.99× the compute \(95 %: 0\.9\d to beyond the "
            r"budget, n = 3\)",
            text,
        )

    def test_an_arm_that_cannot_be_told_and_is_above_on_average_reaches_nothing(self):
        text = self.verdict((21.0, 16.0, 10.05), noise=0.3)
        assert text.startswith("not distinguishable") and "reaches" not in text

    @pytest.mark.parametrize(("seeds", "said"), [((0,), "one seed"), ((0, 1), "two seeds")])
    def test_too_few_seeds_have_no_interval(self, seeds, said):
        params = make_params(ARMS, seeds=seeds, trials=TRIALS)
        found = verdicts_of(params, FINAL_FIDS)
        for arm, sign in (("patch-m25", "−"), ("crop-m45", "+")):
            assert found[arm].startswith(f"undecided: FID difference {sign}1")
            assert f"at equal compute, but {said} cannot tell a difference from chance" in found[arm]
            assert "×" not in found[arm], "no ratio: it would be taken for a result"
        assert f"({said}: no interval)" in found["scratch"]
        assert "saves" not in page_text()

    def test_the_baseline_is_said_to_be_it(self):
        found = verdicts_of(self.params, FINAL_FIDS)
        expected = "the arm that the others are compared with: FID 11.00 (95 %: 8.52 to 13.48, n = 3); hyperparameters "
        assert found["scratch"].startswith(expected)

    def test_what_is_clear_alone_need_not_be_among_many(self):
        near = {"scratch": (10.0, 12.0, 11.0), "patch-m50": (9.5, 11.6, 10.3)}  # p = 0.03
        assert "chance" not in verdicts_of(self.params, near)["patch-m50"]
        many = make_params({f"patch-m{n}": {"strategy": "patch", "mask_rate": n / 20} for n in range(5, 8)} | PAIR)
        text = verdicts_of(many, near)["patch-m50"]
        assert re.search(r"with 4 arms compared, chance cannot be ruled out \(Holm-adjusted p = 0\.\d\d\)", text)

    def test_kid_may_disagree_about_scratch(self):
        write_results(self.params, {"scratch": (10.0, 12.0, 11.0), "patch-m50": (9.0, 10.9, 9.8)})
        edit_milestones(self.params, "patch-m50", kid=2.0)
        text = report_on(self.params).verdicts.set_index("arm")["verdict"]
        assert "KID ranks it and scratch the other way round (KID×1000 difference +2.93)" in text["patch-m50"]
        assert "other way" not in text["scratch"]

    def test_arms_whose_order_is_disputed_are_named_up_to_three(self):
        params = make_params()
        write_results(params)
        edit_milestones(params, "crop-m45", kid=0.01)  # the worst FID, the best KID
        texts = report_on(params).verdicts.set_index("arm")["verdict"]
        assert "disagree on whether it is better than patch-m25, patch-m50, patch-m75 and 2 more" in texts["crop-m45"]
        assert "FID and KID disagree on whether it is better than crop-m45" in texts["patch-m50"]

    def test_arms_matched_otherwise_are_not_said_to_have_equal_compute(self):
        params = make_params(PAIR, match="images")
        write_results(params)
        edit_milestones(params, "patch-m50", flops=0.6)
        text = report_on(params).verdicts["verdict"][1]
        assert "at equal images seen with 0.60× the compute" in text and "equal compute" not in text
        assert "differs by up to 67%" in page_text()


@pytest.mark.usefixtures("_no_figures")
class TestAnswer:
    def answer(self, params: Params, fids: Fids = FINAL_FIDS) -> str:
        write_results(params, fids)
        report_on(params)
        return re.search(r"\*\*(.*?)\*\*", page_text())[1]

    def test_it_counts_what_is_clear_among_all(self):
        assert self.answer(make_params()) == (
            "1 of 6 masked arms had a clearly lower FID than scratch at equal compute: patch-m25 (3 seeds, "
            "Holm-adjusted p < 0.05); 2 had a clearly higher one; 3 could not be distinguished from scratch."
        )

    @pytest.mark.parametrize(("seeds", "said"), [((0,), "One seed"), ((0, 1), "Two seeds")])
    def test_it_is_modest_about_few_seeds(self, seeds, said):
        text = self.answer(make_params(seeds=seeds))
        assert text.startswith(f"{said} cannot tell a difference from chance. Observed: 1 of 6 masked arms")

    def test_it_calls_arms_masked_only_if_all_of_them_are(self):
        params = make_params()
        unmasked = params.arms["patch-m25"].model_copy(update={"mask_rate": 0.0})
        text = self.answer(params.model_copy(update={"arms": {**params.arms, "patch-m25": unmasked}}))
        assert "of 6 pretrained arms" in text and "masked" not in text

    def test_it_says_what_was_matched(self):
        assert "at equal images seen" in self.answer(make_params(match="images"))

    def test_without_scratch_or_masked_arms_there_is_none(self):
        masked = {key: arm for key, arm in ARMS.items() if key != "scratch"}
        assert "there is no arm without pretraining" in self.answer(make_params(masked))
        assert "no arm was pretrained" in self.answer(make_params({"scratch": ARMS["scratch"]}))


@pytest.mark.usefixtures("_no_figures")
class TestTable:
    def table(self, params: Params, width: int = 110) -> list[str]:
        write_results(params)
        written = report_on(params)
        return format_table(written.verdicts, written.summary, width).splitlines()

    def test_three_seeds_stand_with_intervals_and_fit(self, report):
        lines = format_table(report[1].verdicts, report[1].summary).splitlines()
        assert max(map(len, lines)) <= 110
        assert re.search(r"FID \(n=3\) +ΔFID \(n=3\)", lines[0])
        row = next(line for line in lines if line.startswith("patch-m25 "))
        assert "9.90 [7.53, 12.27]" in row and "−1.10 [−1.35, −0.85]" in row and "0.92× [0.90, 0.94]" in row

    def test_the_scales_are_the_last_rows(self, report):
        lines = format_table(report[1].verdicts, report[1].summary).splitlines()
        assert re.match(r"real vs real +3\.25 +–", lines[-2]) and re.match(r"untrained +95\.50 +–", lines[-1])
        text = (report[0] / "summary.md").read_text()
        assert re.search(r"\| real vs real +\|.* 3\.25 ", text) and re.search(r"\| untrained +\|.* 95\.50 ", text)

    def test_one_seed_is_said_beside_every_number(self):
        lines = self.table(make_params(seeds=(0,)))
        for name in ("FID", "ΔFID", "KID×1000"):
            assert f" {name} (n=1)" in lines[0]
        text = (paths.REPORT / "summary.md").read_text()
        assert " precision (n=1)" in text and " recall (n=1)" in text
        assert "One seed proves nothing" in text and "±" not in text and "SD" not in text

    def test_differing_numbers_of_seeds_stand_in_the_cells(self):
        params = make_params(PAIR)
        write_results(params)
        for seed in (1, 2):
            paths.metrics("patch-m50", seed).unlink()
        written = report_on(params)
        lines = format_table(written.verdicts, written.summary, 200).splitlines()
        assert "(n=" not in lines[0] and " seeds " in lines[0]
        row = next(line for line in lines if line.startswith("patch-m50"))
        assert "11.00 (n=1)" in row and "+1.00 (n=1)" in row
        assert "11.00 [8.52, 13.48]" in next(line for line in lines if line.startswith("scratch"))
        assert "Fewer than 3 seeds give no interval: any difference may be chance (patch-m50)." in page_text()

    def test_many_arms_fit(self):
        arms = {
            f"patch-m{n:02d}-a-long-name-that-goes-on": {"strategy": "patch", "mask_rate": n / 30} for n in range(2, 26)
        }
        assert max(map(len, self.table(make_params({"scratch": ARMS["scratch"], **arms})))) <= 110

    def test_a_narrow_terminal_leaves_out_what_matters_least(self):
        lines = self.table(make_params(), width=70)
        assert max(map(len, lines)) <= 70 and "ΔFID" in lines[0] and "KID" not in lines[0]

    def test_without_scratch_there_is_no_delta(self):
        lines = self.table(make_params({key: arm for key, arm in ARMS.items() if key != "scratch"}))
        assert "Δ" not in lines[0] and "same FID" not in lines[0] and "p (Holm)" not in lines[0]

    @pytest.mark.parametrize("arm", ["scratch", "patch-m50"])
    def test_one_arm_one_seed_one_milestone(self, arm):
        lines = self.table(make_params({arm: ARMS[arm]}, seeds=(3,), milestones=(1.0,)))
        assert len(lines) == 5 and len(read_rows(paths.REPORT / "summary.csv")) == 1


MISSING_FILES = [
    (paths.metrics("patch-m50", 1), "evaluate"),
    (paths.record("evaluate", "patch-m50", 1), "evaluate"),
    (paths.pretrain("patch-m50", 1) / "curve.csv", "pretrain"),
    (paths.finetune("patch-m50", 1) / "curve.csv", "finetune"),
    (paths.record("finetune", "patch-m50", 1), "finetune"),
    (paths.record("pretrain", "patch-m50", 1), "pretrain"),
    (paths.samples("patch-m50", 1) / "milestone-1.000.npy", "sample"),
]


@pytest.mark.usefixtures("_no_figures")
class TestMissing:
    params = make_params(THREE)

    @pytest.mark.parametrize(("file", "stage"), MISSING_FILES, ids=lambda value: str(value))
    def test_a_missing_or_broken_file_costs_its_arm_and_seed_alone(self, file, stage):
        write_results(self.params)
        for content in (b"\x80" * file.stat().st_size, b"", b"\x80 no", None):
            file.unlink() if content is None else file.write_bytes(content)
            written = report_on(self.params)
            (line,) = written.missing
            assert line.startswith(f"patch-m50, seed 1: {file} ")
            would_work = Jobs(self.params).find(stage, "patch-m50", 1).why_outdated() != ""
            force = "" if would_work else " --force"
            assert line.endswith(f"run `maskdm {stage} --arm patch-m50 --seed 1{force}`")
            assert line in page_text() and line in html_text()
            assert list(written.verdicts["num_seeds"]) == [3, 2, 3]

    def test_pairs_are_of_the_seeds_that_both_have(self):
        write_results(self.params)
        paths.metrics("scratch", 0).unlink()
        report_on(self.params)
        row = verdict_rows()["patch-m50"]
        assert float(row["delta_fid"]) == pytest.approx((11.5 - 12.0 + 11.2 - 11.0) / 2)
        assert row["delta_fid_low"] == "" and row["fid_low"] != ""
        assert row["verdict"].startswith("undecided: FID difference") and "two seeds cannot tell" in row["verdict"]
        assert "1 of 3 seeds missing" in verdict_rows()["scratch"]["verdict"]

    def test_a_curve_of_another_run_than_its_record_is_left_out(self):
        write_results(self.params)
        file = paths.finetune("crop-m45", 2) / "curve.csv"
        file.write_text(file.read_text() + "1005,0.1,0.002,1,1,1\n")
        stamp_outputs(self.params)
        (line,) = report_on(self.params).missing
        assert "are of different runs" in line and line.endswith("finetune --arm crop-m45 --seed 2 --force`")

    def test_a_missing_arm_keeps_its_place(self):
        write_results(self.params)
        for seed in (0, 1, 2):
            paths.metrics("patch-m50", seed).unlink()
        written = report_on(self.params)
        assert len(written.missing) == 3
        row = verdict_rows()["patch-m50"]
        assert list(verdict_rows()) == list(self.params.arms) and (row["num_seeds"], row["fid"]) == ("0", "")
        assert row["verdict"] == (
            "missing: results/metrics/patch-m50-seed-0.json is missing; run `maskdm evaluate --arm patch-m50 --seed 0`"
        )
        assert "1 of 2 masked arms could not be compared" in page_text()
        assert {r["arm"] for r in read_rows(paths.REPORT / "summary.csv")} == {"scratch", "crop-m45"}
        assert re.search(r"^patch-m50 .*–", format_table(written.verdicts, written.summary), re.MULTILINE)

    def test_a_missing_scratch_is_not_replaced(self):
        params = make_params({**self.params.model_dump()["arms"], "other": {"strategy": "none"}})
        write_results(params)
        for seed in params.seeds:
            paths.metrics("scratch", seed).unlink()
        report_on(params)
        assert "No comparison is possible yet: scratch or every masked arm is missing" in page_text()
        row = verdict_rows()["crop-m45"]
        assert (
            "FID 21.07 (95 %: " in row["verdict"]
            and "not compared with scratch, because scratch is missing" in row["verdict"]
        )
        assert row["delta_fid"] == ""

    @pytest.mark.parametrize(("output", "stage"), [(paths.SCALE, "scale"), (paths.FEATURES, "features")], ids=str)
    def test_without_what_scores_are_made_from_there_is_no_report_and_its_command_is_named(self, output, stage):
        write_results(self.params)
        output.rename("elsewhere")
        says = rf"scratch-seed-0.json is out of date: {output}.* is missing; run `maskdm {stage}` "
        with pytest.raises(UserError, match=says):
            report_on(self.params)

    @pytest.mark.parametrize(
        ("file", "command"),
        [
            (paths.record("features"), "maskdm features"),
            (paths.record("prepare"), "maskdm prepare"),
            (paths.DATA / "manifest.json", "maskdm prepare"),
            (paths.DATA / "images-00000.npy", "maskdm prepare"),
        ],
        ids=str,
    )
    def test_without_the_data_there_is_no_report(self, file, command):
        write_results(self.params)
        for content in (b"", b"\x80 no", None):
            file.unlink() if content is None else file.write_bytes(content)
            with pytest.raises(UserError, match=re.escape(str(file))) as caught:
                report_on(self.params)
            force = "" if Jobs(self.params).find(command.split()[1]).why_outdated() else " --force"
            assert f"`{command}{force}`" in str(caught.value)
        assert not any(paths.REPORT.iterdir())

    def test_with_nothing_left_it_is_an_error_that_names_the_first(self):
        write_results(self.params)
        for arm in self.params.arms:
            for seed in self.params.seeds:
                paths.record("pretrain", arm, seed).unlink()
        with pytest.raises(
            UserError, match=r"nothing to report.*scratch, seed 0.*pretrain-scratch-seed-0.json.*`maskdm"
        ):
            report_on(self.params)
        assert not any(paths.REPORT.iterdir())

    def test_what_is_missing_goes_to_stderr(self, capsys):
        write_results(self.params)
        paths.metrics("patch-m50", 1).unlink()
        print_report(report_on(self.params))
        found = capsys.readouterr()
        assert found.err.startswith("missing: patch-m50, seed 1: ") and "missing: " not in found.out


@pytest.mark.usefixtures("_no_figures")
class TestTuning:
    params = make_params(PAIR, trials=TRIALS)

    def test_every_trial_is_shown_the_chosen_one_marked(self):
        write_results(self.params)
        edit_json(self.params, paths.trial("scratch", "high"), failed="loss not finite at step 7", fid=None, kid=None)
        report_on(self.params)
        table = [line for line in (paths.REPORT / "summary.md").read_text().splitlines() if "finetune.batch" in line]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")]
        assert ["scratch", "smaller", "finetune.batch\\_size 64", "9.00", "27.00", "chosen"] in rows
        text = page_text()
        assert "| scratch | high | pretrain.lr 0.004, finetune.lr 0.004 | – | – | failed: loss not finite" in text
        assert "same 4 trials, each with 30% of the budget, on seed 1000" in text and "lowest KID was chosen" in text
        assert "scratch: smaller (finetune.batch_size 64)" in text
        row = verdict_rows()["scratch"]
        assert (row["trial"], row["num_trials"]) == ("smaller", "4")
        assert read_results(self.params).tuning_wall_seconds == {"scratch": 20.0, "patch-m50": 20.0}

    def test_values_at_the_edge_of_what_was_tried_are_cautioned_against(self):
        three = {name: TRIALS[name] for name in ("low", "given", "high")}
        write_results(make_params(PAIR, trials=three))
        report_on(make_params(PAIR, trials=three))
        assert (
            "finetune.lr 0.004, the largest of 3 (scratch, patch-m50); pretrain.lr 0.004, the largest of 3 (patch-m50)."
        ) in page_text()

    def test_values_inside_the_range_are_not(self):
        inside = {"low": TRIALS["low"], "high": TRIALS["high"], "given": {}}
        write_results(make_params(PAIR, trials=inside))
        report_on(make_params(PAIR, trials=inside))
        assert "at the edge" not in page_text()

    def test_given_values_are_said_to_be_given(self):
        params = make_params({**PAIR, "patch-m50": {**ARMS["patch-m50"], "pretrain": {"lr": 1e-3}}})
        write_results(params)
        report_on(params)
        text = page_text()
        assert "none was tuned by this pipeline" in text and "patch-m50: pretrain.lr 0.001" in text
        assert verdict_rows()["patch-m50"]["num_trials"] == "1"

    @pytest.mark.parametrize(
        ("change", "reason", "command"),
        [
            (
                {"trials": {**TRIALS, "high": {"finetune.lr": 8e-3, "pretrain.lr": 4e-3}}},
                "tuning/scratch/high.json is out of date: ",
                "maskdm tune --arm scratch --trial high",
            ),
            (
                {"trials": {**TRIALS, "more": {"finetune.lr": 9e-3}}},
                "tuning/scratch/more.json is missing",
                "maskdm tune --arm scratch --trial more",
            ),
            ({"metric": "fid"}, 'results/chosen is out of date: tuning.metric was "kid", is "fid"', "maskdm choose"),
        ],
        ids=["another value", "another trial", "another metric"],
    )
    def test_no_arm_is_shown_with_values_that_another_tuning_might_not_choose(self, change, reason, command):
        write_results(self.params)
        content = self.params.model_dump(mode="json", exclude_unset=True)
        content["tuning"] |= change
        with pytest.raises(UserError, match="nothing to report") as caught:
            read_results(parse_params(content))
        assert "scratch, seed 0: results/pretrain/scratch/seed-0 is out of date: " in str(caught.value)
        assert reason in str(caught.value) and f"run `{command}`" in str(caught.value)

    @pytest.mark.parametrize("content", [b"no", None], ids=str)
    def test_a_trial_that_is_damaged_or_missing_costs_its_arm_alone(self, content):
        write_results(self.params)
        file = paths.trial("patch-m50", "low")
        file.unlink() if content is None else file.write_bytes(content)
        written = report_on(self.params)
        assert len(written.missing) == 3 and all(f"out of date: {file} is " in line for line in written.missing)
        assert written.missing[0].endswith("run `maskdm tune --arm patch-m50 --trial low`")
        rows = verdict_rows()
        assert [rows[arm]["num_trials"] for arm in PAIR] == ["4", ""] and "Chosen: scratch: smaller" in page_text()

    def test_an_arm_whose_trials_have_all_failed_is_missing_and_the_others_are_shown(self):
        write_results(self.params)
        for trial in TRIALS:
            edit_json(self.params, paths.trial("patch-m50", trial), failed="loss not finite", fid=None, kid=None)
        publish_description(
            paths.chosen("patch-m50"), {"arm": "patch-m50", "trial": None, "values": {}, "failed": "all"}
        )
        stamp_outputs(self.params)
        report_on(self.params)
        assert "scratch: smaller (finetune.batch_size 64); patch-m50: none, all have failed." in page_text()
        row = verdict_rows()["patch-m50"]
        assert (row["num_seeds"], row["trial"]) == ("0", "")
        assert "every trial of arm patch-m50 has failed" in row["verdict"]

    def test_tuning_that_was_switched_off_leaves_stale_results(self):
        write_results(self.params)
        says = (
            r"results/finetune/scratch/seed-0 is out of date: finetune.batch_size was 64, is 128; .*`maskdm finetune "
        )
        with pytest.raises(UserError, match=says):
            read_results(make_params(PAIR))

    def test_an_arm_trained_with_another_choice_is_missing(self):
        write_results(self.params)
        edit_choice("scratch", "given", {})
        stamp_outputs(self.params, "choose")
        found = read_results(self.params)
        assert {run.arm for run in found.runs} == {"patch-m50"} and len(found.missing) == len(self.params.seeds)
        assert all(": finetune.batch_size was 64, is 128; " in missing.reason for missing in found.missing)


def edit_choice(arm: str, trial: str, values: dict) -> None:
    publish_description(paths.chosen(arm), {"arm": arm, "trial": trial, "values": values})


class TestStale:
    """Results of other params than today's are missing, whatever of the files is still there."""

    @pytest.mark.parametrize(
        ("section", "change", "says"),
        [
            (
                "dataset",
                {"held_out": 0.1},
                "results/data is out of date: dataset.held_out was 0.0, is 0.1; run `maskdm prepare`",
            ),
            ("budget", {"unmasked_steps": 2000}, "num_steps was 1000, is 2000"),
            ("budget", {"milestones": [0.5, 1.0]}, "milestones was [500, 750, 1000], is [500, 1000]"),
            ("model", {"depth": 7}, "model.depth was 5, is 7"),
            ("finetune", {"lr": 1e-3}, "finetune.lr was 0.002, is 0.001"),
            ("training", {"flip": 0.5}, "training.flip was 0.0, is 0.5"),
            ("compute", {"precision": "bf16"}, 'compute.precision was "fp32", is "bf16"'),
            ("sampling", {"num_steps": 20}, "sampling.num_steps was 50, is 20"),
            ("sampling", {"num_samples": 500}, "sampling.num_samples was 1000, is 500"),
            ("evaluation", {"kid_subsets": 10}, "results/metrics/scale.json is out of date: evaluation.kid_subsets"),
        ],
        ids=str,
    )
    def test_results_of_other_params_are_stale(self, section: str, change: dict, says: str):
        params = make_params(PAIR)
        write_results(params)
        with pytest.raises(UserError, match=re.escape(says)):
            read_results(changed(params, section, **change))

    @pytest.mark.parametrize(
        ("section", "change"),
        [
            ("compute", {"threads": 2, "compile": "off", "attention": "plain", "activation_checkpointing": True}),
            ("saving", {"every_seconds": 5.0}),
            ("data", {"device_resident": False}),
            ("tracking", {"enabled": False}),
            ("finetune", {"micro_batch_size": 32}),
        ],
        ids=str,
    )
    def test_results_of_another_machine_or_its_use_are_not(self, section: str, change: dict):
        params = make_params(PAIR)
        write_results(params)
        assert not read_results(changed(params, section, **change)).missing

    def test_pretraining_of_others_does_not_make_scratch_stale(self):
        params = make_params(PAIR)
        write_results(params)
        found = read_results(changed(params, "pretrain", lr=1e-5))
        assert {run.arm for run in found.runs} == {"scratch"}
        assert found.missing[0].reason == (
            "results/pretrain/patch-m50/seed-0 is out of date: pretrain.lr was 0.002, is 1e-05"
        )
        assert found.missing[0].command == "maskdm pretrain --arm patch-m50 --seed 0"


def changed(params: Params, section: str, **change: object) -> Params:
    content = params.model_dump(mode="json", exclude_unset=True)
    content[section] = {**content.get(section, {}), **change}
    return parse_params(content)


class TestFiles:
    def test_the_report_names_what_was_run(self, report):
        text = (report[0] / "summary.md").read_text()
        for fact in (
            *("1,797", "8×8", EXTRACTOR_SHA, DATA_SHA, "97.3%", "0123456789abcdef", "torch 2.8.0", "ddim, 50 steps"),
            *("EMA weights", "3.25", "95.5", "Student's t", "lanczos", "biased", "not biased"),
        ):
            assert fact in text, fact
        assert "8×8 \\| as \\<shipped\\>" in text
        assert "not Inception FIDs" in " ".join(text.split())
        assert "6 arms are compared at once" in text

    def test_equal_results_give_equal_bytes(self, report):
        write_results(make_params())
        report_on(make_params())
        names = {file.name for file in report[0].iterdir()}
        assert {"summary.csv", "verdicts.csv", "summary.md", "report.html"} <= names
        assert {file.name for file in paths.REPORT.iterdir()} == names
        for name in names:
            assert (paths.REPORT / name).read_bytes() == (report[0] / name).read_bytes(), name

    @pytest.mark.usefixtures("_no_figures")
    def test_removed_arms_and_seeds_are_not_looked_at(self, report):
        write_results(make_params({**ARMS, "patch-m99": {"strategy": "patch", "mask_rate": 0.9}}, seeds=(0, 1, 2)))
        paths.metrics("patch-m99", 0).write_text("broken")
        paths.metrics("patch-m50", 7).write_text("broken")
        report_on(make_params())
        for name in ("summary.csv", "verdicts.csv"):
            assert (paths.REPORT / name).read_bytes() == (report[0] / name).read_bytes()
        assert "patch-m99" not in (paths.REPORT / "report.html").read_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_fewer_real_images_than_features_are_cautioned_against(self):
        params = make_params({"scratch": ARMS["scratch"]})
        write_results(params)
        for num_real, is_told in ((129, False), (100, True)):
            edit_json(params, paths.record("features"), num_features=128, num_real=num_real)
            report_on(params)
            assert ("100 images are too few for 128 features" in page_text()) == is_told

    @pytest.mark.usefixtures("_no_figures")
    def test_another_extractor_needs_no_classifier_caution(self):
        params = make_params({"scratch": ARMS["scratch"]})
        write_results(params)
        for file in (*(paths.metrics("scratch", seed) for seed in params.seeds), paths.record("features"), paths.SCALE):
            edit_json(params, file, extractor="dinov2-vit-s-14")
        assert not report_on(params).missing
        assert "not Inception FIDs" not in page_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_a_mask_rate_far_from_what_was_asked_is_cautioned_against(self, report):
        assert "does not allow every mask rate" not in (report[0] / "summary.md").read_text()
        params = make_params({"scratch": ARMS["scratch"], "crop-m10": {"strategy": "crop", "mask_rate": 0.1}})
        write_results(params)
        report_on(params)
        assert "crop-m10 masked 0.25 instead of 0.10" in page_text()

    @pytest.mark.usefixtures("_no_figures")
    @pytest.mark.parametrize(
        ("change", "says"),
        [
            ({"threads": 2}, "threads 1 (scratch, patch-m50) and 2 (crop-m45)"),
            ({"device_name": "NVIDIA H200"}, "device A <fast> CPU (scratch, patch-m50) and NVIDIA H200 (crop-m45)"),
            ({"machine": {"cpu": "Another"}}, "device A <fast> CPU (scratch, patch-m50) and Another (crop-m45)"),
            ({"compile": "default"}, "compile off (scratch, patch-m50) and default (crop-m45)"),
            ({"attention": "fused"}, "attention plain (scratch, patch-m50) and fused (crop-m45)"),
            ({"activation_checkpointing": True}, "activation checkpointing off (scratch, patch-m50) and on (crop-m45)"),
            ({"threads": 2, "devices": 4}, "threads 1 (scratch, patch-m50) and 2 (crop-m45); devices 1 (scratch, "),
        ],
        ids=str,
    )
    def test_arms_that_ran_differently_are_cautioned_against(self, change, says):
        params = make_params(THREE)
        write_results(params)
        for stage, seed in product(("pretrain", "finetune"), params.seeds):
            edit_record(stage, "crop-m45", seed, **change)
        report_on(params)
        assert f"The arms did not run alike: {says}" in page_text()
        assert "(crop-m45). Their scores agree up to rounding; their seconds are not comparable." in page_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_an_arm_whose_stages_ran_differently_stands_with_both_and_bf16_is_said_to_round_coarsely(self):
        write_results(make_params(THREE))
        edit_record("pretrain", "patch-m50", 0, precision="bf16")
        report_on(make_params(THREE))
        says = "precision fp32 (scratch, patch-m50, crop-m45) and bf16 (patch-m50). Their scores agree up to rounding, "
        assert says in page_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_arms_that_ran_alike_are_not(self):
        """What trains no arm, what follows from its mask, and what old records do not say: none is a difference."""
        params = make_params(THREE)
        write_results(params)
        edit_record("pretrain", "scratch", 0, threads=8)  # of no step
        for seed in params.seeds:
            edit_record("pretrain", "crop-m45", seed, attention="fused")  # of another number of tokens than patch-m50
            edit_record("evaluate", "crop-m45", seed, threads=8, device_name="NVIDIA H200")
        file = paths.record("finetune", "patch-m50", 1)
        write_json(file, {key: value for key, value in json.loads(file.read_text()).items() if key not in RAN_WITH})
        report_on(params)
        assert "did not run alike" not in page_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_one_arm_is_compared_with_none(self):
        params = make_params({"scratch": ARMS["scratch"]})
        write_results(params)
        edit_record("finetune", "scratch", 0, threads=8)
        report_on(params)
        assert "did not run alike" not in page_text()

    @pytest.mark.usefixtures("_no_figures")
    def test_seeds_are_said_to_be_few_until_they_are_not(self, report):
        assert "3 seeds are few" in (report[0] / "summary.md").read_text()
        params = make_params(PAIR, seeds=range(6))
        write_results(params, {"scratch": (10.0, 11.0, 12.0, 13.0, 14.0, 15.0), "patch-m50": (9.0,) * 6})
        report_on(params)
        assert "are few" not in page_text() and "n = 6" in page_text()

    def test_a_finished_report_is_printed_again_as_it_was(self, report, capsys, monkeypatch):
        monkeypatch.chdir(report[0].parents[1])
        print_report(report[1])
        first = capsys.readouterr().out
        print_summary(make_params())
        again = capsys.readouterr().out
        assert again == f"experiment digits-test\n\n{first}"
        assert max(map(len, first.splitlines()[:-1])) <= 110
        assert first.startswith("scratch: the arm that the others are compared with") and "FID (n=3)" in first
        assert not re.search(r"\b[np]\n|=\n|\d\n *%", first) and "\N{NO-BREAK SPACE}" not in first
        assert first.splitlines()[-1].endswith("results/report/report.html")

    def test_without_a_report_the_summary_says_so(self):
        with pytest.raises(UserError, match=r"verdicts.csv is missing; run first: dvc repro"):
            print_summary(make_params())


def html_text() -> str:
    """What report.html says, in one line, code in backticks."""
    page = re.sub(r"</?code>", "`", (paths.REPORT / "report.html").read_text())
    return " ".join(html.unescape(page).split())


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.345, "12.3"), (0.012345, "0.0123"), (123456.7, "123,457"), (-1.5, "-1.50")],
)
def test_numbers_have_three_digits(value, text):
    assert number_text(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.034, "+0.03"), (-0.034, "−0.03"), (-0.001, "0.00"), (0.0, "0.00")])
def test_differences_have_a_sign_unless_they_are_zero(value, text):
    assert signed(value, 2) == text


def test_decimals_follow_the_size_of_a_column():
    places = [decimals(pd.Series([size, -size])) for size in (0.0, 0.0123, 0.5, 1.5, 12.0, 1234.0)]
    assert places == [2, 4, 3, 2, 2, 2]
    assert all(a >= b for a, b in pairwise(places[1:]))
