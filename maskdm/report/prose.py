"""What people read around the numbers: what columns are, how to read the scores, and what was run."""

from __future__ import annotations

import json
import math
from typing import Any

from maskdm.config import Params
from maskdm.report.comparison import Findings
from maskdm.report.numbers import number_text
from maskdm.report.points import are_shown
from maskdm.report.results import Results
from maskdm.report.statistics import ENOUGH
from maskdm.report.tables import SCALES, values_text
from maskdm.report.verdicts import MATCHED_BY
from maskdm.scoring.headline import FID, SCORES, Headline, Score
from maskdm.scoring.protocol import bias_note, flips_text


def score_of(key: str) -> Score:
    """A score by its key, which is its name where it has no other."""
    return next((score for score in SCORES if score.key == key), Score(key, key))


def table_note(found: Findings) -> str:
    """What the columns of the result are."""
    counts, headline, results = {found.compared[arm].num_seeds for arm in found.arms}, found.headline, found.results
    cell = "Mean over seeds [95 % interval by Student's t]"
    if max(counts) < ENOUGH:
        cell = "One seed (n=1): no interval" if counts == {1} else "Mean over seeds, too few for an interval"
    sentences = [
        f"{cell}, at the end of the budget.",
        f"Lower {headline.name} and {headline.second.name}, higher precision and recall are better.",
        "The last two rows are the scales: real images scored as if they were samples, and the network before any "
        "training.",
        f"{headline.label} SD: standard deviation of the seeds." if max(counts) > 1 else "",
        *(_delta_notes(headline, max(counts)) if found.against else []),
        "Asked and realised are mask rates; tuned: from how many trials the hyperparameters were chosen.",
        "TFLOPs (10¹² operations), images seen and device seconds include pretraining.",
        "Device seconds are those in training steps; they compare only on one idle machine.",
        results.protocol.text,
        flips_text(results.flips),
    ]
    return " ".join(sentence for sentence in sentences if sentence)


def _delta_notes(headline: Headline, num_seeds: int) -> list[str]:
    name = headline.name
    said = [
        f"Δ{headline.label} is each seed's {name} less scratch's with that seed; negative is better.",
        f"Same {name} at: the part of scratch's compute at which the arm's {name} curve falls to scratch's final "
        f"{name} for good; never: not within the budget.",
    ]
    if num_seeds < ENOUGH:
        return said
    return [
        *said,
        "… is an open end: the interval reaches beyond the first or the last milestone.",
        f"p (Holm): of Δ{name} being zero, adjusted for the number of arms.",
    ]


def distance_note(params: Params, results: Results) -> str:
    """What the table of distances between points is; empty where there is none."""
    if not are_shown(params):
        return ""
    floor = results.scale["distances"]["floor"]
    splits = f"the mean of {floor['draws']} random splits, {floor['num_samples']:,} points in the place of samples"
    return (
        "W₁ of x and of y are Wasserstein-1 distances of one coordinate alone, sliced W₁ is the mean over directions, "
        "energy looks at all pairs of points: the first two see the marginals, the last two the joint distribution. "
        "In brackets the mean's 95 % interval over seeds. A perfect model would not get 0 but about what "
        f"{SCALES['floor']} gets ({splits}). The primer is the pretrained weights before any finetuning. Drawn with x "
        "and y each alone it sees what pretraining showed it, one coordinate at a time, and tells what it learned of "
        "the marginals; drawn together, as finetuning begins, it sees two at once, which pretraining never showed it."
    )


def tuning_note(params: Params, results: Results) -> str:
    """How the hyperparameters came about, in words."""
    tuning = params.tuning
    if not tuning.enabled:
        note = "Every arm ran with hyperparameters as given in params.yaml; none was tuned by this pipeline."
        own = {
            key: {f"pretrain.{name}": value for name, value in arm.pretrain.items()}
            | {f"finetune.{name}": value for name, value in arm.finetune.items()}
            for key, arm in params.arms.items()
        }
        differing = "; ".join(f"{key}: {values_text(values)}" for key, values in own.items() if values)
        return f"{note} Those that differ from the common ones: {differing}." if differing else note
    chosen = "; ".join(
        f"{arm}: none, all have failed" if one.trial is None else f"{arm}: {one.trial} ({values_text(one.values)})"
        for arm, one in results.choices.items()
    )
    return (
        f"Every arm tried the same {len(tuning.trials)} trials, each with {tuning.budget_fraction:.0%} of the budget, "
        f"on seed {tuning.seed}, which no score of this report comes from; the one with the lowest "
        f"{score_of(tuning.metric).name} was chosen. One seed cannot tell trials apart that lie close together, and "
        "the best values for a part of the budget need not be those for all of it; the intervals over seeds do not "
        "contain the chance in this choice. The compute of the trials is not part of the compute in this report. "
        f"Chosen: {chosen}."
    )


def notes(found: Findings) -> list[str]:
    """What the metrics can and can't tell."""
    params, headline, scale = found.params, found.headline, found.results.scale
    samples, floor, untrained = params.sampling.num_samples, scale["floor"], scale["untrained"]
    both = "the two" if headline == FID else f"{headline.name} and {headline.second.name}"
    of_floor = (
        f"The floor is real images scored against real images ({floor['num_samples']:,}): {_scores_text(floor)}. "
        "A score near it cannot be told from real data. They were scored against the other real images alone, the arms "
        "against all: the floor of FID is rather too high than too low."
    )
    if floor["num_samples"] != samples:
        of_floor += f" The arms were scored with {samples:,} images, so the bias of their FID is another."
    said = [
        f"{bias_note(samples)} Where {both} disagree about the order of two arms, the verdict says so: believe "
        "neither.",
        of_floor,
        f"The untrained network: {_scores_text(untrained)}. An arm near it has learned nothing.",
        "Precision is how many samples look real; recall is how much of the real data's variety they cover.",
        f"Every arm spends the same {MATCHED_BY[params.budget.match]}, pretraining and finetuning together.",
    ]
    if not found.against:
        return said
    name = headline.name
    equal = (
        f"Compute at equal {name}: each seed's {name} is interpolated linearly in log compute between milestones; the "
        "estimate is the compute from which on the mean over seeds stays at or below scratch's final mean. A curve "
        "that is there at its first milestone already is said to need at most that much."
    )
    if found.num_seeds >= ENOUGH:
        equal += (
            " Its 95 % interval is the set of computes at which a paired t-interval of the difference contains zero "
            "(Fieller's way), open where that set reaches the first or the last milestone."
        )
    return [*said, equal]


def _scores_text(scores: dict[str, Any]) -> str:
    return (
        f"FID {number_text(scores['fid'])}, KID×1000 {number_text(scores['kid'] * 1000)}, precision "
        f"{scores['precision']:.3f}, recall {scores['recall']:.3f}"
    )


def facts(params: Params, results: Results) -> list[tuple[str, str]]:
    """The protocol: what was run, on what, with what."""
    budget, model, diffusion, sampling = params.budget, params.model, params.diffusion, params.sampling
    eta = f", eta {sampling.eta:g}" if sampling.sampler == "ddim" else ""
    # Tuning may have chosen another probability of flips for some arm than params.yaml has.
    flips = ", ".join(f"{arm} {flip:g}" for arm, flip in results.flips.items() if flip != params.training.flip)
    elsewhere: dict[str, list[str]] = {}  # arms by the dataset that they are pretrained on
    for arm in params.arms:
        if (name := params.pretrain_of(arm).dataset) is not None:
            elsewhere.setdefault(name, []).append(arm)
    pretrained = "; ".join(f"{', '.join(arms)}: {name}" for name, arms in elsewhere.items())
    reference, parts = "all real images", {"train": " trained on", "held_out": " held out"}
    if params.dataset.held_out and params.evaluation.reference in parts:
        reference = f"the real images{parts[params.evaluation.reference]}"
    return [
        *_data_facts(params, results.manifest),
        ("arms", f"{len(params.arms)}: {', '.join(params.arms)}"),
        ("seeds", ", ".join(map(str, params.seeds))),
        *([("pretrained on other data", pretrained)] if pretrained else []),
        ("budget", f"equal {MATCHED_BY[budget.match]}: that of {budget.unmasked_steps:,} unmasked steps"),
        (
            "model",
            f"U-ViT, patch size {model.patch_size}, dim {model.dim}, depth {model.depth}, {model.num_heads} heads",
        ),
        (
            "diffusion",
            f"{diffusion.num_timesteps} steps, {diffusion.schedule} schedule, predicts {diffusion.prediction}",
        ),
        ("sampler", f"{sampling.sampler}, {sampling.num_steps} steps{eta}"),
        ("weights sampled", f"EMA weights, decay {params.training.ema_decay:g}"),
        ("flips in training", f"with probability {params.training.flip:g}" + (f", but {flips}" if flips else "")),
        ("samples scored", f"{sampling.num_samples:,} per arm and seed, against {reference}"),
        ("feature extractor", _extractor_text(results.features_record)),
        ("the scores' protocol", " ".join(results.protocol.text.split("\n"))),
        ("intervals", "95 %, Student's t over seeds, paired by seed with scratch; Holm's correction"),
        *_origin_facts(results),
    ]


def _data_facts(params: Params, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    size, kind = f"{params.dataset.height}×{params.dataset.width}", "grey" if params.dataset.channels == 1 else "RGB"
    done: dict[str, Any] = manifest.get("protocol") or {}
    box = f" {done['crop_box']}" if done.get("crop_box") else ""
    return [
        ("dataset", _plain(manifest.get("source", params.dataset.source))),
        ("images", f"{manifest['count']:,} of {size} pixels, {kind}"),
        ("data sha256", manifest["sha256"]),
        ("crop", f"{done.get('crop', 'unknown')}{box}"),
        ("resize", f"to {size}, {done.get('resize_filter', 'unknown filter')}, antialiased"),
    ]


def _extractor_text(features: dict[str, Any]) -> str:
    accuracy = features.get("classifier_accuracy")
    held_out = "" if accuracy is None else f"; held-out accuracy {accuracy:.1%}"
    file = f"; weights file sha256 {features['weights_sha256']}" if features.get("weights_sha256") else ""
    return f"{features['extractor']}, sha256 {features['extractor_sha256']}{file}{held_out}"


def _origin_facts(results: Results) -> list[tuple[str, str]]:
    """Commits, versions and machines of what made the numbers: all of them, where the stages differ."""
    records = [results.prepare_record, results.features_record]
    records += [record for run in results.runs for record in (run.pretrain_record, run.finetune_record)]
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            versions.setdefault(name, set()).add(version)
    commits, machines = [], []
    for record in records:
        commit = record.get("git_commit") or "none (not a git repository)"
        commits.append(f"{commit}, with uncommitted changes" if record.get("git_dirty") else commit)
        machines.append(_plain(record.get("machine") or {}) or "unknown")
    peak = max((r["peak_memory_gib"] for r in records if r.get("peak_memory_gib")), default=math.nan)
    return [
        ("git commit", "; ".join(dict.fromkeys(commits))),
        ("versions", ", ".join(f"{n} {' and '.join(sorted(v))}" for n, v in sorted(versions.items()))),
        ("machine", "; ".join(dict.fromkeys(machines))),
        ("peak memory", f"{peak:.2f} GiB" if math.isfinite(peak) else "unknown"),
    ]


def _plain(value: Any) -> str:
    """A value of a manifest or record as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in sorted(value.items()) if inner is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
