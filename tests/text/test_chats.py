"""Chats, rendered by the model's template."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headfuse.errors import DataError
from headfuse.text.documents import read_documents
from headfuse.text.records import Document
from tests.text.corpus import CHAT, TEMPLATE, record

SHARE = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "The cat."}]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHARE}, {"conversations": CHAT}])
def test_chats_are_rendered_by_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**row, "source": "chat"}) + "\n" + record("plain"))
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    documents = list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=chatting))
    assert documents == ["<s>[user]Who?[assistant]The cat.", "plain"]
    assert isinstance(documents[0], Document)
    assert documents[0].source == "chat"
    with pytest.raises(DataError, match="line 1: is a chat, and the tokenizer has no chat template"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer))
    chatting.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match=r"the chat template refuses it .*roles must alternate"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=chatting))


@pytest.mark.parametrize("messages", ["text", [], ["text"], [{"content": "no role"}], [{"from": "human"}]])
def test_chats_of_another_form(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, messages: Any) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    with pytest.raises(DataError, match="line 1: 'messages'"):
        list(read_documents(str(tmp_path / "a.jsonl"), tokenizer=tokenizer))
