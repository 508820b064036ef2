"""Without a GPU, kernels.py runs in Triton's interpreter, for which Triton must be imported with
TRITON_INTERPRET set. fp4.py is imported before that, so that FP4Linear stays on its plain path in
all other tests."""

import importlib
import importlib.util
import os

import pytest
import torch

import fp4
from experiments import recipes

torch.set_num_threads(1)  # of each of pytest's processes, and of what they start
os.environ["OMP_NUM_THREADS"] = "1"
if importlib.util.find_spec("triton") and not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    for module in ("kernels", "triton.experimental.gluon"):  # the first launch imports the second
        importlib.import_module(module)
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture
def exact(monkeypatch):
    """Every rounding is the identity, so that only the algebra is left."""

    class Exact:
        codes_col = block = None

        def __init__(self, x, *_, **__):
            self.x, self.rows, self.tensor_scale = x, len(x), x.new_ones(())

        def t(self):
            return Exact(self.x.t())

        def values(self):
            return self.x

        dequantize = values

        def tensors(self):
            return self.x, self.x, self.x

    for module in (fp4, recipes):
        monkeypatch.setattr(module, "NVFP4", Exact)
    monkeypatch.setattr(fp4, "quantize", lambda x, **_: Exact(x))
    monkeypatch.setattr(fp4, "_bf16", lambda x: x)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
