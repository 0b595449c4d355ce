from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from maskdm.base.errors import ParamsError, UserError
from maskdm.config import load_params
from maskdm.config.new_experiment import new_experiment, next_steps

ROOT = Path(__file__).parents[2]
TINY = ROOT / "experiments" / "tiny"


def make(folder: Path, *changes: str, arms: tuple[str, ...] = (), source: Path = TINY) -> Path:
    new_experiment(folder, source, changes, arms)
    return folder


def test_it_is_the_other_one_but_for_what_was_changed(tmp_path: Path) -> None:
    folder = make(tmp_path / "mine", "budget.unmasked_steps=30", "pretrain.lr=2e-4", "training.flip=0.5")
    before = yaml.safe_load((TINY / "params.yaml").read_text(encoding="utf-8"))
    after = yaml.safe_load((folder / "params.yaml").read_text(encoding="utf-8"))
    assert after.pop("name") == "mine"
    before.pop("name")
    before["budget"]["unmasked_steps"] = 30
    before["pretrain"]["lr"] = 2e-4
    before["training"]["flip"] = 0.5
    assert load_params(folder / "params.yaml").pretrain.lr == 2e-4
    after["pretrain"]["lr"] = float(after["pretrain"]["lr"])
    assert after == before


def test_comments_are_kept_and_the_first_line_says_where_it_comes_from(tmp_path: Path) -> None:
    text = (make(tmp_path / "mine", "name=other", arms=("scratch",)) / "params.yaml").read_text(encoding="utf-8")
    says = f"# From {TINY / 'params.yaml'}, changed: name=other --arms scratch; the comment below describes that one."
    assert text.startswith(f"{says}\n# The whole pipeline in")
    assert "name: other\n" in text


def test_dvc_finds_the_pipeline_in_it(tmp_path: Path) -> None:
    assert (make(tmp_path / "mine") / "dvc.yaml").resolve() == (ROOT / "dvc.yaml").resolve()


def test_only_the_named_arms_are_kept(tmp_path: Path) -> None:
    assert list(load_params(make(tmp_path / "mine", arms=("patch-m50",)) / "params.yaml").arms) == ["patch-m50"]


def test_paths_go_on_leading_to_the_same_files(tmp_path: Path) -> None:
    source = tmp_path / "project" / "experiments" / "first"
    source.mkdir(parents=True)
    for name in ("dvc.yaml", "Snakefile"):
        (tmp_path / "project" / name).touch()
    content = yaml.safe_load((TINY / "params.yaml").read_text(encoding="utf-8"))
    content["dataset"] = {"source": "image_folder", "root": "data/a", "image_size": 8, "channels": 1}
    content["datasets"] = {"more": {**content["dataset"], "root": "/data/b"}}
    (source / "params.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    folder = make(tmp_path / "elsewhere" / "deep" / "mine", source=source)
    params = load_params(folder / "params.yaml")
    assert params.dataset.root is not None
    assert (folder / params.dataset.root).resolve() == (source / "data" / "a").resolve()
    assert params.datasets["more"].root == "/data/b"


def test_a_path_that_an_alias_repeats_is_moved_once(tmp_path: Path) -> None:
    source = tmp_path / "project"
    source.mkdir()
    for name in ("dvc.yaml", "Snakefile"):
        (source / name).touch()
    lines = (TINY / "params.yaml").read_text(encoding="utf-8").splitlines()
    lines = [line for line in lines if not line.startswith(("dataset:", "datasets:"))]
    lines += ["datasets:", "  one: &one {source: image_folder, root: imgs, image_size: 8, channels: 1}", "  two: *one"]
    lines += ["dataset:", "  <<: *one", "  limit: 200"]
    (source / "params.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    params = load_params(make(tmp_path / "mine", source=source) / "params.yaml")
    roots = [params.dataset.root, *(dataset.root for dataset in params.datasets.values())]
    assert roots == ["../project/imgs"] * 3


def test_files_that_are_looked_for_beside_params_yaml_are_found_from_elsewhere(tmp_path: Path) -> None:
    fashion = ROOT / "experiments" / "fashion-mnist"
    params = load_params(make(tmp_path / "mine", source=fashion) / "params.yaml")
    assert params.dataset.root is not None
    assert (tmp_path / "mine" / params.dataset.root).resolve() == fashion / "data" / "fashion_mnist"


@pytest.mark.parametrize(
    ("changes", "arms", "says"),
    [
        (["model.dime=3"], (), "model.dime: unknown key; did you mean 'dim'?"),
        (["model.dim=0"], (), "model.dim: "),
        (["model.dim"], (), "--set model.dim: expected path.to.key=value"),
        (["=3"], (), "--set =3: expected path.to.key=value"),
        (["name.x=3"], (), "name is a value, not a section"),
        (["seeds=[1"], (), "--set seeds: '[1' is not a YAML value"),
        (["name=!x y"], (), "the new params.yaml is not plain YAML"),
        (["arms=5"], ("scratch",), "arms: input should be a valid dictionary"),
        ([], ("none",), "there is no arm 'none'; expected some of scratch, patch-m50, block2-m75"),
    ],
)
def test_a_wrong_change_is_refused_and_nothing_is_made(
    tmp_path: Path, changes: list[str], arms: tuple[str, ...], says: str
) -> None:
    with pytest.raises(ParamsError) as caught:
        make(tmp_path / "mine", *changes, arms=arms)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "mine").exists()


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "params.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="is there already"):
        make(tmp_path / "mine")
    assert (tmp_path / "mine" / "params.yaml").read_text(encoding="utf-8") == "mine"


def test_one_that_was_made_outside_of_the_project_can_be_made_another_from(tmp_path: Path) -> None:
    second = make(tmp_path / "second", source=make(tmp_path / "first"))
    assert (second / "dvc.yaml").resolve() == (ROOT / "dvc.yaml").resolve()


def test_outside_of_a_project_there_is_no_pipeline_to_link_to(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((TINY / "params.yaml").read_bytes())
    with pytest.raises(UserError, match="is not in a maskdm project"):
        make(tmp_path / "mine", source=tmp_path)


def test_dvc_is_named_where_it_can_run_it(tmp_path: Path) -> None:
    assert "dvc repro" not in next_steps(tmp_path / "mine")
    (tmp_path / ".dvc").mkdir()
    assert f"dvc repro {tmp_path}/mine/dvc.yaml" in next_steps(tmp_path / "mine")
