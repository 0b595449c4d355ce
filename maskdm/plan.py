"""`maskdm plan`: what every arm would do with its budget, before anything runs."""

from __future__ import annotations

from tabulate import tabulate

from maskdm.compute import plan_arm
from maskdm.config import Params

COLUMNS = [
    "arm",
    "m asked",
    "m realised",
    "visible",
    "pretrain steps × batch",
    "GFLOP/step",
    "finetune steps × batch",
    "GFLOP/step",
    "total TFLOP",
]


def format_plan(params: Params) -> str:
    """A table with a row per arm."""
    rows = [_row(params, arm) for arm in params.arms]
    table = tabulate(rows, headers=COLUMNS, disable_numparse=True)
    return f"{table}\n\nmatched by {params.budget.match}; each arm runs once per seed: {params.seeds}"


def _row(params: Params, arm: str) -> list[str]:
    plan, visible = plan_arm(params, arm), params.visible_of(arm)
    asked = params.arm(arm).mask_rate
    window = "" if visible.window is None else f" ({visible.window[0]}×{visible.window[1]})"
    return [
        arm,
        "-" if asked is None else f"{asked:g}",
        f"{visible.realised_mask_rate(params.grid):.4g}",
        f"{visible.num_visible}/{params.grid.num_patches}{window}",
        f"{plan.pretrain.num_steps} × {plan.pretrain.batch_size}",
        f"{plan.pretrain.flops_per_step / 1e9:.3g}",
        f"{plan.finetune.num_steps} × {plan.finetune.batch_size}",
        f"{plan.finetune.flops_per_step / 1e9:.3g}",
        f"{plan.flops / 1e12:.4g}",
    ]
