"""Chats: messages in any of their usual spellings, through the tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from hf_shrink.errors import CalibrationError

_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's


class RefusedChat(CalibrationError):
    """The chat template does not take a chat; the message is the template's reason."""


def refused_note(refused: Sequence[str], name: str) -> list[str]:
    """One line about the chats of the data `name` that the chat template refuses, for these reasons; none for none."""
    why = "; ".join(list(dict.fromkeys(refused))[:3])
    return [f"the chat template refuses {len(refused)} chats of {name}, left out: {why}"] if refused else []


def is_chat(value: object) -> bool:
    """Whether a cell of a data set holds messages."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def chat_document(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> str | list[int]:
    """Token ids of a chat by the chat template; without one, the texts of its messages.

    Raises RefusedChat where the template does not take it: a role that it does not know, roles that do not alternate.
    """
    turns = [_turn(message) for message in messages]
    if tokenizer.chat_template is None:
        return "\n\n".join(text for turn in turns if (text := _joined(turn.get("content"))))
    if any(isinstance(turn.get("content"), list) for turn in turns) and not _reads_parts(tokenizer):
        turns = [{**turn, "content": _joined(turn["content"])} if "content" in turn else turn for turn in turns]
    try:
        ids: Any = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    except (TypeError, TemplateError) as error:
        raise RefusedChat(str(error)) from error
    return [int(token) for token in ids]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as templates read it, whether it came in the spelling of OpenAI or of ShareGPT."""
    turn: dict[str, Any] = _present(message)
    sender, value = turn.pop("from", None), turn.pop("value", "")
    turn["role"] = _ROLES.get(str(sender), turn.get("role", sender))
    if "content" not in turn and not turn.get("tool_calls"):  # templates tell a call of tools by its missing content
        turn["content"] = value
    return turn


def _present(value: Any) -> Any:
    """The value without keys that hold None: Arrow gives every message and part the keys of all others."""
    if isinstance(value, Mapping):
        return {key: _present(inner) for key, inner in value.items() if inner is not None}
    return [_present(inner) for inner in value] if isinstance(value, list) else value


def _joined(content: Any) -> str:
    """The text of a message that may come in parts."""
    parts = content if isinstance(content, list) else [content]
    texts = (part.get("text") if isinstance(part, Mapping) else part for part in parts)
    return "\n".join(str(text) for text in texts if text)


def _reads_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the chat template reads content in parts; one that reads strings prints the list itself, or fails."""
    content: Any = [{"type": "text", "text": "a"}]
    try:
        made = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    except (TypeError, TemplateError):
        return False
    return str(content) not in str(made)
