"""The numbers: a row per arm, seed and milestone; a row per arm; and how they are written for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from maskdm.report.results import COMPARABLE_KEYS, FLOOR_KEYS, MILESTONE_KEYS, Results, Run, milestone_key

SUMMARY_COLUMNS = (
    *("arm", "seed", "strategy", "mask_rate", "realised_mask_rate", "block_size", "milestone"),
    *MILESTONE_KEYS,
    *COMPARABLE_KEYS,
    *FLOOR_KEYS,
    *("pretrain_seconds", "finetune_seconds", "train_seconds"),
)
WHOLE_COLUMNS = ("seed", "block_size", "step", "images_seen", "num_samples", "floor_num_samples")
TEXT_COLUMNS = ("arm", "strategy", "extractor", "extractor_sha256", "data_sha256")
ARM_COLUMNS = ("arm", "strategy", "block_size", "mask_rate", "realised_mask_rate")
TERMINAL_WIDTH = 110
# What a terminal table leaves out, in this order, until it fits; arm, FID and ΔFID always stay.
DISPENSABLE = ("images seen", "strategy", "TFLOPs", "recall", "precision", "asked", "train s")


def summary_frame(results: Results, milestones: list[float]) -> pd.DataFrame:
    """One row per arm, seed and milestone, in the order of params.yaml.

    The seconds are those of the whole training, whatever the milestone.
    """
    rows = [_summary_row(run, fraction) for run in results.runs for fraction in milestones]
    frame = pd.DataFrame(rows, columns=list(SUMMARY_COLUMNS))
    kinds = {c: "float64" for c in SUMMARY_COLUMNS if c not in TEXT_COLUMNS}
    kinds.update(dict.fromkeys(WHOLE_COLUMNS, "Int64"))
    return frame.astype(kinds)


def _summary_row(run: Run, fraction: float) -> dict[str, Any]:
    pretrain, finetune = (r["train_seconds"] for r in (run.pretrain_record, run.finetune_record))
    seconds = {
        "pretrain_seconds": pretrain,
        "finetune_seconds": finetune,
        "train_seconds": pretrain + finetune,
    }
    milestone = run.metrics["milestones"][milestone_key(fraction)]
    # The milestone's scores come last: the file's own top-level ones are the final milestone's.
    return {**run.metrics, "arm": run.arm, "seed": run.seed, "milestone": fraction, **seconds, **milestone}


def reference_arm(summary: pd.DataFrame) -> str | None:
    """The arm the others are compared with: `scratch`, else the first without pretraining, else none."""
    unmasked = list(summary.loc[summary["strategy"] == "none", "arm"].unique())
    return "scratch" if "scratch" in unmasked else next(iter(unmasked), None)


def final_frame(summary: pd.DataFrame) -> pd.DataFrame:
    """One row per arm: the final milestone's mean over seeds and, with several, their standard deviation.

    ΔFID is paired: each seed's FID less scratch's FID with that seed. It is empty for scratch, or without it.
    """
    last = summary[summary["milestone"] == summary["milestone"].max()]
    reference = reference_arm(summary)
    base = last[last["arm"] == reference].set_index("seed")["fid"]
    frames = [group.set_index("seed") for _, group in last.groupby("arm", sort=False)]
    return pd.DataFrame([_final_row(f, base, f["arm"].iloc[0] == reference) for f in frames]).astype(
        {"block_size": "Int64", "num_seeds": "Int64", "seeds_better": "Int64"}
    )


def _final_row(runs: pd.DataFrame, base: pd.Series, is_reference: bool) -> dict[str, Any]:
    """One arm's row; `runs` and `base` (scratch's FIDs) are indexed by seed."""
    delta = runs["fid"] - base.reindex(runs.index)
    compared = len(base) > 0 and not is_reference
    row: dict[str, Any] = {column: runs[column].iloc[0] for column in ARM_COLUMNS} | {"num_seeds": len(runs)}
    row |= _mean_and_std("fid", runs["fid"])
    row |= _mean_and_std("delta_fid", delta if compared else delta * math.nan)
    row["seeds_better"] = int((delta < 0).sum()) if compared else None
    row |= _mean_and_std("kid_x1000", runs["kid"] * 1000)
    row |= _mean_and_std("precision", runs["precision"]) | _mean_and_std("recall", runs["recall"])
    row |= {"tflops": runs["flops"].mean() / 1e12, "images_seen": float(runs["images_seen"].mean())}
    return row | _mean_and_std("train_seconds", runs["train_seconds"])


def _mean_and_std(name: str, values: pd.Series) -> dict[str, float]:
    return {
        name: float(values.mean()),
        f"{name}_std": float(values.std(ddof=1)) if len(values) > 1 else math.nan,
    }


def write_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a frame so that equal frames give equal bytes and every float reads back exactly."""
    frame.to_csv(file, index=False, lineterminator="\n", encoding="utf-8")


def display_table(final: pd.DataFrame) -> pd.DataFrame:
    """The final table as text, rounded for people; without ΔFID where there is nothing to compare with."""
    fid_decimals = decimals(final["fid"])
    columns: dict[str, list[str]] = {
        "arm": list(final["arm"]),
        "strategy": [_strategy(row) for _, row in final.iterrows()],
        "asked": _each(final["mask_rate"], rate_text),
        "realised": _each(final["realised_mask_rate"], rate_text),
        "FID": _with_spread(final, "fid", fid_decimals),
        "ΔFID": _with_spread(final, "delta_fid", fid_decimals, sign="+"),
        "KID×1000": _with_spread(final, "kid_x1000", decimals(final["kid_x1000"])),
        "precision": _with_spread(final, "precision", 3),
        "recall": _with_spread(final, "recall", 3),
        "TFLOPs": _each(final["tflops"], number_text),
        "images seen": _each(final["images_seen"], lambda count: f"{count:,.0f}"),
        "train s": _each(final["train_seconds"], number_text),
    }
    if final["delta_fid"].isna().all():
        del columns["ΔFID"]
    return pd.DataFrame(columns)


def _each(values: pd.Series, text: Callable[[float], str]) -> list[str]:
    return ["–" if pd.isna(value) else text(value) for value in values]


def _with_spread(final: pd.DataFrame, name: str, places: int, sign: str = "") -> list[str]:
    pairs = zip(final[name], final[f"{name}_std"], strict=True)
    return ["–" if pd.isna(mean) else spread_text(mean, std, places, sign) for mean, std in pairs]


def spread_text(mean: float, std: float, places: int, sign: str = "") -> str:
    """A mean, and ± its standard deviation where there is one."""
    text = f"{mean:{sign}.{places}f}"
    return text if pd.isna(std) else f"{text} ± {std:.{places}f}"


def decimals(values: pd.Series) -> int:
    """Decimal places that show a typical value of a column with three digits, at least two places."""
    size = values.abs().median()
    return 2 if not size > 0 else min(max(2 - math.floor(math.log10(size)), 2), 6)


def number_text(value: float) -> str:
    """Three significant digits, no exponent, thousands separated."""
    places = 0 if value == 0 else max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:,.{min(places, 6)}f}"


def rate_text(rate: float) -> str:
    """A mask rate with two decimals, three where they are needed."""
    return f"{rate:.2f}" if round(rate, 2) == round(rate, 3) else f"{rate:.3f}"


def _strategy(row: pd.Series) -> str:
    return strategy_text(row["strategy"], None if pd.isna(row["block_size"]) else int(row["block_size"]))


def strategy_text(strategy: str, block_size: int | None) -> str:
    """How a family of arms is called in tables and legends."""
    return strategy if block_size is None else f"{strategy} {block_size}×{block_size}"


def table_markdown(table: pd.DataFrame) -> str:
    """A table of text as GitHub Markdown."""
    return _tabulate(table, "pipe")


def format_final(final: pd.DataFrame, width: int = TERMINAL_WIDTH) -> str:
    """The final table for a terminal, at most `width` columns wide: what matters least is left out first.

    Args:
        final: what `write_report` returned.
        width: columns of the terminal.
    """
    texts = [_tabulate(table, "simple") for table in _ever_leaner(display_table(final))]
    return next((text for text in texts if max(map(len, text.splitlines())) <= width), texts[-1])


def _ever_leaner(table: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The table as it is, then with shorter cells, then with ever fewer columns."""
    yield table
    shorter = {c: [cell.split(" ±")[0] for cell in table[c]] for c in ("precision", "recall")}
    names = [arm if len(arm) <= 24 else arm[:23] + "…" for arm in table["arm"]]
    table = table.assign(**shorter, arm=names)
    yield table
    for column in DISPENSABLE:
        table = table.drop(columns=column)
        yield table


def print_table(final: pd.DataFrame) -> None:
    """Print the final table for a terminal."""
    print(format_final(final))


def _tabulate(table: pd.DataFrame, style: str) -> str:
    align = ["left" if column in ("arm", "strategy") else "right" for column in table.columns]
    return table.to_markdown(index=False, tablefmt=style, disable_numparse=True, colalign=align)
