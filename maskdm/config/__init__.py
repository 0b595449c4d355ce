"""What is known of an experiment without torch: its params, the shapes and costs that follow, and its runs.

`schema` declares every knob, `reading` opens params.yaml, `geometry` counts visible patches, `flops` counts compute,
`runs` resolves one arm and seed.
"""

from maskdm.config.reading import MAX_BYTES, load_params, parse_params
from maskdm.config.runs import Run, Training, resolve
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
)

__all__ = [
    "MAX_BYTES",
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
    "StageConfig",
    "Training",
    "TrainingConfig",
    "load_params",
    "parse_params",
    "resolve",
]
