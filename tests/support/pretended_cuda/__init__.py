"""A pretended CUDA device on a machine without one, and a count of what a real one would wait for.

    python -m pytest -p tests.support.pretended_cuda.plugin tests/devices
    python -m tests.support.pretended_cuda [--report FILE] [--no-float64] -- headfuse fuse --device cuda ...
    torchrun --nproc_per_node 2 -m tests.support.pretended_cuda --no-count -- headfuse uptrain --device cuda ...

`start()` makes `cuda:0` a device of a process with a CPU-only PyTorch: real tensors of the CUDA dispatch key whose
memory is the host's (device.cpp, compiled once). Autograd, autocast, AdamW, files, DDP and FSDP2 (over gloo) are
PyTorch's own. `Transfers` counts copies between host and device, waits, and the work that each does. It knows nothing
of the pretence, and counts a real device just as well.

What it cannot show: speed, kernels that only CUDA has, their numerics, races between streams, several devices in a
process, CUDA graphs, inductor.
"""

from tests.support.pretended_cuda.build import UnavailableError
from tests.support.pretended_cuda.device import allocated, limit, peak, reset_peak, start, started
from tests.support.pretended_cuda.transfers import Transfers

__all__ = ["Transfers", "UnavailableError", "allocated", "limit", "peak", "reset_peak", "start", "started"]
