"""The model card of a network: what it is, what it was trained on, what it cost, how good it is, and how to use it.

Every section is a function of plain facts that gives the lines of its part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from maskdm.base.printable import printable
from maskdm.config import Params
from maskdm.config.formats import WeightSet
from maskdm.models.layouts import Checkpoint
from maskdm.report.prose import bias_note, extractor_caution, few_samples_caution
from maskdm.scoring.protocol import Protocol

MOST_SHOWN = 20  # names of what an import has ignored
PAPER = "[Masked Diffusion Models are Fast Distribution Learners](https://arxiv.org/abs/2306.11363)"
SETS: dict[WeightSet, str] = {"ema": "averaged (EMA)", "raw": "raw"}
SCORES = {"fid": "FID", "kid": "KID", "precision": "precision", "recall": "recall"}
USE = """\
With maskdm installed, in the folder that holds `{name}`:

```python
from pathlib import Path

from maskdm.data.grids import save_grid
from maskdm.models.exported import load_exported

exported = load_exported("{name}")  # also: params, model, num_classes = exported
images = exported.draw(num_images=16, seed=0)  # uint8 (16, {height}, {width}, {channels}); image i depends on (seed, i)
save_grid(images, Path("images.png"))
```

The weights alone, by parameter name: `safetensors.torch.load_file("{name}/model.safetensors")`."""


@dataclass(frozen=True)
class Training:
    """What is known of a checkpoint of an experiment.

    Attributes:
        what: e.g. `arm patch-m50, seed 0, at 100 % of the budget`.
        arm: its key.
        manifests: of the prepared datasets, by what they are for; None where they are not there any more.
        spent: by stage, {steps, batch_size, images_seen, flops}; both stages together under `together`.
        record: of the stage that made it; empty where there is none.
        scores: of the checkpoint; None where it is not scored.
        metrics: the whole file that they come from.
        not_scored: why there are no scores.
        started_from: the folder of other weights that pretraining started from; None if from scratch.
        started_from_sha256: of those weights; None where it is not known.
        num_features: D of the extractor that made the scores; 0 where it is not known.
    """

    what: str
    arm: str
    manifests: Mapping[str, Mapping[str, Any] | None]
    spent: Mapping[str, Mapping[str, int]]
    record: Mapping[str, Any]
    scores: Mapping[str, Any] | None
    metrics: Mapping[str, Any]
    not_scored: str
    started_from: str | None = None
    started_from_sha256: str | None = None
    num_features: int = 0


def exported_card(name: str, params: Params, num_classes: int, which: WeightSet, training: Training) -> str:
    """The card of a checkpoint of an experiment.

    Args:
        name: of the folder.
        params: that it was trained with.
        num_classes: of the dataset.
        which: the weights that are exported.
        training: what is known of it.
    """
    sections = {
        "What this is": [
            f"The {SETS[which]} weights of experiment `{params.name}`, {training.what}: a diffusion model of images, "
            "trained with maskdm."
        ],
        "Data": _data(params, training),
        "Network": _network(params, num_classes),
        "Masking": _masking(params, training.arm),
        "Compute": _compute(training),
        "Quality": _quality(which, training),
        "Where it comes from": _origin(training.record),
        "Use": [_use(name, params)],
    }
    return _card(name, params, sections)


def imported_card(
    name: str, params: Params, checkpoint: Checkpoint, source: Mapping[str, Any], which: WeightSet
) -> str:
    """The card of a network of other code.

    Args:
        name: of the folder.
        params: that describe it.
        checkpoint: what was read.
        source: its file, sha256 and layout.
        which: the set in model.safetensors.
    """
    process = params.diffusion
    others = [kind for kind in checkpoint.sets if kind != which]
    ignored = [*checkpoint.ignored[:MOST_SHOWN], *(["…"] if len(checkpoint.ignored) > MOST_SHOWN else [])]
    sections = {
        "What this is": [
            f"Weights imported from `{source['file']}` (sha256 `{source['sha256']}`), in the layout of the code of "
            f"{'MaskDM' if source['layout'] == 'maskdm' else 'U-ViT'}: the network computes the same function.",
            "",
            f"`model.safetensors` holds the {SETS[which]} weights"
            + "".join(f", `model-{kind}.safetensors` the {SETS[kind]} ones" for kind in others)
            + f". Not taken over: {', '.join(ignored) or 'nothing'}.",
        ],
        "Data": [
            "Not recorded in the file. `dataset.root` in config.json is a placeholder, as are its budget, arms and "
            "learning rates."
        ],
        "Network": [
            *_network(params, checkpoint.shape.num_classes),
            f"- said at import, not in the file: {params.model.num_heads} heads, {process.num_timesteps} timesteps, "
            f"schedule {process.schedule}, prediction {process.prediction}; images from [−1, 1]",
        ],
        "Quality": ["Not scored."],
        "Use": [_use(name, params)],
    }
    return _card(name, params, sections)


def _card(name: str, params: Params, sections: Mapping[str, Sequence[str]]) -> str:
    kind = "class-conditional" if params.model.class_conditional else "unconditional-image-generation"
    front = {"library_name": "maskdm", "tags": ["diffusion", kind, "masked-pretraining", "u-vit", params.name]}
    head = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "# license: yours to choose, e.g. apache-2.0", "---"]
    parts = [f"## {title}\n\n" + "\n".join(lines) for title, lines in sections.items()]
    return "\n".join(head) + f"\n\n# {name}\n\n" + "\n\n".join(parts) + "\n"


def _use(name: str, params: Params) -> str:
    height, width, channels = params.dataset.shape
    return USE.format(name=name, height=height, width=width, channels=channels)


def _data(params: Params, training: Training) -> list[str]:
    lines = []
    for purpose, manifest in training.manifests.items():
        if manifest is None:
            lines.append(f"- {purpose}: not here any more, or prepared anew since")
            continue
        lines += [
            f"- {purpose}: {manifest['count']:,} images, sha256 of their pixels `{manifest['sha256']}`",
            *(f"  - {part}: {_listed(manifest[part])}" for part in ("source", "protocol")),
        ]
    flips = f"- left-right flips in training: with probability {params.training.flip:g}"
    return [*lines, *_start(training), flips]


def _start(training: Training) -> list[str]:
    """Weights of elsewhere that the network started from; the last part of a path says enough to strangers."""
    if training.started_from is None:
        return []
    name = printable(training.started_from.rstrip("/").rsplit("/", 1)[-1])
    known = training.started_from_sha256
    sha256 = f" (sha256 `{known}`)" if known else ""
    return [f"- started from the weights in `{name}`{sha256}, whose data and compute are not counted here"]


def _listed(values: Mapping[str, Any]) -> str:
    """Plain values as text; the last part of a path says enough to strangers."""
    given = {key: value for key, value in values.items() if value is not None}
    shown = {key: str(value).rstrip("/").rsplit("/", 1)[-1] if key == "root" else value for key, value in given.items()}
    return ", ".join(f"{key} {printable(str(value))}" for key, value in shown.items())


def _network(params: Params, num_classes: int) -> list[str]:
    model, process, (height, width, channels) = params.model, params.diffusion, params.dataset.shape
    classes = f"a class token of {num_classes} classes" if model.class_conditional else "no classes"
    time = "a SiLU MLP makes the time token" if model.mlp_time_embed else "the sinusoidal embedding is the time token"
    return [
        f"- U-ViT without its final convolution: dim {model.dim}, {model.depth} blocks with long skips, "
        f"{model.num_heads} heads, MLP ratio {model.mlp_ratio:g}; {time}; {classes}",
        f"- images {height}×{width}×{channels} in patches of {model.patch_size}×{model.patch_size}: "
        f"{params.grid.num_patches} tokens",
        f"- diffusion: {process.num_timesteps} timesteps, schedule {process.schedule}, predicts {process.prediction}",
        f"- drawn with {params.sampling.sampler}, {params.sampling.num_steps} evaluations per image",
    ]


def _masking(params: Params, arm: str) -> list[str]:
    config = params.arm(arm)
    if config.strategy == "none":
        return ["No masked pretraining: trained from scratch."]
    block = f" of {config.block_size}×{config.block_size} patches" if config.block_size else ""
    visible, grid = params.visible_of(arm).num_visible, params.pretrain_grid_of(arm)
    return [
        f"- strategy {config.strategy}{block}, mask rate asked for {config.mask_rate:g}, realised "
        f"{params.realised_mask_rate_of(arm):.4g}: {visible} of {grid.num_patches} patches visible",
        f"- masked patches never entered the network; method: {PAPER}",
    ]


def _compute(training: Training) -> list[str]:
    lines = []
    for stage, spent in training.spent.items():
        steps = f"{spent['steps']:,} steps of {spent['batch_size']} images, " if "steps" in spent else ""
        lines.append(f"- {stage}: {steps}{spent['images_seen']:,} images, {spent['flops']:.4g} FLOPs")
    seconds = training.record.get("device_seconds")
    where = training.record.get("device_name")
    timed = [f"- the last stage took {seconds:,} s in training steps on {where}"] if seconds is not None else []
    return [*lines, "- FLOPs are counted, forward and backward, 2 per multiply-add", *timed]


def _quality(which: WeightSet, training: Training) -> list[str]:
    if training.scores is None:
        return [f"Not scored: {training.not_scored}."]
    metrics, scores = training.metrics, training.scores
    lines = [
        "| metric | value |",
        "|---|---|",
        *(f"| {title} | {scores[key]:.6g} |" for key, title in SCORES.items() if key in scores),
        "",
        f"- extractor `{metrics['extractor']}`, sha256 `{metrics['extractor_sha256']}`; "
        f"{scores['num_samples']:,} samples, drawn from the {SETS[which]} weights with seed {metrics['seed']}",
        *_protocol_lines(_protocol_of(metrics)),
    ]
    if "fid_floor" in metrics:
        lines.append(
            f"- scale: real images against real ones have FID {metrics['fid_floor']:.6g} (n = "
            f"{metrics['floor_num_samples']:,}), the untrained network {metrics['fid_untrained']:.6g}"
        )
    protocol = _protocol_of(metrics)
    num_samples = scores["num_samples"]
    fewest = num_samples if protocol is None else min(num_samples, protocol.num_real)
    caveats = [
        extractor_caution(str(metrics["extractor"])),
        few_samples_caution(fewest, training.num_features) if training.num_features else "",
        bias_note(num_samples),
        "One run with one seed: another seed gives another number.",
    ]
    return [*lines, *(f"- caveat: {text}" for text in caveats if text)]


def _protocol_of(metrics: Mapping[str, Any]) -> Protocol | None:
    """What the scores are of; None where it was not recorded."""
    try:
        return Protocol.from_dict(metrics["protocol"])
    except (ValueError, TypeError, KeyError):
        return None


def _protocol_lines(protocol: Protocol | None) -> list[str]:
    try:
        return [] if protocol is None else [f"- {line}" for line in protocol.text.splitlines()]
    except (ValueError, TypeError, KeyError, AttributeError):
        return []


def _origin(record: Mapping[str, Any]) -> list[str]:
    if not record:
        return ["Not recorded: results/records has no record of the stage."]
    commit = record.get("git_commit") or "none (outside a git repository)"
    changed = ", with uncommitted changes" if record.get("git_dirty") else ""
    versions = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items())
    return [
        f"- git commit of the code: {commit}{changed}",
        f"- maskdm {record.get('maskdm')}; {versions}",
        f"- fingerprint of params.yaml then: `{record.get('params_fingerprint')}`; started {record.get('started')}",
    ]
