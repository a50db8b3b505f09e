"""Who may use the server: those with its key, and web pages of allowed origins."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from email.message import Message
from ipaddress import ip_address
from urllib.parse import urlsplit

from ..requests.checks import RequestError
from ..requests.fields import ALIASES

OPEN = ("/", "/health")  # the paths that need no key


@dataclass(frozen=True)
class Settings:
    """The settings of the HTTP side.

    Args:
        names: the names of the model that a request may use; the server itself uses the first.
        aliases: other names that stand for the first; see
            :func:`mlx_qwen3next.server.requests.fields.served_name`.
        adapter: the name of the adapter that a request may use.
        allowed_origins: the origins of web pages that may use the server; ``*`` allows all.
        api_key: the key that requests must carry; None requires none.
        max_body_bytes: the size of the largest body that is read.
    """

    names: tuple[str, ...]
    aliases: tuple[str, ...] = ALIASES
    adapter: str | None = None
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = None
    max_body_bytes: int = 32 * 2**20


def check_origin(headers: Message, settings: Settings) -> None:
    """Checks that a request comes from no web page, or from one that may use the server.

    Raises:
        RequestError: it does not.
    """
    origin = headers.get("Origin")
    if origin is None or _is_allowed(origin, settings) or _is_own(origin, headers):
        return
    message = f"web pages of {origin[:80]} may not use this server; see --allowed-origins"
    raise RequestError(message, status=403)


def check_key(headers: Message, settings: Settings) -> None:
    """Checks that a request carries the key, if there is one.

    Raises:
        RequestError: it does not.
    """
    if settings.api_key is None:
        return
    scheme, _, bearer = headers.get("Authorization", "").partition(" ")
    given = [headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""]
    raw = [text.strip().encode("latin-1", "replace") for text in given]
    if not any([hmac.compare_digest(text, settings.api_key.encode()) for text in raw]):
        raise RequestError(
            "the API key is missing or wrong; send the header Authorization: Bearer KEY, "
            "or x-api-key: KEY",
            status=401,
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )


def cors_headers(headers: Message, settings: Settings) -> dict[str, str]:
    """The headers that let the web page of a request read the answer; none unless it may."""
    origin, allowed = headers.get("Origin"), settings.allowed_origins
    if origin is None or not _is_allowed(origin, settings):
        return {}
    return {
        "Access-Control-Allow-Origin": "*" if "*" in allowed else origin,
        "Vary": "Origin",
        "Access-Control-Allow-Methods": "GET, POST, DELETE, OPTIONS",
        "Access-Control-Allow-Headers": "*, Authorization",  # the star does not include it
    }


def _is_allowed(origin: str, settings: Settings) -> bool:
    return bool({origin, "*"} & set(settings.allowed_origins))


def _is_own(origin: str, headers: Message) -> bool:
    """Whether a page is the server's own.

    The page has then the address that the request was sent to. A name proves nothing, because
    anyone can have a name point to this machine; an address can belong to no other server.
    """
    if origin != f"http://{headers.get('Host')}":
        return False
    try:
        name = urlsplit(origin).hostname or ""
        return name == "localhost" or bool(ip_address(name))
    except ValueError:
        return False
