"""The pretended device refuses what CUDA refuses, computes what a CPU does, and counts what a GPU would wait for."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.support import pretended_cuda as pretend
from tests.support.pretended_cuda import device

pytestmark = pytest.mark.skipif(not device.started(), reason="no pretended device in this process")
SMALL = torch.arange(12.0).view(3, 4)


def test_tensors_say_where_they_are() -> None:
    x = SMALL.to("cuda")
    assert x.device == torch.device("cuda:0")
    assert x.is_cuda
    assert x.tolist() == SMALL.tolist()
    assert torch.tensor([1.0], device="cuda").item() == 1
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


@pytest.mark.parametrize(
    "mix",
    [
        lambda x, y: x + y,
        lambda x, y: x @ y.T,
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.where(x > 1, x, y),
        lambda x, y: F.embedding(y.long() % 3, x),
        lambda x, y: x.index_select(0, y[0].long() % 3),
        lambda x, y: torch.linalg.solve(x[:, :3], y[:, :3]),
        lambda x, y: F.layer_norm(x, (4,), y[0]),
        lambda x, y: x.add_(y),
        lambda x, y: torch.einsum("ij,kj->ik", x, y),
    ],
)
def test_operands_on_two_devices_are_refused(mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
    with pytest.raises(RuntimeError, match=r"same device|multi-device"):
        mix(SMALL.to("cuda"), SMALL)


def test_what_cuda_takes_from_a_cpu() -> None:
    x = SMALL.to("cuda")
    assert (x + torch.tensor(1.0)).is_cuda
    x[0] = torch.tensor(7.0)
    assert x[torch.tensor([0, 2])].shape == (2, 4)
    x.masked_fill_(x > 8, torch.tensor(0.0))
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        SMALL[torch.tensor([0], device="cuda")]


def test_views_share_memory() -> None:
    x = SMALL.to("cuda")
    x.unfold(1, 2, 2)[:, 0].zero_()
    x.T[3] += 100
    expected = SMALL.clone()
    expected[:, :2], expected[:, 3] = 0, expected[:, 3] + 100
    assert torch.equal(x.cpu(), expected)


def test_gradients_are_the_cpus() -> None:
    torch.manual_seed(0)
    stock = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    moved, inputs = copy.deepcopy(stock).to("cuda"), torch.randn(2, 5, 8)
    stock(inputs).square().sum().backward()
    moved(inputs.to("cuda")).square().sum().backward()
    for a, b in zip(stock.parameters(), moved.parameters(), strict=True):
        assert b.grad is not None
        assert b.grad.is_cuda
        torch.testing.assert_close(a.grad, b.grad.cpu(), rtol=1e-4, atol=1e-5)


def test_autocast_is_cudas() -> None:
    layer = torch.nn.Linear(4, 4).to("cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        out = layer(SMALL.to("cuda"))
        assert out.dtype == torch.bfloat16
        assert out.softmax(-1).dtype == torch.float32


def test_optimizer_state_and_files() -> None:
    layer = torch.nn.Linear(4, 4).to("cuda")
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    layer(SMALL.to("cuda")).sum().backward()
    optimizer.step()
    assert optimizer.state[layer.weight]["exp_avg"].is_cuda
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    for where in (None, "cpu"):
        file.seek(0)
        loaded = torch.load(file, map_location=where, weights_only=True)["weight"]
        assert loaded.is_cuda == (where is None)
        assert torch.equal(loaded.cpu(), layer.weight.detach().cpu())


def test_memory_is_counted_and_ends() -> None:
    before = pretend.allocated()
    x = torch.empty(2**20, device="cuda")
    assert pretend.allocated() - before == x.nbytes
    pretend.limit(pretend.allocated() + 2**20)
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**20, device="cuda")
    pretend.limit(2**40)
    del x
    assert pretend.allocated() == before


def test_copies_and_waits_are_counted_where_they_are_made() -> None:
    with pretend.Transfers(package="tests") as count:
        x = SMALL.to("cuda")
        x.sum().item()
        x.nonzero()
        x[x > 3].cpu()
        x.to("cpu", torch.float64)
    found = count.report()["copies"]
    assert found["to device"]["times"] == 1
    assert found["to device"]["bytes"] == SMALL.nbytes
    assert found["to host"]["bytes"] == 8 * 4 + SMALL.nbytes  # float32 travels
    assert found["read"]["times"] == 1
    assert found["shaped by data"]["times"] == 2
    assert count.report()["launches"]["cuda"] > 0


PROCESSES = """
from tests.support import pretended_cuda as pretend
from tests.support.pretended_cuda import device
pretend.start()
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
dist.init_process_group("nccl")
torch.manual_seed(0)
rank = dist.get_rank()
plain = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1)).cuda()
import copy
sharded = copy.deepcopy(plain)
for layer in sharded:
    fully_shard(layer)
fully_shard(sharded)
plain = torch.nn.parallel.DistributedDataParallel(plain, device_ids=[0])
for model in (plain, sharded):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(2):
        model(torch.full((2, 4), rank + step + 1.0, device="cuda")).square().mean().backward()
        optimizer.step(); optimizer.zero_grad()
for a, b in zip(plain.module.parameters(), sharded.parameters()):
    torch.testing.assert_close(a, b.full_tensor())
"""


def test_two_processes_share_gradients(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(PROCESSES)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    subprocess.run([*command, str(tmp_path / "work.py")], check=True, env=env, timeout=300)
