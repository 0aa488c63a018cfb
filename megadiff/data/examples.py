"""Examples to learn from, as lines of `.jsonl` files say them: prompts and responses in turn.

    {"prompt": "…", "response": "…"}
    {"messages": [{"role": "system | user | assistant", "content": "…"}, …]}

The first is taken as it is. A conversation becomes plain text: every message is written as the template says, and what
the assistant says, and nothing else, is a response. So a turn of the template up to its `{content}` belongs to the
prompt, and what follows `{content}` to the prompt of the next response: the end of a response is the end-of-text token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megadiff.data.documents import Document, utf8

CHAT_TEMPLATE = "<|{role}|>\n{content}\n"
"""How a message is written unless `--chat-template` says otherwise."""

_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class ExampleFormat:
    """Turns a line of a `.jsonl` file into a document of an even number of parts: prompts and responses in turn.

    Raises:
        ValueError: The template lacks its places, or has them the wrong way round.
    """

    chat_template: str = CHAT_TEMPLATE
    """A message, with `{role}` before `{content}`."""

    def __post_init__(self) -> None:
        before, _, after = self.chat_template.partition("{content}")
        if "{content}" not in self.chat_template or "{role}" not in before or "{content}" in after:
            raise ValueError(
                f"chat_template must hold {{role}} and, after it, {{content}} once, got {self.chat_template!r}; "
                f"give, say, {CHAT_TEMPLATE!r}."
            )

    def document(self, record: Any) -> Document:
        """Return the parts of an example.

        Args:
            record: What a line holds.

        Raises:
            ValueError: It is no example, or a response is empty.
        """
        if isinstance(record, dict) and "messages" in record:
            parts = self._conversation(record["messages"])
        elif isinstance(record, dict) and {"prompt", "response"} <= record.keys():
            parts = [_string(record, "prompt"), _string(record, "response")]
        else:
            got = f"the fields {sorted(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise ValueError(
                f"expected an object with the fields 'prompt' and 'response', or 'messages', got {got}; mend the line."
            )
        if not all(parts[1::2]):
            raise ValueError("a response is empty, and there is nothing to learn from it; mend or remove the line.")
        return tuple(utf8(part) for part in parts)

    def _conversation(self, messages: Any) -> list[str]:
        """Return prompts and responses in turn; what follows the last response is left out."""
        if not isinstance(messages, list):
            raise ValueError(
                f"expected a list in the field 'messages', got a {type(messages).__name__}; mend the line."
            )
        before, _, after = self.chat_template.partition("{content}")
        parts, prompt = [], ""
        for message in messages:
            if not isinstance(message, dict) or message.get("role") not in _ROLES or "content" not in message:
                raise ValueError(
                    f"expected messages with a 'role' of {', '.join(_ROLES)} and a 'content', got {message!r:.80}; "
                    "mend or remove the line."
                )
            prompt += before.replace("{role}", message["role"])
            content = _string(message, "content")
            if message["role"] == "assistant":
                parts += [prompt, content]
                prompt = after
            else:
                prompt += content + after
        if not parts:
            raise ValueError("expected a message of the role 'assistant', got none; mend or remove the line.")
        return parts


def _string(record: dict[str, Any], name: str) -> str:
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(
            f"expected a string in the field {name!r}, got a {type(value).__name__}; mend or remove the line."
        )
    return value
