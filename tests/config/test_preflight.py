"""What would end a run after hours is told before it begins: too few real images, and weights that do not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from maskdm.base.errors import ParamsError
from maskdm.config import Params, parse_params
from maskdm.config.image_counts import NUM_IMAGES, most_real
from maskdm.config.preflight import check
from maskdm.data.digits import open_digits
from maskdm.models.exported import publish_exported
from tests.conftest import ARM, Experiment
from tests.factories import tiny_model, tiny_params
from tests.imported import modules_after

FOLDER = {"source": "image_folder", "root": "photos", "image_size": 8, "channels": 1, "limit": None}
TOO_FEW = "real images are fewer than the metrics need: 50 (evaluation.kid_subset_size 50"


# --- real images


@pytest.mark.parametrize(
    ("dataset", "reference", "most"),
    [
        ({"limit": None}, "train", 1797),
        ({"limit": 5000}, "train", 1797),
        ({"limit": None, "fraction": 0.5}, "train", 898),
        ({"limit": 200, "held_out": 0.25}, "train", 150),
        ({"limit": 200, "held_out": 0.25}, "held_out", 50),
        ({"limit": 200, "held_out": 0.25}, "all", 200),
        (FOLDER, "train", None),
        (FOLDER | {"fraction": 0.1}, "train", None),
        (FOLDER | {"limit": 200, "held_out": 0.25}, "held_out", 50),
        (FOLDER | {"source": "mnist", "root": None, "split": "test"}, "train", 10_000),
        (FOLDER | {"source": "svhn", "root": None}, "train", 73_257),
    ],
)
def test_how_many_images_there_are_to_compare_with_at_most(
    dataset: dict[str, Any], reference: str, most: int | None
) -> None:
    assert most_real(tiny_params(dataset=dataset, evaluation={"reference": reference})) == most


def test_the_number_of_digits_is_the_real_one() -> None:
    with open_digits(tiny_params().dataset) as digits:
        assert NUM_IMAGES["digits"]["train"] == len(digits)


@pytest.mark.parametrize("command", [["validate"], ["plan", "--no-calibration"], ["prepare"]], ids=" ".join)
def test_too_few_real_images_are_told_before_any_work(tiny: Experiment, command: list[str]) -> None:
    tiny.change(dataset={"limit": 60, "held_out": 0.25})
    outcome = tiny.run(*command)
    assert outcome.code == (1 if command == ["prepare"] else 2)
    assert f"evaluation.reference train: 45 {TOO_FEW}" in outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert not tiny.path("results").exists()


def test_what_only_the_images_tell_is_told_by_prepare(tiny: Experiment) -> None:
    for number in range(30):
        path = tiny.path("photos", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8), number, dtype=np.uint8)).save(path)
    tiny.change(dataset={**FOLDER, "on_bad_image": "skip"}).succeed("validate")
    outcome = tiny.run("prepare")
    assert outcome.code == 1
    assert f"evaluation.reference train: 30 {TOO_FEW}" in outcome.err
    assert not tiny.path("results/data").exists()
    tiny.change(evaluation={"kid_subset_size": 30}).succeed("prepare")
    tiny.path("photos", "a", "0.png").write_bytes(b"no image")
    said = tiny.succeed("prepare", "--force").err  # what lies in a folder of the user's is not looked at otherwise
    assert "warning: evaluation.reference train: 29 real images are fewer than the metrics need: 30" in said


# --- weights to start from


def exported(folder: Path, params: Params, num_classes: int = 0) -> None:
    weights = dict(tiny_model(params).state_dict())
    publish_exported(folder, params, num_classes, {"ema": weights}, "ema", {}, "a card")


def params_of(experiment: Experiment, **changes: Any) -> Params:
    """Its params with keys of sections changed, of one arm."""
    content = experiment.content
    content["arms"] = {ARM: content["arms"][ARM]}
    return parse_params({**content, **{name: {**content[name], **values} for name, values in changes.items()}})


def starting_from(tiny: Experiment, checkpoint: str) -> Experiment:
    return tiny.keep_arm(ARM).change(pretrain={"checkpoint": checkpoint})


def test_weights_that_fit_and_weights_that_are_not_there_yet_are_no_mistakes(tiny: Experiment) -> None:
    exported(tiny.path("model"), params_of(tiny))
    assert "!" not in starting_from(tiny, "model").succeed("validate").out
    assert "pretrain.checkpoint: there is no" in starting_from(tiny, "later").succeed("validate").out


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "patch": ({"model": {"patch_size": 4}}, "patch_size is 4 there and 2 here"),
    "width": ({"model": {"dim": 32}}, "dim is 32 there and 16 here"),
    "size": ({"dataset": {"image_size": 16}}, "image_size is 16 there and 8 here"),
    "diffusion": ({"diffusion": {"prediction": "v"}}, "prediction is 'v' there and 'x_0' here"),
}


@pytest.mark.parametrize("command", [["validate"], ["plan", "--no-calibration"]], ids=" ".join)
@pytest.mark.parametrize("case", MISFITS)
def test_weights_of_another_network_are_told_before_any_work(tiny: Experiment, case: str, command: list[str]) -> None:
    changes, message = MISFITS[case]
    exported(tiny.path("model"), params_of(tiny, **changes))
    outcome = starting_from(tiny, "model").run(*command)
    assert outcome.code == 2
    assert f"arms.{ARM}.pretrain.checkpoint: the model in model does not fit the experiment: {message}" in outcome.err
    assert len(outcome.err.splitlines()) == 1


def _no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def _no_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0[]")


def _huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")


def _short_offsets(folder: Path) -> None:
    header = b'{"a":{"data_offsets":[0]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)


def _pipe(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")


def _file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("no folder")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_no_config, r"model is not a folder of maskdm export or maskdm import-checkpoint: it has no config\.json"),
        (_file, r"model is not a folder of maskdm export or maskdm import-checkpoint: it has no config\.json"),
        (_no_weights, r"model/model\.safetensors can't be used \(there is no such file\)"),
        (_cut, r"model/model\.safetensors can't be used \(it is cut off or damaged\): export, import or copy"),
        (_no_header, "it is cut off or damaged"),
        (_huge_header, "it is cut off or damaged"),
        (_short_offsets, "it is cut off or damaged"),
        (_pipe, "there is no such file"),
    ],
)
def test_a_damaged_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    params = tiny_params(pretrain={"checkpoint": "model"})
    exported(Path("model"), tiny_params())
    check(params)
    damage(Path("model"))
    with pytest.raises(ParamsError, match=message) as caught:
        check(params)
    assert len(str(caught.value).splitlines()) == 1, "equal mistakes of several arms are one"


def test_other_weights_are_checked_without_torch(tiny: Experiment) -> None:
    exported(tiny.path("model"), params_of(tiny))
    modules = modules_after(starting_from(tiny, "model").folder, "validate")
    assert "torch" not in modules
