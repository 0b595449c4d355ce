# Masked pretraining and unmasked finetuning of every arm and seed.
rule pretrain:
    input:
        "results/data",
        "results/chosen/{arm}.json",
    output:
        directory("results/pretrain/{arm}/seed-{seed}"),
        "results/records/pretrain-{arm}-seed-{seed}.json",
    log:
        "logs/pretrain-{arm}-seed-{seed}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES * PARAMS.training.devices
    resources:
        gpu=GPU * PARAMS.training.devices,
    params:
        depends_on=depends_on("pretrain"),
    shell:
        "maskdm pretrain --arm {wildcards.arm} --seed {wildcards.seed} --stage-version 6 > {log} 2>&1"


rule finetune:
    input:
        "results/data",
        "results/chosen/{arm}.json",
        "results/pretrain/{arm}/seed-{seed}",
    output:
        directory("results/finetune/{arm}/seed-{seed}"),
        "results/records/finetune-{arm}-seed-{seed}.json",
    log:
        "logs/finetune-{arm}-seed-{seed}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES * PARAMS.training.devices
    resources:
        gpu=GPU * PARAMS.training.devices,
    params:
        depends_on=depends_on("finetune"),
    shell:
        "maskdm finetune --arm {wildcards.arm} --seed {wildcards.seed} --stage-version 5 > {log} 2>&1"
