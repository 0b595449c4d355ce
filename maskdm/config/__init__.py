"""What is known of an experiment without torch: its params, the shapes and costs that follow, and its runs.

`schema` declares every knob, `reading` opens params.yaml, `geometry` counts visible patches, `flops` counts compute,
`runs` resolves one arm and seed.
"""

from maskdm.config.reading import MAX_BYTES, NOT_PLAIN_YAML, load_params
from maskdm.config.runs import Run, Spent, Training, resolve
from maskdm.config.schema import (
    PARAMS_FILE,
    ArmConfig,
    ComputeConfig,
    DatasetConfig,
    DiffusionConfig,
    EvaluationConfig,
    Extractor,
    FinetuneConfig,
    ModelConfig,
    Params,
    PretrainConfig,
    SamplingConfig,
    Section,
    StageConfig,
    TrainingConfig,
    TuningConfig,
    parse_params,
)

__all__ = [
    "MAX_BYTES",
    "NOT_PLAIN_YAML",
    "PARAMS_FILE",
    "ArmConfig",
    "ComputeConfig",
    "DatasetConfig",
    "DiffusionConfig",
    "EvaluationConfig",
    "Extractor",
    "FinetuneConfig",
    "ModelConfig",
    "Params",
    "PretrainConfig",
    "Run",
    "SamplingConfig",
    "Section",
    "Spent",
    "StageConfig",
    "Training",
    "TrainingConfig",
    "TuningConfig",
    "load_params",
    "parse_params",
    "resolve",
]
