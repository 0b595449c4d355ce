"""The report: its numbers against hand computation, its errors, and what its files hold."""

import csv
import json
import math
import re
import shutil
import statistics
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from maskdm import paths
from maskdm.config import Params, parse_params
from maskdm.errors import UserError
from maskdm.report import format_final, print_table, write_report
from maskdm.report.figures import FIGURES, image_grid
from maskdm.report.looks import arm_looks
from maskdm.report.tables import decimals, number_text

ARMS = {
    "scratch": {"strategy": "none"},
    "patch-m25": {"strategy": "patch", "mask_rate": 0.25},
    "patch-m50": {"strategy": "patch", "mask_rate": 0.5},
    "patch-m75": {"strategy": "patch", "mask_rate": 0.75},
    "block2-m50": {"strategy": "block", "block_size": 2, "mask_rate": 0.5},
    "block2-m75": {"strategy": "block", "block_size": 2, "mask_rate": 0.75},
    "crop-m45": {"strategy": "crop", "mask_rate": 0.45},
}
FINAL_FIDS = {  # by arm: seed 0, seed 1
    "scratch": (10.0, 12.0),
    "patch-m25": (9.0, 10.0),
    "patch-m50": (11.0, 11.5),
    "patch-m75": (14.0, 15.0),
    "block2-m50": (10.5, 13.0),
    "block2-m75": (16.0, 15.0),
    "crop-m45": (20.0, 22.0),
}
BUDGET_FLOPS = 4.2e13
DATA_SHA = "d" * 64


def make_params(arms: dict | None = None, seeds: tuple = (0, 1), milestones: tuple = (0.5, 0.75, 1.0)) -> Params:
    return parse_params(
        {
            "name": "digits-test",
            "seeds": list(seeds),
            "dataset": {"source": "digits", "image_size": 8, "channels": 1},
            "model": {"patch_size": 2, "dim": 64, "depth": 5, "num_heads": 4},
            "diffusion": {"schedule": "cosine", "prediction": "x_0"},
            "budget": {"match": "flops", "unmasked_steps": 1000, "milestones": list(milestones)},
            "training": {},
            "pretrain": {"share": 0.3, "lr": "2e-3", "batch_size": 128},
            "finetune": {"lr": "2e-3", "batch_size": 128},
            "sampling": {},
            "compute": {},
            "evaluation": {},
            "arms": ARMS if arms is None else arms,
        }
    )


def write_results(params: Params, fids: dict | None = None) -> None:
    """Everything the report reads, in the working directory; numbers that depend on arm and seed alone."""
    rng = np.random.default_rng(0)
    write_data(params, rng)
    for number, arm in enumerate(params.arms):
        for place, seed in enumerate(params.seeds):
            fid = (fids or FINAL_FIDS).get(arm, (10.0 + number / 3,) * 9)[place]
            write_json(paths.metrics(arm, seed), make_metrics(params, arm, seed, fid))
            write_curves(params, arm, seed)
            write_json(paths.record("pretrain", arm, seed), make_record(train_seconds=2.5 + number, seed=seed))
            write_json(paths.record("finetune", arm, seed), make_record(train_seconds=40.0 + seed, seed=seed))
            write_samples(params, arm, seed, rng)


def write_data(params: Params, rng: np.random.Generator) -> None:
    size, channels = params.dataset.image_size, params.dataset.channels
    manifest = {
        "count": 1797,
        "shape": [size, size, channels],
        "sha256": DATA_SHA,
        "source": {"kind": "digits"},
        "protocol": {"note": "8×8 | as <shipped>"},
        "labels": True,
        "shards": [{"file": "images-00000.npy", "count": 100}],
    }
    write_json(paths.DATA / "manifest.json", manifest)
    np.save(paths.DATA / "images-00000.npy", rng.integers(0, 256, (100, size, size, channels), dtype=np.uint8))
    write_json(paths.record("prepare"), make_record())
    write_json(paths.record("features"), make_record(extractor="classifier", classifier_accuracy=0.9731))


def write_json(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def make_record(**entries: object) -> dict:
    return {
        "wall_seconds": 1.0,
        "images_per_second": 1234.5,
        "peak_memory_gib": 0.61,
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "versions": {"python": "3.11.7", "torch": "2.8.0"},
        "machine": {"cpu": "A <fast> CPU", "cores": 2},
        "params_fingerprint": "f" * 16,
        **entries,
    }


def make_metrics(params: Params, arm: str, seed: int, final_fid: float) -> dict:
    config = params.arm(arm)
    milestones = {}
    for fraction in params.budget.milestones:
        fid = final_fid * (1 + 1.5 * (1 - fraction))
        milestones[f"{fraction:.3f}"] = {
            "step": round(1000 * fraction),
            "flops": BUDGET_FLOPS * fraction,
            "images_seen": round(128000 * fraction),
            "fid": fid,
            "kid": fid / 3000,
            "kid_std": 0.0007,
            "precision": 0.8 - fid / 100,
            "recall": 0.7 - fid / 100,
        }
    return {
        "arm": arm,
        "seed": seed,
        "strategy": config.strategy,
        "mask_rate": config.mask_rate,
        "realised_mask_rate": params.visible_of(arm).realised_mask_rate(params.grid),
        "block_size": config.block_size,
        "num_samples": 1000,
        "extractor": "classifier",
        "extractor_sha256": "e" * 64,
        **{k: v for k, v in milestones["1.000"].items() if k in ("fid", "kid", "precision", "recall")},
        "fid_floor": 3.25,
        "kid_floor": 0.0002,
        "floor_num_samples": 898,
        "data_sha256": DATA_SHA,
        "milestones": milestones,
    }


def write_curves(params: Params, arm: str, seed: int) -> None:
    share, place = params.pretrain_of(arm).share, 100 * list(params.arms).index(arm)
    write_curve(paths.pretrain(arm, seed), 0.0, share, seed + place)
    write_curve(paths.finetune(arm, seed), share, 1.0, seed + place + 10)


def write_curve(folder: Path, start: float, end: float, seed: int) -> None:
    noise = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["step,loss,lr,images_seen,tokens_seen,flops"]
    for index, done in enumerate(np.linspace(start, end, 400 if end > start else 0).tolist()):
        loss = 0.05 + seed / 5000 + 0.4 * math.exp(-9 * (done - start)) * (1 + 0.2 * noise.standard_normal())
        step = 3 * (index + 1)
        lines.append(f"{step},{loss!r},0.002,{step * 128},{step * 2048},{done * BUDGET_FLOPS!r}")
    (folder / "curve.csv").write_text("\n".join(lines) + "\n")


def write_samples(params: Params, arm: str, seed: int, rng: np.random.Generator) -> None:
    size, channels = params.dataset.image_size, params.dataset.channels
    folder = paths.samples(arm, seed)
    folder.mkdir(parents=True, exist_ok=True)
    images = rng.integers(0, 256, (80, size, size, channels), dtype=np.uint8)
    np.save(folder / f"milestone-{params.budget.milestones[-1]:.3f}.npy", images)


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    """The report of 7 arms × 2 seeds × 3 milestones: its folder and what write_report returned."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("report")
        patch.chdir(root)
        write_results(make_params())
        final = write_report(make_params())
    return root / paths.REPORT, final


def read_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_summary_has_a_row_per_arm_seed_and_milestone_in_the_order_of_params(report):
    rows = read_rows(report[0] / "summary.csv")
    expected = [(a, s, m) for a in ARMS for s in (0, 1) for m in (0.5, 0.75, 1.0)]
    assert [(r["arm"], int(r["seed"]), float(r["milestone"])) for r in rows] == expected


def test_summary_holds_the_milestone_s_numbers_to_the_last_digit(report):
    row = next(r for r in read_rows(report[0] / "summary.csv") if r["arm"] == "block2-m75" and r["seed"] == "1")
    metrics = make_metrics(make_params(), "block2-m75", 1, 15.0)
    for name, value in metrics["milestones"]["0.500"].items():
        assert float(row[name]) == value, name
    for name in (
        "realised_mask_rate",
        "block_size",
        "mask_rate",
        "fid_floor",
        "num_samples",
        "floor_num_samples",
    ):
        assert float(row[name]) == metrics[name], name
    assert (row["strategy"], row["extractor"], row["data_sha256"]) == ("block", "classifier", DATA_SHA)
    assert [float(row[f"{stage}_seconds"]) for stage in ("pretrain", "finetune", "train")] == [
        7.5,
        41.0,
        48.5,
    ]


def test_whole_numbers_stay_whole_and_nulls_empty(report):
    scratch = read_rows(report[0] / "summary.csv")[0]
    assert (scratch["step"], scratch["images_seen"], scratch["seed"]) == ("500", "64000", "0")
    assert (scratch["mask_rate"], scratch["block_size"], scratch["realised_mask_rate"]) == ("", "", "0.0")


def test_final_means_and_standard_deviations_are_the_seeds(report):
    for row in read_rows(report[0] / "final.csv"):
        fids = FINAL_FIDS[row["arm"]]
        assert float(row["fid"]) == pytest.approx(statistics.mean(fids), rel=1e-12)
        assert float(row["fid_std"]) == pytest.approx(statistics.stdev(fids), rel=1e-12)
        assert float(row["kid_x1000"]) == pytest.approx(statistics.mean(fids) / 3, rel=1e-12)
        assert float(row["kid_x1000_std"]) == pytest.approx(statistics.stdev(fids) / 3, rel=1e-12)
        assert float(row["precision"]) == pytest.approx(0.8 - statistics.mean(fids) / 100, rel=1e-12)
        assert float(row["recall_std"]) == pytest.approx(statistics.stdev(fids) / 100, rel=1e-9)
        assert float(row["tflops"]) == pytest.approx(42.0)
        assert float(row["images_seen"]) == 128000


def test_delta_is_paired_by_seed(report):
    rows = {row["arm"]: row for row in read_rows(report[0] / "final.csv")}
    pairs = zip(FINAL_FIDS["block2-m50"], FINAL_FIDS["scratch"], strict=True)
    deltas = [ours - theirs for ours, theirs in pairs]  # +0.5 and +1.0
    assert float(rows["block2-m50"]["delta_fid"]) == pytest.approx(statistics.mean(deltas))
    assert float(rows["block2-m50"]["delta_fid_std"]) == pytest.approx(statistics.stdev(deltas))
    assert rows["patch-m50"]["seeds_better"] == "1"
    assert rows["scratch"]["delta_fid"] == rows["scratch"]["seeds_better"] == ""


def test_write_report_returns_the_final_table(report):
    folder, final = report
    assert list(final["arm"]) == list(ARMS)
    assert list(final.columns) == list(read_rows(folder / "final.csv")[0])


def test_the_verdicts_say_what_the_seeds_say(report):
    text = (report[0] / "summary.md").read_text()
    assert "**patch-m25**: fid 9.50 ± 0.71 against scratch's 11.00 ± 1.41 at equal compute" in text
    assert re.search(r"\*\*patch-m25\*\*: .*: \*\*better with 2 of 2 seeds\*\*", text)
    assert re.search(r"\*\*crop-m45\*\*: .*: \*\*worse with 2 of 2 seeds\*\*", text)
    assert re.search(r"\*\*patch-m50\*\*: .*undecided \(worse on average, better with 1 of 2 seeds\)", text)
    assert "1 of 6 masked arms had a lower FID than scratch at equal compute: patch-m25" in text
    assert "for 1 the seeds disagree" in text


def test_an_arm_that_gets_there_sooner_is_said_to():
    arms = {key: ARMS[key] for key in ("scratch", "patch-m25", "patch-m50")}
    params = make_params(arms, seeds=(0,))
    write_results(params, {"scratch": (10.0,), "patch-m25": (7.0,), "patch-m50": (9.5,)})
    write_report(params)
    lines = (paths.REPORT / "summary.md").read_text().splitlines()
    assert "final fid from 0.75 of the budget on" in next(line for line in lines if line.startswith("- **patch-m25"))
    assert "of the budget on" not in next(line for line in lines if line.startswith("- **patch-m50"))


def test_the_report_names_what_was_run(report):
    folder, _ = report
    text = (folder / "summary.md").read_text()
    for fact in (
        "1,797",
        "8×8",
        "e" * 64,
        "97.3%",
        "0123456789abcdef",
        "torch 2.8.0",
        "ddim, 50 steps",
        "3.25",
    ):
        assert fact in text, fact
    assert "8×8 \\| as \\<shipped\\>" in text
    assert "not Inception FIDs" in " ".join(text.split())


def test_every_figure_is_linked_and_not_blank(report):
    folder, _ = report
    text = (folder / "summary.md").read_text()
    for name in FIGURES:
        assert f"]({name})" in text
        with Image.open(folder / name) as image:
            assert not image.info.get("Software")
            pixels = np.asarray(image.convert("L"), dtype=float)
        assert pixels.shape[0] > 200 and pixels.shape[1] > 400
        assert pixels.var() > 100, name


def test_the_page_needs_nothing_else(report):
    page = (report[0] / "index.html").read_text()
    sources = re.findall(r"""(?:src|href)=["']?([^"'\s>]+)""", page)
    assert len(sources) == len(FIGURES)
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "http:" not in page and "https:" not in page and "<script" not in page and "url(" not in page


def test_the_page_escapes_what_it_was_given(report):
    page = (report[0] / "index.html").read_text()
    assert "A &lt;fast&gt; CPU" in page and "<fast>" not in page
    assert "as &lt;shipped&gt;" in page and "<shipped>" not in page


def test_equal_results_give_equal_bytes(report):
    write_results(make_params())
    write_report(make_params())
    for file in sorted(report[0].iterdir()):
        assert (paths.REPORT / file.name).read_bytes() == file.read_bytes(), file.name
    assert {f.name for f in paths.REPORT.iterdir()} == {
        *("summary.csv", "final.csv", "final.md", "summary.md", "index.html"),
        *FIGURES,
    }


def test_one_seed_is_cautioned_against_and_has_no_spread():
    params = make_params(seeds=(0,))
    write_results(params)
    final = write_report(params)
    text = (paths.REPORT / "summary.md").read_text()
    assert "One seed proves nothing" in text and "One seed proves nothing" in (paths.REPORT / "index.html").read_text()
    assert "±" not in text and "±" not in format_final(final)
    assert final["fid_std"].isna().all()
    assert re.search(r"\*\*patch-m50\*\*: fid 11.00 against scratch's 10.00 at equal compute.*: \*\*worse\*\*", text)


def test_two_seeds_are_said_to_be_few_and_six_are_not(report):
    assert "2 seeds are few" in (report[0] / "summary.md").read_text()
    params = make_params({"scratch": ARMS["scratch"], "patch-m50": ARMS["patch-m50"]}, seeds=range(6))
    write_results(params, {"scratch": (10, 11, 12, 13, 14, 15), "patch-m50": (9, 10, 11, 12, 13, 14)})
    write_report(params)
    text = (paths.REPORT / "summary.md").read_text()
    assert "are few" not in text and "better with 6 of 6 seeds" in text


def test_without_scratch_there_is_no_delta():
    params = make_params({key: arm for key, arm in ARMS.items() if key != "scratch"})
    write_results(params)
    final = write_report(params)
    text = (paths.REPORT / "summary.md").read_text()
    assert final["delta_fid"].isna().all() and "Δ" not in format_final(final) and "ΔFID" not in text
    assert "No comparison is possible: there is no arm without pretraining" in text


@pytest.mark.parametrize("arm", ["scratch", "patch-m50"])
def test_one_arm_one_seed_one_milestone(arm):
    params = make_params({arm: ARMS[arm]}, seeds=(3,), milestones=(1.0,))
    write_results(params)
    final = write_report(params)
    assert len(final) == 1 and len(read_rows(paths.REPORT / "summary.csv")) == 1
    assert "No comparison is possible" in (paths.REPORT / "summary.md").read_text()


def test_another_extractor_needs_no_classifier_caution():
    params = make_params({"scratch": ARMS["scratch"]})
    write_results(params)
    for seed in params.seeds:
        edit_metrics("scratch", seed, extractor="dinov2-vit-s-14")
    write_report(params)
    assert "not Inception FIDs" not in " ".join((paths.REPORT / "summary.md").read_text().split())


def test_unequal_compute_is_not_called_equal():
    params = make_params()
    write_results(params)
    for seed in params.seeds:
        metrics = json.loads(paths.metrics("patch-m25", seed).read_text())
        metrics["milestones"]["1.000"]["flops"] *= 1.5
        write_json(paths.metrics("patch-m25", seed), metrics)
    write_report(params)
    text = (paths.REPORT / "summary.md").read_text()
    assert "at 1.50× its compute" in text and "differs by up to 50%" in " ".join(text.split())


def test_a_mask_rate_far_from_what_was_asked_is_cautioned_against(report):
    assert "does not allow every mask rate" not in (report[0] / "summary.md").read_text()
    params = make_params({"scratch": ARMS["scratch"], "crop-m10": {"strategy": "crop", "mask_rate": 0.1}})
    write_results(params)
    write_report(params)
    assert "crop-m10 masked 0.25 instead of 0.10" in (paths.REPORT / "summary.md").read_text()


def test_colour_images_and_a_wide_range_of_fids():
    content = {
        **make_params().model_dump(),
        "dataset": {"source": "image_folder", "root": "x", "image_size": 32, "channels": 3},
    }
    params = parse_params(content)
    write_results(params, {**FINAL_FIDS, "scratch": (3.5, 4.0), "crop-m45": (90.0, 120.0)})
    for seed in params.seeds:
        edit_metrics("scratch", seed, fid_floor=0.0)
    write_report(params)
    with Image.open(paths.REPORT / "samples.png") as image:
        colors = np.asarray(image.convert("RGB"), dtype=int)
    assert np.abs(colors[..., 0] - colors[..., 2]).max() > 50


def edit_metrics(arm: str, seed: int, **entries: object) -> None:
    file = paths.metrics(arm, seed)
    write_json(file, {**json.loads(file.read_text()), **entries})


@pytest.mark.parametrize(
    ("file", "command"),
    [
        (paths.metrics("patch-m50", 1), "maskdm evaluate --arm patch-m50 --seed 1"),
        (paths.pretrain("scratch", 0) / "curve.csv", "maskdm pretrain --arm scratch --seed 0"),
        (paths.finetune("crop-m45", 1) / "curve.csv", "maskdm finetune --arm crop-m45 --seed 1"),
        (paths.record("finetune", "patch-m25", 0), "maskdm finetune --arm patch-m25 --seed 0"),
        (paths.record("pretrain", "patch-m25", 0), "maskdm pretrain --arm patch-m25 --seed 0"),
        (paths.samples("block2-m50", 0) / "milestone-1.000.npy", "maskdm sample --arm block2-m50 --seed 0"),
        (paths.record("features"), "maskdm features"),
        (paths.record("prepare"), "maskdm prepare"),
        (paths.DATA / "manifest.json", "maskdm prepare"),
        (paths.DATA / "images-00000.npy", "maskdm prepare"),
    ],
    ids=str,
)
def test_a_missing_or_broken_file_is_named_with_the_command_that_makes_it(file, command):
    write_results(make_params())
    for content in (b"", b"\x80 no", None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(UserError) as caught:
            write_report(make_params())
        assert str(file) in str(caught.value) and f"`{command}`" in str(caught.value)
    assert not paths.REPORT.exists()


def test_a_missing_milestone_is_named():
    write_results(make_params(milestones=(0.5, 1.0)))
    with pytest.raises(UserError, match=r"scratch-seed-0.json lacks milestone 0.750 .*`maskdm evaluate --arm scratch"):
        write_report(make_params())


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"mask_rate": 0.4}, "is stale.*mask_rate 0.4, params.yaml has 0.5"),
        ({"extractor_sha256": "other"}, "not comparable: extractor_sha256 is other and eee"),
        ({"num_samples": 10}, "not comparable: num_samples is 10 and 1000"),
        ({"data_sha256": "other"}, "other data"),
        ({"milestones": None}, "lacks milestone 0.500"),
    ],
)
def test_stale_or_incomparable_metrics_are_refused(entries, message):
    write_results(make_params())
    edit_metrics("patch-m50", 1, **entries)
    with pytest.raises(UserError, match=message) as caught:
        write_report(make_params())
    assert str(paths.metrics("patch-m50", 1)) in str(caught.value)


def test_removed_arms_and_seeds_are_not_looked_at(report):
    write_results(make_params({**ARMS, "patch-m99": {"strategy": "patch", "mask_rate": 0.9}}, seeds=(0, 1)))
    edit_metrics("patch-m99", 0, num_samples=1)
    shutil.copy(paths.metrics("patch-m50", 1), paths.metrics("patch-m50", 7))
    write_report(make_params())
    for name in ("summary.csv", "final.csv"):
        assert (paths.REPORT / name).read_bytes() == (report[0] / name).read_bytes()
    assert "patch-m99" not in (paths.REPORT / "index.html").read_text()


def many_arms() -> dict:
    rates = (0.1, 0.25, 0.5, 0.75)
    arms: dict = {"scratch": ARMS["scratch"]}
    arms |= {f"patch-m{r * 100:02.0f}": {"strategy": "patch", "mask_rate": r} for r in (*rates, 0.6, 0.85)}
    for size in (2, 3, 4):
        arms |= {
            f"block{size}-m{r * 100:02.0f}": {**ARMS["block2-m50"], "block_size": size, "mask_rate": r} for r in rates
        }
    arms |= {f"crop-m{r * 100:02.0f}": {"strategy": "crop", "mask_rate": r} for r in rates}
    arms["patch-m50-a-long-name-that-goes-on-and-on"] = {**ARMS["patch-m50"], "pretrain": {"share": 0.4}}
    return arms


def test_the_terminal_table_fits(report, capsys):
    print_table(report[1])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert all(any(line.startswith(f"{arm} ") for line in lines) for arm in ARMS)
    assert "FID" in lines[0] and "ΔFID" in lines[0] and "9.50 ± 0.71" in "\n".join(lines)


def test_many_arms_fit_and_look_different():
    params = make_params(many_arms())
    assert len(params.arms) == 24
    write_results(params)
    final = write_report(params)
    assert max(map(len, format_final(final).splitlines())) <= 110
    assert len(set(arm_looks(params).values())) == 24


def test_the_table_shrinks_to_a_narrow_terminal(report):
    narrow = format_final(report[1], width=70)
    assert max(map(len, narrow.splitlines())) <= 70
    assert "FID" in narrow and "recall" not in narrow


def test_scratch_is_black_and_a_rate_has_one_marker():
    looks = arm_looks(make_params())
    assert looks["scratch"].color == "#000000"
    assert looks["patch-m50"].marker == looks["block2-m50"].marker != looks["patch-m75"].marker
    assert len({look.color for look in looks.values()}) == len(ARMS)


def test_an_image_grid_keeps_every_pixel():
    images = np.arange(4 * 8 * 8, dtype=np.uint8).reshape(4, 8, 8, 1)
    grid = image_grid(images, 2)
    scale = 320 // 16
    gap = 4
    assert grid.shape == (16 * scale + gap, 16 * scale + gap, 3)
    assert np.array_equal(grid[: 8 * scale : scale, : 8 * scale : scale, 1], images[0, ..., 0])
    assert np.array_equal(grid[8 * scale + gap :: scale, 8 * scale + gap :: scale, 2], images[3, ..., 0])


def test_large_images_are_reduced_by_averaging():
    images = np.random.default_rng(0).integers(0, 256, (16, 256, 256, 3), dtype=np.uint8)
    grid = image_grid(images, 4)
    assert 300 <= grid.shape[0] <= 400
    assert grid[0, 0] == pytest.approx(images[0, :3, :3].mean(axis=(0, 1)), abs=0.51)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (12.345, "12.3"), (0.012345, "0.0123"), (123456.7, "123,457"), (-1.5, "-1.50")],
)
def test_numbers_have_three_digits(value, text):
    assert number_text(value) == text


def test_decimals_follow_the_size_of_a_column():
    places = [decimals(pd.Series([size, -size])) for size in (0.0, 0.0123, 0.5, 1.5, 12.0, 1234.0)]
    assert places == [2, 4, 3, 2, 2, 2]
    assert all(a >= b for a, b in pairwise(places[1:]))
