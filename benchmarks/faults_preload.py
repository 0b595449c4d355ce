"""What the processes that `faults.Stages` forks have imported already: a stage then starts in no time."""

import torch._dynamo  # noqa: F401  (an optimizer imports it)

import maskdm.stages.evaluate
import maskdm.stages.features
import maskdm.stages.report
import maskdm.stages.scale
import maskdm.stages.trial  # noqa: F401
