"""What limits the meaning of the numbers: one function for each caution, empty where it does not apply.

To add one, write a function of the findings and list it in `CAUTIONS`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from maskdm.config import Params
from maskdm.report.comparison import Findings
from maskdm.report.numbers import names_text, rate_text
from maskdm.report.results import Choice
from maskdm.report.seconds import RAN_WITH
from maskdm.report.statistics import ENOUGH
from maskdm.report.verdicts import EQUAL_COMPUTE, MATCHED_BY
from maskdm.scoring import points
from maskdm.scoring.protocol import extractor_caution, few_samples_caution

RATE_TOLERANCE = 0.05  # between the mask rate asked for and the realised one
MANY_SEEDS = 6  # from here on, Student's t is hardly wider than the normal distribution
MAX_NAMES = 4  # of arms in a sentence


def cautions(found: Findings) -> list[str]:
    """Every caution that applies."""
    return [text for caution in CAUTIONS if (text := caution(found))]


def shape_of_points(found: Findings) -> str:
    """FID does not see the shape of points."""
    if not points.apply_to(found.params):
        return ""
    return (
        "FID of points compares only their means and covariances, as if they were Gaussian: it is blind to the shape "
        "that they lie on. The answer and the verdicts therefore use sliced W₁, the mean Wasserstein-1 distance over "
        "directions. It is above 0 for real points too: see the row “real vs real”."
    )


def few_seeds(found: Findings) -> str:
    """One, two or a few seeds cannot tell much."""
    counts = {arm: found.compared[arm].num_seeds for arm in found.arms}
    most = max(counts.values())
    if most == 1:
        return (
            "One seed proves nothing: another seed may change the sign of any of these differences. Run three or more."
        )
    if most < ENOUGH:
        return "Two seeds give no interval: any difference may be chance. Run three or more."
    said = []
    if few := [arm for arm, count in counts.items() if count < ENOUGH]:
        said.append(f"Fewer than {ENOUGH} seeds give no interval: any difference may be chance ({', '.join(few)}).")
    if most < MANY_SEEDS:
        said.append(
            f"{most} seeds are few: the intervals assume that scores are normally distributed over seeds, which so few "
            "cannot confirm, and an arm without a clear difference may still be better or worse."
        )
    return " ".join(said)


def many_arms(found: Findings) -> str:
    """Of many intervals, some exclude zero by chance."""
    tests = sum(against.score.difference.has_interval for against in found.against.values())
    if tests < 2:
        return ""
    return (
        f"{tests} arms are compared at once, each with its own 95 % interval: even if masking made no difference, "
        "about one interval in twenty would exclude zero. The answer above and the column p (Holm) are corrected for "
        "this; the intervals are not."
    )


def untuned_baseline(found: Findings) -> str:
    """Scratch's hyperparameters were given."""
    choice = found.results.choices.get(found.reference or "")
    if choice is None or choice.trials:
        return ""
    return (
        f"The hyperparameters of {choice.arm} were given, not tuned: against an untuned baseline, masking looks better "
        "than it is. List trials under `tuning.trials` in params.yaml to tune every arm."
    )


def edges_of_tuning(found: Findings) -> str:
    """Chosen values are the smallest or largest ones tried, so better values may lie outside."""
    arms: dict[str, list[str]] = {}
    for arm, choice in found.results.choices.items():
        for edge in _edges(found.params, choice):
            arms.setdefault(edge, []).append(arm)
    if not arms:
        return ""
    edges = "; ".join(f"{edge} ({names_text(names, MAX_NAMES)})" for edge, names in arms.items())
    return f"Tuning chose values at the edge of the range that it tried; better ones may lie outside: {edges}."


def _edges(params: Params, choice: Choice) -> Iterator[str]:
    """The numeric hyperparameters of which the chosen trial has the smallest or largest value."""
    common = {"pretrain": params.pretrain_of, "finetune": params.finetune_of}
    for path in dict.fromkeys(path for trial in choice.trials for path in trial.values):
        if choice.trial is None or (path.startswith("pretrain.") and params.arm(choice.arm).strategy == "none"):
            continue  # all trials have failed, or the arm has no pretraining
        section, _, key = path.partition(".")
        given = getattr(common[section](choice.arm) if section in common else params.training, key, None)
        tried = {trial.name: _number(trial.values.get(path, given)) for trial in choice.trials}
        numbers = sorted({number for number in tried.values() if number is not None})
        chosen = tried[choice.trial]
        if len(numbers) > 1 and chosen in (numbers[0], numbers[-1]):
            which = "smallest" if chosen == numbers[0] else "largest"
            yield f"{path} {chosen:g}, the {which} of {len(numbers)}"


def _number(value: Any) -> float | None:
    """A number, also where YAML 1.1 reads one as text (`2e-3`)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except ValueError:
        return None


def other_features(found: Findings) -> str:
    """Scores on these features are not comparable with published ones."""
    return extractor_caution(str(found.results.features_record["extractor"]))


def few_images(found: Findings) -> str:
    """There are fewer samples, or real images, than features."""
    record, num_samples = found.results.features_record, found.params.sampling.num_samples
    return few_samples_caution(min(num_samples, record.get("num_real", num_samples)), record.get("num_features", 0))


def unequal_compute(found: Findings) -> str:
    """The arms were matched by something other than compute."""
    flops = [found.compared[arm].flops for arm in found.arms]
    spread = max(flops) / min(flops) - 1
    if spread <= EQUAL_COMPUTE:
        return ""
    return (
        f"The arms were matched by {MATCHED_BY[found.params.budget.match]}, and their training compute differs by "
        f"up to {spread:.0%}: differences at the end of the budget are not differences at equal compute."
    )


def unlike_runs(found: Findings) -> str:
    """The arms were trained on different devices, or in other ways that change rounding and seconds."""
    ran: dict[tuple[str, int | None], dict[str, list[str]]] = {}
    for run in found.results.runs:
        for record in (run.pretrain_record, run.finetune_record):
            for key in RAN_WITH if record.get("steps") else ():  # strategy `none` has no pretraining
                # `auto` chooses attention by the number of tokens: arms of different numbers may differ there
                tokens = record.get("num_visible") if key == "attention" else None
                if key in record:
                    ran.setdefault((key, tokens), {}).setdefault(_ran_with(record, key), []).append(run.arm)
    unlike = {key: ways for key, ways in ran.items() if len(ways) > 1}
    if not unlike or len({run.arm for run in found.results.runs}) < 2:
        return ""
    said = [
        f"{RAN_WITH[key]} " + " and ".join(f"{way} ({', '.join(dict.fromkeys(arms))})" for way, arms in ways.items())
        for (key, _), ways in unlike.items()
    ]
    coarse = ", which is coarse in bf16" if ("precision", None) in unlike else ""
    return (
        f"The arms did not run alike: {'; '.join(said)}. Their scores agree up to rounding{coarse}; their seconds are "
        "not comparable."
    )


def _ran_with(record: dict[str, Any], key: str) -> str:
    value = record[key]
    if isinstance(value, bool):
        return "on" if value else "off"
    return str((record.get("machine") or {}).get("cpu", value)) if value == "cpu" else str(value)


def unequal_load(found: Findings) -> str:
    """The machine was not equally fast for all arms: their seconds do not compare."""
    why = {arm: one.why_seconds_differ for arm, one in found.against.items() if one.why_seconds_differ}
    if not why:
        return ""
    said = "; ".join(f"{arm}: {reason}" for arm, reason in list(why.items())[:MAX_NAMES])
    more = f"; and {len(why) - MAX_NAMES} more" if len(why) > MAX_NAMES else ""
    return f"Device seconds are not compared where the machine was not equally fast for both arms ({said}{more})."


def weights_from_elsewhere(found: Findings) -> str:
    """Arms start from weights whose training is not in their compute."""
    begun = {arm: found.params.pretrain_of(arm).checkpoint for arm in found.arms}
    named = "; ".join(f"{arm} from {folder}" for arm, folder in begun.items() if folder is not None)
    if not named:
        return ""
    return (
        f"These arms start from weights that were trained before: {named}. The compute of that training is not "
        "counted, and what is said about flips does not cover it."
    )


def unreachable_rates(found: Findings) -> str:
    """Mask rates that the patch grid does not have."""
    arms = []
    for arm in found.arms:
        asked, realised = found.params.arm(arm).mask_rate, found.params.mask_of(arm).realised_mask_rate
        if asked is not None and abs(asked - realised) > RATE_TOLERANCE:
            arms.append(f"{arm} masked {rate_text(realised)} instead of {rate_text(asked)}")
    return f"The patch grid does not allow every mask rate: {'; '.join(arms)}." if arms else ""


CAUTIONS = (
    shape_of_points,
    few_seeds,
    many_arms,
    untuned_baseline,
    edges_of_tuning,
    other_features,
    few_images,
    unequal_compute,
    unlike_runs,
    unequal_load,
    weights_from_elsewhere,
    unreachable_rates,
)
