"""Shards made ahead, in parts, by other processes: the same bytes for any number of them, killed or not."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from maskdm import engines, paths
from maskdm.checksums import file_sha256, with_checksum
from maskdm.config import Params, load_params, parse_params
from maskdm.data.arrays import ImageArrays
from maskdm.data.prepare import prepare, prepare_part
from maskdm.errors import ParamsError, UserError
from maskdm.stages.prepare import KEPT
from maskdm.stages.prepare import run as run_stage
from maskdm.stages.versions import STAGE_VERSIONS

ROOT = Path(__file__).parents[1]
NUM_IMAGES, SIDE = 50, 8
OUT = Path("out")


@pytest.fixture(autouse=True)
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fifty images in two classes, in `photos`; one of them bad."""
    monkeypatch.chdir(tmp_path)
    for i in range(NUM_IMAGES):
        path = Path("photos") / "ab"[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    Path("photos/a/20.png").write_bytes(b"no image")


def content(jobs: int, **dataset: Any) -> dict[str, Any]:
    given = yaml.safe_load((ROOT / "experiments" / "tiny" / "params.yaml").read_text(encoding="utf-8"))
    photos = {"source": "image_folder", "root": "photos", "image_size": SIDE, "channels": 3, "on_bad_image": "skip"}
    digits = {"source": "digits", "image_size": SIDE, "channels": 3, "limit": 40, "shard_images": 15}
    return {
        **given,
        "dataset": {**photos, "shard_images": 7, "held_out": 0.2, **dataset},
        "datasets": {"digits": digits},
        "data": {"prepare_jobs": jobs},
        "evaluation": {**given["evaluation"], "kid_subset_size": 20},
        "tracking": {"enabled": False},
    }


def params(jobs: int, **dataset: Any) -> Params:
    return parse_params(content(jobs, **dataset))


def bytes_of(folder: Path = OUT) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def straight() -> dict[str, bytes]:
    """What `prepare` makes by itself."""
    prepare(params(1), Path("straight"))
    return bytes_of(Path("straight"))


def test_shards_are_ranges_of_files_and_a_bad_one_moves_no_other() -> None:
    manifest = prepare(params(1, held_out=0.0), OUT)
    assert [shard["count"] for shard in manifest["shards"]] == [7, 6, *[7] * 5, 1]  # a/20.png is the eleventh
    assert [entry["file"] for entry in manifest["skipped"]] == ["a/20.png"]
    before = bytes_of()
    Path("photos/a/20.png").write_bytes(Path("photos/a/22.png").read_bytes())
    prepare(params(1, held_out=0.0), OUT)
    changed = {name for name, found in bytes_of().items() if found != before[name]}
    assert changed == {"images-00001.npy", "labels.npy", "manifest.json", "preview.png"}


def test_a_shard_of_bad_images_alone_is_left_out() -> None:
    for name in ("00", "02", "04"):
        Path(f"photos/a/{name}.png").write_bytes(b"")
    manifest = prepare(params(1, held_out=0.0, shard_images=3), OUT)
    assert manifest["shards"][0]["file"] == "images-00001.npy"
    assert not (OUT / "images-00000.npy").exists()
    arrays = ImageArrays.open(OUT)
    arrays.verify()
    assert len(arrays) == NUM_IMAGES - 4


@pytest.mark.parametrize("jobs", [2, 3, 20])
def test_any_number_of_parts_gives_the_same_bytes(jobs: int) -> None:
    expected = straight()
    made = [prepare_part(params(jobs), part, KEPT) for part in reversed(range(jobs))]
    assert sum(made) == 6 + 2 + 3  # training, held out, digits
    assert max(made) - min(made) <= 1, "shared evenly"
    prepare(params(jobs), OUT, KEPT)
    assert bytes_of() == expected
    assert not KEPT.exists()


def test_parts_are_taken_and_not_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    for part in range(3):
        prepare_part(params(3), part, KEPT)
    assert prepare_part(params(3), 0, KEPT) == 0
    monkeypatch.setattr("maskdm.data.collection.ImageFiles.load", None)  # nothing is read any more
    prepare(params(3), OUT, KEPT)
    assert len(ImageArrays.open(OUT)) + len(ImageArrays.open(OUT / "held_out")) == NUM_IMAGES - 1


def test_what_is_missing_is_made() -> None:
    expected = straight()
    prepare_part(params(3), 1, KEPT)
    prepare(params(3), OUT, KEPT)
    assert bytes_of() == expected
    prepare(params(4), OUT, KEPT)  # another number, and nothing kept
    assert bytes_of() == expected


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("damage", [_cut, Path.unlink])
def test_a_damaged_shard_is_made_again(suffix: str, damage: Any) -> None:
    expected = straight()
    for part in range(2):
        prepare_part(params(2), part, KEPT)
    damage(KEPT / f"images-00002{suffix}")
    prepare(params(2), OUT, KEPT)
    assert bytes_of() == expected


@pytest.mark.parametrize("change", ["an image", "params", "a class"])
def test_a_shard_of_other_images_or_params_is_not_taken(change: str) -> None:
    for part in range(2):
        prepare_part(params(2), part, KEPT)
    changed: dict[str, Any] = {}
    if change == "an image":
        Image.new("RGB", (SIDE, SIDE), "red").save("photos/b/03.png")
    elif change == "params":
        changed = {"resize_filter": "bicubic", "image_size": 4}
    else:
        Path("photos/a").rename("photos/c")
    prepare(params(2, **changed), OUT, KEPT)
    prepare(params(1, **changed), Path("straight"))
    assert bytes_of() == bytes_of(Path("straight"))


def slow_part(part: int) -> subprocess.Popen[bytes]:
    """One of two parts at work in another process, its first shard done."""
    text = yaml.safe_dump(content(2), sort_keys=False)
    Path("params.yaml").write_text(text, encoding="utf-8")
    slow = (
        "import time, maskdm.data.bulk_decoding as b; load = b._load\n"
        "b._load = lambda *a: time.sleep(0.02) or load(*a)\n"
        "from maskdm.config import load_params; from maskdm.stages.prepare import run\n"
        f"run(load_params(), {part})"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE)
    first = KEPT / f"images-{part:05d}.json"
    deadline = time.monotonic() + 60
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


def test_a_killed_part_goes_on_from_its_finished_shards() -> None:
    expected = straight()
    process, first = slow_part(0), KEPT / "images-00000.json"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was at work"
    kept = {path: path.stat().st_mtime_ns for path in KEPT.glob("images-*.json")}
    assert first in kept
    given = load_params()
    for part in range(2):
        prepare_part(given, part, KEPT, STAGE_VERSIONS["prepare"])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    prepare(given, OUT, KEPT, STAGE_VERSIONS["prepare"])
    assert bytes_of() == expected


@pytest.mark.parametrize("jobs", [2, 1])
def test_prepare_waits_for_a_part_at_work(jobs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its own number of jobs or another: it would remove the folder that the part writes to."""
    expected = straight()
    process, said = slow_part(1), ""
    process.send_signal(signal.SIGSTOP)
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(run_stage, params(jobs))
        try:
            while f"prepare: waiting for process {process.pid}" not in said:
                assert not future.done(), "it waits"
                said += capsys.readouterr().err
        finally:
            process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=60)
        future.result(timeout=60)
    assert (process.returncode, b"Traceback" in error) == (0, False), error.decode()
    assert bytes_of(paths.DATA) == expected
    assert not KEPT.exists()


def test_what_parts_have_made_is_taken_and_goes_without_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = straight()
    for part in range(2):
        run_stage(params(2), part)
    monkeypatch.setattr("maskdm.data.collection.ImageFiles.load", None)  # nothing is read any more
    run_stage(params(1))
    assert bytes_of(paths.DATA) == expected
    assert not KEPT.exists()


def test_without_jobs_nothing_is_kept() -> None:
    run_stage(params(1))
    assert not KEPT.exists()
    assert [path.name for path in paths.lock("prepare").parent.iterdir()] == ["prepare.lock"]


def test_shards_made_by_other_code_are_not_taken(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = straight()
    for _ in range(2):
        run_stage(params(2), 0)
    assert re.findall(r"made (\d+) shards", capsys.readouterr().err) == ["6", "0"]
    for file in KEPT.rglob("*.npy"):  # as other code may have made them
        note = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        del note["checksum"]
        np.save(file, np.load(file) // 2)
        note["sha256"] = file_sha256(file)
        file.with_suffix(".json").write_text(json.dumps(with_checksum(note)), encoding="utf-8")
    monkeypatch.setitem(STAGE_VERSIONS, "prepare", STAGE_VERSIONS["prepare"] + 1)
    run_stage(params(2), 0)
    assert re.findall(r"made (\d+) shards", capsys.readouterr().err) == ["6"]
    run_stage(params(2))
    assert bytes_of(paths.DATA) == expected


def test_a_bad_image_stops_a_part_and_is_named() -> None:
    with pytest.raises(UserError, match=r"bad image photos/a/20\.png"):
        for part in range(2):
            prepare_part(params(2, on_bad_image="error"), part, KEPT)
    assert not list(KEPT.rglob("*.building"))


@pytest.mark.parametrize("part", [-1, 3])
def test_a_part_that_there_is_not(part: int) -> None:
    with pytest.raises(ParamsError, match=rf"--part {part}: data\.prepare_jobs 3 has the parts 0 to 2"):
        run_stage(params(3), part)


def test_marks_of_parts_are_no_results() -> None:
    """They need not be there once the dataset is: DVC, which knows nothing of parts, makes none."""
    head = "output_file\tdate\trule\tlog-file(s)\tstatus\tplan\n"
    good = "results/data\t-\tprepare\tlogs/prepare.log\tok\tno update\n"
    mark = ".work/prepare-parts/0\t-\tprepare_part\tlogs/x.log\tmissing\tno update\n"
    assert engines._all_done(head + mark + good)
    assert not engines._all_done(head + mark)
    assert not engines._all_done(head + good.replace("ok", "missing"))


@pytest.mark.workflow
def test_snakemake_spreads_the_parts_and_gathers_the_same_bytes(tmp_path: Path) -> None:
    for name in ("Snakefile", "workflow", "profiles", "dvc.yaml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)  # type: ignore[operator]
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    found = []
    for jobs, rules in ((3, ["prepare_part"] * 3 + ["prepare"]), (1, ["prepare"])):
        Path("params.yaml").write_text(yaml.safe_dump(content(jobs), sort_keys=False), encoding="utf-8")
        shutil.rmtree("results", ignore_errors=True)
        words = ["snakemake", "--cores", "2", "results/data"]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        ran = [
            line.split()[1].rstrip(":") for line in done.stderr.splitlines() if line.startswith(("rule ", "localrule "))
        ]
        assert ran == rules
        assert not KEPT.exists()
        again = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert "Nothing to be done" in again.stderr
        files = bytes_of(Path("results/data"))
        found.append({name: content for name, content in files.items() if not name.endswith(".snakemake_timestamp")})
    assert found[0] == found[1]
