# The dataset as arrays, and the real images' features.
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
        "maskdm prepare --stage-version 1 > {log} 2>&1"


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
    threads: PARAMS.compute.threads
    params:
        depends_on=depends_on("features"),
    shell:
        "maskdm features --stage-version 1 > {log} 2>&1"
