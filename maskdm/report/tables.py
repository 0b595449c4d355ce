"""The tables: a row per arm, seed and milestone; a row per arm; and how they are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.config import Params
from maskdm.config.paths import ORIGIN_KEYS
from maskdm.report.comparison import Comparison, Findings
from maskdm.report.numbers import decimals, number_text, rate_text, signed
from maskdm.report.results import Results, milestone_key
from maskdm.report.statistics import ENOUGH, Paired, estimate, half_width
from maskdm.report.verdicts import Verdict
from maskdm.scoring.headline import FID, SCORE_KEYS, SCORES, Headline, Score, flat_scores, headline_of

OF_AN_ARM = ("strategy", "block_size", "mask_rate", "realised_mask_rate")
SPENT = ("step", "flops", "images_seen", "tokens_seen")  # until a milestone
SCALES = {"floor": "real vs real", "untrained": "untrained"}  # both ends of the scale, as tables call them
SCALED = [score.key for score in SCORES if score.has_scale]
OTHERS = [score for score in SCORES if score not in FID.shown]  # precision, recall: beside the headline's scores
WHOLE_COLUMNS = (
    *("seed", "block_size", "num_visible", "step", "images_seen", "tokens_seen", "num_samples", "floor_num_samples"),
    *("num_trials", "num_seeds"),
)
TEXT_COLUMNS = ("arm", "strategy", *ORIGIN_KEYS, "trial", "kind", "verdict")
LEFT_COLUMNS = ("arm", "strategy", "trial", "values", "what", "value", "")  # of tables of text
TERMINAL_WIDTH = 110
MAX_ARM = 24  # characters of an arm's name in a terminal that is too narrow
NONE = "–"


def summary_frame(params: Params, results: Results) -> pd.DataFrame:
    """One row per arm, seed and milestone, in the order of params.yaml: the columns of summary.csv.

    Seconds and memory are those from the start of pretraining to the milestone.
    """
    rows, distances = [], results.distances
    floor, untrained = ({f"{key}_{end}": results.scale_of(key)[end] for key in SCALED} for end in SCALES)
    ends = {f"{name}_{end}": results.scale_of(name)[end] for end in SCALES for name in distances}
    for run in results.runs:
        choice, curve = results.choices[run.arm], run.finetune_curve
        for fraction in params.budget.milestones:
            at = flat_scores(run.metrics["milestones"][milestone_key(fraction)])
            timing = curve[curve["step"] == at["step"]].iloc[0]
            seconds = float(timing["device_seconds"])
            rows.append(
                {
                    **{"arm": run.arm, "seed": run.seed, **{key: run.metrics[key] for key in OF_AN_ARM}},
                    **{"num_visible": params.mask_of(run.arm).num_visible, "milestone": fraction},
                    **{key: at[key] for key in SPENT},
                    "device_seconds": seconds,
                    "data_wait_share": float(timing["data_wait_seconds"]) / seconds if seconds > 0 else math.nan,
                    "peak_memory_gib": float(timing["peak_memory_gib"]),
                    **{key: at[key] for key in SCORE_KEYS},
                    **{**floor, "floor_num_samples": results.scale["floor"]["num_samples"], **untrained},
                    **{key: run.metrics[key] for key in ORIGIN_KEYS},
                    **{"trial": choice.trial, "num_trials": choice.num_trials},
                    **{**{key: at[key] for key in distances}, **ends},
                }
            )
    return _typed(rows)


def _typed(rows: list[dict[str, Any]]) -> pd.DataFrame:
    kinds = {column: "float64" for column in rows[0] if column not in TEXT_COLUMNS}
    kinds.update({column: "Int64" for column in WHOLE_COLUMNS if column in kinds})
    return pd.DataFrame(rows).astype(kinds)


def verdict_frame(found: Findings, verdicts: list[Verdict]) -> pd.DataFrame:
    """One row per arm, in the order of params.yaml, empty where there is no value: the columns of verdicts.csv."""
    return _typed([_verdict_row(found.params, found.compared[verdict.arm], verdict) for verdict in verdicts])


def _verdict_row(params: Params, arm: Comparison, verdict: Verdict) -> dict[str, Any]:
    config, choice, against, nothing = params.arm(arm.arm), arm.choice, arm.against, Paired(estimate([]), math.nan)
    key, second = arm.headline.key, arm.headline.second.key
    score, gap = arm.scores[key], nothing if against is None else against.score
    other, other_gap = arm.scores[second], nothing if against is None else against.second
    ratio, low, high = (None, None, None) if against is None else against.ratios
    return {
        "arm": arm.arm,
        **{name: getattr(config, name) for name in OF_AN_ARM[:3]},
        "realised_mask_rate": params.mask_of(arm.arm).realised_mask_rate,
        "num_seeds": arm.num_seeds,
        **{key: score.mean, f"{key}_std": score.std, f"{key}_low": score.low, f"{key}_high": score.high},
        **_delta(key, gap),
        **{"p_value": gap.p_value, "p_holm": math.nan if against is None else against.p_holm},
        **{second: other.mean, f"{second}_std": other.std, **_delta(second, other_gap)},
        **{
            column: value
            for name, one in arm.scores.items()
            if name not in (key, second)
            for column, value in ((name, one.mean), (f"{name}_std", one.std))
        },
        "flops": arm.flops,
        "images_seen": None if math.isnan(arm.images_seen) else round(arm.images_seen),
        "device_seconds": arm.device_seconds,
        **{"compute_ratio": ratio, "compute_ratio_low": low, "compute_ratio_high": high},
        f"flops_at_equal_{key}": None if ratio is None or against is None else against.crossing.at,
        f"device_seconds_at_equal_{key}": None if ratio is None or against is None else against.seconds_at_equal_score,
        "trial": None if choice is None else choice.trial,
        "num_trials": None if choice is None else choice.num_trials,
        "conclusive": None if against is None else int(against.is_conclusive),
        "kind": verdict.kind,
        "verdict": verdict.text,
    }


def _delta(name: str, pair: Paired) -> dict[str, float]:
    gap = pair.difference
    return {f"delta_{name}": gap.mean, f"delta_{name}_low": gap.low, f"delta_{name}_high": gap.high}


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame so that equal frames give equal bytes and every float reads back exactly."""
    frame.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")


def display_table(verdicts: pd.DataFrame, summary: pd.DataFrame) -> pd.DataFrame:
    """The verdicts' numbers as text, rounded for people, with both ends of the scale in two rows below the arms.

    A mean over three seeds or more has its 95 % interval beside it. With fewer seeds their number stands there instead:
    in the heading if it is the same for all arms, otherwise in the cell.
    """
    headline, first = headline_of(summary), summary.iloc[0]
    ends = [{"arm": title, **{s.key: first[f"{s.key}_{end}"] for s in headline.shown}} for end, title in SCALES.items()]
    frame = pd.concat([verdicts, pd.DataFrame(ends)], ignore_index=True)
    counts = verdicts.loc[verdicts["num_seeds"] > 0, "num_seeds"].unique()
    is_common, label = len(counts) == 1, headline.label
    n, in_cells = (f" (n={counts[0]})", False) if is_common else ("", True)
    places, first_flops = decimals(headline.times * frame[headline.key]), summary.groupby("arm")["flops"].min()
    table = {
        "arm": list(frame["arm"]),
        "strategy": [
            NONE if pd.isna(strategy) else strategy_text(strategy, None if pd.isna(size) else int(size))
            for strategy, size in zip(frame["strategy"], frame["block_size"], strict=True)
        ],
        "asked": _each(frame["mask_rate"], rate_text),
        "realised": _each(frame["realised_mask_rate"], rate_text),
        **({} if is_common else {"seeds": _each(frame["num_seeds"], lambda count: str(int(count)))}),
        f"{label}{n}": _scores(frame, headline, places, in_cells),
        f"{label} SD{n}": _each(headline.times * frame[f"{headline.key}_std"], lambda std: f"{std:.{places}f}"),
        f"Δ{label}{n}": _differences(frame, headline, places, in_cells),
        "p (Holm)": _each(frame["p_holm"], lambda p: "<0.001" if p < 0.001 else f"{p:.3f}"),
        **{
            f"{one.label}{n}": _scores(frame, one, decimals(one.times * frame[one.key]), in_cells)
            for one in headline.shown[1:]
        },
        **{f"{one.name}{n}": _scores(frame, one, 3, in_cells) for one in OTHERS},
        f"same {headline.name} at{n}": [_ratio(row, headline, first_flops) for row in frame.to_dict("records")],
        "TFLOPs": _each(frame["flops"] / 1e12, number_text),
        "images seen": _each(frame["images_seen"], lambda count: f"{count:,.0f}"),
        f"device s{n}": _each(frame["device_seconds"], number_text),
        "tuned": _each(frame["num_trials"], lambda count: "no" if count == 1 else f"{int(count)} trials"),
    }
    return pd.DataFrame({name: column for name, column in table.items() if name == "arm" or set(column) != {NONE}})


def _each(values: pd.Series, text: Callable[[Any], str]) -> list[str]:
    return [NONE if pd.isna(value) else text(value) for value in values]


def _rounded(values: pd.Series) -> list[str]:
    places = decimals(values)
    return _each(values, lambda value: f"{value:.{places}f}")


def _scores(frame: pd.DataFrame, score: Score, places: int, is_count_shown: bool) -> list[str]:
    """Means over seeds with their intervals; the ends of the scale have neither seeds nor an interval."""
    cells = []
    for mean, std, count in zip(frame[score.key], frame[f"{score.key}_std"], frame["num_seeds"], strict=True):
        text = NONE if pd.isna(mean) else f"{score.times * mean:.{places}f}"
        if text != NONE and pd.notna(count):
            half = half_width(score.times * std, int(count))
            if not math.isnan(half):
                text += f" [{score.times * mean - half:.{places}f}, {score.times * mean + half:.{places}f}]"
            elif is_count_shown:
                text += f" (n={int(count)})"
        cells.append(text.replace("-", "−"))
    return cells


def _differences(frame: pd.DataFrame, headline: Headline, places: int, is_count_shown: bool) -> list[str]:
    cells = []
    gaps = headline.times * frame[[f"delta_{headline.key}{end}" for end in ("", "_low", "_high")]]
    for (gap, low, high), count in zip(gaps.itertuples(index=False), frame["num_seeds"], strict=True):
        text = NONE if pd.isna(gap) else signed(gap, places)
        if pd.notna(low):
            text += f" [{signed(low, places)}, {signed(high, places)}]"
        elif text != NONE and count >= ENOUGH:
            text += f" (n<{ENOUGH})"
        elif text != NONE and is_count_shown:
            text += f" (n={int(count)})"
        cells.append(text)
    return cells


def _ratio(row: dict[Any, Any], headline: Headline, first_flops: pd.Series) -> str:
    """The compute at an equal score as a fraction of scratch's; an open end of its interval is an ellipsis."""
    if pd.isna(row[f"delta_{headline.key}"]) or not row["conclusive"]:
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
    scores = pd.DataFrame([trial.scores for _, trial in trials], columns=["kid", "fid"], dtype="float64")
    kid, fid = (
        [cell.replace("-", "−") for cell in _rounded(column)] for column in (1000 * scores["kid"], scores["fid"])
    )
    return pd.DataFrame(
        {
            "arm": [trial.arm for _, trial in trials],
            "trial": [trial.name for _, trial in trials],
            "values": [values_text(trial.values) for _, trial in trials],
            "KID×1000": kid,
            "FID": fid,
            "": [f"failed: {t.failed}" if t.failed else "chosen" if t.name == best else "" for best, t in trials],
        }
    )


def values_text(values: dict[str, Any]) -> str:
    """What a trial or an arm overrides."""
    texts = (f"{path} {value:g}" if isinstance(value, float) else f"{path} {value}" for path, value in values.items())
    return ", ".join(texts) or "as in params.yaml"


def strategy_text(strategy: str, block_size: int | None) -> str:
    """How arms of one strategy and block size are called in tables and legends."""
    return strategy if block_size is None else f"{strategy} {block_size}×{block_size}"


def plain_table(table: pd.DataFrame, style: str = "pipe") -> str:
    """A table of text as GitHub Markdown, or in another style of tabulate."""
    align = ["left" if column in LEFT_COLUMNS else "right" for column in table.columns]
    return table.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)


def format_table(verdicts: pd.DataFrame, summary: pd.DataFrame, width: int = TERMINAL_WIDTH) -> str:
    """The result table for a terminal, at most `width` columns wide: the least important parts are left out first.

    Args:
        verdicts: as in verdicts.csv.
        summary: as in summary.csv.
        width: columns of the terminal.
    """
    table, headline = display_table(verdicts, summary), headline_of(summary)
    titles = {column: column.split(" (n=")[0] for column in table}  # without the number of seeds
    second, others, interval = headline.second.label, [score.name for score in OTHERS], "interval of "
    for left_out in (
        *("nothing", "long names", *(interval + name for name in others), "images seen", "strategy", "TFLOPs"),
        *(f"{headline.label} SD", "asked", "tuned", *reversed(others), *(score.label for score in headline.also)),
        *("device s", "realised", "p (Holm)", interval + second, f"same {headline.name} at", second, "seeds"),
    ):
        if left_out == "long names":
            table["arm"] = [arm if len(arm) <= MAX_ARM else arm[: MAX_ARM - 1] + "…" for arm in table["arm"]]
        elif left_out.startswith(interval):
            for column in [column for column in table if interval + titles[column] == left_out]:
                table[column] = [cell.split(" [")[0] for cell in table[column]]
        else:
            table = table[[column for column in table if titles[column] != left_out]].copy()
        text = plain_table(table, "simple")
        if max(map(len, text.splitlines())) <= width:
            break
    return text
