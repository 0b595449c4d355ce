"""The tables: a row per arm, seed and milestone; a row per arm; and how they are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.config import Params
from maskdm.config.formats import ORIGIN_KEYS
from maskdm.report.comparison import Against, Comparison
from maskdm.report.numbers import decimals, number_text, rate_text, ratio_text, signed
from maskdm.report.results import MILESTONE_KEYS, Results, Run, milestone_key
from maskdm.report.statistics import ENOUGH, Estimate, half_width
from maskdm.report.verdicts import Verdict
from maskdm.scoring.headline import FID, Headline, Score, flat_scores, headline_of

ARM_COLUMNS = ("arm", "strategy", "block_size", "mask_rate", "realised_mask_rate")
SCALES = {"floor": "real vs real", "untrained": "untrained"}  # as they are called in tables
SCALE_COLUMNS = ("fid_floor", "kid_floor", "floor_num_samples", "fid_untrained", "kid_untrained")
SUMMARY_COLUMNS = (
    *("arm", "seed", *ARM_COLUMNS[1:], "num_visible", "milestone", "step", "flops", "images_seen", "tokens_seen"),
    *("device_seconds", "data_wait_share", "peak_memory_gib"),
    *("fid", "kid", "kid_std", "precision", "recall", "num_samples"),
    *SCALE_COLUMNS,
    *ORIGIN_KEYS,
    *("trial", "num_trials"),
)


def summary_columns(distances: Sequence[str]) -> tuple[str, ...]:
    """Those of summary.csv, where points are scored with their distances and both ends of these."""
    return *SUMMARY_COLUMNS, *distances, *(f"{name}_{end}" for end in SCALES for name in distances)


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


VERDICT_COLUMNS = verdict_columns(FID, ("precision", "recall"))
WHOLE_COLUMNS = (
    *("seed", "block_size", "num_visible", "step", "images_seen", "tokens_seen", "num_samples", "floor_num_samples"),
    *("num_trials", "num_seeds"),
)
TEXT_COLUMNS = ("arm", "strategy", *ORIGIN_KEYS, "trial", "verdict")
LEFT_COLUMNS = ("arm", "strategy", "trial", "values", "what", "value", "")  # of tables of text
TERMINAL_WIDTH = 110


def summary_frame(params: Params, results: Results) -> pd.DataFrame:
    """One row per arm, seed and milestone, in the order of params.yaml; seconds and memory are those until then."""
    distances = results.distances
    scale = _scale_columns(results, distances)
    rows = [
        {**_run_columns(params, results, run), **_milestone_columns(run, fraction, distances), **scale}
        for run in results.runs
        for fraction in params.budget.milestones
    ]
    return _typed(rows, summary_columns(distances))


def _typed(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    kinds = {column: "float64" for column in columns if column not in TEXT_COLUMNS}
    kinds.update({column: "Int64" for column in WHOLE_COLUMNS if column in columns})
    return pd.DataFrame(rows, columns=list(columns)).astype(kinds)


def _scale_columns(results: Results, distances: Sequence[str]) -> dict[str, Any]:
    scales = {name: results.scale_of(name) for name in ("fid", "kid", *distances)}
    scores = {f"{name}_{end}": value for name, ends in scales.items() for end, value in ends.items()}
    return scores | {"floor_num_samples": results.scale["floor"]["num_samples"]}


def _run_columns(params: Params, results: Results, run: Run) -> dict[str, Any]:
    choice = results.choices[run.arm]
    return {
        **{key: run.metrics[key] for key in (*ARM_COLUMNS[1:], *ORIGIN_KEYS)},
        "arm": run.arm,
        "seed": run.seed,
        "num_visible": params.visible_of(run.arm).num_visible,
        "trial": choice.trial,
        "num_trials": choice.num_trials,
    }


def _milestone_columns(run: Run, fraction: float, distances: Sequence[str]) -> dict[str, Any]:
    milestone = flat_scores(run.metrics["milestones"][milestone_key(fraction)])
    timing = run.finetune_curve[run.finetune_curve["step"] == milestone["step"]].iloc[0]
    seconds = float(timing["device_seconds"])
    return {
        "milestone": fraction,
        **{key: milestone[key] for key in (*MILESTONE_KEYS, *distances)},
        "device_seconds": seconds,
        "data_wait_share": float(timing["data_wait_seconds"]) / seconds if seconds > 0 else math.nan,
        "peak_memory_gib": float(timing["peak_memory_gib"]),
    }


def verdict_frame(params: Params, compared: list[Comparison], verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per arm, in the order of params.yaml; empty where there is nothing to say."""
    rows = [_verdict_row(params, c, verdict) for c, verdict in zip(compared, verdicts, strict=True)]
    headline = compared[0].headline
    others = [name for name in compared[0].scores if name not in (headline.key, headline.second.key)]
    return _typed(rows, verdict_columns(headline, others))


def _verdict_row(params: Params, arm: Comparison, verdict: Verdict) -> dict[str, Any]:
    config, choice = params.arm(arm.arm), arm.choice
    row: dict[str, Any] = {
        **{key: getattr(config, key) for key in ("strategy", "block_size", "mask_rate")},
        "arm": arm.arm,
        "realised_mask_rate": params.realised_mask_rate_of(arm.arm),
        "num_seeds": arm.num_seeds,
        **{key: getattr(arm, key) for key in ("flops", "device_seconds")},
        "images_seen": None if math.isnan(arm.images_seen) else round(arm.images_seen),
        "trial": None if choice is None else choice.trial,
        "num_trials": None if choice is None else choice.num_trials,
        "verdict": verdict.text,
    }
    for name, score in arm.scores.items():
        row |= {name: score.mean, f"{name}_std": score.std, f"{name}_low": score.low, f"{name}_high": score.high}
    return row | ({} if arm.against is None else _against_columns(arm.headline, arm.against))


def _against_columns(headline: Headline, against: Against) -> dict[str, Any]:
    crossed = against.crossing
    row: dict[str, Any] = {
        "p_value": against.score.p_value,
        "p_holm": against.p_holm,
        "compute_ratio": against.ratio(crossed.at),
        "compute_ratio_low": against.ratio(crossed.low),
        "compute_ratio_high": against.ratio(crossed.high),
        f"flops_at_equal_{headline.key}": crossed.at,
        f"device_seconds_at_equal_{headline.key}": against.seconds_at_equal_score,
    }
    for name, pair in ((headline.key, against.score), (headline.second.key, against.second)):
        gap: Estimate = pair.difference
        row |= {f"delta_{name}": gap.mean, f"delta_{name}_low": gap.low, f"delta_{name}_high": gap.high}
    return row


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame so that equal frames give equal bytes and every float reads back exactly."""
    frame.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")


def display_table(verdicts: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """The verdicts' numbers as text, rounded for people, the scales in two rows below the arms.

    With three seeds or more a mean stands with its 95 % interval. With fewer the number of seeds stands beside it: in
    the heading where it is the same for all arms, else in the cell.
    """
    arms = verdicts[verdicts["num_seeds"] > 0]
    headline = headline_of(summary)
    counts, scales = arms["num_seeds"].unique(), _scale_rows(summary, headline)
    common = int(counts[0]) if len(counts) == 1 else None
    suffix = "" if common is None else f" (n={common})"
    first_flops = summary.groupby("arm")["flops"].min()
    frame = _in_units(pd.concat([verdicts, scales], ignore_index=True), headline)
    table = {
        "arm": list(frame["arm"]),
        "strategy": [_strategy(row) for _, row in frame.iterrows()],
        "asked": _each(frame["mask_rate"], rate_text),
        "realised": _each(frame["realised_mask_rate"], rate_text),
        **_score_columns(frame, headline, common, suffix),
        f"same {headline.name} at{suffix}": [_ratio_cell(row, headline, first_flops) for _, row in frame.iterrows()],
        "TFLOPs": _each(frame["flops"] / 1e12, number_text),
        "images seen": _each(frame["images_seen"], lambda count: f"{count:,.0f}"),
        f"device s{suffix}": _each(frame["device_seconds"], number_text),
        "tuned": [_tuned_cell(count) for count in frame["num_trials"]],
    }
    return pd.DataFrame(_only_useful(table))


def _scale_rows(summary: pd.DataFrame, headline: Headline) -> pd.DataFrame:
    first, keys = summary.iloc[0], [score.key for score in headline.shown]
    rows = [{"arm": title, **{key: first[f"{key}_{end}"] for key in keys}} for end, title in SCALES.items()]
    return pd.DataFrame(rows, columns=["arm", *keys]).astype(dict.fromkeys(keys, "float64"))


def _in_units(frame: pd.DataFrame, headline: Headline) -> pd.DataFrame:
    """The frame with the scores as they are shown, their spread and differences, too."""
    names = {column: score.times for score in headline.shown for column in _columns_of(score) if column in frame}
    return frame.assign(**{column: frame[column] * times for column, times in names.items()})


def _columns_of(score: Score) -> list[str]:
    key = score.key
    return [key, f"{key}_std", f"delta_{key}", f"delta_{key}_low", f"delta_{key}_high"]


def _score_columns(frame: pd.DataFrame, headline: Headline, common: int | None, suffix: str) -> dict[str, list[str]]:
    """The headline, other scores, precision and recall, the number of seeds in the heading or a column of its own."""
    key, label, others = headline.key, headline.label, headline.shown[1:]
    places = decimals(frame[key])
    columns = {
        "seeds": ["–" if pd.isna(count) else str(int(count)) for count in frame["num_seeds"]] if common is None else [],
        f"{label}{suffix}": _scores(frame, key, places, common),
        f"{label} SD{suffix}": _each(frame[f"{key}_std"], lambda std: f"{std:.{places}f}"),
        f"Δ{label}{suffix}": [_delta_cell(row, key, places, common) for _, row in frame.iterrows()],
        "p (Holm)": _each(frame["p_holm"], p_text),
        **{f"{one.label}{suffix}": _scores(frame, one.key, decimals(frame[one.key]), common) for one in others},
        f"precision{suffix}": _scores(frame, "precision", 3, common),
        f"recall{suffix}": _scores(frame, "recall", 3, common),
    }
    return {name: cells for name, cells in columns.items() if cells}


def _scores(frame: pd.DataFrame, name: str, places: int, common: int | None) -> list[str]:
    return [_score_cell(row, name, places, common) for _, row in frame.iterrows()]


def _score_cell(row: pd.Series, name: str, places: int, common: int | None) -> str:
    mean, count = row[name], row["num_seeds"]
    if pd.isna(mean):
        return "–"
    text = f"{mean:.{places}f}".replace("-", "−")
    if pd.isna(count):  # a scale
        return text
    half = half_width(row[f"{name}_std"], int(count))
    if not math.isnan(half):
        return f"{text} [{mean - half:.{places}f}, {mean + half:.{places}f}]".replace("-", "−")
    return text + _few(int(count), common)


def _few(count: int, common: int | None) -> str:
    """The number of seeds, where it is not in the heading and too small for an interval."""
    return f" (n={count})" if common is None else ""


def _delta_cell(row: pd.Series, key: str, places: int, common: int | None) -> str:
    if pd.isna(row[f"delta_{key}"]):
        return "–"
    text, low, high = (signed(row[f"delta_{key}{end}"], places) for end in ("", "_low", "_high"))
    if pd.notna(row[f"delta_{key}_low"]):
        return f"{text} [{low}, {high}]"
    count = int(row["num_seeds"])
    return text + (_few(count, common) if count < ENOUGH else f" (n<{ENOUGH})")


def _ratio_cell(row: pd.Series, headline: Headline, first_flops: pd.Series) -> str:
    """The compute at an equal score in units of scratch's, open ends of its interval as ellipses."""
    if pd.isna(row[f"delta_{headline.key}"]):
        return "–"
    if pd.isna(row["compute_ratio"]):
        text = "never"
    else:
        at_most = row[f"flops_at_equal_{headline.key}"] <= first_flops[row["arm"]]
        text = f"{'≤ ' if at_most else ''}{ratio_text(row['compute_ratio'])}"
    if pd.isna(row[f"delta_{headline.key}_low"]):
        return text
    low, high = (_open_end(row[f"compute_ratio_{end}"]) for end in ("low", "high"))
    return f"{text} [{low}, {high}]"


def _open_end(ratio: float) -> str:
    return "…" if pd.isna(ratio) else f"{ratio:.2f}"


def p_text(p: float) -> str:
    """A p-value with three decimals."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def _tuned_cell(num_trials: Any) -> str:
    if pd.isna(num_trials):
        return "–"
    return "no" if num_trials == 1 else f"{int(num_trials)} trials"


def _only_useful(table: dict[str, list[str]]) -> dict[str, list[str]]:
    """Without the columns that compare where nothing can be compared, and the others that are empty."""
    return {name: cells for name, cells in table.items() if name == "arm" or set(cells) != {"–"}}


def _each(values: pd.Series, text: Callable[[float], str]) -> list[str]:
    return ["–" if pd.isna(value) else text(value) for value in values]


def _strategy(row: pd.Series) -> str:
    if pd.isna(row["strategy"]):
        return "–"
    return strategy_text(row["strategy"], None if pd.isna(row["block_size"]) else int(row["block_size"]))


def strategy_text(strategy: str, block_size: int | None) -> str:
    """How a family of arms is called in tables and legends."""
    return strategy if block_size is None else f"{strategy} {block_size}×{block_size}"


def table_markdown(table: pd.DataFrame) -> str:
    """A table of text as GitHub Markdown."""
    return _tabulate(table, "pipe")


def format_table(verdicts: pd.DataFrame, summary: pd.DataFrame, width: int = TERMINAL_WIDTH) -> str:
    """The result table for a terminal, at most `width` columns wide: what matters least is left out first.

    Args:
        verdicts: as in verdicts.csv.
        summary: as in summary.csv.
        width: columns of the terminal.
    """
    texts = [
        _tabulate(table, "simple") for table in _ever_leaner(display_table(verdicts, summary), headline_of(summary))
    ]
    return next((text for text in texts if max(map(len, text.splitlines())) <= width), texts[-1])


def _dispensable(headline: Headline) -> list[str]:
    """What a terminal table leaves out, in this order, until it fits; arm, headline and its difference always stay."""
    return [
        *("images seen", "strategy", "TFLOPs", f"{headline.label} SD", "asked", "tuned", "recall", "precision"),
        *(*(score.label for score in headline.also), "device s", "realised"),
        *("p (Holm)", f"same {headline.name} at", headline.second.label, "seeds"),
    ]


def _ever_leaner(table: pd.DataFrame, headline: Headline) -> Iterator[pd.DataFrame]:
    """The table as it is, then with shorter cells, then with ever fewer columns."""
    yield table
    names = [arm if len(arm) <= 24 else arm[:23] + "…" for arm in table["arm"]]
    table = _without_intervals(table.assign(arm=names), ("precision", "recall"))
    yield table
    for name in _dispensable(headline):
        if name == f"same {headline.name} at":  # worth more than the interval of the second opinion
            table = _without_intervals(table, (headline.second.label,))
            yield table
        table = table[[column for column in table if _name(column) != name]]
        yield table


def _without_intervals(table: pd.DataFrame, names: tuple[str, ...]) -> pd.DataFrame:
    return table.assign(**{c: [cell.split(" [")[0] for cell in table[c]] for c in table if _name(c) in names})


def _name(column: str) -> str:
    """A heading without its number of seeds."""
    return column.split(" (n=")[0]


def _tabulate(table: pd.DataFrame, style: str) -> str:
    align = ["left" if column in LEFT_COLUMNS else "right" for column in table.columns]
    return table.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
