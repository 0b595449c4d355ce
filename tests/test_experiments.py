"""Every experiment that comes with maskdm states its cost, is valid, can be planned, and runs when it is shrunk."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest

from maskdm.config import Params, load_params
from maskdm.config.new_experiment import new_experiment
from maskdm.plan import run
from tests.conftest import EXPERIMENTS, Experiment
from tests.data.test_datasets import encode, make_hub_celeba, make_hub_cifar, make_lsun, make_mnist, pixels, put

ROOT = Path(__file__).parents[1]
# Run end to end. The other digits differ from digits-seeds and transfer-digits in values that shrinking replaces, and
# tiny is what most tests of stages run on.
RUN = sorted({*EXPERIMENTS} - {"digits", "transfer-digits-1", "tiny"})
REPORTED = {"celeba64", "swissroll", "transfer-digits"}  # images, points, two datasets: the rest have the same figures
SHRUNK = [
    "model.patch_size=1",
    "model.dim=8",
    "model.depth=3",
    "model.num_heads=2",
    "budget.unmasked_steps=60",
    "budget.milestones=[0.7, 1.0]",
    "training.log_every=2",
    "pretrain.batch_size=4",
    "finetune.batch_size=4",
    "pretrain.warmup_steps=0",
    "finetune.warmup_steps=0",
    "sampling.num_steps=2",
    "sampling.num_samples=6",
    "evaluation.features=pixels",
    "evaluation.reference=all",
    "evaluation.kid_subset_size=3",
    "evaluation.kid_subsets=2",
    "evaluation.prc_neighborhood=2",
    "compute.threads=1",
    "compute.device=cpu",
    "tuning.trials={}",
    "tracking.enabled=false",
    "seeds=[0]",
]


def experiment(name: str) -> Path:
    return ROOT / "experiments" / name


def header(name: str) -> str:
    lines = (experiment(name) / "params.yaml").read_text(encoding="utf-8").splitlines()
    return "\n".join(lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


@pytest.mark.parametrize("name", [name for name in EXPERIMENTS if name != "tiny"])
def test_the_header_gives_cost_expectation_and_command(name: str) -> None:
    for what in ("cost ", "expected ", f"command   snakemake -d experiments/{name} --cores "):
        assert f"#   {what}" in header(name)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_is_valid_and_named_like_its_folder(name: str) -> None:
    assert load_params(experiment(name) / "params.yaml").name == name


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_can_be_planned(name: str, tmp_path: Path) -> None:
    params = load_params(experiment(name) / "params.yaml")
    with contextlib.chdir(tmp_path):
        plan = run(params, ["A100"], calibrate=False)
    assert all(arm in plan for arm in params.arms)


def make_folder(folder: str) -> None:
    for i in range(20):
        put(f"{folder}/class-{i % 2}/{i}.jpg", encode(pixels(1, i, (24, 20, 3))[0]))


MAKERS: dict[str, Callable[[str], object]] = {
    "image_folder": make_folder,
    "huggingface:nielsr/CelebA-faces": make_hub_celeba,
    "huggingface:uoft-cs/cifar10": make_hub_cifar,
    "lsun": lambda root: make_lsun(20, f"{root}/church_outdoor_train_lmdb"),
    "fashion_mnist": make_mnist,
}


def shrink(name: str, folder: Path) -> Experiment:
    """The smallest experiment with these sources: the first and the last arm, on made-up images unless embedded."""
    params = load_params(experiment(name) / "params.yaml")
    changes = list(SHRUNK)
    for where, dataset in [("dataset", params.dataset), *((f"datasets.{k}", d) for k, d in params.datasets.items())]:
        if dataset.source != "swissroll":
            changes.append(f"{where}.image_size=4")
        if dataset.source in MAKERS:
            changes.append(f"{where}.root={folder / 'images' / where}")
    if params.dataset.held_out:
        changes.append("dataset.held_out=0.5")
    arms = {next(iter(params.arms)): None, list(params.arms)[-1]: None}
    new_experiment(folder / name, experiment(name), changes, list(arms))
    shrunk = load_params(folder / name / "params.yaml")
    with contextlib.chdir(folder / name):
        make_images(shrunk)
    return Experiment(folder / name)


def make_images(params: Params) -> None:
    for dataset in (params.dataset, *params.datasets.values()):
        if dataset.source in MAKERS:
            assert dataset.root is not None
            MAKERS[dataset.source](dataset.root)


@pytest.mark.workflow
@pytest.mark.parametrize("name", RUN)
def test_an_experiment_runs_from_end_to_end(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if name in ("cifar10", "celeba64"):
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    shrunk = shrink(name, tmp_path)
    for stage in ("prepare", "features", "scale", "choose"):
        shrunk.succeed(stage)
    for arm in shrunk.content["arms"]:
        for stage in ("pretrain", "finetune", "sample", "evaluate"):
            shrunk.succeed(stage, "--arm", arm, "--seed", "0")
    if name in REPORTED:
        shrunk.succeed("report")
        assert all(arm in shrunk.succeed("summary").out for arm in shrunk.content["arms"])
