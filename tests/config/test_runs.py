"""What every stage's result depends on: which knobs of params.yaml change the fingerprint of which stage."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import pytest
import yaml

from maskdm.base.checksums import short_hash
from maskdm.config import Params, Section, load_params, parse_params, resolve
from maskdm.config.geometry import WITH_BLOCKS, Grid, Mask, Strategy
from maskdm.config.jobs import ARM_STAGES, Jobs
from maskdm.config.runs import shared_values
from tests.conftest import ARM, TINY

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Experiment

SHARED = ("prepare", "features", "scale", "choose")
Fingerprints = dict[str, str]


def a_content(*changes: dict[str, Any]) -> dict[str, Any]:
    """The tiny experiment's content with values at `section/key/…` replaced or added; `share` has its default."""
    content = yaml.safe_load(TINY.read_text(encoding="utf-8"))
    del content["pretrain"]["share"]
    for path, value in [change for one in changes for change in one.items()]:
        *sections, key = path.split("/")
        place = content
        for section in sections:
            place = place[section]
        place[key] = copy.deepcopy(value)
    return content


def fingerprints(params: Params, arm: str, seed: int = 0) -> Fingerprints:
    """Of every stage of an arm, of those of the whole experiment, and of the arm's first trial."""
    run, shared = resolve(params, arm, seed), {stage: short_hash(shared_values(stage, params)) for stage in SHARED}
    tune = resolve(params, arm, seed, next(iter(params.tuning.trials))).fingerprint("tune")
    return {**shared, "tune": tune, **{stage: run.fingerprint(stage) for stage in ARM_STAGES}}


def changed(before: Fingerprints, after: Fingerprints) -> set[str]:
    assert before.keys() == after.keys()
    return {stage for stage in before if before[stage] != after[stage]}


class Knob(NamedTuple):
    """A change of a knob, and the stages whose fingerprint it changes.

    Attributes:
        value: another one than the tiny experiment's.
        shared: stages of the whole experiment.
        masked: stages of an arm with pretraining.
        scratch: stages of the arm without.
        given: what has to be given before, by path.
    """

    value: Any
    shared: str = ""
    masked: str = ""
    scratch: str = ""
    given: dict[str, Any] = {}  # noqa: RUF012  (never changed)


TRAINED = ("", "tune pretrain finetune", "tune finetune")
PRETRAINED = ("", "tune pretrain", "")
BUDGETED = ("", "tune pretrain finetune", "")  # scratch spends all of it anyhow
FINETUNED = ("", "tune finetune", "tune finetune")
NETWORK = ("scale", "tune pretrain finetune sample", "tune pretrain finetune sample")
SHAPE = ("prepare scale", "tune pretrain finetune sample", "tune pretrain finetune sample")
DIFFUSED = ("scale", "tune pretrain finetune sample", "tune finetune sample")
DRAWN = ("scale", "tune sample evaluate", "tune sample evaluate")
SCORED = ("scale", "tune evaluate", "tune evaluate")
REAL = ("features scale", "tune evaluate", "tune evaluate")
MASK = ("", "tune pretrain finetune evaluate", "")
SAME_MASK_RATE = ("", "tune pretrain evaluate", "")  # and so as many steps
DEVICE = "tune finetune sample evaluate"
OTHER = {"source": "digits", "image_size": 16, "channels": 1}
KNOBS: dict[str, Knob] = {
    "name": Knob("other"),
    "seeds": Knob([0, 1]),
    # what is made of the images is an input of the stages behind
    "dataset/source": Knob("mnist", "prepare"),
    "dataset/root": Knob("other", "prepare", given={"dataset/source": "image_folder", "dataset/root": "one"}),
    "dataset/split": Knob("test", "prepare", given={"dataset/source": "mnist"}),
    "dataset/image_size": Knob(16, *SHAPE),
    "dataset/channels": Knob(3, *SHAPE),
    "dataset/crop": Knob("none", "prepare"),
    "dataset/crop_box": Knob([1, 0, 7], "prepare", given={"dataset/crop": "box", "dataset/crop_box": [0, 0, 8]}),
    "dataset/resize_filter": Knob("bicubic", "prepare"),
    "dataset/on_bad_image": Knob("skip", "prepare"),
    "dataset/max_pixels": Knob(100, "prepare"),
    "dataset/classes": Knob(["1", "2"], "prepare"),
    "dataset/limit": Knob(100, "prepare"),
    "dataset/fraction": Knob(0.5, "prepare", given={"dataset/limit": None}),
    "dataset/held_out": Knob(0.25, "prepare"),
    "dataset/seed": Knob(1, "prepare"),
    "dataset/shard_images": Knob(64, "prepare"),
    "datasets": Knob({"other": OTHER}, "prepare"),
    "model/patch_size": Knob(1, *NETWORK),
    "model/dim": Knob(32, *NETWORK),
    "model/depth": Knob(5, *NETWORK),
    "model/num_heads": Knob(4, *NETWORK),
    "model/mlp_ratio": Knob(2.0, *NETWORK),
    "model/qkv_bias": Knob(True, *NETWORK),
    "model/mlp_time_embed": Knob(True, *NETWORK),
    "model/class_conditional": Knob(True, *NETWORK),
    "diffusion/num_timesteps": Knob(50, *DIFFUSED),
    "diffusion/schedule": Knob("linear", *DIFFUSED),
    "diffusion/prediction": Knob("v", *DIFFUSED),
    "budget/match": Knob("images", *BUDGETED),
    "budget/unmasked_steps": Knob(40, *TRAINED),
    "budget/milestones": Knob([0.5, 1.0], "", "finetune", "finetune"),
    "training/betas": Knob([0.9, 0.99], *TRAINED),
    "training/weight_decay": Knob(0.0, *TRAINED),
    "training/decay": Knob("weights", *TRAINED),
    "training/ema_decay": Knob(0.99, *TRAINED),
    "training/grad_clip": Knob(1.0, *TRAINED),
    "training/flip": Knob(0.5, "", "tune pretrain finetune evaluate", "tune finetune evaluate"),
    "training/log_every": Knob(10, *TRAINED),  # the curve, and what is said of weights that are not finite
    "pretrain/lr": Knob(1e-3, *PRETRAINED),
    "pretrain/batch_size": Knob(20, *BUDGETED),
    "pretrain/warmup_steps": Knob(2, *PRETRAINED),
    "pretrain/lr_decay": Knob("cosine", *PRETRAINED),
    "pretrain/share": Knob(0.2, *BUDGETED),
    "pretrain/steps": Knob(3, *BUDGETED),
    "pretrain/dataset": Knob("other", *BUDGETED, given={"datasets": {"other": OTHER}}),
    "pretrain/checkpoint": Knob("model"),  # an input: the weights in it
    "finetune/lr": Knob(1e-3, *FINETUNED),
    "finetune/batch_size": Knob(16, *TRAINED),  # the budget is the cost of so many of these batches
    "finetune/warmup_steps": Knob(2, *FINETUNED),
    "finetune/lr_decay": Knob("cosine", *FINETUNED),
    "finetune/init_from": Knob("raw", *FINETUNED),
    "sampling/sampler": Knob("ddpm", *DRAWN),
    "sampling/num_steps": Knob(6, *DRAWN),
    "sampling/eta": Knob(0.5, *DRAWN),
    "sampling/num_samples": Knob(65, *DRAWN),
    "sampling/batch_size": Knob(32, *DRAWN),
    "sampling/clip_x_0": Knob(False, *DRAWN),
    "sampling/grid_images": Knob(9, "", "sample", "sample"),
    "sampling/primer": Knob(True, "", "sample evaluate", ""),
    "evaluation/features": Knob("pixels", *REAL),
    "evaluation/weights": Knob("x.pth", given={"evaluation/features": "vgg16"}),  # an input: the file
    "evaluation/reference": Knob("all", *REAL),
    "evaluation/batch_size": Knob(100, *REAL),
    "evaluation/kid_subsets": Knob(5, *SCORED),
    "evaluation/kid_subset_size": Knob(40, *SCORED),
    "evaluation/prc_neighborhood": Knob(4, *REAL),
    "evaluation/classifier_epochs": Knob(3, *REAL),
    "compute/device": Knob("cpu", "features scale", f"pretrain {DEVICE}", DEVICE),
    "compute/precision": Knob("fp32", *DIFFUSED),
    "tuning/seed": Knob(1001, "choose", "tune", "tune"),
    "tuning/budget_fraction": Knob(0.75, "choose", "tune", "tune"),
    "tuning/metric": Knob("fid", "choose"),
    "tuning/trials": Knob({"given": {"finetune.lr": 1e-3}, "more": {}}, "choose", "tune", "tune"),
    "data/device_resident": Knob(True, given={"data": {}}),
    "tracking/enabled": Knob(False, given={"tracking": {}}),
    "saving/every_seconds": Knob(1.0, given={"saving": {}}),
    "saving/every_steps": Knob(1, given={"saving": {}}),
    f"arms/{ARM}/strategy": Knob("crop", *SAME_MASK_RATE, given={f"arms/{ARM}/mask_rate": 0.75}),
    f"arms/{ARM}/mask_rate": Knob(0.75, *MASK),
    f"arms/{ARM}/block_size": Knob(
        1, *SAME_MASK_RATE, given={f"arms/{ARM}": {"strategy": "block", "mask_rate": 0.75, "block_size": 2}}
    ),
    f"arms/{ARM}/pretrain": Knob({"lr": 1e-3}, *PRETRAINED),
    f"arms/{ARM}/finetune": Knob({"lr": 1e-3}, "", "tune finetune", ""),
}
# These change rounding at most, wherever they stand.
ROUNDING: dict[str, Any] = {
    "compute/threads": 2,
    "compute/compile": "default",
    "compute/attention": "plain",
    "compute/activation_checkpointing": True,
    "compute/devices": 2,
    "pretrain/micro_batch_size": 16,
    "finetune/micro_batch_size": "auto",
}
IN_ARMS = {
    f"arms/{ARM}/pretrain": {"micro_batch_size": 8},
    f"arms/{ARM}/finetune": {"micro_batch_size": 8},
    "arms/scratch/finetune": {"micro_batch_size": 8},
}


def all_knobs() -> set[str]:
    """Every key that params.yaml may have, those of one arm for those of all."""
    knobs = set[str]()
    for name, field in Params.model_fields.items():
        kind = field.annotation
        is_section = isinstance(kind, type) and issubclass(kind, Section)
        knobs |= {f"{name}/{key}" for key in kind.model_fields} if is_section else {name}  # type: ignore[union-attr]
    arm = parse_params(a_content()).arm(ARM)
    return knobs - {"arms"} | {f"arms/{ARM}/{key}" for key in type(arm).model_fields}


def test_every_knob_of_params_yaml_is_looked_at() -> None:
    assert all_knobs() == {*KNOBS, *ROUNDING}


@pytest.mark.parametrize("path", KNOBS)
def test_a_knob_changes_the_fingerprints_of_the_stages_that_depend_on_it_and_no_others(path: str) -> None:
    knob = KNOBS[path]
    before, after = (parse_params(a_content(knob.given, own)) for own in ({}, {path: knob.value}))
    assert after != before
    for arm, own in ((ARM, knob.masked), ("scratch", knob.scratch)):
        assert changed(fingerprints(before, arm), fingerprints(after, arm)) == {*knob.shared.split(), *own.split()}, arm


@pytest.mark.parametrize("path", [*ROUNDING, *IN_ARMS])
def test_what_changes_rounding_alone_changes_no_fingerprint(path: str) -> None:
    before = parse_params(a_content())
    after = parse_params(a_content({path: {**ROUNDING, **IN_ARMS}[path]}))
    assert after != before
    for arm in before.arms:
        assert not changed(fingerprints(before, arm), fingerprints(after, arm))
        assert resolve(after, arm, 0).fingerprint() == resolve(before, arm, 0).fingerprint()
    if path in ROUNDING:
        assert shared_values("report", after) == shared_values("report", before)


def test_the_rounding_knobs_of_a_trial_change_nothing_of_it() -> None:
    trials = {"one": {"finetune.lr": 1e-3}, "two": {}}
    before = parse_params(a_content({"tuning/trials": trials}))
    after = parse_params(a_content({"tuning/trials": trials, "tuning/trials/one/finetune.micro_batch_size": 4}))
    for arm in before.arms:
        assert changed(fingerprints(before, arm), fingerprints(after, arm)) == {"choose"}, "which says what was chosen"


@pytest.mark.parametrize(
    "change",
    [
        {"arms/block2-m75/mask_rate": 0.5},
        {"arms/block2-m75": {"strategy": "patch", "mask_rate": 0.25}},
        {"arms/block2-m75/pretrain": {"lr": 1e-3, "batch_size": 16, "share": 0.1}},
        {"arms/block2-m75/finetune": {"lr": 1e-3, "batch_size": 16, "init_from": "raw"}},
    ],
    ids=str,
)
def test_the_values_of_an_arm_change_nothing_of_another(change: dict[str, Any]) -> None:
    before, after = parse_params(a_content()), parse_params(a_content(change))
    assert changed(fingerprints(before, "block2-m75"), fingerprints(after, "block2-m75"))
    for other in (ARM, "scratch"):
        assert not changed(fingerprints(before, other), fingerprints(after, other))


@pytest.mark.parametrize("arms", [{"more": {"strategy": "crop", "mask_rate": 0.75}}, {}], ids=["one more", "one less"])
def test_an_arm_that_comes_or_goes_changes_the_choice_alone(arms: dict[str, Any]) -> None:
    content = a_content()
    before = parse_params(content)
    kept = {arm: content["arms"][arm] for arm in (ARM, "scratch")}
    after = parse_params({**content, "arms": {**(content["arms"] if arms else kept), **arms}})
    for arm in kept:
        assert changed(fingerprints(before, arm), fingerprints(after, arm)) == {"choose"}


def test_arms_seeds_and_trials_have_fingerprints_of_their_own() -> None:
    params = parse_params(a_content())
    runs = [resolve(params, arm, seed) for arm in params.arms for seed in (0, 1)]
    found = [run.fingerprint(stage) for run in runs for stage in ARM_STAGES]
    found += [
        resolve(params, arm, 0, trial).fingerprint("tune") for arm in params.arms for trial in params.tuning.trials
    ]
    assert len({*found}) == len(found) == 3 * 2 * 4 + 3 * 2
    assert len({run.fingerprint() for run in runs}) == len(runs)


def test_chosen_values_are_as_if_params_yaml_said_them_of_the_arm() -> None:
    chosen = {"pretrain.lr": 8e-3, "finetune.batch_size": 16}
    said = a_content({f"arms/{ARM}/pretrain": {"lr": 8e-3}, f"arms/{ARM}/finetune": {"batch_size": 16}})
    runs = resolve(parse_params(a_content()), ARM, 0, chosen=chosen), resolve(parse_params(said), ARM, 0)
    assert len({run.fingerprint() for run in runs}) == 1
    given = resolve(parse_params(a_content()), ARM, 0)
    assert resolve(parse_params(a_content()), ARM, 0, chosen={}).fingerprint() == given.fingerprint()
    assert runs[0].fingerprint() != given.fingerprint()


def test_primers_are_scored_with_what_pretraining_has_spent() -> None:
    primed = {"sampling/primer": True}
    before, after = (parse_params(a_content(primed, change)) for change in ({}, {"pretrain/share": 0.2}))
    assert changed(fingerprints(before, ARM), fingerprints(after, ARM)) == {"tune", "pretrain", "finetune", "evaluate"}


@pytest.mark.parametrize("strategy", get_args(Strategy))
def test_a_strategy_is_known_by_its_name_and_the_patches_that_it_leaves(strategy: Strategy) -> None:
    """Nothing else of config has to know it: neither the schema nor the values that results depend on."""
    rate = {} if strategy == "none" else {"mask_rate": 0.5}
    size = {"block_size": 2} if strategy in WITH_BLOCKS else {}
    run = resolve(parse_params(a_content({"arms/mine": {"strategy": strategy, **rate, **size}})), "mine", 0)
    asked = {"strategy": strategy, "mask_rate": None, "block_size": None, **rate, **size}
    assert run.values("evaluate")["mask"] == run.mask == asked
    assert run.pretrain.mask == Mask(strategy, Grid(4, 4), **rate, **size)
    if strategy != "none":
        assert run.values("pretrain")["mask"] == asked


# --- scratch


@pytest.mark.parametrize(
    "arm", [{"strategy": "none"}, {"strategy": "patch", "mask_rate": 0.5, "pretrain": {"share": 0}}]
)
def test_initial_weights_depend_on_the_network_and_the_seed_alone(arm: dict[str, Any]) -> None:
    params = parse_params(a_content({"arms/first": arm}))
    assert resolve(params, "first", 3).pretrain.values == {
        "arm": "first",
        "seed": 3,
        "image_shape": [8, 8, 1],
        "model": {**params.model.model_dump()},
        "num_steps": 0,
    }


def test_initial_weights_are_the_same_bytes_and_serve_whatever_else_is_changed(
    tiny: Experiment, tmp_path: Path
) -> None:
    """That is, also the metadata of their file says nothing of what may change without making it again."""
    tiny.change(tuning={"trials": {}}).succeed("prepare")
    for stage in ("pretrain", "finetune"):
        tiny.succeed(stage, "--arm", "scratch", "--seed", "0")
    changes: dict[str, dict[str, Any]] = {
        "diffusion": {"prediction": "v", "num_timesteps": 50, "schedule": "linear"},
        "budget": {"unmasked_steps": 30, "match": "images", "milestones": [0.5, 1.0]},
        "training": {"flip": 0.5, "log_every": 3, "ema_decay": 0.9},
        "finetune": {"lr": 1e-3, "batch_size": 16},
        "compute": {"precision": "fp32", "threads": 2},
    }
    other = tiny.copy_to(tmp_path / "other").change(**changes)
    place = "results/pretrain/scratch"
    assert other.succeed("pretrain", "--arm", "scratch", "--seed", "0").out.endswith(": up to date\n")
    other.succeed("finetune", "--arm", "scratch", "--seed", "0")
    other.succeed("pretrain", "--arm", "scratch", "--seed", "0", "--force")
    assert other.hashes(place) == tiny.hashes(place)


# --- what is found in results/


def test_a_finished_experiment_is_up_to_date_whatever_changes_rounding_alone(
    finished: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: dict[str, dict[str, Any]] = {}
    for path, value in ROUNDING.items():
        section, key = path.split("/")
        changes.setdefault(section, {})[key] = value
    monkeypatch.chdir(finished.folder)
    jobs = Jobs(load_params(finished.change(**changes).file))
    assert [job.why_outdated() for job in jobs.all()] == [""] * len([*jobs.all()])
    stamps = [*finished.folder.glob("results/**/stamp.json"), *finished.folder.glob("results/metrics/*.json")]
    said = json.dumps([json.loads(stamp.read_bytes()) for stamp in stamps])
    assert len(stamps) > 10 and not any(f'"{path.split("/")[1]}"' in said for path in ROUNDING)
