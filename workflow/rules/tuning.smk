# Trials of every arm, and for every arm the values of its best one.
rule tune:
    input:
        "results/data",
        "results/features",
    output:
        "results/tuning/{arm}/{trial}.json",
        "results/records/tune-{arm}-trial-{trial}.json",
    log:
        "logs/tune-{arm}-trial-{trial}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES * PARAMS.training.devices
    resources:
        gpu=GPU * PARAMS.training.devices,
    params:
        depends_on=depends_on("tune"),
    shell:
        "maskdm tune --arm {wildcards.arm} --trial {wildcards.trial} --stage-version 5 > {log} 2>&1"


rule choose:
    input:
        "results/data",
        expand("results/tuning/{arm}/{trial}.json", arm=ARMS, trial=TRIALS),
    output:
        expand("results/chosen/{arm}.json", arm=ARMS),
        "results/records/choose.json",
    log:
        "logs/choose.log",
    conda:
        "../envs/maskdm.yaml"
    threads: PARAMS.compute.threads
    params:
        depends_on=depends_on("choose"),
    shell:
        "maskdm choose --stage-version 2 > {log} 2>&1"
