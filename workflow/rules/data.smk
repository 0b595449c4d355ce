# The dataset as arrays, the real images' features, and the scale of the metrics.
rule prepare:
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
        "maskdm prepare --stage-version 2 > {log} 2>&1"


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
        "maskdm features --stage-version 3 > {log} 2>&1"


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
        "maskdm scale --stage-version 3 > {log} 2>&1"
