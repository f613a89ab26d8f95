"""The document in a record: its field `text`, or a chat as the model's template renders it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headfuse.errors import DataError
from headfuse.text.bos import start_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_FIELD = 'each record needs its text in a field "text", like {"text": "..."}, or a chat in "messages"'
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
"""Speaker names of the ShareGPT form -> role names of chat templates."""


class Document(str):
    """A text, and the record's field `source`, which names its domain; empty where there is none."""

    __slots__ = ("source",)
    source: str


class Continued(str):
    """A further piece of the document before it, so that no EOS stands between them."""

    __slots__ = ()


def text_of(record: Any, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The document of a record, with its source."""
    if not isinstance(record, dict):
        raise DataError("is not a JSON object", where=where, fix=_FIELD)
    chats = [field for field in ("messages", "conversations") if field in record]
    if "text" in record or not chats:
        text = _text_field(record, where)
    else:
        text = _rendered(record, chats[0], where, tokenizer)
    document = Document(text.encode("utf-8", "replace").decode("utf-8"))  # a lone surrogate becomes "?"
    document.source = record["source"] if isinstance(record.get("source"), str) else ""
    return document


def _text_field(record: dict[str, Any], where: str) -> str:
    if "text" not in record:
        found = ", ".join(sorted(record)) or "none"
        raise DataError(f'has no field "text"; its fields are: {found}', where=where, fix=_FIELD)
    if not isinstance(record["text"], str):
        raise DataError(
            f'the field "text" holds {type(record["text"]).__name__}, not a string', where=where, fix=_FIELD
        )
    return record["text"]


def _rendered(record: dict[str, Any], field: str, where: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """A chat rendered by the model's own template, without BOS, as windows add it where it belongs."""
    messages = [_message(message, field, where) for message in record[field]] if _is_list(record[field]) else []
    if not messages:
        raise DataError(f"{field!r} is not a list of messages", where=where, fix=_FIELD)
    if not getattr(tokenizer, "chat_template", None):
        fix = 'give a model whose tokenizer has one, or records with "text"'
        raise DataError("is a chat, and the tokenizer has no chat template to render it", where=where, fix=fix)
    assert tokenizer is not None
    tools = record.get("tools")
    try:
        rendered = tokenizer.apply_chat_template(messages, tools=tools if _is_list(tools) else None, tokenize=False)
    except Exception as error:  # what templates refuse, they raise in many kinds
        fix = "change the record, such as the order of its roles"
        raise DataError(f"the chat template refuses it ({reason_of(error)})", where=where, fix=fix) from None
    return str(rendered).removeprefix(tokenizer.bos_token if start_token(tokenizer) is not None else "")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _message(message: Any, field: str, where: str) -> dict[str, Any]:
    """A message of a chat as templates read it: `role` and `content`."""
    if isinstance(message, dict):
        if isinstance(message.get("role"), str):
            return {name: value for name, value in message.items() if value is not None or name == "content"}
        if isinstance(message.get("from"), str) and isinstance(message.get("value"), str):
            role = message["from"]
            return {"role": _ROLES.get(role, role), "content": message["value"]}
    fix = 'write messages as {"role": "user", "content": "..."}'
    raise DataError(f"{field!r} holds an entry that is not a message", where=where, fix=fix)


def reason_of(error: Exception) -> str:
    """The first line of an error of a library, or its class."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
