"""Documents from what the `datasets` library reads: Parquet files, saved datasets, and datasets of the hub."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headfuse.errors import DataError
from headfuse.text.records import reason_of, text_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_HUB_TIMEOUT = 10
"""Seconds."""


def read_parquet(path: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """The documents of a Parquet file; raises DataError, while reading, for one that is damaged."""
    try:
        rows = _load_dataset("parquet", data_files=glob.escape(str(path)), split="train")
        for number, row in enumerate(rows, 1):
            yield text_of(row, f"{path}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(
            f"is not a readable parquet file ({reason_of(error)})", where=path, fix="write the file again"
        ) from None


def read_saved(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Iterator[str]:
    """A folder that `save_to_disk` wrote; of a DatasetDict the split `train`, or the only one."""
    import datasets

    try:
        saved = datasets.load_from_disk(str(folder))
        if isinstance(saved, datasets.DatasetDict):
            split = "train" if "train" in saved else min(saved) if len(saved) == 1 else None
            if split is None:
                fix = f"give the folder of one of them: {', '.join(sorted(saved))}"
                raise DataError("holds several splits, none of them train", where=folder, fix=fix)
            saved = saved[split]
        for number, row in enumerate(saved, 1):
            yield text_of(row, f"{folder}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # pyarrow and datasets raise many kinds
        raise DataError(
            f"is not a readable folder of save_to_disk ({reason_of(error)})", where=folder, fix="write it again"
        ) from None


def read_hub(
    data: str, name: str, config: str | None, split: str, tokenizer: PreTrainedTokenizerBase | None
) -> Iterator[str]:
    """The documents of a hub dataset; `data` is the name that the user gave.

    Raises:
        DataError: while reading, for a dataset that the hub does not give or that has no text.
    """
    try:
        _ask_hub(name)
        rows = _load_dataset(name, config, split=split)
        for number, row in enumerate(rows, 1):
            yield text_of(row, f"{data}, row {number}", tokenizer)
    except DataError:
        raise
    except Exception as error:  # the hub, the network, and datasets raise many kinds
        raise DataError(
            f"neither a local file nor a dataset that the hub gives ({reason_of(error)})",
            where=data,
            fix="check the path, or the id as org/name/config:split; HF_HUB_OFFLINE=1 forbids downloads",
        ) from None


def _ask_hub(name: str) -> None:
    """Raise what the hub says of a dataset that it does not give: `datasets` tries again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    with suppress(OfflineModeIsEnabled):  # `datasets` looks into its cache, and does not wait
        HfApi().dataset_info(name, timeout=_HUB_TIMEOUT)


def _load_dataset(*args: Any, **kwargs: Any) -> Iterable[Any]:
    """The rows of a dataset, as they come."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs it raises, too: one message is enough
    rows: Iterable[Any] = datasets.load_dataset(*args, **kwargs, streaming=True)
    return rows
