# The dataset as arrays, the real images' features, and the scale of the metrics.
# Shards are independent: with data.prepare_jobs: N, N jobs make them ahead, on any machines, and `prepare` gathers them.
PARTS = (
    expand(".work/prepare-parts/{part}", part=range(PARAMS.data.prepare_jobs))
    if PARAMS.data.prepare_jobs > 1
    else []
)


rule prepare_part:
    output:
        touch(".work/prepare-parts/{part}"),
    log:
        "logs/prepare-part-{part}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: PARAMS.compute.threads
    params:
        depends_on=depends_on("prepare"),
    shell:
        "maskdm prepare --part {wildcards.part} --stage-version 4 > {log} 2>&1"


rule prepare:
    input:
        PARTS,
    output:
        directory("results/data"),
        "results/records/prepare.json",
    log:
        "logs/prepare.log",
    conda:
        "../envs/maskdm.yaml"
    threads: PARAMS.compute.threads
    params:
        depends_on=depends_on("prepare"),
    shell:
        "maskdm prepare --stage-version 4 > {log} 2>&1"


rule features:
    input:
        "results/data",
    output:
        directory("results/features"),
        "results/records/features.json",
    log:
        "logs/features.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES
    resources:
        gpu=GPU,
    params:
        depends_on=depends_on("features"),
    shell:
        "maskdm features --stage-version 4 > {log} 2>&1"


rule scale:
    input:
        "results/data",
        "results/features",
    output:
        "results/metrics/scale.json",
        "results/records/scale.json",
    log:
        "logs/scale.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES
    resources:
        gpu=GPU,
    params:
        depends_on=depends_on("scale"),
    shell:
        "maskdm scale --stage-version 5 > {log} 2>&1"
