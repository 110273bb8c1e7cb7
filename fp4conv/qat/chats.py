"""Chats as token ids, by the template of the tokenizer.

Owns what reaches a template, and the day that it writes: gpt-oss's and Llama's put today's date into every example, so
that a run of two days would train on other tokens than it began with. What a row is, and its loss, is `data`'s.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fp4conv.errors import UsageError

if TYPE_CHECKING:
    import transformers

TOOLS, TEMPLATE_OPTIONS = "tools", "chat_template_kwargs"  # columns beside messages, as trl calls them
_EVERY_TEMPLATE_HAS = frozenset({"user", "assistant", "tool"})
_SOME_HAVE_ONE = frozenset({"system", "developer"})
_DIRECTIVES = "aAbBcdeHIjmMpSUwWxXyY%"  # of strftime; what is of no day is that of its midnight


class Chats:
    """Renders the chats of one dataset. `day`: what templates take for today, as 2026-01-31; None: today.

    `passed_over`: a place and a role for each system message that the template has left out.
    """

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, day: str | None = None) -> None:
        self.passed_over: list[str] = []
        self._tokenizer = tokenizer
        self._today = "" if day is None else _today(day)

    def ids(
        self, messages: object, row: Mapping[str, object], where: str, *, generate: bool = False
    ) -> tuple[int, ...]:
        """Those of `messages`, with the tools and options in other columns of their `row`.

        `generate`: with the beginning of an answer. UsageError, with `where`, for what the template does not take.
        """
        checked = _checked(messages, where)
        tools, options = _tools(row.get(TOOLS), where), _options(row.get(TEMPLATE_OPTIONS), where)
        try:
            template = self._tokenizer.get_chat_template(tools=tools)
            dated = self._today + template if "strftime_now" in template else template
            words = {**options, "chat_template": dated, "tools": tools, "add_generation_prompt": generate}
            rendered = self._tokenizer.apply_chat_template(checked, tokenize=True, return_dict=True, **words)
            numbered = [] if generate else list(enumerate(checked, 1))
            unusual = [pair for pair in numbered if pair[1]["role"] not in _EVERY_TEMPLATE_HAS]
            text = self._tokenizer.apply_chat_template(checked, tokenize=False, **words) if unusual else ""
        except Exception as error:
            # Templates are programs of their own, and raise what they like.
            raise UsageError(f"the chat template refuses it: {error}", where=where) from error
        for number, message in unusual:
            if _is_missing(message.get("content"), text):
                self._pass_over(number, str(message["role"]), where)
        return tuple(rendered["input_ids"])

    def _pass_over(self, number: int, role: str, where: str) -> None:
        if role not in _SOME_HAVE_ONE:
            raise UsageError(
                f"the chat template leaves out message {number}, whose role is {role!r}",
                where=where,
                hint="templates know the roles system, user, assistant and tool",
            )
        self.passed_over.append(f"{where}, message {number}, {role}")


def _is_missing(content: object, text: str) -> bool:
    return isinstance(content, str) and content.strip() not in text


def _checked(messages: object, where: str) -> list[dict[str, object]]:
    """`messages` without what is null: templates ask whether a key is there, and write None as a word."""
    if not isinstance(messages, list) or not all(
        isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
    ):
        raise UsageError("messages is no list of objects with a role and a content", where=where)
    for number, message in enumerate(messages, 1):
        if message.get("content") is None and not any(message.get(key) for key in ("tool_calls", "thinking")):
            raise UsageError(f"message {number} has no content", where=where)
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _tools(value: object, where: str) -> list[dict[str, object]] | None:
    """The tools of a row: a list of objects, or JSON of one, as a column of one type needs it."""
    try:
        found: object = json.loads(value) if isinstance(value, str) and value else value
    except ValueError:
        found = value
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UsageError(f"{TOOLS} is no list of objects, nor JSON of one", where=where)
    return found


def _options(value: object, where: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UsageError(f"{TEMPLATE_OPTIONS} is {type(value).__name__}, expected an object", where=where)
    return {str(key): one for key, one in value.items() if one is not None}


def _today(day: str) -> str:
    """What goes before a template so that its strftime_now writes `day`.

    In the template's own language: transformers lets no function into a template.
    """
    date = datetime.datetime.fromisoformat(day)
    parts = ((f"%{letter}", date.strftime(f"%{letter}")) for letter in _DIRECTIVES)
    plain = (("%-d", str(date.day)), ("%-m", str(date.month)))
    filters = "".join(f"|replace({json.dumps(old)}, {json.dumps(new)})" for old, new in (*plain, *parts))
    # The line's end belongs to the block: the template begins as it would alone.
    return f"{{%- macro strftime_now(format) %}}{{{{ format{filters} }}}}{{% endmacro %}}\n"
