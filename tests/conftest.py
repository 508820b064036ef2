"""One thread a process, the same random numbers before every test, and the kernels in Triton's
interpreter where there is no GPU. For that TRITON_INTERPRET must be set when Triton is imported
first. In all other tests a CPU's tensors take the plain path."""

import importlib
import os
import signal

import pytest
import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    fp4 = importlib.import_module("fp4")
    if fp4.KERNELS:
        importlib.import_module("triton.experimental.gluon")  # else the first launch does, too late
        importlib.import_module("experiments.project")  # it has a kernel of its own
    fp4.KERNELS = None
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(autouse=True)
def unaffected_by_other_tests():
    """A seed; and the handlers of signals that train.main() replaces."""
    torch.manual_seed(0)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
