"""Checks on a GPU. The same code runs on a CPU, at tiny sizes, so that it cannot rot where there is no GPU.

``MOME_DIST_TEST_DEVICE`` forces a device: ``cuda`` makes a GPU that is missing an error, ``cpu`` hides the GPUs.
Without it, a GPU is used where there is one.
"""

import os

from tools.gpu_suite import DEVICE

if os.environ.get(DEVICE) == "cpu":  # before anything asks CUDA
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
