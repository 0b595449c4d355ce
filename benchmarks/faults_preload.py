"""What the processes that `faults.Stages` forks have imported already: a stage then starts in no time."""

import torch._dynamo  # noqa: F401  (an optimizer imports it)

from maskdm.torchvision_compat import declare_missing_operators

declare_missing_operators()

import torch_fidelity.metric_prc  # noqa: E402, F401

import maskdm.stages.evaluate  # noqa: E402
import maskdm.stages.features  # noqa: E402
import maskdm.stages.report  # noqa: E402
import maskdm.stages.scale  # noqa: E402
import maskdm.stages.trial  # noqa: E402, F401
