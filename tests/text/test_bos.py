"""Windows begin with BOS where the tokenizer's texts do."""

import json
from itertools import islice
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, processors
from transformers import PreTrainedTokenizerFast

from headfuse.evaluation.passkey import passkey_prompts
from headfuse.evaluation.perplexity import evaluation_text, nll_protocol
from headfuse.text.bos import start_token
from headfuse.text.calibration import CalibrationText
from headfuse.text.documents import read_documents
from headfuse.text.stream import TrainingText
from headfuse.text.windows import iter_windows, token_windows, varied_windows
from tests.text.corpus import CHAT, SENTENCES, TEMPLATE, packed, write_jsonl


@pytest.fixture(scope="module")
def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The same tokenizer, but it puts BOS before every text, as those of llama and gemma do."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=TEMPLATE)


def test_windows_begin_with_bos_where_the_tokenizer_does(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, beginning: PreTrainedTokenizerFast
) -> None:
    assert start_token(tokenizer) is None
    assert start_token(beginning) == 0
    plain, windows = token_windows(SENTENCES, tokenizer, 15), token_windows(SENTENCES, beginning, 16)
    assert (windows[:, 0] == 0).all()
    assert torch.equal(windows[:, 1:], plain)
    assert torch.equal(torch.stack(list(iter_windows(SENTENCES, beginning, 16))), windows)
    varied = varied_windows(SENTENCES, beginning, 16, 9, seed=0)
    assert torch.equal(varied[:, 1:], varied_windows(SENTENCES, tokenizer, 15, 9, seed=0))
    assert (varied[:, 0] == 0).all()
    assert not (varied[:, 1:] == 0).any()


def test_training_windows_begin_with_bos(tmp_path: Path, beginning: PreTrainedTokenizerFast) -> None:
    data = write_jsonl(tmp_path / "a.jsonl", [f"{i} " + SENTENCES[i % 40] for i in range(60)])
    training = TrainingText(data, beginning, 16, seed=0)
    first, second = islice(training.batches(3), 2)
    for windows in (training.validation, first.windows, second.windows):
        assert windows.shape[1] == 16
        assert (windows[:, 0] == 0).all()
        assert not (windows[:, 1:] == 0).any()
    assert torch.equal(next(training.batches(3, first.state)).windows, second.windows)


@pytest.mark.parametrize("stride", [16, 15, 4])
def test_evaluation_predicts_every_token_once_after_bos(
    tokenizer: PreTrainedTokenizerFast, beginning: PreTrainedTokenizerFast, stride: int
) -> None:
    found = evaluation_text(SENTENCES, beginning, 16, 5, stride)
    assert (found.windows[:, 0] == 0).all()
    assert found.windows.shape == (5, 16)
    assert found.domains.shape == found.scored.shape == (5, 15)
    predicted = found.windows[:, 1:][found.scored].tolist()
    assert predicted == packed(SENTENCES, tokenizer)[: len(predicted)]
    assert len(predicted) == 15 + 4 * min(stride, 15)
    assert "each begins with BOS" in nll_protocol(found, stride)


def test_start_windows_begin_with_bos(beginning: PreTrainedTokenizerFast) -> None:
    windows = token_windows(SENTENCES, beginning, 64, 4)
    for calibration in (CalibrationText.split(windows, 1, 0), CalibrationText.split(windows, 1, 0).part(0.7)):
        assert (calibration.starts[:, 0] == 0).all()
        assert not (calibration.starts[:, 1:] == 0).any()
        assert calibration.starts.shape[1] == 4


def test_chats_and_passkeys_have_one_bos(tmp_path: Path, beginning: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}) + "\n")
    (document,) = read_documents(str(tmp_path / "a.jsonl"), tokenizer=beginning)
    assert document == "[user]Who?[assistant]The cat."
    ((prompt, _),) = passkey_prompts(beginning, 400, 1)
    assert len(prompt) == 400
    assert prompt[0] == 0
    assert 0 not in prompt[1:]
