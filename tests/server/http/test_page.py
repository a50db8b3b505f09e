"""The page to chat on: its bytes, its policy, and that the server has what its script asks for."""

import base64
import hashlib
import re

import pytest
from helpers_server import CHAT, NAMES, events, exchange, serving

from mlx_qwen3next.server.http import page
from mlx_qwen3next.server.http.access import Settings

TEXT = page.PAGE.decode()


def inline(tag):
    (text,) = re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", TEXT, re.DOTALL)
    return text


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_anyone_gets_the_page_and_nothing_else_without_the_key(method):
    with serving(settings=Settings(names=NAMES, api_key="key")) as server:
        status, headers, raw = exchange(server, method, "/?x")
        assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
        assert headers["Content-Length"] == str(len(page.PAGE))
        assert raw == (page.PAGE if method == "GET" else b"")
        assert page.HEADERS.items() <= dict(headers).items()
        assert exchange(server, "GET", "/v1/models")[0] == 401


def test_the_policy_allows_the_page_s_own_text_alone():
    rules = dict(rule.split(" ", 1) for rule in page.HEADERS["Content-Security-Policy"].split("; "))
    hashes = {
        f"{tag}-src": hashlib.sha256(inline(tag).encode()).digest() for tag in ("script", "style")
    }
    for rule, digest in hashes.items():
        assert rules.pop(rule) == f"'sha256-{base64.b64encode(digest).decode()}'"
    assert rules == {
        **{"default-src": "'none'", "base-uri": "'none'", "form-action": "'none'"},
        **{"frame-ancestors": "'none'", "connect-src": "'self'", "img-src": "data:"},
    }


def test_nothing_comes_from_elsewhere_and_no_text_becomes_html():
    assert not re.findall(r"https?:|//\w|@import|url\(|\bsrc=", TEXT)
    assert re.findall(r'href="(.*?)"', TEXT) == ["data:,"]
    assert not re.findall(r"HTML|document\.write|eval|Function\(|setAttribute|DOMParser", TEXT)
    assert not re.findall(r"<[^>]* (?:on\w+|style)=", TEXT)  # the policy would forbid them


def test_every_path_that_the_script_asks_for_is_there():
    asked = re.findall(r'(?:ask|fetch)\("(.*?)"', inline("script"))
    assert {f"/{path}" for path in asked} == {CHAT, "/v1/models"}
    with serving() as server:
        for path in asked:
            assert exchange(server, "GET", f"/{path}")[0] in (200, 405)


def test_every_element_that_the_script_names_is_there():
    named = set(re.findall(r'\$\("(\w+)"\)', inline("script")))
    assert named <= set(re.findall(r'\bid="(\w+)"', TEXT)) and len(named) > 8


def test_each_chunk_has_the_counts_so_far():
    """What the page shows while an answer is streamed, and keeps of one that was stopped."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    with serving() as server:
        counted, _ = events(server, stream_options=options)
        plain, _ = events(server, stream_options={"include_usage": True})
        hidden, _ = events(server, stream_options={"continuous_usage_stats": True})
    *chunks, ending, last, done = counted
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [*range(1, len(chunks) + 1)] and len(chunks) > 1
    assert last["usage"]["completion_tokens"] == counts[-1] + 1  # the end's own token
    assert chunks[0]["usage"].keys() == last["usage"].keys()
    assert (last["choices"], done) == ([], "[DONE]") and "usage" not in ending
    assert sum("usage" in chunk for chunk in plain[:-1]) == 1
    assert not any("usage" in chunk for chunk in hidden[:-1])
