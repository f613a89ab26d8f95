"""Training in several processes."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from headfuse.checkpoint.checksums import file_sha256
from headfuse.errors import ConfigError
from headfuse.training.accelerator import make_accelerator
from tests.support.tiny_models import tiny_model
from tests.training.runs import losses, records, train, without_dropout


def launch(script: list[str], processes: int, code: int = 0) -> None:
    """Run Python in processes that find each other, as `accelerate launch` and torchrun start them."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    common = {
        **os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, *script], env={**common, "RANK": str(i), "LOCAL_RANK": str(i)}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    outputs = [rank.communicate()[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [code] * processes, "\n".join(outputs)
    assert not any("wrote" in output for output in outputs[1:])


@pytest.mark.long
def test_two_processes_equal_one_at_the_same_global_batch(source: Path, fused: Path, data: str, tmp_path: Path) -> None:
    without_dropout(source, fused)
    options: dict[str, Any] = {"teacher": str(source), "dtype": "float32"}
    one = train(fused, data, output=tmp_path / "one", batch_size=4, **options)
    line = [
        "-m", "headfuse", "uptrain", str(fused), "--teacher", str(source), "--data", data, "--tokens", "384",
        "--batch-size", "1", "--gradient-accumulation", "2", "--sequence-length", "16", "--checkpoint-every", "5",
        "--learning-rate", "1e-2", "--dtype", "float32", "--device", "cpu", "--threads", "1",
        "-o", str(tmp_path / "two"),
    ]  # fmt: skip
    launch(line, 2)
    two = records(tmp_path / "two")
    assert two[0]["processes"] == 2
    for a, b in zip(losses(one.output), losses(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    assert two[0]["nll_before"] == pytest.approx(one.nll_before, abs=1e-5)
    assert two[-1]["nll_after"] == pytest.approx(one.nll_after, abs=1e-4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(a[name], b[name], atol=1e-3) for name in a)


ENDS = """
import sys
from pathlib import Path
from headfuse.errors import DataError
from headfuse.training import batches
from headfuse.training.uptrain import uptrain
model, teacher, data, output = sys.argv[1:]
class Read:
    def __enter__(self):
        return self
    def __exit__(self, *_):
        pass
    def __next__(self):
        raise DataError("line 7 is no JSON", where="text.jsonl", fix="mend it")
batches.read_ahead = lambda batches: Read()
try:
    uptrain(model, teacher=teacher, data=data, tokens=384, batch_size=1, sequence_length=16, device="cpu", threads=1,
            output=Path(output))
except DataError as error:
    assert (error.what, error.where, error.fix) == ("line 7 is no JSON", "text.jsonl", "mend it")
    sys.exit(7)
"""


@pytest.mark.long
def test_what_the_reader_of_the_text_finds_wrong_ends_every_process(
    source: Path, fused: Path, data: str, tmp_path: Path
) -> None:
    launch(["-c", ENDS, str(fused), str(source), data, str(tmp_path / "out")], 2, code=7)


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_a_run_goes_on_in_another_number_of_processes(
    source: Path, fused: Path, data: str, tmp_path: Path, before: int, after: int
) -> None:
    """With the batches of the run before; without --batch-size they are divided anew."""
    without_dropout(source, fused)
    whole = train(fused, data, teacher=str(source), output=tmp_path / "whole", batch_size=2)
    script = ["-c", TOGETHER, str(fused), str(source), data, str(tmp_path / "out")]
    launch([*script, "7", str(2 // before)], before, code=-signal.SIGKILL)
    launch([*script, "-1"], after)
    for a, b in zip(losses(whole.output), losses(tmp_path / "out"), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.allclose(a[name].float(), b[name].float(), atol=1e-3) for name in a)


SHARDED = """
import copy, sys
import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from types import SimpleNamespace
from torch.distributed.fsdp import FSDPModule
from headfuse.models.states import decoder_layers, model_states
from headfuse.training.accelerator import shard_layers
from headfuse.training.teacher import LiveTeacher
from headfuse.training.objective import LossWeights, Objective
from headfuse.models.loading import load_model
dist.init_process_group("gloo")
plugin = dict(fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False)
accelerator = SimpleNamespace(
    state=SimpleNamespace(fsdp_plugin=FullyShardedDataParallelPlugin(**plugin)), torch_device_mesh=None,
    mixed_precision="no", is_main_process=True, device=torch.device("cpu"),
)
student, teacher = (load_model(folder, device="cpu") for folder in sys.argv[1:])
torch.manual_seed(0)
batch = torch.randint(0, 42, (2, 16))
own = batch[dist.get_rank()][None]
for mode, weights in (("loss", LossWeights(1, 0.5, 0.3)), ("layerwise", LossWeights())):
    whole, part = copy.deepcopy(student), copy.deepcopy(student)
    head = teacher.get_output_embeddings()
    Objective(whole, head, weights)(batch, model_states(teacher, batch, layers=True), None, mode).backward()
    objective = fsdp2_prepare_model(accelerator, Objective(part, head, weights))
    assert all(isinstance(layer, FSDPModule) for layer in decoder_layers(part))
    assert part.get_output_embeddings().weight is part.get_input_embeddings().weight
    objective(own, model_states(teacher, own, layers=True), None, mode).backward()
    for a, b in zip(part.parameters(), whole.parameters(), strict=True):
        if b.grad is not None:
            assert torch.allclose(a.grad.full_tensor(), b.grad, atol=1e-6)

wanted = LiveTeacher(copy.deepcopy(teacher), torch.device("cpu"), None, True).states(batch, 0)
shard_layers(teacher, accelerator)
with torch.no_grad():
    found = LiveTeacher(teacher, torch.device("cpu"), None, True).states(batch, 0)
assert all(torch.equal(a, b) for a, b in zip((found.last, *found.outputs), (wanted.last, *wanted.outputs), strict=True))
for parameter in decoder_layers(teacher).parameters():  # freed after the forward pass
    assert 2 * parameter.to_local().numel() == parameter.numel()
"""


@pytest.mark.slow
def test_sharded_gradients_are_those_of_one_process(source: Path, fused: Path) -> None:
    """FSDP2 on two processes; accelerate itself shards on accelerators alone."""
    without_dropout(source, fused)
    launch(["-c", SHARDED, str(fused), str(source)], 2)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("phi3", {}, "fused_learning_rate: a sharded qkv_proj can have only one learning rate"),
        ("llama", {"train": "lora"}, "train: lora: adapters cannot be merged into sharded weights"),
    ],
)
def test_what_sharded_weights_do_not_allow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, options: dict[str, Any], message: str
) -> None:
    def sharding(*args: Any, **kwargs: Any) -> Any:
        accelerator = make_accelerator(*args, **kwargs)
        monkeypatch.setitem(accelerator.state.__dict__, "distributed_type", DistributedType.FSDP)
        return accelerator

    monkeypatch.setattr(sys.modules["headfuse.training.uptrain"], "make_accelerator", sharding)
    model = tiny_model(tmp_path / "model", model_type)
    with pytest.raises(ConfigError) as caught:
        train(model, str(tmp_path / "text.txt"), loss="ce", **options)
    assert message in str(caught.value)
    assert not (tmp_path / "model-uptrained.partial").exists()


TOGETHER = """
import os, signal, sys
from pathlib import Path
from headfuse.training.uptrain import uptrain
model, teacher, data, output, last, *batch = sys.argv[1:]
def kill(progress):
    if progress.step == int(last):
        os.kill(os.getpid(), signal.SIGKILL)
uptrain(model, teacher=teacher, data=data, tokens=384, batch_size=int(*batch) or None, sequence_length=16,
        checkpoint_every=5, learning_rate=1e-2, device="cpu", threads=1, output=Path(output), resume=True,
        on_progress=kill)
"""


@pytest.mark.slow
def test_killed_processes_go_on_together(source: Path, fused: Path, data: str, tmp_path: Path) -> None:
    """With dropout, of which each process draws its own."""
    script = ["-c", TOGETHER, str(fused), str(source), data]
    launch([*script, str(tmp_path / "whole"), "-1", "1"], 2)
    launch([*script, str(tmp_path / "out"), "7", "1"], 2, code=-signal.SIGKILL)
    assert json.loads((tmp_path / "out.partial" / "resume.json").read_text())["step"] == 5
    launch([*script, str(tmp_path / "out"), "-1", "1"], 2)
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")
    sums = [file_sha256(tmp_path / name / "model.safetensors") for name in ("out", "whole")]
    assert sums[0] == sums[1]
