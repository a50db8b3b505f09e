"""The answers to clients that ask which server this is and which model it has.

One object of a model has the fields of all the protocols: OpenAI's, Anthropic's, and vLLM's length
of the context. Clients of Ollama are told what they look for before they use the other protocols.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

# The version of Ollama whose clients know that the server speaks OpenAI's Responses.
OLLAMA = {"version": "0.13.4"}
PULLED = {"status": "success"}  # a model that is here already


def model(name: str, created: int, context_length: int | None) -> dict[str, Any]:
    """A model.

    Args:
        created: seconds since 1970.
        context_length: in tokens; None if it is not known yet.
    """
    length = {} if context_length is None else {"max_model_len": context_length}
    return {
        **{"id": name, "object": "model", "created": created, "owned_by": "local"},
        **{"type": "model", "display_name": name, "created_at": _date(created)},
        **length,
    }


def models(only: dict[str, Any]) -> dict[str, Any]:
    """The list of the server's models.

    Args:
        only: the one that it has, of :func:`model`.
    """
    ends = {"first_id": only["id"], "last_id": only["id"]}
    return {"object": "list", "data": [only], "has_more": False} | ends


def tags(name: str, created: int) -> dict[str, Any]:
    """Ollama's list of models."""
    return {"models": [{"name": name, "model": name, "modified_at": _date(created)}]}


def _date(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
