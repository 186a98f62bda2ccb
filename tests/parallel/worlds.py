"""Forked worlds for tests: what the workers need is imported here, once, before any of them starts."""

from __future__ import annotations

from mome_dist.parallel.forked import compute_on_cpu

compute_on_cpu()

import torch

torch.set_num_threads(1)

# DeepSpeed imports both when it makes an engine.
import deepspeed.module_inject.auto_ep_layer
import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import mome_dist.engine.engine
import mome_dist.model.build
import mome_dist.parallel.initialize
import mome_dist.training.step  # noqa: F401  imported once here, inherited by every fork
from mome_dist.parallel.forked import run_forked as run_world

__all__ = ["run_world"]
