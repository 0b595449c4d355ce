# The pipeline for Snakemake: the stages of dvc.yaml, arms in parallel.
#   snakemake --cores N                          the experiment of ./params.yaml
#   snakemake -d experiments/<name> --cores N    another one
#   snakemake --report report.html               what came out, as one page of Snakemake's
from snakemake.utils import min_version

min_version("9.0")


configfile: "params.yaml"


report: "workflow/report/workflow.rst"


include: "workflow/rules/common.smk"
include: "workflow/rules/data.smk"
include: "workflow/rules/tuning.smk"
include: "workflow/rules/training.smk"
include: "workflow/rules/scoring.smk"


rule all:
    default_target: True
    input:
        "results/report",


onstart:
    engines.snakemake_starts()


onsuccess:
    engines.after_snakemake(*ENGINE)
