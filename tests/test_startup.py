"""What starting a command costs, told by what its process imports: no compiler, nothing that is not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from maskdm.config.jobs import ARM_STAGES
from maskdm.training.optimizer import EagerAdam, EagerAdamW
from tests.imported import AFTER, after, modules_after, run_python

if TYPE_CHECKING:
    from tests.conftest import Experiment

OF_ARM = ["--arm", "patch-m50", "--seed", "0"]
OF_TRIAL = ["--arm", "patch-m50", "--trial", "given"]
COMPILER = {"torch._dynamo", "torch._inductor", "sympy"}
SCORING = {"torch_fidelity", "torchvision"}
PLOTTING = {"matplotlib", "pandas"}
ENGINES = {"dvc", "snakemake", "mlflow"}
TENSORS = {"torch", "numpy"}
NEVER = COMPILER | SCORING | ENGINES  # the classifier scores, and MLflow is for stages of minutes, and the report
TRAINING = NEVER | PLOTTING | {"sklearn", "scipy", "PIL"}

NOT_IMPORTED = {
    "prepare": TRAINING - {"PIL"} | {"torch"},  # not even scikit-learn, which has the digits
    "features": TRAINING,
    "scale": TRAINING,
    "tune": TRAINING,
    "choose": TRAINING | {"torch"},
    "pretrain": TRAINING,
    "finetune": TRAINING,
    "sample": TRAINING - {"PIL"},  # it draws grids
    "evaluate": TRAINING - {"PIL"},  # it knows what `sample` has drawn
    "report": NEVER | {"sklearn"},  # SciPy has Student's t, torch draws the example masks
}


def words_of(stage: str) -> list[str]:
    return [stage, *(OF_ARM if stage in ARM_STAGES else OF_TRIAL if stage == "tune" else [])]


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["validate"]], ids=" ".join)
def test_commands_that_compute_nothing_import_neither_tensors_nor_engines(tiny: Experiment, words: list[str]) -> None:
    assert not modules_after(tiny.folder, *words) & (TENSORS | TRAINING)


@pytest.mark.parametrize("stage", list(NOT_IMPORTED))
def test_a_stage_that_does_its_work_imports_only_what_it_uses(scored: Experiment, stage: str) -> None:
    unused = modules_after(scored.folder, *words_of(stage), "--force") & NOT_IMPORTED[stage]
    assert not unused, unused


@pytest.mark.parametrize("stage", list(NOT_IMPORTED))
def test_a_stage_that_is_up_to_date_imports_neither_tensors_nor_engines(finished_once: Experiment, stage: str) -> None:
    said, modules = run_python(AFTER.format(words=words_of(stage), more=""), finished_once.folder)
    assert said.endswith(": up to date")
    assert not {*modules.split()} & (TENSORS | TRAINING)


@pytest.mark.parametrize(
    "module", ["maskdm.config.jobs", "maskdm.stages.markers", "maskdm.stages.runner", "maskdm.status"]
)
def test_what_only_compares_stamps_imports_neither_tensors_nor_engines(module: str, tiny: Experiment) -> None:
    (modules,) = run_python(f"import sys, {module}; print(*sys.modules)", tiny.folder)
    assert not {*modules.split()} & (TENSORS | TRAINING)


def test_kernels_are_deterministic_although_the_compiler_is_not_told(prepared: Experiment) -> None:
    asked = "import torch; print(torch.are_deterministic_algorithms_enabled())"
    assert after(prepared.folder, *words_of("pretrain"), more=asked)[1:] == ["True"]


def test_imported_modules_are_kept_out_of_garbage_collection_and_nothing_else_is(prepared: Experiment) -> None:
    asked = """
import gc
print(gc.isenabled(), gc.get_freeze_count() > 10_000, len(gc.get_objects()) < gc.get_freeze_count())
"""
    assert after(prepared.folder, "choose", "--force", more=asked)[1:] == ["True True True"]


# --- optimizers without the compiler


def trained(optimizer: Callable[..., torch.optim.Optimizer], **options: object) -> list[Tensor]:
    """Weights and moments after some steps, one of which is skipped as the training skips a non-finite one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 1))
    by_dim = {dim: [p for p in model.parameters() if p.dim() == dim] for dim in (1, 2)}
    groups = [{"params": by_dim[1], "weight_decay": 0.0}, {"params": by_dim[2], "weight_decay": 0.1}]
    stepping = optimizer(groups, lr=0.01, betas=(0.8, 0.9), **options)
    for step in range(6):
        model(torch.randn(4, 6)).square().mean().backward()
        if options.get("fused"):
            stepping.found_inf = torch.tensor(float(step == 3))  # type: ignore[attr-defined]
        stepping.step()
        stepping.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    weights = [p.detach() for p in model.parameters()]
    return weights + [value for p in model.parameters() for value in stepping.state[p].values()]


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}], ids=["fused", "foreach", "plain"])
@pytest.mark.parametrize(("bare", "whole"), [(EagerAdam, torch.optim.Adam), (EagerAdamW, torch.optim.AdamW)])
def test_the_bare_optimizers_make_the_updates_of_pytorchs(
    bare: type[torch.optim.Optimizer], whole: type[torch.optim.Optimizer], options: dict[str, object]
) -> None:
    ours, theirs = trained(bare, **options), trained(whole, **options)
    assert len(ours) == len(theirs) == 4 * 4
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


def test_an_update_records_no_gradient_and_leaves_gradients_on() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = EagerAdamW([weight], lr=0.1)
    weight.square().sum().backward()
    optimizer.step()  # without `no_grad`, changing a leaf in place is an error
    assert torch.is_grad_enabled() and weight.is_leaf and not torch.equal(weight, torch.ones(3))


@pytest.mark.parametrize(
    ("name", "imports"), [("maskdm.training.optimizer.EagerAdamW", False), ("torch.optim.AdamW", True)]
)
def test_the_bare_optimizers_do_not_import_the_compiler(tiny: Experiment, name: str, imports: bool) -> None:
    """Where PyTorch's own no longer does, ours are no longer needed."""
    module, cls = name.rsplit(".", 1)
    code = f"""
import sys, torch
from {module} import {cls}
weight = torch.nn.Parameter(torch.ones(3))
optimizer = {cls}([weight], lr=0.1, fused=True)
weight.sum().backward()
optimizer.step()
optimizer.zero_grad()
print("torch._dynamo" in sys.modules)
"""
    assert run_python(code, tiny.folder) == [str(imports)]
