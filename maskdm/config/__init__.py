"""What is known of an experiment without torch: its params, the shapes and costs that follow from them, and its runs.

`schema` declares every knob, `reading` reads params.yaml, `geometry` counts visible patches, `flops` counts compute,
`runs` resolves one arm and seed.
"""

from maskdm.config.reading import load_params as load_params
from maskdm.config.reading import parse_params as parse_params
from maskdm.config.runs import Run as Run
from maskdm.config.runs import Training as Training
from maskdm.config.runs import resolve as resolve
from maskdm.config.schema import PARAMS_FILE as PARAMS_FILE
from maskdm.config.schema import ArmConfig as ArmConfig
from maskdm.config.schema import ComputeConfig as ComputeConfig
from maskdm.config.schema import DatasetConfig as DatasetConfig
from maskdm.config.schema import DiffusionConfig as DiffusionConfig
from maskdm.config.schema import EvaluationConfig as EvaluationConfig
from maskdm.config.schema import Extractor as Extractor
from maskdm.config.schema import ModelConfig as ModelConfig
from maskdm.config.schema import Params as Params
from maskdm.config.schema import SamplingConfig as SamplingConfig
from maskdm.config.schema import Section as Section
from maskdm.config.schema import StageConfig as StageConfig
from maskdm.config.schema import TrainingConfig as TrainingConfig
