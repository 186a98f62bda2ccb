"""Tests. The environment is set here, before anything imports torch.

Parallel tests fork their workers from this process. An OpenMP thread pool does not survive a fork, so none may exist:
one thread for every operation, in the main thread and in those that libraries start to load weights.

Where there is no GPU, or the tests are not to use it, Triton's kernels run in its interpreter.
"""

import os

from mome_dist.launchers.gpus import visible_gpus

os.environ.update(
    OMP_NUM_THREADS="1",
    OMP_WAIT_POLICY="PASSIVE",
    HF_DEACTIVATE_ASYNC_LOAD="1",
    HF_HUB_OFFLINE="1",
    GLOO_SOCKET_IFNAME="lo",
)
if os.environ.get("MOME_DIST_TEST_DEVICE") == "cpu" or not visible_gpus(os.environ):
    os.environ["TRITON_INTERPRET"] = "1"
