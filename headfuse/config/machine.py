"""Options that say where and how a command computes, apart from those that decide its result."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import model_validator

from headfuse.choices import ComputeDtype, Dtype, Placement, names
from headfuse.config.loading import Options, one_of
from headfuse.errors import ConfigError


class Processor(Options):
    """The device, for commands whose output has no dtype of its own."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `mps`."""
    threads: int | None = None
    """CPU threads."""
    trust_remote_code: bool = False
    """Run code that comes with a model."""


class Machine(Processor):
    """Where a model is loaded, and in which dtype."""

    dtype: str | None = None
    """The dtype of the computation; by default float32 on a CPU, the stored one elsewhere."""

    @model_validator(mode="after")
    def _known_dtypes(self) -> Machine:
        for name, value in self:
            if name.endswith("dtype") and value is not None and value not in names(Dtype):
                raise ConfigError(f"{name} is {value!r}", fix=f"give one of {', '.join(names(Dtype))}")
        return self


class FusingMachine(Machine):
    """Where a model is fused."""

    dtype: str | None = None
    """The dtype of the written weights; by default the source's."""
    compute_dtype: Annotated[ComputeDtype, one_of(*names(ComputeDtype))] = "float32"
    """Dtype of matrix products in the layers; bfloat16 is several times as fast on a GPU, two to eight times as fast
    on a CPU that has it (AVX512-BF16, AMX), and slow on others. `headfuse doctor` measures it.
    """
    placement: Annotated[Placement, one_of(*names(Placement))] = "auto"
    """Which weights stay on the device between two uses; by default as many as its memory holds."""


class TrainingMachine(Machine):
    """Where a model and its teacher are trained, and what is recorded on the way."""

    dtype: str | None = None
    """The dtype of the written weights; by default each tensor's own in the model."""
    compute_dtype: Annotated[ComputeDtype, one_of(*names(ComputeDtype))] | None = None
    """Dtype of matrix products; by default bfloat16 on a GPU that has it, else float32."""
    teacher_device: str | None = None
    """Device of the teacher; by default that of the model."""
    teacher_dtype: str | None = None
    """Dtype in which the teacher computes; by default `compute_dtype`, if it is given, else float32 on a CPU and the
    stored one elsewhere.
    """
    teacher_cache: Path | None = None
    """Folder for the teacher's last hidden states; the teacher is then not in memory during training."""
    log_every: int = 1
    """Steps between two lines of train_log.jsonl."""
    trackers: tuple[str, ...] = ()
    """`tensorboard`, `wandb`."""
    tracker_folder: Path = Path("runs")
    """Folder in which trackers write, each run in a subfolder named after the output."""

    @model_validator(mode="after")
    def _some_log(self) -> TrainingMachine:
        if self.log_every < 1:
            raise ConfigError(f"log_every is {self.log_every}", fix="give 1 or more")
        return self


MachineT = TypeVar("MachineT", bound=Processor)
