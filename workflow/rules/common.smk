# What the rules share: the validated parameters, and which of them each stage depends on.
import yaml
from snakemake.exceptions import WorkflowError

from maskdm import engines
from maskdm.config import parse_params
from maskdm.errors import ParamsError

try:
    PARAMS = parse_params(config)
except ParamsError as error:
    raise WorkflowError(str(error))

# What a stage that computes takes: with `--resources gpu=N` (1 by default, see profiles/) no more of them run at a time
# than there are GPUs.
CORES = PARAMS.compute.threads
GPU = int(engines.stages_use_a_gpu(PARAMS.compute.device))

ARMS = list(PARAMS.arms)
SEEDS = list(PARAMS.seeds)
TRIALS = list(PARAMS.tuning.trials)

# dvc.yaml names the parameters that make a stage stale; a change of their values reruns it here as well.
with open(workflow.source_path("../../dvc.yaml")) as _file:
    STAGES = yaml.safe_load(_file)["stages"]


# What DVC has made is told to Snakemake before it plans anything; not by the jobs that it starts on other machines.
DEPLOYMENT = [str(method) for method in workflow.deployment_settings.deployment_method]
ENGINE = [workflow.main_snakefile, ["--sdm", *DEPLOYMENT] if DEPLOYMENT else []]
if workflow.is_main_process:
    engines.before_snakemake(*ENGINE)
ANSWERS = engines.given_answers()


def depends_on(stage):
    """The values of the parameters that the stage depends on, as an input to its `params:`."""

    def values(wildcards):
        if ANSWERS is not None:
            return ANSWERS.get(engines.stage_name(stage, wildcards), engines.NOT_KNOWN)
        names = [
            name.replace("${item.arm}", wildcards.get("arm", "")).replace(
                "${item.trial}", wildcards.get("trial", "")
            )
            for name in STAGES[stage]["params"]
        ]
        return engines.plain({name: _value(name) for name in names})

    return values


def _value(name):
    value = config
    for key in name.split("."):
        value = value.get(key) if value is not None else None
    return value


wildcard_constraints:
    arm="[a-z0-9-]+",
    trial="[a-z0-9-]+",
    seed=r"\d+",
    part=r"\d+",
