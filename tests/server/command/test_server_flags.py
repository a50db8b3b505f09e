"""The flags of the server's command, compared with those of mlx_lm.server."""

import argparse

import pytest
from mlx_lm import server as stock

from mlx_qwen3next.decoding.sampling import Sampling
from mlx_qwen3next.server import command as server
from mlx_qwen3next.server import flags


@pytest.fixture
def stock_flags(monkeypatch):
    """The flags of mlx_lm.server as argparse's actions; only its main() makes its parser."""

    class Recorded(BaseException):
        pass

    def record(parser):
        raise Recorded(parser)

    with monkeypatch.context() as patched, pytest.raises(Recorded) as recorded:
        patched.setattr(argparse.ArgumentParser, "parse_args", record)
        stock.main()
    (parser,) = recorded.value.args
    return {flag: action for action in parser._actions for flag in action.option_strings}


def test_every_flag_of_mlx_lm_s_server_is_there_with_its_default(stock_flags):
    """Five defaults differ: mlx-lm's server is open to all web pages, limits its cached texts and
    its answers, reads chunks of one size, and has no experts on disk. Those of sampling hold where
    the checkpoint recommends none. Values that it takes are taken here, too."""
    ours = {flag: a for a in flags.parser()._actions for flag in a.option_strings}
    assert len(stock_flags) > 25
    assert stock_flags.keys() <= ours.keys()
    differ = {flag for flag, a in stock_flags.items() if ours[flag].default != a.default}
    sampling = {"--temp": "temp", "--top-p": "top_p", "--top-k": "top_k", "--min-p": "min_p"}
    ours_alone = {"--allowed-origins", "--prompt-cache-size", "--max-tokens", "--prefill-step-size"}
    assert differ == ours_alone | {"--decode-concurrency"} | {*sampling}
    assert stock_flags["--decode-concurrency"].default == flags.DECODE_CONCURRENCY
    for flag, option in sampling.items():
        assert (ours[flag].default, getattr(Sampling, option)) == (None, stock_flags[flag].default)
    assert ours["--allowed-origins"].default == []
    for flag, action in stock_flags.items():
        if flag in ("-h", "--help"):
            continue
        assert ours[flag].dest == action.dest
        value = "5" if action.type is int else (action.choices or ["0.5"])[-1]
        value = "{}" if flag == "--chat-template-args" else value
        value = "5MB" if flag == "--prompt-cache-bytes" else value
        given = [flag] if action.nargs == 0 else [flag, value]
        parsed = getattr(flags.parser().parse_args(given), action.dest)
        if flag == "--pipeline":  # may have the numbers of layers here
            assert parsed is not False
        else:
            assert parsed == (True if action.nargs == 0 else (action.type or str)(value))


def test_the_help_of_all_flags_can_be_printed(call):
    status, out, err = call(server.main, "--help")
    assert (status, err) == (0, "")
    assert "--prompt-cache-dir" in out and "--decode-concurrency" in out


def test_sizes_and_lists_are_read():
    args = flags.parser().parse_args(
        ["--prompt-cache-bytes", "2MB", "--allowed-origins", "http://a, http://b", "--mtp", "3"]
    )
    assert args.prompt_cache_bytes == 2_000_000
    assert args.allowed_origins == ["http://a", "http://b"]
    assert args.mtp == 3


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("--mtp", "9", "--mtp"),
        ("--port", "99999", "--port"),
        ("--port", "-1", "--port"),
        ("--temp", "-1", "temp"),
        ("--top-p", "2", "top_p"),
        ("--max-tokens", "0", "--max-tokens"),
        ("--decode-concurrency", "0", "--decode-concurrency"),
        ("--prompt-concurrency", "0", "--prompt-concurrency"),
        ("--prefill-step-size", "0", "--prefill-step-size"),
        ("--kv-bits", "7", "kv_bits"),
        ("--kv-group-size", "48", "kv_group_size"),
        ("--model", "/nowhere", "/nowhere"),
        ("--num-draft-tokens", "4", "--num-draft-tokens is not supported: use --mtp"),
        ("--prompt-cache-bytes", "5XB", "--prompt-cache-bytes"),
        ("--prompt-cache-bytes", "XB", "--prompt-cache-bytes"),
        ("--prompt-cache-bytes", "0", "at least 1"),
        ("--prompt-cache-size", "0", "at least 1"),
        ("--drain-seconds", "-1", "at least 0"),
        ("--drain-seconds", "nan", "at least 0"),
        ("--api-key", "@/nowhere", "/nowhere"),
        ("--api-key", "", "--api-key"),
        ("--log-requests", "/dev/null", "/dev/null"),
        ("--adapter-path", "/nowhere", "/nowhere"),
        ("--chat-template-args", "[]", "--chat-template-args"),
        ("--host", "no.such.host.invalid", "error"),
    ],
)
def test_bad_input_is_one_line_and_status_2(call, flag, value, message):
    extra = ["--kv-bits", "8"] if flag == "--kv-group-size" else []
    port = [] if flag == "--port" else ["--port", "0"]
    status, _, err = call(server.main, *port, flag, value, *extra)
    assert status == 2
    assert err.count("\n") == 1 and err.startswith("error: ")
    assert message in err
