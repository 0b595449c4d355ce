# Samples of every arm and seed, their scores, and the report over all of them.
rule sample:
    input:
        "results/data",
        "results/pretrain/{arm}/seed-{seed}",  # for sampling.primer
        "results/finetune/{arm}/seed-{seed}",
    output:
        directory("results/samples/{arm}/seed-{seed}"),
        "results/records/sample-{arm}-seed-{seed}.json",
    log:
        "logs/sample-{arm}-seed-{seed}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES * PARAMS.training.devices
    resources:
        gpu=GPU * PARAMS.training.devices,
    params:
        depends_on=depends_on("sample"),
    shell:
        "maskdm sample --arm {wildcards.arm} --seed {wildcards.seed} --stage-version 5 > {log} 2>&1"


rule evaluate:
    input:
        "results/data",
        "results/features",
        "results/metrics/scale.json",
        "results/finetune/{arm}/seed-{seed}",
        "results/samples/{arm}/seed-{seed}",
    output:
        "results/metrics/{arm}-seed-{seed}.json",
        "results/records/evaluate-{arm}-seed-{seed}.json",
    log:
        "logs/evaluate-{arm}-seed-{seed}.log",
    conda:
        "../envs/maskdm.yaml"
    threads: CORES
    resources:
        gpu=GPU,
    params:
        depends_on=depends_on("evaluate"),
    shell:
        "maskdm evaluate --arm {wildcards.arm} --seed {wildcards.seed} --stage-version 4 > {log} 2>&1"


rule report:
    input:
        "results/data",
        "results/features",
        expand("results/tuning/{arm}/{trial}.json", arm=ARMS, trial=TRIALS),
        expand("results/chosen/{arm}.json", arm=ARMS),
        "results/metrics/scale.json",
        expand(
            "results/records/{stage}.json",
            stage=["prepare", "features", "scale", "choose"],
        ),
        expand("results/records/tune-{arm}-trial-{trial}.json", arm=ARMS, trial=TRIALS),
        expand("results/pretrain/{arm}/seed-{seed}", arm=ARMS, seed=SEEDS),
        expand("results/finetune/{arm}/seed-{seed}", arm=ARMS, seed=SEEDS),
        expand("results/samples/{arm}/seed-{seed}", arm=ARMS, seed=SEEDS),
        expand("results/metrics/{arm}-seed-{seed}.json", arm=ARMS, seed=SEEDS),
        expand(
            "results/records/{stage}-{arm}-seed-{seed}.json",
            stage=["pretrain", "finetune", "sample", "evaluate"],
            arm=ARMS,
            seed=SEEDS,
        ),
    output:
        report(
            directory("results/report"),
            patterns=["{name}.html", "{name}.csv", "{name}.png"],
            caption="../report/results.rst",
            category="Does masked pretraining pay?",
            labels={"what": "{name}"},
        ),
    log:
        "logs/report.log",
    conda:
        "../envs/maskdm.yaml"
    threads: PARAMS.compute.threads
    params:
        depends_on=depends_on("report"),
    shell:
        "maskdm report --stage-version 5 > {log} 2>&1"
