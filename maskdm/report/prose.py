"""What stands around the numbers: their limits, how to read them, and what they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

from maskdm.config import Params
from maskdm.report.comparison import Comparison, reference_of
from maskdm.report.numbers import number_text, rate_text
from maskdm.report.points import points_caution
from maskdm.report.results import Missing, Results
from maskdm.report.sensitivity import edge_caution
from maskdm.report.statistics import CONFIDENCE, ENOUGH
from maskdm.report.verdicts import EQUAL_COMPUTE, MATCHED_BY
from maskdm.scoring.headline import FID, Headline
from maskdm.scoring.protocol import flips_text

RATE_TOLERANCE = 0.05  # between the mask rate asked for and the one realised
_SCALE_ROWS = (
    "The last two rows are the scales: real images scored as if they were samples, and the network before any training."
)
# What changes rounding and seconds, and no result is made again for it: by its key in records, how people call it.
RAN_WITH = {
    "device_name": "device",
    "precision": "precision",
    "compile": "compile",
    "attention": "attention",
    "activation_checkpointing": "activation checkpointing",
    "threads": "threads",
    "devices": "devices",
}
MANY_SEEDS = 6  # from here on, Student's t is no longer much wider than the normal distribution


def cautions(params: Params, results: Results, compared: list[Comparison]) -> list[str]:
    """What keeps these numbers from meaning more than they do."""
    found = [
        points_caution(params),
        _seed_caution(compared),
        _many_arms_caution(compared),
        _untuned_caution(params, results),
        edge_caution(params, results),
        extractor_caution(str(results.features_record["extractor"])),
        few_samples_caution(_fewest_images(params, results), results.features_record.get("num_features", 0)),
        _compute_caution(params, compared),
        _unlike_caution(results),
        _elsewhere_caution(params, compared),
        _rate_caution(params, compared),
    ]
    return [text for text in found if text]


def _fewest_images(params: Params, results: Results) -> int:
    """How many samples were scored, or real images compared with where those are fewer."""
    num_samples = params.sampling.num_samples
    return min(num_samples, int(results.features_record.get("num_real", num_samples)))


def missing_lines(missing: list[Missing]) -> list[str]:
    """Every result that the report does without: why, and what makes it."""
    return [f"{one.what}: {one.reason}; run `{one.command}`" for one in missing]


def _seed_caution(compared: list[Comparison]) -> str:
    counts = {arm.arm: arm.num_seeds for arm in compared if arm.seeds}
    fewest, most = min(counts.values()), max(counts.values())
    if most == 1:
        return "One seed proves nothing: another may turn any of these differences around. Run three or more."
    if most < ENOUGH:
        return "Two seeds give no interval: any difference may be chance alone. Run three or more."
    said = []
    if fewest < ENOUGH:
        few = ", ".join(arm for arm, count in counts.items() if count < ENOUGH)
        said.append(f"Fewer than {ENOUGH} seeds give no interval: any difference may be chance alone ({few}).")
    if most < MANY_SEEDS:
        said.append(
            f"{most} seeds are few: the intervals take the scores to be normally distributed over seeds, which so few "
            "cannot check, and an arm without a clear difference may still be better or worse."
        )
    return " ".join(said)


def _many_arms_caution(compared: list[Comparison]) -> str:
    tests = sum(arm.against is not None and arm.against.score.difference.has_interval for arm in compared)
    if tests < 2:
        return ""
    return (
        f"{tests} arms are compared at once, each with a 95 % interval of its own: where masking makes no difference, "
        "about one interval in twenty excludes zero all the same. The answer above and p (Holm) allow for that; the "
        "intervals do not."
    )


def _untuned_caution(params: Params, results: Results) -> str:
    name = reference_of(params)
    choice = results.choices.get(name or "")
    if choice is None or choice.is_tuned:
        return ""
    return (
        f"The hyperparameters of {name} were given, not tuned: against an untuned baseline masking looks better than "
        "it is. List trials under tuning in params.yaml and enable it."
    )


def extractor_caution(extractor: str) -> str:
    """What FIDs on these features are not; empty for Inception's, which published numbers use.

    Args:
        extractor: its name and layer.
    """
    if extractor == "pixels":
        return (
            "The features are the pixel values themselves: these are not Inception FIDs. They compare means and "
            "covariances of pixels, see no shapes, and are comparable only within this dataset."
        )
    if "classifier" not in extractor:
        return _pretrained_caution(extractor)
    return (
        "The features come from a small classifier trained on this dataset's own labels: these are not "
        "Inception FIDs. They are comparable only within this dataset and this extractor, never with "
        "published numbers."
    )


def _pretrained_caution(extractor: str) -> str:
    name = extractor.split("/")[0]
    if name.startswith("inception"):
        return ""
    return (
        f"The features are those of {name}, not Inception's: the numbers are comparable only with others of the same "
        "extractor and weights."
    )


def few_samples_caution(num_samples: int, num_features: int) -> str:
    """What too few images do to FID; empty where there are enough for a covariance of full rank.

    Args:
        num_samples: of the smaller set.
        num_features: D.
    """
    if num_samples > num_features:
        return ""
    return (
        f"{num_samples:,} images are fewer than the {num_features:,} features: their covariance has not full rank, and "
        "FID is far too high. Compare it with nothing but FIDs of as many images; KID has no such bias."
    )


def _compute_caution(params: Params, compared: list[Comparison]) -> str:
    flops = [arm.flops for arm in compared if arm.seeds]
    spread = max(flops) / min(flops) - 1
    if spread <= EQUAL_COMPUTE:
        return ""
    return (
        f"The arms were matched by {MATCHED_BY[params.budget.match]}, and their training compute differs by "
        f"up to {spread:.0%}: differences at the end of the budget do not answer the question at equal compute."
    )


def _unlike_caution(results: Results) -> str:
    """Where the arms were trained in different ways, which of them in which."""
    ran: dict[tuple[str, int | None], dict[str, list[str]]] = {}
    for run in results.runs:
        for record in (run.pretrain_record, run.finetune_record):
            for key in RAN_WITH if record.get("steps") else ():  # strategy `none` has no pretraining
                # `auto` chooses attention by the number of tokens: that arms differ there is how each is meant to run
                tokens = record.get("num_visible") if key == "attention" else None
                if key in record:
                    ran.setdefault((key, tokens), {}).setdefault(_ran_with(record, key), []).append(run.arm)
    unlike = {key: ways for key, ways in ran.items() if len(ways) > 1}
    if not unlike or len({run.arm for run in results.runs}) < 2:
        return ""
    said = [
        f"{RAN_WITH[key]} " + " and ".join(f"{way} ({', '.join(dict.fromkeys(arms))})" for way, arms in ways.items())
        for (key, _), ways in unlike.items()
    ]
    coarse = ", which is coarse in bf16" if ("precision", None) in unlike else ""
    return f"The arms did not run alike: {'; '.join(said)}. Scores agree to rounding{coarse}; seconds do not compare."


def _ran_with(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, bool):
        return "on" if value else "off"
    return str((record.get("machine") or {}).get("cpu", value)) if value == "cpu" else str(value)


def _elsewhere_caution(params: Params, compared: list[Comparison]) -> str:
    begun = {arm.arm: params.pretrain_of(arm.arm).checkpoint for arm in compared if arm.seeds}
    if not (given := {arm: folder for arm, folder in begun.items() if folder is not None}):
        return ""
    named = "; ".join(f"{arm} from {folder}" for arm, folder in given.items())
    return (
        "What the weights cost that an arm starts from is not in its compute, nor what their own training flipped in "
        f"what is said of flips: {named}."
    )


def _rate_caution(params: Params, compared: list[Comparison]) -> str:
    arms = []
    for key in (arm.arm for arm in compared if arm.seeds):
        asked, realised = params.arm(key).mask_rate, params.realised_mask_rate_of(key)
        if asked is not None and abs(asked - realised) > RATE_TOLERANCE:
            arms.append(f"{key} masked {rate_text(realised)} instead of {rate_text(asked)}")
    return f"The grid does not allow every mask rate: {'; '.join(arms)}." if arms else ""


def table_note(results: Results, compared: list[Comparison]) -> str:
    """What the table's columns are."""
    counts = {arm.num_seeds for arm in compared if arm.seeds}
    with_delta = any(arm.against is not None for arm in compared)
    with_interval, headline = max(counts) >= ENOUGH, compared[0].headline
    return _joined(
        [
            f"{_what_a_cell_is(counts)}, at the end of the budget.",
            f"Lower {headline.name} and {headline.second.name}, higher precision and recall are better.",
            _SCALE_ROWS,
            *([f"{headline.label} SD: standard deviation of the seeds."] if max(counts) > 1 else []),
            *(_delta_notes(headline, with_interval) if with_delta else []),
            "Asked and realised are mask rates; tuned: from how many trials the hyperparameters were chosen.",
            "TFLOPs (10¹² operations), images seen and device seconds include pretraining.",
            "Device seconds are those in training steps; they compare only on one idle machine.",
            results.protocol.text,
            flips_text(results.flips),
        ]
    )


def _joined(sentences: Iterable[str]) -> str:
    return " ".join(sentence for sentence in sentences if sentence)


def _what_a_cell_is(counts: set[int]) -> str:
    if counts == {1}:
        return "One seed (n=1): no interval"
    if max(counts) < ENOUGH:
        return "Mean over seeds, too few for an interval"
    return "Mean over seeds [95 % interval by Student's t]"


def _delta_notes(headline: Headline, with_interval: bool) -> list[str]:
    name = headline.name
    notes = [
        f"Δ{headline.label} is each seed's {name} less scratch's with that seed; negative is better.",
        f"Same {name} at: the part of scratch's compute at which the arm's {name} curve falls to scratch's final "
        f"{name} for good; never: not within the budget.",
    ]
    if with_interval:
        notes.append("… is an open end: the interval reaches beyond the first or the last milestone.")
        notes.append(f"p (Holm): of Δ{name} being zero, adjusted for the number of arms.")
    return notes


def notes(params: Params, results: Results, compared: list[Comparison]) -> list[str]:
    """What the metrics can and can't tell."""
    samples, headline = params.sampling.num_samples, compared[0].headline
    both = "the two" if headline == FID else f"{headline.name} and {headline.second.name}"
    return [
        f"{bias_note(samples)} Where {both} disagree about the order of two arms, the verdict says so: believe "
        "neither.",
        *_scale_notes(results.scale, samples),
        "Precision is how many samples look real; recall is how much of the real data's variety they cover.",
        f"Every arm spends the same {MATCHED_BY[params.budget.match]}, pretraining and finetuning together.",
        *_method_notes(compared),
    ]


def bias_note(num_samples: int) -> str:
    """How FID depends on the number of samples."""
    return (
        f"FID is biased: it falls as the number of samples grows ({num_samples:,} here), by an amount that depends on "
        "the model. Compare it only between equal numbers of samples. KID is not biased, but noisier."
    )


def _scale_notes(scale: dict[str, Any], num_samples: int) -> list[str]:
    floor, untrained = scale["floor"], scale["untrained"]
    text = (
        f"The floor is real images scored against real images ({floor['num_samples']:,}): {_scores_text(floor)}. "
        "A score near it cannot be told from real data. They were scored against the other real images alone, the arms "
        "against all: the floor of FID is rather too high than too low."
    )
    if floor["num_samples"] != num_samples:
        text += f" The arms were scored with {num_samples:,} images, so the bias of their FID is another."
    return [text, f"The untrained network: {_scores_text(untrained)}. An arm near it has learned nothing."]


def _scores_text(scores: dict[str, Any]) -> str:
    return (
        f"FID {number_text(scores['fid'])}, KID×1000 {number_text(scores['kid'] * 1000)}, precision "
        f"{scores['precision']:.3f}, recall {scores['recall']:.3f}"
    )


def _method_notes(compared: list[Comparison]) -> list[str]:
    if all(arm.against is None for arm in compared):
        return []
    name = compared[0].headline.name
    text = (
        f"Compute at equal {name}: each seed's {name} is interpolated linearly in log compute between milestones; the "
        "estimate is the compute from which on the mean over seeds stays at or below scratch's final mean. A curve "
        "that is there at its first milestone already is said to need at most that much."
    )
    if any(arm.num_seeds >= ENOUGH for arm in compared):
        text += (
            " Its 95 % interval is the set of computes at which a paired t-interval of the difference contains zero "
            "(Fieller's way), open where that set reaches the first or the last milestone."
        )
    return [text]


def facts(params: Params, results: Results) -> list[tuple[str, str]]:
    """The protocol: what was run, on what, with what."""
    return [
        *_data_facts(params, results.manifest),
        ("arms", f"{len(params.arms)}: {', '.join(params.arms)}"),
        ("seeds", ", ".join(map(str, params.seeds))),
        *_method_facts(params),
        ("flips in training", _flips_fact(params, results.flips)),
        ("samples scored", f"{params.sampling.num_samples:,} per arm and seed, against {_reference_text(params)}"),
        ("feature extractor", _extractor_text(results.features_record)),
        ("the scores' protocol", " ".join(results.protocol.text.split("\n"))),
        (
            "intervals",
            f"{100 * CONFIDENCE:.0f} %, Student's t over seeds, paired by seed with scratch; Holm's correction",
        ),
        *_origin_facts(results.records),
    ]


def _data_facts(params: Params, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    size, kind = f"{params.dataset.height}×{params.dataset.width}", "grey" if params.dataset.channels == 1 else "RGB"
    done: dict[str, Any] = manifest.get("protocol") or {}
    resize = f"to {size}, {done.get('resize_filter', 'unknown filter')}, antialiased"
    box = f" {done['crop_box']}" if done.get("crop_box") else ""
    return [
        ("dataset", _plain(manifest.get("source", params.dataset.source))),
        ("images", f"{manifest['count']:,} of {size} pixels, {kind}"),
        ("data sha256", manifest["sha256"]),
        ("crop", f"{done.get('crop', 'unknown')}{box}"),
        ("resize", resize),
    ]


def _method_facts(params: Params) -> list[tuple[str, str]]:
    budget, model, diffusion, sampling = params.budget, params.model, params.diffusion, params.sampling
    size = f"dim {model.dim}, depth {model.depth}, {model.num_heads} heads"
    eta = f", eta {sampling.eta:g}" if sampling.sampler == "ddim" else ""
    process = f"{diffusion.num_timesteps} steps, {diffusion.schedule} schedule"
    return [
        *_pretraining_facts(params),
        ("budget", f"equal {MATCHED_BY[budget.match]}: that of {budget.unmasked_steps:,} unmasked steps"),
        ("model", f"U-ViT, patch size {model.patch_size}, {size}"),
        ("diffusion", f"{process}, predicts {diffusion.prediction}"),
        ("sampler", f"{sampling.sampler}, {sampling.num_steps} steps{eta}"),
        ("weights sampled", f"EMA weights, decay {params.training.ema_decay:g}"),
    ]


def _flips_fact(params: Params, flips: dict[str, float]) -> str:
    """Tuning may have chosen another value for some arm than params.yaml has."""
    given = params.training.flip
    others = [f"{arm} {flip:g}" for arm, flip in flips.items() if flip != given]
    return f"with probability {given:g}" + (f", but {', '.join(others)}" if others else "")


def _pretraining_facts(params: Params) -> list[tuple[str, str]]:
    """Which arms are pretrained on another dataset."""
    arms: dict[str, list[str]] = {}
    for arm in params.arms:
        if (name := params.pretrain_of(arm).dataset) is not None:
            arms.setdefault(name, []).append(arm)
    return (
        [("pretrained on other data", "; ".join(f"{', '.join(a)}: {name}" for name, a in arms.items()))] if arms else []
    )


def _extractor_text(features: dict[str, Any]) -> str:
    accuracy = features.get("classifier_accuracy")
    held_out = "" if accuracy is None else f"; held-out accuracy {accuracy:.1%}"
    file = f"; weights file sha256 {features['weights_sha256']}" if features.get("weights_sha256") else ""
    return f"{features['extractor']}, sha256 {features['extractor_sha256']}{file}{held_out}"


def _reference_text(params: Params) -> str:
    if not params.dataset.held_out:
        return "all real images"
    which = {"train": "the real images trained on", "held_out": "the real images held out", "all": "all real images"}
    return which[params.evaluation.reference]


def _origin_facts(records: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Commits, versions and machines: all of them, where the stages differ."""
    versions: dict[str, set[str]] = {}
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            versions.setdefault(name, set()).add(version)
    peak = max((r["peak_memory_gib"] for r in records if r.get("peak_memory_gib")), default=math.nan)
    return [
        ("git commit", _distinct(_commit(record) for record in records)),
        ("versions", ", ".join(f"{n} {' and '.join(sorted(v))}" for n, v in sorted(versions.items()))),
        ("machine", _distinct(_machine(record.get("machine") or {}) for record in records)),
        ("peak memory", f"{peak:.2f} GiB" if math.isfinite(peak) else "unknown"),
    ]


def _commit(record: dict[str, Any]) -> str:
    commit = record.get("git_commit")
    if commit is None:
        return "none (not a git repository)"
    return f"{commit}, with uncommitted changes" if record.get("git_dirty") else str(commit)


def _machine(machine: dict[str, Any]) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in sorted(machine.items())) or "unknown"


def _distinct(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))


def _plain(value: Any) -> str:
    """A value of a manifest or record as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in sorted(value.items()) if inner is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
