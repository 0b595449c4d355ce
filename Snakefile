# The pipeline for Snakemake: the stages of dvc.yaml, arms in parallel.
#   snakemake --cores N                          the experiment of ./params.yaml
#   snakemake -d experiments/<name> --cores N    another one
#   snakemake --report report.html               the results as Snakemake's report page
# Every stage checks by itself whether its output is up to date, and then exits at once (maskdm/config/jobs.py). Snakemake
# does not see results/, only an empty marker file per output; when this file is read, markers of missing and outdated
# outputs are removed.
from snakemake.exceptions import WorkflowError
from snakemake.utils import min_version

from maskdm.config import parse_params
from maskdm.config.jobs import STAGE_VERSIONS, Jobs
from maskdm.base.errors import ParamsError
from maskdm.stages.markers import set_markers, stages_use_a_gpu

min_version("9.0")


configfile: "params.yaml"


report: "workflow/report/workflow.rst"


try:
    PARAMS = parse_params(config)
except ParamsError as error:
    raise WorkflowError(str(error))
JOBS = Jobs(PARAMS)
if workflow.is_main_process:
    set_markers(JOBS)

ARMS, SEEDS, TRIALS = list(PARAMS.arms), PARAMS.seeds, list(PARAMS.tuning.trials)
THREADS, DEVICES = PARAMS.compute.threads, PARAMS.compute.devices
# `--resources gpu=N` (1 by default, see profiles/) limits how many GPUs running stages use together.
GPU = int(stages_use_a_gpu(PARAMS.compute.device))
ENVIRONMENT = "workflow/envs/maskdm.yaml"


def done(name, **values):
    """The markers of a stage for all combinations of the values."""
    return expand(f".work/done/{name}", **values)


ARM = "{arm}-seed-{seed}"
EVERY_ARM = {"arm": ARMS, "seed": SEEDS}
# What each stage waits for.
OF_THE_EXPERIMENT = {
    "prepare": [],
    "features": done("prepare"),
    "scale": done("features"),
    "choose": done("prepare")
    + done("tune-{arm}-trial-{trial}", arm=ARMS, trial=TRIALS),
}
OF_AN_ARM = {
    "pretrain": done("choose"),
    "finetune": [f".work/done/pretrain-{ARM}"],
    "sample": [f".work/done/finetune-{ARM}"],
    "evaluate": [f".work/done/sample-{ARM}", *done("scale")],
}


# Short stages do not open MLflow. The report publishes everything; where it did not run, this does.
TRACK = "maskdm track || true" if PARAMS.tracking.enabled else "true"


onsuccess:
    if Jobs(PARAMS).find("report").why_outdated():
        shell(TRACK)


onerror:
    shell(TRACK)


wildcard_constraints:
    arm="[a-z0-9-]+",
    trial="[a-z0-9-]+",
    seed=r"\d+",


rule all:
    input:
        [f".work/done/{job.name}" for job in JOBS.all()],


for stage, needed in OF_THE_EXPERIMENT.items():

    rule:
        name:
            stage
        input:
            needed,
        output:
            touch(f".work/done/{stage}"),
        log:
            f"logs/{stage}.log",
        conda:
            ENVIRONMENT
        threads: THREADS
        resources:
            gpu=GPU if stage in ("features", "scale") else 0,
        params:
            stage=stage,
            version=STAGE_VERSIONS[stage],
        shell:
            "maskdm {params.stage} --stage-version {params.version} > {log} 2>&1"


rule tune:
    input:
        done("features"),
    output:
        touch(".work/done/tune-{arm}-trial-{trial}"),
    log:
        "logs/tune-{arm}-trial-{trial}.log",
    conda:
        ENVIRONMENT
    threads: THREADS * DEVICES
    resources:
        gpu=GPU * DEVICES,
    params:
        version=STAGE_VERSIONS["tune"],
    shell:
        "maskdm tune --arm {wildcards.arm} --trial {wildcards.trial} --stage-version {params.version} > {log} 2>&1"


for stage, needed in OF_AN_ARM.items():
    devices = 1 if stage == "evaluate" else DEVICES

    rule:
        name:
            stage
        input:
            needed,
        output:
            touch(f".work/done/{stage}-{ARM}"),
        log:
            f"logs/{stage}-{ARM}.log",
        conda:
            ENVIRONMENT
        threads: THREADS * devices
        resources:
            gpu=GPU * devices,
        params:
            stage=stage,
            version=STAGE_VERSIONS[stage],
        shell:
            "maskdm {params.stage} --arm {wildcards.arm} --seed {wildcards.seed} --stage-version {params.version} > {log} 2>&1"


rule report:
    input:
        done("scale"),
        done(f"evaluate-{ARM}", **EVERY_ARM),
    output:
        touch(".work/done/report"),
        page=report(  # a copy for `snakemake --report`: Snakemake deletes outputs that it knows before their job
            directory(".work/report"),
            patterns=["{name}.html", "{name}.csv", "{name}.png"],
            caption="workflow/report/results.rst",
            category="Does masked pretraining pay?",
            labels={"what": "{name}"},
        ),
    log:
        "logs/report.log",
    conda:
        ENVIRONMENT
    threads: THREADS
    params:
        version=STAGE_VERSIONS["report"],
    shell:
        "maskdm report --stage-version {params.version} > {log} 2>&1 && cp -r results/report {output.page}"
