"""What stands around the numbers: their limits, how to read them, and what they come from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import pandas as pd

from maskdm.config import Params
from maskdm.report.findings import EQUAL_COMPUTE, MATCHED_BY
from maskdm.report.page import Picture
from maskdm.report.results import Results
from maskdm.report.tables import number_text, rate_text, reference_arm

RATE_TOLERANCE = 0.05  # between the mask rate asked for and the one realised
ENOUGH_SEEDS = 6  # from here on, all of them agreeing by chance is less likely than 5 %


def cautions(params: Params, summary: pd.DataFrame, final: pd.DataFrame) -> list[str]:
    """What keeps these numbers from meaning more than they do."""
    found = [
        _seed_caution(len(params.seeds)),
        _extractor_caution(str(summary["extractor"].iloc[0])),
        _compute_caution(params, final),
        _rate_caution(final),
    ]
    return [text for text in found if text]


def _seed_caution(num_seeds: int) -> str:
    if num_seeds == 1:
        return "One seed proves nothing: another may turn any of these differences around. Run three or more."
    if num_seeds >= ENOUGH_SEEDS:
        return ""
    return (
        f"{num_seeds} seeds are few: even where pretraining makes no difference, all agree on better, or "
        f"all on worse, with probability {2 * 0.5**num_seeds:.2g}; with many arms that happens to some."
    )


def _extractor_caution(extractor: str) -> str:
    if "classifier" not in extractor:
        return ""
    return (
        "The features come from a small classifier trained on this dataset's own labels: these are not "
        "Inception FIDs. They are comparable only within this dataset and this extractor, never with "
        "published numbers."
    )


def _compute_caution(params: Params, final: pd.DataFrame) -> str:
    spread = float(final["tflops"].max() / final["tflops"].min() - 1)
    if spread <= EQUAL_COMPUTE:
        return ""
    return (
        f"The arms were matched by {MATCHED_BY[params.budget.match]}, and their training compute differs by "
        f"up to {spread:.0%}: this does not answer the question at equal compute."
    )


def _rate_caution(final: pd.DataFrame) -> str:
    off = final[(final["mask_rate"] - final["realised_mask_rate"]).abs() > RATE_TOLERANCE]
    arms = [
        f"{row['arm']} masked {rate_text(row['realised_mask_rate'])} instead of {rate_text(row['mask_rate'])}"
        for _, row in off.iterrows()
    ]
    return f"The grid does not allow every mask rate: {'; '.join(arms)}." if arms else ""


def table_note(params: Params, final: pd.DataFrame) -> str:
    """What the table's columns are."""
    count = len(params.seeds)
    seeds = f"Mean over {count} seeds ± their standard deviation" if count > 1 else "One seed"
    delta = "ΔFID is each seed's FID less scratch's with that seed; negative is better."
    return " ".join(
        [
            f"{seeds}, at the end of the budget.",
            "Lower FID and KID, higher precision and recall are better.",
            *([] if reference_arm(final) is None else [delta]),
            "Asked and realised are mask rates.",
            "TFLOPs (10¹² operations) and images seen include pretraining.",
            "The seconds are wall-clock; they compare only on one idle machine.",
        ]
    )


def notes(params: Params, summary: pd.DataFrame) -> list[str]:
    """What the metrics can and can't tell."""
    row = summary.iloc[0]
    num_samples, num_real = int(row["num_samples"]), int(row["floor_num_samples"])
    fid, kid = number_text(summary["fid_floor"].mean()), number_text(summary["kid_floor"].mean() * 1000)
    floor = (
        f"The floor is real images scored against real images ({num_real:,}): fid {fid}, kid×1000 {kid}. "
        "A score near it cannot be told from real data."
    )
    if num_real != num_samples:
        floor += f" The arms were scored with {num_samples:,} images, so the bias of their FID is another."
    return [
        f"FID is biased by the number of samples ({num_samples:,} here): compare it only between equal "
        "numbers. KID is not biased, but noisier; where the two disagree about an arm, believe neither.",
        floor,
        "Precision is how many samples look real; recall is how much of the real data's variety they cover.",
        f"Every arm spends the same {MATCHED_BY[params.budget.match]}, pretraining and finetuning together.",
    ]


def pictures(params: Params) -> list[Picture]:
    """The figures with what they show."""
    several = len(params.seeds) > 1
    return [
        Picture(
            "fid_vs_mask_rate.png",
            "Final FID against mask rate",
            "Below the black line masked pretraining paid, above it it cost."
            f"{' Bars and the grey band are the range of the seeds.' if several else ''}"
            " The FID axis need not start at zero; points of equal rate stand a little apart.",
        ),
        Picture(
            "fid_vs_flops.png",
            "FID against training compute",
            "Each point is a milestone; compute counts pretraining."
            f"{' Lines are means, bands and small points the seeds.' if several else ''}"
            " The axes need not start at zero.",
        ),
        Picture(
            "losses.png",
            "Training losses",
            f"{'Averaged over seeds. ' if several else ''}Masked and unmasked losses are not comparable, nor "
            "are losses of different mask rates: they are errors on different problems. A finetuning curve "
            "starts where its pretraining stopped.",
        ),
        Picture(
            "samples.png",
            "Samples",
            f"Real images, and samples at the end of the budget, seed {params.seeds[0]}: the same cell holds "
            "the same image seed in every arm; none was selected.",
            density=1.0,  # a pixel of a sample is a whole number of the page's
        ),
    ]


def facts(params: Params, results: Results, summary: pd.DataFrame) -> list[tuple[str, str]]:
    """What was run, on what, with what."""
    row = summary.iloc[0]
    return [
        *_data_facts(params, results.manifest),
        ("arms", f"{len(params.arms)}: {', '.join(params.arms)}"),
        ("seeds", ", ".join(map(str, params.seeds))),
        *_method_facts(params),
        ("samples scored", f"{int(row['num_samples']):,} per arm and seed"),
        ("feature extractor", _extractor_text(row, results.features_record)),
        *_origin_facts(results.records),
    ]


def _data_facts(params: Params, manifest: dict[str, Any]) -> list[tuple[str, str]]:
    size, kind = params.dataset.image_size, "grey" if params.dataset.channels == 1 else "RGB"
    return [
        ("dataset", _plain(manifest.get("source", params.dataset.source))),
        ("images", f"{manifest['count']:,} of {size}×{size} pixels, {kind}"),
        ("protocol", _plain(manifest.get("protocol", "unknown"))),
        ("data sha256", manifest["sha256"]),
    ]


def _method_facts(params: Params) -> list[tuple[str, str]]:
    budget, model, diffusion, sampling = params.budget, params.model, params.diffusion, params.sampling
    size = f"dim {model.dim}, depth {model.depth}, {model.num_heads} heads"
    eta = f", eta {sampling.eta:g}" if sampling.sampler == "ddim" else ""
    process = f"{diffusion.num_timesteps} steps, {diffusion.schedule} schedule"
    return [
        ("budget", f"equal {MATCHED_BY[budget.match]}: that of {budget.unmasked_steps:,} unmasked steps"),
        ("model", f"U-ViT, patch size {model.patch_size}, {size}"),
        ("diffusion", f"{process}, predicts {diffusion.prediction}"),
        ("sampler", f"{sampling.sampler}, {sampling.num_steps} steps{eta}, EMA weights"),
    ]


def _extractor_text(row: pd.Series, features: dict[str, Any]) -> str:
    accuracy = features.get("classifier_accuracy")
    held_out = "" if accuracy is None else f"; held-out accuracy {accuracy:.1%}"
    return f"{row['extractor']}, sha256 {row['extractor_sha256']}{held_out}"


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
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in sorted(value.items()))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
