"""The questions that every protocol answers about a request."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from ..answers.events import End, Event
from ..answers.tokens import Context, SampledToken
from ..requests.checks import RequestError
from .stored import Stored

# Fields that have the same name and meaning in all protocols; those of sampling are ours in some.
SHARED = (
    *("model", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "logit_bias"),
    *("xtc_probability", "xtc_threshold", "repetition_penalty", "repetition_context_size"),
    *("presence_penalty", "presence_context_size", "frequency_penalty"),
    *("frequency_context_size", "chat_template_kwargs", "adapters"),
)


@dataclass(frozen=True)
class About:
    """The facts that answers tell of the server.

    Args:
        model: its name.
        created: seconds since 1970.
        fingerprint: of the versions and the machine.
        stored: the responses that requests may continue.
    """

    model: str
    created: int
    fingerprint: str
    stored: Stored


class Form(ABC):
    """A request and its answer in a protocol.

    Args:
        body: the request's, a JSON object.
        about: the server.

    Attributes:
        request: the body of the chat completion that asks for the same, or of the completion.
        is_chat: whether it is one of a chat.

    Raises:
        RequestError: the body cannot be translated.
    """

    is_chat: ClassVar = True
    request: dict[str, Any]

    @abstractmethod
    def __init__(self, body: dict[str, Any], about: About): ...

    @abstractmethod
    def begin(self, context: Context, fields: dict[str, Any]) -> bytes:
        """Begins the answer; returns what a stream sends first.

        Args:
            fields: the checked request.
        """

    @abstractmethod
    def chunk(self, events: Sequence[Event], sampled: Sequence[SampledToken]) -> bytes:
        """More of a stream.

        Args:
            events: at least one.
            sampled: the tokens since the last chunk.
        """

    @abstractmethod
    def end(self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End) -> bytes:
        """The rest of a stream."""

    @abstractmethod
    def whole(
        self, events: Sequence[Event], sampled: Sequence[SampledToken], end: End
    ) -> dict[str, Any]:
        """The answer as a whole."""

    @staticmethod
    def error(error: RequestError) -> dict[str, Any]:
        """An error in place of an answer; OpenAI's form."""
        return error.body

    def failed(self, error: RequestError) -> bytes:
        """An error within a stream."""
        return sent(self.error(error))


def sent(content: dict[str, Any], *, named: bool = False) -> bytes:
    """An event of a stream.

    Args:
        named: whether the event has its ``type`` for its name.
    """
    name = f"event: {content['type']}\n" if named else ""
    return f"{name}data: {json.dumps(content)}\n\n".encode()


def named(*contents: dict[str, Any]) -> bytes:
    """Events of a stream that have their types for their names."""
    return b"".join(sent(content, named=True) for content in contents)
