"""Who may use the server: the origins of web pages, the server's own page among them."""

from email.message import Message

import pytest
from helpers_server import CHAT, MESSAGES, NAMES, exchange, serving

from mlx_qwen3next.server.http.access import Settings, check_origin
from mlx_qwen3next.server.requests.checks import RequestError


def refused(origin, host, **settings):
    headers = Message()
    headers["Origin"] = origin
    if host is not None:
        headers["Host"] = host
    try:
        check_origin(headers, Settings(names=NAMES, **settings))
    except RequestError as error:
        return error.status == 403
    return False


@pytest.mark.parametrize("host", ["localhost:8080", "localhost", "127.0.0.1:1", "[::1]:80"])
def test_the_server_s_own_page_may_use_it(host):
    assert not refused(f"http://{host}", host)
    assert refused(f"https://{host}", host)
    assert refused(f"http://{host}", "192.168.0.1")
    assert refused(f"http://{host}", None)


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        ("http://evil.example:8080", "evil.example:8080"),  # whose name points to this machine
        ("http://127.0.0.1.evil.example", "127.0.0.1.evil.example"),
        ("http://localhost.", "localhost."),
        ("http://localhost:1", "localhost:2"),
        ("http://", ""),
        ("http://[", "["),
        ("null", "localhost"),
    ],
)
def test_a_name_in_the_request_proves_nothing(origin, host):
    assert refused(origin, host)
    assert not refused(origin, host, allowed_origins=(origin,))


def test_the_server_s_own_page_over_a_socket():
    with serving() as server:
        own = "http://{}:{}".format(*server.server_address)
        for origin, status in ((own, 200), ("http://localhost:9", 403)):
            body, headers = {"messages": MESSAGES}, {"Origin": origin}
            assert exchange(server, "POST", CHAT, body, headers)[0] == status
