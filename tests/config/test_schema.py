"""params.yaml: every default is valid, every mistake is one line that says where, what and what would be right."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from maskdm.base.checksums import short_hash
from maskdm.base.errors import ParamsError
from maskdm.config import ArmConfig, Params, load_params, parse_params, schema
from maskdm.config.runs import for_trial, with_values
from tests.conftest import EXPERIMENTS

ROOT = Path(__file__).parents[2]
PARAMS_FILES = [ROOT / "params.yaml", *(ROOT / "experiments" / name / "params.yaml" for name in EXPERIMENTS)]
TINY: dict[str, Any] = yaml.safe_load((ROOT / "experiments" / "tiny" / "params.yaml").read_text(encoding="utf-8"))
SECTIONS = sorted(
    (s for s in vars(schema).values() if isinstance(s, type) and issubclass(s, schema.Section)),
    key=lambda s: s.__name__,
)
FIELDS = [(s.__name__, name) for s in SECTIONS if s is not schema.Section for name in s.model_fields]
REQUIRED = [n for n, f in Params.model_fields.items() if f.is_required()]


def content_with(path: str, value: Any) -> dict[str, Any]:
    """The tiny experiment's content with the value at `section/key/…` replaced or added."""
    content = copy.deepcopy(TINY)
    *sections, key = path.split("/")
    place = content
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return content


def content_without(path: str) -> dict[str, Any]:
    """The tiny experiment's content without what is at `section/key/…`."""
    content = copy.deepcopy(TINY)
    *sections, key = path.split("/")
    place = content
    for section in sections:
        place = place[section]
    del place[key]
    return content


def error_of(content: Any) -> str:
    """The one line that refuses the content, without the file's name."""
    with pytest.raises(ParamsError) as caught:
        parse_params(content)
    message = str(caught.value)
    assert "\n" not in message and message.startswith("params.yaml: ")
    return message.removeprefix("params.yaml: ")


def test_tiny_content_is_valid_so_that_the_errors_below_have_one_cause() -> None:
    assert list(parse_params(TINY).arms) == ["scratch", "patch-m50", "block2-m75"]


@pytest.mark.parametrize("file", PARAMS_FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_params_file_of_the_project_is_valid(file: Path) -> None:
    params = load_params(file)
    for arm in params.arms:
        assert 1 <= params.mask_of(arm).num_visible <= params.grid.num_patches


def test_only_what_describes_the_experiment_is_required() -> None:
    content = {key: TINY[key] for key in REQUIRED}
    assert parse_params({**content, "sampling": {}, "evaluation": {}, "training": {}, "diffusion": {}}).arms
    assert set(Params.model_fields) - set(REQUIRED) == {"tracking", "saving", "data"}


@pytest.mark.parametrize(
    ("path", "where", "advice"),
    [
        ("modle", "modle", "did you mean 'model'?"),
        ("model/dime", "model.dime", "did you mean 'dim'?"),
        ("dataset/chanels", "dataset.chanels", "did you mean 'channels'?"),
        ("pretrain/warmup_step", "pretrain.warmup_step", "did you mean 'warmup_steps'?"),
        ("finetune/init_fron", "finetune.init_fron", "did you mean 'init_from'?"),
        ("arms/patch-m50/mask_rat", "arms.patch-m50.mask_rat", "did you mean 'mask_rate'?"),
        ("saving/every_second", "saving.every_second", "did you mean 'every_seconds'?"),
        ("tuning/trial", "tuning.trial", "did you mean 'trials'?"),
        ("pretrain/step", "pretrain.step", "did you mean 'steps'?"),
        ("tracking/zzz", "tracking.zzz", "expected one of: enabled"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(path: str, where: str, advice: str) -> None:
    assert error_of(content_with(path, 1)) == f"{where}: unknown key; {advice}"


def test_unknown_key_of_a_dataset_that_is_named_as_a_key_is_refused_with_a_suggestion() -> None:
    message = error_of(content_with("datasets", {"held_out": OTHER | {"chanels": 1}}))
    assert message == "datasets.held_out.chanels: unknown key; did you mean 'channels'?"


@pytest.mark.parametrize(
    ("stage", "key", "advice"),
    [
        ("pretrain", "lrr", "did you mean 'lr'?"),
        ("pretrain", "batchsize", "did you mean 'batch_size'?"),
        ("finetune", "lrr", "did you mean 'lr'?"),
        pytest.param("finetune", "init_fron", "did you mean 'init_from'?"),
    ],
)
def test_unknown_key_in_an_arms_override_is_refused_with_a_suggestion(stage: str, key: str, advice: str) -> None:
    message = error_of(content_with(f"arms/patch-m50/{stage}", {key: 1}))
    assert message.startswith("arms.patch-m50") and key in message
    assert advice in message


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_mistake_in_an_arms_override_names_the_stage(stage: str) -> None:
    assert stage in error_of(content_with(f"arms/patch-m50/{stage}", {"lr": "abc"}))


@pytest.mark.parametrize("key", ["lr", "shar"])
def test_suggestion_at_the_top_is_a_key_of_the_top(key: str) -> None:
    message = error_of(content_with(key, 1))
    suggested = re.findall(r"'(\w+)'", message) or message.partition("expected one of: ")[2].split(", ")
    assert suggested and set(suggested) <= set(Params.model_fields)


@pytest.mark.parametrize("section", REQUIRED)
def test_missing_section_is_named(section: str) -> None:
    assert error_of(content_without(section)) == f"{section}: is missing"


@pytest.mark.parametrize(
    "path",
    [
        "dataset/source",
        "model/dim",
        "budget/unmasked_steps",
        "pretrain/lr",
        "arms/scratch/strategy",
        "compute/device",
        "compute/precision",
        "tuning/seed",
        "tuning/budget_fraction",
        "tuning/trials",
    ],
)
def test_missing_key_is_named(path: str) -> None:
    assert error_of(content_without(path)) == f"{path.replace('/', '.')}: is missing"


@pytest.mark.parametrize(
    ("path", "value", "where", "expected"),
    [
        ("model/dim", "16", "model.dim", "valid integer"),
        ("model/dim", 16.0, "model.dim", "valid integer"),
        ("model/dim", True, "model.dim", "valid integer"),
        ("model", 3, "model", "valid dictionary"),
        ("model", None, "model", "valid dictionary"),
        ("name", 3, "name", "valid string"),
        ("name", "two words", "name", "match pattern"),
        ("seeds", 0, "seeds", "valid list"),
        ("seeds", [], "seeds", "at least 1 item"),
        ("seeds", ["0"], "seeds.0", "valid integer"),
        ("seeds", [0, -1], "seeds.1", "greater than or equal to 0"),
        ("pretrain/lr", "abc", "pretrain.lr", "valid number"),
        ("pretrain/lr", True, "pretrain.lr", "valid number"),
        ("pretrain/lr", 0, "pretrain.lr", "greater than 0"),
        ("pretrain/lr", float("nan"), "pretrain.lr", "finite number"),
        ("pretrain/lr", float("inf"), "pretrain.lr", "finite number"),
        ("pretrain/share", 1.0, "pretrain.share", "less than 1"),
        ("tracking/enabled", "yes", "tracking.enabled", "valid boolean"),
        ("compute/threads", 0, "compute.threads", "greater than or equal to 1"),
        ("saving/every_seconds", 0, "saving.every_seconds", "greater than 0"),
        ("tuning/seed", -1, "tuning.seed", "greater than or equal to 0"),
        ("tuning/budget_fraction", 0, "tuning.budget_fraction", "greater than 0"),
        ("tuning/budget_fraction", 1.01, "tuning.budget_fraction", "less than or equal to 1"),
        ("tuning/metric", "precision", "tuning.metric", "'kid' or 'fid'"),
        ("tuning/trials", None, "tuning.trials", "valid dictionary"),
        ("tuning/trials/given", None, "tuning.trials.given", "valid dictionary"),
        ("pretrain/steps", 0, "pretrain.steps", "greater than or equal to 1"),
        ("dataset/image_size", [8, 8, 1], "dataset.image_size", "or [height, width]"),
        ("dataset/image_size", 0, "dataset.image_size", "1 or more"),
        ("dataset/image_size", True, "dataset.image_size", "1 or more"),
        ("dataset/fraction", 0.0, "dataset.fraction", "greater than 0"),
        ("dataset/held_out", 1.0, "dataset.held_out", "less than 1"),
        ("evaluation/reference", "test", "evaluation.reference", "'train', 'held_out' or 'all'"),
        ("dataset/channels", 2, "dataset.channels", "1 or 3"),
        ("training/betas", [0.9], "training.betas", "at least 2 items"),
        ("training/betas", [0.9, 1.0], "training.betas.1", "less than 1"),
        ("arms", {}, "arms", "at least 1 item"),
        ("arms/scratch", "none", "arms.scratch", "valid dictionary"),
        ("arms/patch-m50/pretrain", None, "arms.patch-m50.pretrain", "valid dictionary"),
        ("arms/patch-m50/strategy", "patches", "arms.patch-m50.strategy", "input should be 'none', 'patch', 'block'"),
        ("arms/patch-m50/mask_rate", 1.0, "arms.patch-m50.mask_rate", "less than 1"),
        ("arms/patch-m50/mask_rate", -0.1, "arms.patch-m50.mask_rate", "greater than or equal to 0"),
    ],
)
def test_wrong_type_or_range_says_where_what_was_expected_and_got(
    path: str, value: Any, where: str, expected: str
) -> None:
    message = error_of(content_with(path, value))
    assert message.startswith(f"{where}: ")
    assert expected in message
    assert message.endswith(f", got {value[-1] if where[-1].isdigit() else value!r}") or repr(value) in message


OTHER: dict[str, Any] = {"source": "digits", "image_size": 16, "channels": 1}


@pytest.mark.parametrize(
    ("path", "value", "where", "says"),
    [
        ("model/patch_size", 3, "model.patch_size", "3 does not divide dataset.image_size 8"),
        ("model/patch_size", 16, "model.patch_size", "16 does not divide dataset.image_size 8"),
        ("model/num_heads", 3, "model", "num_heads 3 does not divide dim 16"),
        ("model/depth", 4, "model", "depth 4 is even"),
        ("model", {"patch_size": 2, "dim": 15, "depth": 3, "num_heads": 3}, "model", "dim 15 is odd"),
        ("arms/block2-m75/block_size", 5, "arms.block2-m75", "block_size 5 is larger than the 4×4"),
        ("arms/block2-m75/block_size", None, "arms.block2-m75", "strategy block needs it"),
        ("arms/patch-m50/block_size", 2, "arms.patch-m50", "belongs to strategy block"),
        ("arms/patch-m50/mask_rate", None, "arms.patch-m50", "strategy patch needs mask_rate"),
        ("arms/patch-m50/mask_rate", 0.01, "arms.patch-m50", "masks nothing on a 4×4 grid"),
        ("arms/patch-m50/mask_rate", 0.99, "arms.patch-m50", "the highest possible is 0.9375"),
        ("arms/scratch/mask_rate", 0.5, "arms.scratch", "remove mask_rate"),
        ("arms/scratch/pretrain", {"lr": 1.0}, "arms.scratch", "remove mask_rate and pretrain"),
        ("budget/milestones", [1.0, 0.6], "budget.milestones", "increasing"),
        ("budget/milestones", [0.6, 0.6, 1.0], "budget.milestones", "increasing"),
        ("budget/milestones", [0.6, 0.9], "budget.milestones", "end with 1.0, got [0.6, 0.9]"),
        ("budget/milestones", [0.0, 1.0], "budget.milestones", "(0, 1]"),
        ("budget/milestones", [0.6, 1.0, 1.5], "budget.milestones", "end with 1.0"),
        ("budget/milestones", [0.3, 1.0], "arms.patch-m50", "the first milestone (0.3 of the budget) falls into"),
        ("arms/patch-m50/pretrain", {"share": 0.7}, "arms.patch-m50", "falls into pretraining, which takes 0.7 of it"),
        ("arms/patch-m50/pretrain", {"steps": 300}, "arms.patch-m50", "falls into pretraining, which takes 7.41 of it"),
        ("arms/patch-m50/pretrain", {"steps": 25}, "arms.patch-m50", "falls into pretraining, which takes 0.617 of it"),
        ("pretrain/steps", 3, "pretrain", "give share (0.3) or steps (3), not both"),
        ("arms/patch-m50/pretrain", {"share": 0.2, "steps": 3}, "arms.patch-m50.pretrain", "give share (0.2) or steps"),
        ("arms/patch-m50/pretrain", {"batch_size": 3200}, "arms.patch-m50", "pays for 0.12 of one pretraining step"),
        ("arms/patch-m50/finetune", {"batch_size": 3200}, "arms.patch-m50", "pays for 0.14 of one finetuning step"),
        ("budget/unmasked_steps", 1, "arms.scratch", "fall on finetuning steps [1, 1], which are not all different"),
        ("budget/milestones", [0.6, 0.61, 1.0], "arms.scratch", "fall on finetuning steps [12, 12, 20]"),
        ("sampling/num_samples", 49, "sampling.num_samples", "49 samples are fewer than the metrics need: 50"),
        ("evaluation/prc_neighborhood", 64, "sampling.num_samples", "64 samples are fewer than the metrics need: 65"),
        ("sampling/num_steps", 101, "sampling.num_steps", "101 is more than diffusion.num_timesteps 100"),
        ("seeds", [1, 0, 1], "seeds", "different numbers, got [1, 0, 1]"),
        ("dataset/source", "image_folder", "dataset", "needs root"),
        ("dataset/root", "images", "dataset", "takes no root; did you mean source: image_folder?"),
        ("dataset/source", "digitz", "dataset.source", "unknown dataset 'digitz'; did you mean 'digits'?"),
        ("dataset/source", "celeba", "dataset.source", "celeba was removed: write huggingface:nielsr/CelebA-faces"),
        (
            "dataset/source",
            "cifar10",
            "dataset.source",
            "cifar10 was removed: write huggingface:uoft-cs/cifar10",
        ),
        ("dataset/source", "huggingface:a/b/c", "dataset.source", "huggingface:NAME for a dataset of its hub"),
        ("dataset/source", "lsun", "dataset", "needs split: its category"),
        ("dataset", OTHER | {"source": "lsun", "split": "bedrom_val"}, "dataset", "'bedrom'; did you mean 'bedroom'?"),
        ("dataset", OTHER | {"source": "lsun", "split": "../x"}, "dataset", "expected one of bedroom, bridge, church_"),
        ("dataset/source", "swissroll", "dataset", "image_size: [1, 2]"),
        ("dataset/split", "test", "dataset", "has no split"),
        (
            "dataset",
            OTHER | {"source": "mnist", "split": "valid"},
            "dataset",
            "'valid'; expected one of train, test, all",
        ),
        ("dataset", OTHER | {"image_size": [16, 8], "crop": "box", "crop_box": [0, 0, 8]}, "dataset", "cuts a square"),
        ("dataset/fraction", 0.5, "dataset", "give limit (200) or fraction (0.5), not both"),
        ("dataset/image_size", [8, 9], "model.patch_size", "2 does not divide dataset.image_size [8, 9]"),
        (
            "datasets",
            {"more": OTHER | {"image_size": 9}},
            "model.patch_size",
            "does not divide datasets.more.image_size",
        ),
        ("datasets", {"more": OTHER | {"channels": 3}}, "datasets.more.channels", "the same network sees both"),
        ("datasets", {"More": OTHER}, "datasets.More", "only a-z, 0-9 and '-'"),
        ("pretrain/dataset", "more", "arms.patch-m50", "'more' is not a key of `datasets`, which is empty"),
        ("evaluation/reference", "held_out", "evaluation", "needs dataset.held_out"),
        ("dataset/source", "huggingface:../here", "dataset.source", "huggingface:NAME for a dataset of its hub"),
        ("dataset", OTHER | {"crop": "box", "crop_box": [0, 0, 0]}, "dataset", "its side is 0; expected 1 or more"),
        ("evaluation", {"features": "pixels", "weights": "x.pth"}, "evaluation", "compares pixel values"),
        ("evaluation/weights", "x.pth", "evaluation", "takes no weights"),
        ("pretrain/micro_batch_size", 5, "pretrain", "micro_batch_size 5 does not divide batch_size 32"),
        ("arms/patch-m50/pretrain", {"micro_batch_size": 5}, "arms.patch-m50", "5 does not divide batch_size 32"),
        ("compute/devices", 3, "arms.scratch: pretrain.batch_size 32", "is not divisible by compute.devices 3"),
        ("compute/attention", "math", "compute.attention", "'auto', 'plain' or 'fused'"),
        ("arms/block.2", {"strategy": "none"}, "arms.block.2", "only a-z, 0-9 and '-'"),
        ("arms/Block2", {"strategy": "none"}, "arms.Block2", "only a-z, 0-9 and '-'"),
        ("arms/block_2", {"strategy": "none"}, "arms.block_2", "only a-z, 0-9 and '-'"),
        ("arms/a b", {"strategy": "none"}, "arms.a b", "only a-z, 0-9 and '-'"),
    ],
)
def test_impossible_combination_says_where_and_why(path: str, value: Any, where: str, says: str) -> None:
    message = error_of(content_with(path, value))
    assert message.startswith(where)
    assert says in message


def test_micro_batch_has_to_divide_the_share_of_each_device() -> None:
    content = content_with("compute/devices", 4)
    content["finetune"]["micro_batch_size"] = 16
    says = error_of(content)
    assert "finetune.micro_batch_size 16 does not divide the 8 images of each of compute.devices 4" in says
    content["finetune"]["micro_batch_size"] = "auto"
    assert parse_params(content).compute.devices == 4


@pytest.mark.parametrize("key", ["-m50", "--help", "m50\n"])
def test_arm_key_that_the_command_line_could_not_take_is_refused(key: str) -> None:
    content = copy.deepcopy(TINY)
    content["arms"][key] = {"strategy": "none"}
    with pytest.raises(ParamsError):
        parse_params(content)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model/patch_size", 8),
        ("arms/block2-m75/block_size", 4),
        ("arms/patch-m50/mask_rate", 0.9375),
        ("arms/patch-m50/mask_rate", 0.0),
        ("budget/milestones", [0.31, 1]),
        ("sampling/num_samples", 50),
        ("sampling/num_steps", 100),
        ("pretrain/micro_batch_size", 32),
        ("pretrain/share", 0),
        ("tuning/seed", 1),
        ("tuning/budget_fraction", 1),
        ("tuning/metric", "fid"),
    ],
)
def test_what_is_only_just_possible_is_accepted(path: str, value: Any) -> None:
    content = content_with(path, value)
    if path == "model/patch_size":  # one patch: nothing to mask
        content["arms"] = {"scratch": {"strategy": "none"}}
    parse_params(content)


def test_every_mistake_gets_a_line_of_its_own() -> None:
    content = content_with("model/dim", "16")
    del content["dataset"]["source"]
    with pytest.raises(ParamsError) as caught:
        parse_params(content)
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert lines[0] == "params.yaml: dataset.source: is missing"
    assert lines[1].startswith("params.yaml: model.dim: ")


@pytest.mark.parametrize(
    ("text", "value"), [("2e-4", 2e-4), ("2E-4", 2e-4), ("2.e-4", 2e-4), ("1e1", 10.0), ("0.5", 0.5), ("3", 3.0)]
)
@pytest.mark.parametrize("place", ["pretrain", "arms/patch-m50/pretrain"])
def test_number_that_yaml_1_1_reads_as_a_string_is_a_number(
    tmp_path: Path, place: str, text: str, value: float
) -> None:
    file = tmp_path / "params.yaml"
    content = content_with(f"{place}/lr", "LR")
    file.write_text(yaml.safe_dump(content).replace("LR", text), encoding="utf-8")
    assert load_params(file).pretrain_of("patch-m50").lr == value


def test_python_tag_is_refused_and_not_executed(tmp_path: Path) -> None:
    victim, file = tmp_path / "executed", tmp_path / "params.yaml"
    file.write_text(f"name: !!python/object/apply:os.system ['touch {victim}']\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=r"not plain YAML.*python/object/apply:os\.system"):
        load_params(file)
    assert not victim.exists()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n- 2\n", "expected a mapping of sections, got list"),
        ("just words\n", "expected a mapping of sections, got str"),
        ("", "expected a mapping of sections, got NoneType"),
        ("name: [\n", "is not plain YAML"),
        ("name: tiny\n\tseeds: [0]\n", "is not plain YAML"),
        ("1: 2\n", "YAML reads the key 1 as 1: write it in quotes"),
    ],
)
def test_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError, match=re.escape(says)):
        load_params(file)


def test_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(b"\xff\xfe\x00name")
    with pytest.raises(ParamsError, match="is not plain YAML"):
        load_params(file)


def test_key_given_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(TINY) + "seeds: [0, 1, 2]\n", encoding="utf-8")
    with pytest.raises(ParamsError, match="seeds"):
        load_params(file)


def test_missing_file_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ParamsError, match=rf"no params.yaml in {re.escape(str(tmp_path))}"):
        load_params()


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_no_key_is_one_that_dvc_takes_for_its_own(section: str, name: str) -> None:
    assert name not in {"size", "nfiles"}, "a params section with such a key breaks `dvc repro` (iterative/dvc#10296)"


@pytest.mark.parametrize(("section", "name"), FIELDS)
def test_every_key_is_used_by_some_code_outside_the_schema(section: str, name: str) -> None:
    used = re.compile(rf"\.{name}\b")
    in_schema = ROOT / "maskdm" / "config" / "schema.py"
    files = [f for f in (ROOT / "maskdm").rglob("*.py") if f != in_schema]
    by_schema = len(used.findall(in_schema.read_text(encoding="utf-8")))
    users = [f.name for f in files if used.search(f.read_text(encoding="utf-8"))]
    # `pretrain` and `finetune` are read through pretrain_of and finetune_of
    assert users or (name in {"pretrain", "finetune"} and by_schema), f"{section}.{name} does nothing"


@pytest.mark.parametrize(
    "section", [s for s in SECTIONS if s not in (schema.Section, Params)], ids=lambda s: s.__name__
)
def test_sections_are_immutable(section: type[BaseModel]) -> None:
    assert section.model_config["frozen"] and section.model_config["extra"] == "forbid"


def test_arms_overrides_are_merged_into_the_stages() -> None:
    content = content_with("arms/patch-m50/pretrain", {"batch_size": 64, "share": 0.2})
    content["arms"]["patch-m50"]["finetune"] = {"init_from": "raw"}
    params = parse_params(content)
    own, other = params.pretrain_of("patch-m50"), params.pretrain_of("block2-m75")
    assert own == params.pretrain.model_copy(update={"batch_size": 64, "share": 0.2})
    assert other == params.pretrain
    assert params.finetune_of("patch-m50") == params.finetune.model_copy(update={"init_from": "raw"})
    assert params.finetune_of("scratch") == params.finetune


def test_strategy_none_has_no_share_of_pretraining() -> None:
    params = parse_params(TINY)
    assert params.pretrain_of("scratch").share == 0.0
    assert params.mask_of("scratch").num_visible == 16


def test_strategy_none_makes_none_of_the_shared_pretraining_steps() -> None:
    content = content_with("pretrain", {"lr": 2e-3, "batch_size": 32, "steps": 6})
    content["tuning"]["trials"] = {}
    params = parse_params(content)
    assert (params.pretrain_of("scratch").share, params.pretrain_of("scratch").steps) == (0.0, None)
    assert params.pretrain_of("patch-m50").steps == 6


def test_an_arm_that_splits_its_budget_itself_takes_neither_share_nor_steps_of_the_others() -> None:
    by_steps = parse_params(content_with("arms/patch-m50/pretrain", {"steps": 6}))
    assert by_steps.pretrain_of("patch-m50").steps == 6
    assert by_steps.pretrain_of("block2-m75") == by_steps.pretrain
    content = content_with("pretrain", {"lr": 2e-3, "batch_size": 32, "steps": 6})
    content["tuning"]["trials"] = {}
    content["arms"]["patch-m50"]["pretrain"] = {"share": 0.2}
    by_share = parse_params(content)
    own, other = by_share.pretrain_of("patch-m50"), by_share.pretrain_of("block2-m75")
    assert (own.share, own.steps) == (0.2, None)
    assert other.steps == 6
    assert own.lr == other.lr == 2e-3, "the rest is shared"


def test_an_arm_may_be_pretrained_on_another_dataset_with_another_grid() -> None:
    content = content_with("datasets", {"large": OTHER})
    content["arms"]["patch-m50"]["pretrain"] = {"dataset": "large"}
    params = parse_params(content)
    assert params.for_pretraining("patch-m50").dataset.image_size == 16
    assert (params.grid, params.for_pretraining("patch-m50").grid) == ((4, 4), (8, 8))
    assert params.mask_of("patch-m50").num_visible == 32, "half of the patches that pretraining sees"
    assert params.mask_of("patch-m50").realised_mask_rate == 0.5
    assert params.for_pretraining("block2-m75") == params


@pytest.mark.parametrize(("given", "kept"), [(8, 8), ([8, 8], 8), ([8, 16], [8, 16])])
def test_a_square_is_given_by_its_side(given: Any, kept: Any) -> None:
    assert parse_params(content_with("dataset/image_size", given)).dataset.image_size == kept


@pytest.mark.parametrize(
    ("here", "there", "shares"),
    [
        ({}, {}, True),
        ({"classes": ["1"]}, {}, True),
        ({"classes": ["1", "2"]}, {"classes": ["2", "3"]}, True),
        ({"classes": ["1", "2"]}, {"classes": ["3"]}, False),
        ({}, {"source": "mnist"}, False),
    ],
)
def test_what_is_held_out_is_not_pretrained_on(here: dict[str, Any], there: dict[str, Any], shares: bool) -> None:
    content = content_with("dataset", OTHER | {"held_out": 0.5} | here)
    content["datasets"] = {"other": OTHER | there}
    content["arms"]["patch-m50"]["pretrain"] = {"dataset": "other"}
    if shares:
        assert "arms.patch-m50: pretrain.dataset 'other' may hold images that dataset.held_out" in error_of(content)
    else:
        assert parse_params(content).dataset.held_out == 0.5
    content["dataset"]["held_out"] = 0.0
    assert parse_params(content).datasets


def test_what_all_arms_are_pretrained_on_does_not_concern_scratch() -> None:
    content = content_with("datasets", {"large": OTHER})
    content["pretrain"]["dataset"] = "large"
    params = parse_params(content)
    assert params.pretrain_of("patch-m50").dataset == "large"
    assert params.pretrain_of("scratch").dataset is None


def test_unknown_arm_gets_a_suggestion() -> None:
    with pytest.raises(ParamsError, match=r"no arm 'patch-m5' in params.yaml; did you mean 'patch-m50'\?"):
        parse_params(TINY).arm("patch-m5")


def test_hash_is_equal_for_equal_params_however_they_were_written() -> None:
    backwards = {key: TINY[key] for key in reversed(TINY)}
    with_default = content_with("compute/threads", 1)
    assert short_hash(parse_params(TINY)) == short_hash(parse_params(with_default))
    assert short_hash(parse_params(backwards)) == short_hash(parse_params(copy.deepcopy(TINY)))


CHANGES: dict[str, Any] = {
    "name": "other",
    "seeds": [1],
    "dataset/limit": 100,
    "datasets": {"other": {"source": "digits", "image_size": 8, "channels": 1}},
    "model/qkv_bias": True,
    "diffusion/schedule": "linear",
    "budget/unmasked_steps": 21,
    "budget/milestones": [0.61, 1.0],
    "training/weight_decay": 0.0,
    "pretrain/lr": 2.1e-3,
    "finetune/init_from": "raw",
    "sampling/eta": 1e-9,
    "evaluation/kid_subsets": 11,
    "compute/precision": "fp32",
    "tuning/seed": 1001,
    "tuning/trials": {},
    "tuning/budget_fraction": 0.6,
    "tuning/metric": "fid",
    "tuning/trials/more": {"finetune.lr": 1e-3},
    "tracking/enabled": False,
    "saving/every_seconds": 61,
    "data/device_resident": True,
    "arms/patch-m50/mask_rate": 0.75,
    "arms/patch-m50/pretrain": {"lr": 1e-3},
    "arms/more": {"strategy": "none"},
}


def test_hash_differs_for_any_change() -> None:
    prints = {path: short_hash(parse_params(content_with(path, value))) for path, value in CHANGES.items()}
    assert len({short_hash(parse_params(TINY)), *prints.values()}) == len(CHANGES) + 1
    assert {path.split("/")[0] for path in CHANGES} == set(Params.model_fields), "a change for every section"


def test_hash_tells_parts_and_their_order_apart() -> None:
    params = parse_params(TINY)
    assert short_hash(params.pretrain, 1) != short_hash(params.pretrain, 2)
    assert short_hash(1, 2) != short_hash(2, 1)
    assert short_hash(12) != short_hash(1, 2)


SCALARS = st.one_of(st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.text(max_size=5))
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
PLACES = [f"{s}/{k}" for s, v in TINY.items() if isinstance(v, dict) for k in v] + [*TINY]


@settings(deadline=None)
@given(place=st.sampled_from(PLACES), value=VALUES)
def test_any_value_anywhere_is_valid_or_a_params_error(place: str, value: Any) -> None:
    try:
        parse_params(content_with(place, value))
    except ParamsError as error:
        assert str(error).startswith("params.yaml: ")


# --- tuning


def test_tuning_needs_a_choice() -> None:
    says = "tuning: trials: tuning needs two trials or more to choose from; add trials, or say trials: {}"
    assert error_of(content_with("tuning/trials", {"given": {}})) == says
    assert parse_params(TINY).tuning.enabled
    assert not parse_params(content_with("tuning/trials", {})).tuning.enabled


@pytest.mark.parametrize("is_tuned", [True, False])
def test_tuning_on_a_seed_of_the_report_is_refused(is_tuned: bool) -> None:
    content = content_with("seeds", [0, 3])
    content["tuning"] |= {"seed": 3} if is_tuned else {"seed": 3, "trials": {}}
    assert error_of(content) == "tuning.seed 3 is one of seeds [0, 3]: tune on a seed of its own"


@pytest.mark.parametrize("name", ["LR", "lr_2", "-lr", "lr 2", "lr.2", "", "a/b"])
def test_name_of_a_trial_that_could_be_no_file_is_refused(name: str) -> None:
    content = copy.deepcopy(TINY)
    content["tuning"]["trials"][name] = {"finetune.lr": 1e-3}
    assert error_of(content) == f"tuning.trials.{name}: a trial's name may hold only a-z, 0-9 and '-'"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sampling.num_steps": 3}, "sampling.num_steps: a trial may change pretrain.*, finetune.* and training.*"),
        ({"budget.unmasked_steps": 3}, "budget.unmasked_steps: a trial may change pretrain.*"),
        ({"compute.devices": 2}, "compute.devices: a trial may change pretrain.*"),
        ({"finetun.lr": 1e-3}, "finetun.lr: a trial may change pretrain.*, finetune.* and training.*"),
        ({"lr": 1e-3}, "lr: a trial may change pretrain.*, finetune.* and training.*"),
        ({"training.ema_deca": 0.9}, "training.ema_deca: unknown key; did you mean 'ema_decay'?"),
        ({"training.betas.0": 0.9}, "training.betas.0: unknown key"),
        ({"finetune.lrr": 1e-3}, "finetune.lrr: unknown key; did you mean 'lr'?"),
        ({"pretrain.lrr": 1e-3}, "pretrain.lrr: unknown key; did you mean 'lr'?"),
        ({"finetune.lr": 1e-3, "pretrain.batchsize": 8}, "pretrain.batchsize: unknown key; did you mean 'batch_size'?"),
        ({"finetune.lr": -1}, "finetune.lr: input should be greater than 0, got -1"),
        ({"finetune.lr": "fast"}, "finetune.lr: input should be a valid number"),
        ({"training.ema_decay": 1.0}, "training.ema_decay: input should be less than 1, got 1.0"),
        ({"finetune.micro_batch_size": 5}, "micro_batch_size 5 does not divide batch_size 32"),
        ({"finetune.lr": 1e-3, "pretrain.share": 0.99}, "falls into pretraining, which takes 0.99 of it"),
        ({"finetune.batch_size": 700}, "arms.scratch: what pretraining leaves of the budget pays for 0.91 of one"),
        ({"finetune.batch_size": 512}, "arms.scratch: the milestones [0.6, 1.0] fall on finetuning steps [1, 1]"),
        ({"finetune.lr": 1e-3, "pretrain.share": 0.2, "pretrain.steps": 2}, "give share (0.2) or steps (2), not both"),
    ],
)
def test_trial_that_can_not_be_run_is_named_with_what_is_wrong(values: dict[str, Any], says: str) -> None:
    message = error_of(content_with("tuning/trials/wrong", values))
    assert message.startswith("tuning.trials.wrong: ")
    assert says in message


def test_every_mistake_of_a_trial_gets_a_line_of_its_own() -> None:
    with pytest.raises(ParamsError) as caught:
        parse_params(content_with("tuning/trials/wrong", {"training.ema_deca": 0.9, "training.flop": 0.5}))
    lines = str(caught.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith("params.yaml: tuning.trials.wrong: training.") for line in lines)


@pytest.mark.parametrize(
    "values", [{}, {"finetune.lr": 2e-3}, {"finetune.lr": "2e-3"}, {"training.flip": 0.0}], ids=str
)
def test_two_trials_that_are_one_are_refused(values: dict[str, Any]) -> None:
    message = error_of(content_with("tuning/trials/again", values))
    assert message.startswith(
        "tuning.trials: given and again are the same for arm scratch; every arm must get the same"
    )


def test_trials_that_differ_in_pretraining_alone_are_one_for_an_arm_without_it() -> None:
    content = content_with("tuning/trials", {"given": {}, "other": {"pretrain.lr": 1e-3}})
    assert "given and other are the same for arm scratch" in error_of(content)
    del content["arms"]["scratch"]
    assert list(parse_params(content).tuning.trials) == ["given", "other"]


def test_trials_that_an_arms_own_values_make_equal_are_refused() -> None:
    content = content_with("arms/patch-m50/finetune", {"lr": 8e-3})
    content["arms"]["patch-m50"]["pretrain"] = {"lr": 8e-3}
    assert "given and lr-high are the same for arm patch-m50" in error_of(content)


@pytest.mark.parametrize(
    ("fraction", "says"), [(0.01, "pays for 0.61 of one pretraining step"), (1e-9, "of one pretraining step")]
)
def test_fraction_of_the_budget_that_pays_for_no_step_is_refused(fraction: float, says: str) -> None:
    message = error_of(content_with("tuning/budget_fraction", fraction))
    assert message.startswith("tuning.trials.given: arms.patch-m50: ")
    assert says in message and f"raise tuning.budget_fraction (now {fraction:g})" in message


def test_trials_of_the_whole_budget_have_one_milestone() -> None:
    params = for_trial(parse_params(content_with("tuning/budget_fraction", 1.0)), "patch-m50", {})
    assert params.budget == parse_params(TINY).budget.model_copy(update={"milestones": [1.0]})


VALUES_OF_A_TRIAL = {"pretrain.lr": 5e-3, "pretrain.batch_size": 16, "finetune.init_from": "raw", "training.flip": 0.5}


def test_values_are_those_of_the_arm_and_of_no_other() -> None:
    params = parse_params(TINY)
    changed = with_values(params, "patch-m50", VALUES_OF_A_TRIAL)
    assert changed.pretrain_of("patch-m50") == params.pretrain.model_copy(update={"lr": 5e-3, "batch_size": 16})
    assert changed.finetune_of("patch-m50") == params.finetune.model_copy(update={"init_from": "raw"})
    assert changed.training == params.training.model_copy(update={"flip": 0.5})
    for other in ("scratch", "block2-m75"):
        assert changed.pretrain_of(other) == params.pretrain_of(other)
        assert changed.finetune_of(other) == params.finetune_of(other)
        assert changed.arms[other] == params.arms[other]
    assert (params.pretrain_of("patch-m50").lr, params.training.flip) == (2e-3, 0.0), "the original is as it was"
    untouched = set(Params.model_fields) - {"arms", "training", "tuning"}
    assert {name: getattr(changed, name) for name in untouched} == {name: getattr(params, name) for name in untouched}


def test_params_with_values_have_nothing_left_to_tune() -> None:
    params = parse_params(TINY)
    changed = with_values(params, "patch-m50", VALUES_OF_A_TRIAL)
    assert changed.tuning == params.tuning.model_copy(update={"trials": {}})


def test_values_stand_above_those_of_the_arm_and_beside_the_rest_of_them() -> None:
    content = content_with("arms/patch-m50/pretrain", {"lr": 1e-3, "warmup_steps": 2, "share": 0.2})
    params = with_values(parse_params(content), "patch-m50", {"pretrain.lr": 5e-3})
    own = params.pretrain_of("patch-m50")
    assert (own.lr, own.warmup_steps, own.share) == (5e-3, 2, 0.2)


def test_an_arm_without_pretraining_ignores_values_of_it() -> None:
    params = parse_params(TINY)
    changed = with_values(params, "scratch", {"pretrain.lr": 1.0, "pretrain.share": 0.5, "finetune.lr": 5e-3})
    assert changed.arms["scratch"].pretrain == {}
    assert changed.pretrain_of("scratch") == params.pretrain_of("scratch")
    assert changed.finetune_of("scratch").lr == 5e-3


def test_no_values_change_nothing_but_that_nothing_is_left_to_tune() -> None:
    params = parse_params(TINY)
    off = parse_params(content_with("tuning/trials", {}))
    assert all(with_values(params, arm, {}) == off for arm in params.arms)


def test_a_trial_is_on_the_seed_of_the_tuning_at_its_fraction_of_the_budget() -> None:
    params = parse_params(TINY)
    trial = for_trial(params, "patch-m50", VALUES_OF_A_TRIAL)
    assert trial.seeds == [1000]
    assert trial.budget.unmasked_steps == 10
    assert trial.budget.milestones == [1.0]
    assert trial.budget.match == params.budget.match
    same = with_values(params, "patch-m50", VALUES_OF_A_TRIAL)
    assert trial.arms["patch-m50"] == same.arms["patch-m50"]
    assert (trial.training, trial.pretrain) == (same.training, same.pretrain)
    assert (trial.finetune, trial.sampling, trial.evaluation) == (same.finetune, same.sampling, same.evaluation)
    assert not trial.tuning.enabled
    assert parse_params(trial.model_dump(mode="json", exclude_unset=True)) == trial, "it could be run by hand"


@pytest.mark.parametrize(("fraction", "steps"), [(0.5, 3), (0.3, 2), (0.2, 1)])
def test_pretraining_by_steps_takes_its_fraction_of_them_in_a_trial(fraction: float, steps: int) -> None:
    content = content_with("arms/patch-m50/pretrain", {"steps": 6})
    content["tuning"]["budget_fraction"] = fraction
    params = parse_params(content)
    assert for_trial(params, "patch-m50", {}).pretrain_of("patch-m50").steps == steps
    assert for_trial(params, "block2-m75", {}).pretrain_of("block2-m75") == params.pretrain


def test_pretraining_by_the_steps_of_all_arms_takes_its_fraction_of_them_in_a_trial() -> None:
    params = parse_params(content_with("pretrain", {"lr": 2e-3, "batch_size": 32, "steps": 6}))
    for arm in ("patch-m50", "block2-m75"):
        assert for_trial(params, arm, {}).pretrain_of(arm).steps == 3
    assert for_trial(params, "scratch", {}).pretrain_of("scratch").steps is None


def test_pretraining_steps_of_one_arm_do_not_stop_the_trials_of_another() -> None:
    """24 steps are 0.59 of the arm's budget, and 12 of a trial's; 24 would be more than the whole of a trial's."""
    params = parse_params(content_with("arms/patch-m50/pretrain", {"steps": 24}))
    assert for_trial(params, "patch-m50", {}).pretrain_of("patch-m50").steps == 12
    assert for_trial(params, "scratch", {}).budget.unmasked_steps == 10


def test_arm_config_alone_knows_what_a_mask_needs() -> None:
    make: Callable[..., ArmConfig] = ArmConfig
    assert make(strategy="crop", mask_rate=0.5).block_size is None
    with pytest.raises(ValueError, match="block_size"):
        make(strategy="crop", mask_rate=0.5, block_size=2)


@pytest.mark.parametrize(("key", "read"), [("off", "false"), ("007", "7"), ("0x10", "16"), ("null", "null")])
def test_a_key_that_yaml_does_not_read_as_text_is_quoted(key: str, read: str, tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(f"arms:\n  {key}: {{strategy: none}}\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=f"YAML reads the key {key} as {read}: write it in quotes"):
        load_params(file)
    arms = yaml.safe_load(file.read_text(encoding="utf-8"))["arms"]  # as Snakemake reads it
    with pytest.raises(ParamsError, match=f"^params.yaml: arms: YAML reads a key as {read}: write it in quotes"):
        parse_params({**TINY, "arms": arms})
