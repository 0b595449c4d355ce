"""The texts around the numbers, from texts.j2: captions, what columns mean, how to read the scores, what was run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from maskdm.report.comparison import Findings
from maskdm.report.numbers import number_text, seeds_text
from maskdm.report.points import are_shown
from maskdm.report.results import Results
from maskdm.report.statistics import ENOUGH
from maskdm.report.tables import SCALES, values_text
from maskdm.report.verdicts import MATCHED_BY
from maskdm.scoring.headline import SCORES, Score
from maskdm.scoring.protocol import bias_note, flips_text

HEADING = re.compile(r"^## (.+)$", re.MULTILINE)


def score_of(key: str) -> Score:
    """A score by its key, which is also its name where the report does not know the score."""
    return next((score for score in SCORES if score.key == key), Score(key, key))


def texts(found: Findings) -> dict[str, list[str]]:
    """By section of texts.j2 its paragraphs, each in one line of plain text."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        finalize=lambda value: " ".join(str("" if value is None else value).split()),  # no value begins a paragraph
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=lambda value: number_text(value).replace("-", "−"), seeds=seeds_text, plain=_plain
    )
    rendered = environment.get_template("texts.j2").render(found=found, **_values(found))
    _, *parts = HEADING.split(rendered)
    paragraphs = ([" ".join(text.split()) for text in re.split(r"\n\s*\n", body)] for body in parts[1::2])
    return {name: [text for text in section if text] for name, section in zip(parts[::2], paragraphs, strict=True)}


def _values(found: Findings) -> dict[str, Any]:
    """What texts.j2 needs besides the findings."""
    params, results = found.params, found.results
    metric = score_of(params.tuning.metric)
    own = {
        key: {f"pretrain.{name}": value for name, value in arm.pretrain.items()}
        | {f"finetune.{name}": value for name, value in arm.finetune.items()}
        for key, arm in params.arms.items()
    }
    chosen = (
        f"{arm}: none, all have failed" if one.trial is None else f"{arm}: {one.trial} ({values_text(one.values)})"
        for arm, one in results.choices.items()
    )
    elsewhere: dict[str, list[str]] = {}  # arms by the dataset that they are pretrained on
    for arm in params.arms:
        if (name := params.pretrain_of(arm).dataset) is not None:
            elsewhere.setdefault(name, []).append(arm)
    parts = {"train": " trained on", "held_out": " held out"}
    is_part = params.dataset.held_out and params.evaluation.reference in parts
    return {
        "enough": ENOUGH,
        "ends": SCALES,
        "metric": metric,
        "best": f"{'lowest' if metric.is_lower_better else 'highest'} {metric.name}",
        "own": "; ".join(f"{key}: {values_text(values)}" for key, values in own.items() if values),
        "chosen": "; ".join(chosen),
        "elsewhere": "; ".join(f"{', '.join(arms)}: {name}" for name, arms in elsewhere.items()),
        "distances": results.scale["distances"]["floor"] if are_shown(params) else None,
        "bias": bias_note(params.sampling.num_samples),
        "matched_by": MATCHED_BY[params.budget.match],
        # Tuning may have chosen another probability of flips for an arm than params.yaml has.
        "flips": ", ".join(f"{arm} {flip:g}" for arm, flip in results.flips.items() if flip != params.training.flip),
        "reference": f"the real images{parts[params.evaluation.reference]}" if is_part else "all real images",
        "protocol": f"{results.protocol.text} {flips_text(results.flips)}",
        "origins": _origins(results),
    }


def _origins(results: Results) -> dict[str, str]:
    """Commits, versions and machines of all stages that made the numbers, each once."""
    records = [results.prepare_record, results.features_record]
    records += [record for run in results.runs for record in (run.pretrain_record, run.finetune_record)]
    versions: dict[str, set[str]] = {}
    commits, machines = [], []
    for record in records:
        for name, version in (record.get("versions") or {}).items():
            versions.setdefault(name, set()).add(version)
        commit = record.get("git_commit") or "none (not a git repository)"
        commits.append(f"{commit}, with uncommitted changes" if record.get("git_dirty") else commit)
        machines.append(_plain(record.get("machine") or {}) or "unknown")
    peaks = [record["peak_memory_gib"] for record in records if record.get("peak_memory_gib")]
    return {
        "git commit": "; ".join(dict.fromkeys(commits)),
        "versions": ", ".join(f"{name} {' and '.join(sorted(of))}" for name, of in sorted(versions.items())),
        "machine": "; ".join(dict.fromkeys(machines)),
        "peak memory": f"{max(peaks):.2f} GiB" if peaks else "unknown",
    }


def _plain(value: Any) -> str:
    """A value of a manifest or record as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in sorted(value.items()) if inner is not None)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
