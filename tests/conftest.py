"""Without a GPU, kernels.py runs in Triton's interpreter, for which Triton must be imported with
TRITON_INTERPRET set. fp4.py is imported before that, so that FP4Linear stays on its plain path in
all other tests."""

import importlib
import importlib.util
import os

import torch

import fp4  # noqa: F401

if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for module in ("kernels", "triton.experimental.gluon"):  # the first launch imports the second
        importlib.import_module(module)
    del os.environ["TRITON_INTERPRET"]
