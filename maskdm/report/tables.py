"""The tables: a row per arm, seed and milestone; a row per arm; and how they are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.config import Params
from maskdm.config.paths import ORIGIN_KEYS
from maskdm.report.comparison import Comparison, Findings
from maskdm.report.numbers import decimals, number_text, rate_text, signed
from maskdm.report.results import Results, milestone_key
from maskdm.report.statistics import ENOUGH, half_width
from maskdm.report.verdicts import Verdict
from maskdm.scoring.headline import FID, SCORE_KEYS, SCORES, Headline, flat_scores, headline_of

ARM_COLUMNS = ("arm", "strategy", "block_size", "mask_rate", "realised_mask_rate")
SPENT = ("step", "flops", "images_seen", "tokens_seen")  # by a milestone
SCALES = {"floor": "real vs real", "untrained": "untrained"}  # as they are called in tables
SCALED = [score.key for score in SCORES if score.has_scale]
OTHERS = [score for score in SCORES if score not in FID.shown]  # precision, recall: beside the headline's scores
SUMMARY_COLUMNS = (
    *("arm", "seed", *ARM_COLUMNS[1:], "num_visible", "milestone", *SPENT),
    *("device_seconds", "data_wait_share", "peak_memory_gib"),
    *SCORE_KEYS,
    *(*(f"{key}_floor" for key in SCALED), "floor_num_samples", *(f"{key}_untrained" for key in SCALED)),
    *ORIGIN_KEYS,
    *("trial", "num_trials"),
)
WHOLE_COLUMNS = (
    *("seed", "block_size", "num_visible", "step", "images_seen", "tokens_seen", "num_samples", "floor_num_samples"),
    *("num_trials", "num_seeds"),
)
TEXT_COLUMNS = ("arm", "strategy", *ORIGIN_KEYS, "trial", "verdict")
LEFT_COLUMNS = ("arm", "strategy", "trial", "values", "what", "value", "")  # of tables of text
TERMINAL_WIDTH = 110
NONE = "–"


def verdict_columns(headline: Headline, others: Sequence[str]) -> tuple[str, ...]:
    """Those of verdicts.csv; `others` are the scores besides the headline's two."""
    key, second = headline.key, headline.second.key
    return (
        *ARM_COLUMNS,
        "num_seeds",
        *(key, f"{key}_std", f"{key}_low", f"{key}_high"),
        *(f"delta_{key}", f"delta_{key}_low", f"delta_{key}_high", "p_value", "p_holm"),
        *(second, f"{second}_std", f"delta_{second}", f"delta_{second}_low", f"delta_{second}_high"),
        *(column for name in others for column in (name, f"{name}_std")),
        *("flops", "images_seen", "device_seconds"),
        *("compute_ratio", "compute_ratio_low", "compute_ratio_high"),
        *(f"flops_at_equal_{key}", f"device_seconds_at_equal_{key}"),
        *("trial", "num_trials", "verdict"),
    )


def summary_frame(params: Params, results: Results) -> pd.DataFrame:
    """One row per arm, seed and milestone, in the order of params.yaml; seconds and memory are those until then."""
    distances, rows = results.distances, []
    ends = {name: results.scale_of(name) for name in (*SCALED, *distances)}
    scale = {f"{name}_{end}": value for name, of in ends.items() for end, value in of.items()}
    for run in results.runs:
        choice, curve = results.choices[run.arm], run.finetune_curve
        of_run = {
            **{key: run.metrics[key] for key in (*ARM_COLUMNS[1:], *ORIGIN_KEYS)},
            **{"arm": run.arm, "seed": run.seed, "num_visible": params.mask_of(run.arm).num_visible},
            **{"trial": choice.trial, "num_trials": choice.num_trials},
            **{**scale, "floor_num_samples": results.scale["floor"]["num_samples"]},
        }
        for fraction in params.budget.milestones:
            milestone = flat_scores(run.metrics["milestones"][milestone_key(fraction)])
            timing = curve[curve["step"] == milestone["step"]].iloc[0]
            seconds = float(timing["device_seconds"])
            waited = float(timing["data_wait_seconds"]) / seconds if seconds > 0 else math.nan
            at_milestone = {key: milestone[key] for key in (*SPENT, *SCORE_KEYS, *distances)}
            spent = {"device_seconds": seconds, "peak_memory_gib": float(timing["peak_memory_gib"])}
            rows.append({**of_run, "milestone": fraction, **at_milestone, **spent, "data_wait_share": waited})
    columns = (*SUMMARY_COLUMNS, *distances, *(f"{name}_{end}" for end in SCALES for name in distances))
    return _typed(rows, columns)


def _typed(rows: list[dict[str, Any]], columns: Sequence[str]) -> pd.DataFrame:
    kinds = {column: "float64" for column in columns if column not in TEXT_COLUMNS}
    kinds.update({column: "Int64" for column in WHOLE_COLUMNS if column in columns})
    return pd.DataFrame(rows, columns=list(columns)).astype(kinds)


def verdict_frame(found: Findings, verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per arm, in the order of params.yaml; empty where there is nothing to say."""
    rows = [_verdict_row(found.params, found.compared[verdict.arm], verdict.text) for verdict in verdicts]
    key, second = found.headline.key, found.headline.second.key
    others = [name for name in found.compared[verdicts[0].arm].scores if name not in (key, second)]
    return _typed(rows, verdict_columns(found.headline, others))


def _verdict_row(params: Params, arm: Comparison, verdict: str) -> dict[str, Any]:
    config, choice, against, key = params.arm(arm.arm), arm.choice, arm.against, arm.headline.key
    row: dict[str, Any] = {
        **{name: getattr(config, name) for name in ("strategy", "block_size", "mask_rate")},
        **{name: getattr(arm, name) for name in ("arm", "num_seeds", "flops", "device_seconds")},
        "realised_mask_rate": params.mask_of(arm.arm).realised_mask_rate,
        "images_seen": None if math.isnan(arm.images_seen) else round(arm.images_seen),
        "trial": None if choice is None else choice.trial,
        "num_trials": None if choice is None else choice.num_trials,
        "verdict": verdict,
    }
    for name, score in arm.scores.items():
        row |= {name: score.mean, f"{name}_std": score.std, f"{name}_low": score.low, f"{name}_high": score.high}
    if against is None:
        return row
    for name, pair in ((key, against.score), (arm.headline.second.key, against.second)):
        gap = pair.difference
        row |= {f"delta_{name}": gap.mean, f"delta_{name}_low": gap.low, f"delta_{name}_high": gap.high}
    return row | {
        "p_value": against.score.p_value,
        "p_holm": against.p_holm,
        "compute_ratio": against.ratio(against.crossing.at),
        "compute_ratio_low": against.ratio(against.crossing.low),
        "compute_ratio_high": against.ratio(against.crossing.high),
        f"flops_at_equal_{key}": against.crossing.at,
        f"device_seconds_at_equal_{key}": against.seconds_at_equal_score,
    }


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame so that equal frames give equal bytes and every float reads back exactly."""
    frame.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")


def display_table(verdicts: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """The verdicts' numbers as text, rounded for people, the scales in two rows below the arms.

    With three seeds or more a mean stands with its 95 % interval. With fewer the number of seeds stands beside it: in
    the heading where it is the same for all arms, else in the cell.
    """
    headline, first = headline_of(summary), summary.iloc[0]
    keys = [score.key for score in headline.shown]
    ends = [{"arm": title, **{key: first[f"{key}_{end}"] for key in keys}} for end, title in SCALES.items()]
    scales = pd.DataFrame(ends, columns=["arm", *keys]).astype(dict.fromkeys(keys, "float64"))
    frame = pd.concat([verdicts, scales], ignore_index=True)
    for score in headline.shown:
        parts = (f"{score.key}_std", f"delta_{score.key}", f"delta_{score.key}_low", f"delta_{score.key}_high")
        for column in [name for name in (score.key, *parts) if name in frame]:
            frame[column] *= score.times
    counts = verdicts.loc[verdicts["num_seeds"] > 0, "num_seeds"].unique()
    common = int(counts[0]) if len(counts) == 1 else None
    suffix = "" if common is None else f" (n={common})"
    first_flops = summary.groupby("arm")["flops"].min()
    table = {
        "arm": list(frame["arm"]),
        "strategy": [
            NONE if pd.isna(strategy) else strategy_text(strategy, None if pd.isna(size) else int(size))
            for strategy, size in zip(frame["strategy"], frame["block_size"], strict=True)
        ],
        "asked": _each(frame["mask_rate"], rate_text),
        "realised": _each(frame["realised_mask_rate"], rate_text),
        **_score_columns(frame, headline, common, suffix),
        f"same {headline.name} at{suffix}": [_ratio_cell(row, headline, first_flops) for _, row in frame.iterrows()],
        "TFLOPs": _each(frame["flops"] / 1e12, number_text),
        "images seen": _each(frame["images_seen"], lambda count: f"{count:,.0f}"),
        f"device s{suffix}": _each(frame["device_seconds"], number_text),
        "tuned": _each(frame["num_trials"], lambda count: "no" if count == 1 else f"{int(count)} trials"),
    }
    # Without the columns that compare where nothing can be compared, and the others that are empty.
    return pd.DataFrame({name: cells for name, cells in table.items() if name == "arm" or set(cells) != {NONE}})


def _each(values: pd.Series, text: Callable[[Any], str]) -> list[str]:
    return [NONE if pd.isna(value) else text(value) for value in values]


def _score_columns(frame: pd.DataFrame, headline: Headline, common: int | None, suffix: str) -> dict[str, list[str]]:
    """The headline, other scores, precision and recall, the number of seeds in the heading or a column of its own."""
    key, label, others = headline.key, headline.label, headline.shown[1:]
    places, rows = decimals(frame[key]), [row for _, row in frame.iterrows()]

    def scores(name: str, places: int) -> list[str]:
        return [_score_cell(row, name, places, common) for row in rows]

    return {
        **({"seeds": _each(frame["num_seeds"], lambda count: str(int(count)))} if common is None else {}),
        f"{label}{suffix}": scores(key, places),
        f"{label} SD{suffix}": _each(frame[f"{key}_std"], lambda std: f"{std:.{places}f}"),
        f"Δ{label}{suffix}": [_delta_cell(row, key, places, common) for row in rows],
        "p (Holm)": _each(frame["p_holm"], lambda p: "<0.001" if p < 0.001 else f"{p:.3f}"),
        **{f"{one.label}{suffix}": scores(one.key, decimals(frame[one.key])) for one in others},
        **{f"{one.name}{suffix}": scores(one.key, 3) for one in OTHERS},
    }


def _score_cell(row: pd.Series, name: str, places: int, common: int | None) -> str:
    mean, count = row[name], row["num_seeds"]
    if pd.isna(mean):
        return NONE
    text = f"{mean:.{places}f}"
    if pd.notna(count):  # not a scale
        half = half_width(row[f"{name}_std"], int(count))
        if not math.isnan(half):
            text += f" [{mean - half:.{places}f}, {mean + half:.{places}f}]"
        elif common is None:
            text += f" (n={int(count)})"
    return text.replace("-", "−")


def _delta_cell(row: pd.Series, key: str, places: int, common: int | None) -> str:
    if pd.isna(row[f"delta_{key}"]):
        return NONE
    text, low, high = (signed(row[f"delta_{key}{end}"], places) for end in ("", "_low", "_high"))
    if pd.notna(row[f"delta_{key}_low"]):
        return f"{text} [{low}, {high}]"
    if row["num_seeds"] >= ENOUGH:
        return f"{text} (n<{ENOUGH})"
    return text + (f" (n={int(row['num_seeds'])})" if common is None else "")


def _ratio_cell(row: pd.Series, headline: Headline, first_flops: pd.Series) -> str:
    """The compute at an equal score in units of scratch's, open ends of its interval as ellipses."""
    if pd.isna(row[f"delta_{headline.key}"]):
        return NONE
    if pd.isna(row["compute_ratio"]):
        text = "never"
    else:
        at_most = row[f"flops_at_equal_{headline.key}"] <= first_flops[row["arm"]]
        text = f"{'≤ ' if at_most else ''}{row['compute_ratio']:.2f}×"
    if pd.isna(row[f"delta_{headline.key}_low"]):
        return text
    ends = (row[f"compute_ratio_{end}"] for end in ("low", "high"))
    return f"{text} [{', '.join('…' if pd.isna(ratio) else f'{ratio:.2f}' for ratio in ends)}]"


def trials_table(results: Results) -> pd.DataFrame:
    """Every trial of every arm as text, the chosen one marked; empty where nothing was tuned."""
    trials = [(choice.trial, trial) for choice in results.choices.values() for trial in choice.trials]
    kids = pd.Series([trial.scores["kid"] for _, trial in trials], dtype="float64") * 1000
    fids = pd.Series([trial.scores["fid"] for _, trial in trials], dtype="float64")
    return pd.DataFrame(
        {
            "arm": [trial.arm for _, trial in trials],
            "trial": [trial.name for _, trial in trials],
            "values": [values_text(trial.values) for _, trial in trials],
            "KID×1000": _each(kids, lambda score: f"{score:.{decimals(kids)}f}".replace("-", "−")),
            "FID": _each(fids, lambda score: f"{score:.{decimals(fids)}f}".replace("-", "−")),
            "": [f"failed: {t.failed}" if t.failed else "chosen" if t.name == best else "" for best, t in trials],
        }
    )


def values_text(values: dict[str, Any]) -> str:
    """What a trial or an arm overrides."""
    texts = (f"{path} {value:g}" if isinstance(value, float) else f"{path} {value}" for path, value in values.items())
    return ", ".join(texts) or "as in params.yaml"


def strategy_text(strategy: str, block_size: int | None) -> str:
    """How a family of arms is called in tables and legends."""
    return strategy if block_size is None else f"{strategy} {block_size}×{block_size}"


def plain_table(table: pd.DataFrame, style: str = "pipe") -> str:
    """A table of text as GitHub Markdown, or in another style of tabulate."""
    align = ["left" if column in LEFT_COLUMNS else "right" for column in table.columns]
    return table.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)


def format_table(verdicts: pd.DataFrame, summary: pd.DataFrame, width: int = TERMINAL_WIDTH) -> str:
    """The result table for a terminal, at most `width` columns wide: what matters least is left out first.

    Args:
        verdicts: as in verdicts.csv.
        summary: as in summary.csv.
        width: columns of the terminal.
    """
    tables = _ever_leaner(display_table(verdicts, summary), headline_of(summary))
    texts = [plain_table(table, "simple") for table in tables]
    return next((text for text in texts if max(map(len, text.splitlines())) <= width), texts[-1])


def _ever_leaner(table: pd.DataFrame, headline: Headline) -> Iterator[pd.DataFrame]:
    """The table as it is, then with shorter cells, then with ever fewer columns; arm, score and difference stay."""
    titles = {column: column.split(" (n=")[0] for column in table}  # without the number of seeds

    def without_intervals(*names: str) -> pd.DataFrame:
        return table.assign(**{c: [cell.split(" [")[0] for cell in table[c]] for c in table if titles[c] in names})

    yield table
    table = table.assign(arm=[arm if len(arm) <= 24 else arm[:23] + "…" for arm in table["arm"]])
    table = without_intervals(*(score.name for score in OTHERS))
    yield table
    for name in (
        *("images seen", "strategy", "TFLOPs", f"{headline.label} SD", "asked", "tuned"),
        *(score.name for score in reversed(OTHERS)),
        *(*(score.label for score in headline.also), "device s", "realised"),
        *("p (Holm)", f"same {headline.name} at", headline.second.label, "seeds"),
    ):
        if name == f"same {headline.name} at":  # worth more than the interval of the second opinion
            table = without_intervals(headline.second.label)
            yield table
        table = table[[column for column in table if titles[column] != name]]
        yield table
