"""The training script under FSDP or DeepSpeed on processors, which accelerate offers on GPUs only.

The launcher starts this in the place of ``training/finetune.py``. All it changes is what accelerate
believes of the machine; the sharding is the real one, over gloo.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

torch.set_num_threads(1)
PartialState(cpu=True)
if os.environ.get("ACCELERATE_USE_FSDP") == "true":
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

from training import finetune  # noqa: E402 - what it imports asks for the state

finetune.main(finetune.parse_args())
