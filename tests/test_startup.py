"""What commands import: no compiler, no engine, nothing that is not used. Each import costs every short stage time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

from maskdm.config.jobs import ARM_STAGES
from maskdm.training.optimizer import EagerAdam, EagerAdamW
from tests.imported import modules_after_each, run_python

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
HEAVY = TENSORS | TRAINING

# Stages that one process runs in this order, and what is not imported after each: ever less.
PROCESSES: list[dict[str, set[str]]] = [
    {"choose": TRAINING | {"torch"}, "prepare": TRAINING - {"PIL"} | {"torch"}},  # scikit-learn's digits without it
    {
        **dict.fromkeys(("features", "scale", "tune", "pretrain", "finetune"), TRAINING),
        "sample": TRAINING - {"PIL"},  # it draws grids
        "evaluate": TRAINING - {"PIL"},
        "report": NEVER | {"sklearn"},  # SciPy has Student's t, torch draws the example masks
    },
]


def words_of(stage: str) -> list[str]:
    return [stage, *(OF_ARM if stage in ARM_STAGES else OF_TRIAL if stage == "tune" else [])]


@pytest.mark.workflow
@pytest.mark.parametrize("unused", PROCESSES, ids=" ".join)
def test_stages_import_only_what_they_use(scored: Experiment, unused: dict[str, set[str]]) -> None:
    """And PyTorch's kernels are deterministic, and imported modules alone are kept out of garbage collection."""
    commands = [[*words_of(stage), "--force"] for stage in unused]
    more = """
import gc, sys
if "torch" in sys.modules:
    assert sys.modules["torch"].are_deterministic_algorithms_enabled()
assert gc.isenabled() and gc.get_freeze_count() > 10_000 and len(gc.get_objects()) < gc.get_freeze_count()
"""
    for modules, (stage, names) in zip(modules_after_each(scored.folder, commands, more), unused.items(), strict=True):
        assert not modules & names, stage


def test_stages_that_are_up_to_date_import_nothing_heavy(finished_once: Experiment) -> None:
    commands = [words_of(stage) for stages in PROCESSES for stage in stages]
    *_, modules = modules_after_each(finished_once.folder, commands)
    assert not modules & HEAVY


def test_commands_that_compute_nothing_import_nothing_heavy(tiny: Experiment) -> None:
    """Nor does the Snakefile, which looks for outdated outputs."""
    given = ("--version", "--help", "pretrain --help", "plan --help", "validate", "status", "verify")
    snakefile = "import maskdm.stages.markers; print('MODULES', *sys.modules)"
    after_each = modules_after_each(tiny.folder, [words.split() for words in given], snakefile)
    for modules, words in zip(after_each, (*given, "Snakefile"), strict=True):
        assert not modules & HEAVY and len(modules) < 500, words


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


@pytest.mark.workflow
def test_pytorchs_optimizer_imports_the_compiler_and_the_bare_one_does_not(tiny: Experiment) -> None:
    """Where PyTorch's own no longer does, ours are no longer needed."""
    code = """
import sys, torch
from maskdm.training.optimizer import EagerAdamW
for cls in (EagerAdamW, torch.optim.AdamW):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([weight], lr=0.1, fused=True)
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    print("torch._dynamo" in sys.modules)
"""
    assert run_python(code, tiny.folder) == ["False", "True"]
