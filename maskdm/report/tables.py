"""The tables: a row per arm, seed and milestone; a row per arm; and how they are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.config import Params
from maskdm.formats import ORIGIN_KEYS
from maskdm.report.comparison import Against, Comparison
from maskdm.report.numbers import decimals, number_text, rate_text, ratio_text, signed
from maskdm.report.results import MILESTONE_KEYS, Results, Run, milestone_key
from maskdm.report.statistics import ENOUGH, Estimate, half_width
from maskdm.report.verdicts import Verdict

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
VERDICT_COLUMNS = (
    *ARM_COLUMNS,
    "num_seeds",
    *("fid", "fid_std", "fid_low", "fid_high"),
    *("delta_fid", "delta_fid_low", "delta_fid_high", "p_value", "p_holm"),
    *("kid", "kid_std", "delta_kid", "delta_kid_low", "delta_kid_high"),
    *("precision", "precision_std", "recall", "recall_std"),
    *("flops", "images_seen", "device_seconds"),
    *("compute_ratio", "compute_ratio_low", "compute_ratio_high", "flops_at_equal_fid", "device_seconds_at_equal_fid"),
    *("trial", "num_trials", "verdict"),
)
WHOLE_COLUMNS = (
    *("seed", "block_size", "num_visible", "step", "images_seen", "tokens_seen", "num_samples", "floor_num_samples"),
    *("num_trials", "num_seeds"),
)
TEXT_COLUMNS = ("arm", "strategy", *ORIGIN_KEYS, "trial", "verdict")
LEFT_COLUMNS = ("arm", "strategy", "trial", "values", "what", "value", "")  # of tables of text
TERMINAL_WIDTH = 110
# What a terminal table leaves out, in this order, until it fits; arm, FID and ΔFID always stay.
DISPENSABLE = (
    *("images seen", "strategy", "TFLOPs", "FID SD", "asked", "tuned", "recall", "precision", "device s", "realised"),
    *("p (Holm)", "same FID at", "KID×1000", "seeds"),
)


def summary_frame(params: Params, results: Results) -> pd.DataFrame:
    """One row per arm, seed and milestone, in the order of params.yaml; seconds and memory are those until then."""
    scale = _scale_columns(results.scale)
    rows = [
        {**_run_columns(params, results, run), **_milestone_columns(run, fraction), **scale}
        for run in results.runs
        for fraction in params.budget.milestones
    ]
    return _typed(rows, SUMMARY_COLUMNS)


def _typed(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> pd.DataFrame:
    kinds = {column: "float64" for column in columns if column not in TEXT_COLUMNS}
    kinds.update({column: "Int64" for column in WHOLE_COLUMNS if column in columns})
    return pd.DataFrame(rows, columns=list(columns)).astype(kinds)


def _scale_columns(scale: dict[str, Any] | None) -> dict[str, Any]:
    if scale is None:
        return dict.fromkeys(SCALE_COLUMNS)
    scores = {f"{key}_{name}": scale[name][key] for name in SCALES for key in ("fid", "kid")}
    return scores | {"floor_num_samples": scale["floor"]["num_samples"]}


def _run_columns(params: Params, results: Results, run: Run) -> dict[str, Any]:
    choice = results.choices.get(run.arm)
    return {
        **{key: run.metrics[key] for key in (*ARM_COLUMNS[1:], *ORIGIN_KEYS)},
        "arm": run.arm,
        "seed": run.seed,
        "num_visible": params.visible_of(run.arm).num_visible,
        "trial": None if choice is None else choice.trial,
        "num_trials": None if choice is None else choice.num_trials,
    }


def _milestone_columns(run: Run, fraction: float) -> dict[str, Any]:
    milestone = run.metrics["milestones"][milestone_key(fraction)]
    timing = run.finetune_curve[run.finetune_curve["step"] == milestone["step"]].iloc[0]
    seconds = float(timing["device_seconds"])
    return {
        "milestone": fraction,
        **{key: milestone[key] for key in MILESTONE_KEYS},
        "device_seconds": seconds,
        "data_wait_share": float(timing["data_wait_seconds"]) / seconds if seconds > 0 else math.nan,
        "peak_memory_gib": float(timing["peak_memory_gib"]),
    }


def verdict_frame(params: Params, compared: list[Comparison], verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per arm, in the order of params.yaml; empty where there is nothing to say."""
    rows = [_verdict_row(params, c, verdict) for c, verdict in zip(compared, verdicts, strict=True)]
    return _typed(rows, VERDICT_COLUMNS)


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
    return row | ({} if arm.against is None else _against_columns(arm.against))


def _against_columns(against: Against) -> dict[str, Any]:
    crossed = against.crossing
    row: dict[str, Any] = {
        "p_value": against.fid.p_value,
        "p_holm": against.fid_p_holm,
        "compute_ratio": against.ratio(crossed.at),
        "compute_ratio_low": against.ratio(crossed.low),
        "compute_ratio_high": against.ratio(crossed.high),
        "flops_at_equal_fid": crossed.at,
        "device_seconds_at_equal_fid": against.seconds_at_equal_fid,
    }
    for name, pair in (("delta_fid", against.fid), ("delta_kid", against.kid)):
        gap: Estimate = pair.difference
        row |= {name: gap.mean, f"{name}_low": gap.low, f"{name}_high": gap.high}
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
    counts, scales = arms["num_seeds"].unique(), _scale_rows(summary)
    common = int(counts[0]) if len(counts) == 1 else None
    suffix = "" if common is None else f" (n={common})"
    first_flops = summary.groupby("arm")["flops"].min()
    frame = pd.concat([verdicts.assign(kid=verdicts["kid"] * 1000), scales], ignore_index=True)
    for column in ("kid_std", "delta_kid", "delta_kid_low", "delta_kid_high"):
        frame[column] *= 1000
    table = {
        "arm": list(frame["arm"]),
        "strategy": [_strategy(row) for _, row in frame.iterrows()],
        "asked": _each(frame["mask_rate"], rate_text),
        "realised": _each(frame["realised_mask_rate"], rate_text),
        **_score_columns(frame, common, suffix),
        f"same FID at{suffix}": [_ratio_cell(row, first_flops) for _, row in frame.iterrows()],
        "TFLOPs": _each(frame["flops"] / 1e12, number_text),
        "images seen": _each(frame["images_seen"], lambda count: f"{count:,.0f}"),
        f"device s{suffix}": _each(frame["device_seconds"], number_text),
        "tuned": [_tuned_cell(count) for count in frame["num_trials"]],
    }
    return pd.DataFrame(_only_useful(table))


def _scale_rows(summary: pd.DataFrame) -> pd.DataFrame:
    first = summary.iloc[0]
    rows = [
        {"arm": title, "fid": first[f"fid_{name}"], "kid": first[f"kid_{name}"] * 1000}
        for name, title in SCALES.items()
        if pd.notna(first[f"fid_{name}"])
    ]
    return pd.DataFrame(rows, columns=list(VERDICT_COLUMNS)).astype({"fid": "float64", "kid": "float64"})


def _score_columns(frame: pd.DataFrame, common: int | None, suffix: str) -> dict[str, list[str]]:
    """FID, KID, precision and recall, the number of seeds in the heading or a column of its own."""
    places = {name: decimals(frame[name]) for name in ("fid", "kid")} | {"precision": 3, "recall": 3}
    columns = {
        "seeds": ["–" if pd.isna(count) else str(int(count)) for count in frame["num_seeds"]] if common is None else [],
        f"FID{suffix}": _scores(frame, "fid", places["fid"], common),
        f"FID SD{suffix}": _each(frame["fid_std"], lambda std: f"{std:.{places['fid']}f}"),
        f"ΔFID{suffix}": [_delta_cell(row, places["fid"], common) for _, row in frame.iterrows()],
        "p (Holm)": _each(frame["p_holm"], p_text),
        f"KID×1000{suffix}": _scores(frame, "kid", places["kid"], common),
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


def _delta_cell(row: pd.Series, places: int, common: int | None) -> str:
    if pd.isna(row["delta_fid"]):
        return "–"
    text, low, high = (signed(row[f"delta_fid{end}"], places) for end in ("", "_low", "_high"))
    if pd.notna(row["delta_fid_low"]):
        return f"{text} [{low}, {high}]"
    count = int(row["num_seeds"])
    return text + (_few(count, common) if count < ENOUGH else f" (n<{ENOUGH})")


def _ratio_cell(row: pd.Series, first_flops: pd.Series) -> str:
    """The compute at equal FID in units of scratch's, open ends of its interval as ellipses."""
    if pd.isna(row["delta_fid"]):
        return "–"
    if pd.isna(row["compute_ratio"]):
        text = "never"
    else:
        at_most = row["flops_at_equal_fid"] <= first_flops[row["arm"]]
        text = f"{'≤ ' if at_most else ''}{ratio_text(row['compute_ratio'])}"
    if pd.isna(row["delta_fid_low"]):
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
    texts = [_tabulate(table, "simple") for table in _ever_leaner(display_table(verdicts, summary))]
    return next((text for text in texts if max(map(len, text.splitlines())) <= width), texts[-1])


def _ever_leaner(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The table as it is, then with shorter cells, then with ever fewer columns."""
    yield table
    names = [arm if len(arm) <= 24 else arm[:23] + "…" for arm in table["arm"]]
    table = _without_intervals(table.assign(arm=names), ("precision", "recall"))
    yield table
    for name in DISPENSABLE:
        if name == "same FID at":  # worth more than the interval of the KID
            table = _without_intervals(table, ("KID×1000",))
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
