"""The model that lm-evaluation-harness asks; only imported where the harness is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM


class CountingModel(HFLM):
    """A loaded model; `cut` counts the requests that are longer than `max_length` and lose their beginning."""

    cut = 0

    def _loglikelihood_tokens(self, requests: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
        self.cut += sum(len(context) + len(rest) > self.max_length + 1 for _, context, rest in requests)
        return super()._loglikelihood_tokens(requests, *args, **kwargs)

    def tok_batch_encode(
        self, strings: Sequence[str], *args: Any, left_truncate_len: int | None = None, **kwargs: Any
    ) -> Any:
        """Token ids of prompts that the model continues; the harness keeps their last `left_truncate_len`."""
        if left_truncate_len:
            self.cut += sum(len(self.tok_encode(text)) > left_truncate_len for text in strings)
        return super().tok_batch_encode(strings, *args, left_truncate_len=left_truncate_len, **kwargs)
