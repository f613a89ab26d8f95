"""Every option of `eval` that decides its figures."""

from __future__ import annotations

from pydantic import Field

from headfuse.config.loading import Options
from headfuse.config.values import Count


class EvalConfig(Options):
    """What is measured, and on which text; names as on the command line."""

    data: str = "default"
    """The text, as `read_documents` takes it; its field `source` names a document's domain."""
    baseline: str | None = None
    """A second model, of the same tokenizer."""
    samples: int = 24
    """How many windows; fewer are taken, with a warning, where the text ends."""
    sequence_length: int = 512
    """Tokens in a window."""
    stride: int | None = None
    """Tokens from one window's begin to the next; by default the windows are independent."""
    tasks: tuple[str, ...] = ()
    """Task names of lm-evaluation-harness."""
    tasks_path: tuple[str, ...] = ()
    """Folders of local task files."""
    limit: Count | None = None
    """Questions of each task; None for all."""
    passkey: tuple[int, ...] = ()
    """Context lengths, in tokens, of the retrieval test."""
    passkey_trials: Count = 10
    """Prompts of each length."""
    memory: int | None = Field(default=None, ge=0)
    """Bytes, for what fits beside the weights."""
    speed: bool = False
    """Measure decoding against the baseline."""
    seed: int | None = None
    """Shuffle the documents; by default they are read in the order of the file."""

    @property
    def step(self) -> int:
        """Tokens from one window's begin to the next."""
        return self.sequence_length if self.stride is None else self.stride
