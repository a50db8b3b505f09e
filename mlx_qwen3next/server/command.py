"""The command ``python -m mlx_qwen3next.server``: mlx_lm.server for Qwen3-Next.

The server builds on the parser, the handler and the batch of mlx_lm.server, without changing
anything in mlx-lm. It refuses models of other types, which mlx_lm.server serves.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import resource
import signal
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mlx_lm import server as stock

from ..checkpoint.hub import read_config
from ..cli import (
    Parser,
    add_group_options,
    add_speed_options,
    byte_count,
    count,
    division,
    fingerprint_of,
    guarded,
    positive_seconds,
    refuse,
    seconds,
)
from ..compute.proof import set_kernels
from ..decoding.sampling import Sampling, check_integer
from ..decoding.validation import check_kv_quantization
from ..errors import first_line
from ..group import ALONE, Group, join
from ..model import capacity
from ..prompt_cache.store import PromptCache
from . import mlx_lm_interface
from .checks import MAX_INTEGER
from .engine import Engine
from .handler import Handler, Settings
from .http_server import MAX_CONNECTIONS, Server
from .provider import Provider

DEMO = "qwen3-next-demo"  # the name of the bundled model
LEAST_CACHE = 256 * 2**20  # bytes of the prompt cache at least, however full the memory is
# Flags of mlx_lm.server that would have no effect here, with the reasons.
_UNSUPPORTED = {
    "draft_model": "the model drafts with its own MTP head: use --mtp",
    "num_draft_tokens": "use --mtp",
}
_FINAL_WAIT = 5.0  # seconds for clients to read the end of their answers

EPILOG = """examples:
  %(prog)s
      serve the bundled demo model at http://127.0.0.1:8080/v1
  %(prog)s --model DIR_OR_REPO --port 1234 --prompt-cache-dir ~/.cache/prompts
      serve a model on LM Studio's port, with a prompt cache that survives restarts
  curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What does math.sqrt do?"}]}'
      ask the served model a question
"""


def parser() -> argparse.ArgumentParser:
    """Makes the command's parser: all flags of mlx_lm.server and ours."""
    flags = mlx_lm_interface.stock_parser()
    for action in flags._actions:
        if action.dest in _UNSUPPORTED:
            action.help = f"Not supported: {_UNSUPPORTED[action.dest]}."
    result = Parser(
        flags,
        prog="python -m mlx_qwen3next.server",
        usage="%(prog)s [--model DIR_OR_REPO] [--mtp DEPTH] [--prompt-cache-dir DIR] "
        "[other options]",
        description="Serve Qwen3-Next (Instruct, Thinking, Coder-Next) to OpenAI clients.",
        epilog=EPILOG,
    )
    essential = result.add_argument_group("essential options")
    essential.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="Local directory or Hugging Face repository of the model; the server runs only this "
        "one (default: the small demo model that ships with this package).",
    )
    essential.add_argument(
        "--model-name",
        metavar="NAME",
        help="Name of the model in /v1/models and in answers; requests may use it as well "
        "(default: the repository, or the name of the directory).",
    )
    essential.add_argument(
        "--max-tokens",
        type=count,
        default=MAX_INTEGER,
        metavar="N",
        help="Most tokens of an answer if the request does not say (default: as many as the "
        "context takes).",
    )
    add_speed_options(essential)
    add_group_options(result)
    fairness = result.add_argument_group("many requests at once")
    fairness.add_argument(
        "--max-stall",
        type=positive_seconds,
        default=0.5,
        metavar="SECONDS",
        help="Time for which the reading of a long prompt may hold up the answers that are being "
        "generated, before their next token (default: %(default)s).",
    )
    fairness.add_argument(
        "--max-queue",
        type=count,
        default=64,
        metavar="N",
        help="Requests that may wait while --decode-concurrency others are answered; more are "
        "refused with status 429 (default: %(default)s).",
    )
    cache = result.add_argument_group("prompt cache")
    cache.add_argument(
        "--prompt-cache-bytes",
        type=byte_count,
        metavar="SIZE",
        help="Memory for the prompt cache and the requests being answered together, such as 8GB "
        "(default: half of the memory that the model leaves free).",
    )
    cache.add_argument(
        "--prompt-cache-size",
        type=count,
        metavar="N",
        help="Maximum number of different texts in the prompt cache (default: as many as fit).",
    )
    cache.add_argument(
        "--prompt-cache-dir",
        type=Path,
        metavar="DIR",
        help="Directory in which the prompt cache is saved, so that it survives restarts. It "
        "takes as much space there as in memory.",
    )
    access = result.add_argument_group("access")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="Answer only requests that carry this key; @FILE reads the key from a file.",
    )
    access.add_argument(
        "--allowed-origins",
        type=lambda text: [origin.strip() for origin in text.split(",") if origin.strip()],
        default=[],
        metavar="ORIGINS",
        help="Origins of web pages that may use the server, separated by commas; * allows all "
        "(default: none).",
    )
    access.add_argument(
        "--max-body-bytes",
        type=byte_count,
        default=Settings.max_body_bytes,
        metavar="SIZE",
        help="Size of the largest request that is accepted (default: %(default)s).",
    )
    access.add_argument(
        "--drain-seconds",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="After SIGTERM or Ctrl-C, time to finish the requests being answered; a second "
        "signal ends them at once (default: %(default)s).",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until SIGTERM or Ctrl-C and returns the exit status: 2 for bad input."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=getattr(logging, args.log_level),
        format="%(asctime)s - %(levelname)s - %(message)s",
    )
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads the model, serves it and returns the exit status.

    Raises:
        ValueError: an argument or the model is not usable.
        OSError: the host is unknown, or the port is taken.
    """
    _check(args)
    mlx_lm_interface.check()
    with join() as group:
        return _run(args, group)


def _run(args: argparse.Namespace, group: Group) -> int:
    divided = division(args, group.size)
    set_kernels(args.kernels)
    _allow_files()
    settings = Settings(
        names=_names(args),
        adapter=args.adapter_path,
        allowed_origins=tuple(args.allowed_origins),
        api_key=_api_key(args.api_key),
        max_body_bytes=args.max_body_bytes,
    )
    refuse(args, parser(), _UNSUPPORTED)
    config = read_config(args.model)  # checks the model before 45 GB are fetched or read
    kv_quantization = args.kv_bits, args.kv_group_size, args.quantized_kv_start
    check_kv_quantization(config.head_dim, *kv_quantization)
    if group.size > 1 and args.prompt_cache_dir is not None:
        raise ValueError("--prompt-cache-dir is not supported on several machines")

    generator: Engine | None = None
    errors: list[Exception] = []
    stopping = threading.Event()
    system = stock.get_system_fingerprint()

    def handler(*connection: Any) -> Handler:
        return Handler(generator, settings, *connection, system_fingerprint=system)

    def failed(error: Exception) -> None:
        errors.append(error)
        stopping.set()

    def engine() -> Engine:
        cache = partial(_prompt_cache, args, group=group)
        return Engine(Provider(args, group, divided), cache, args.mtp, failed)

    if group.rank > 0:  # follows rank 0, without clients of its own
        logging.disable()
        _wait(engine().ended)
        return _outcome(errors)

    # With several ranks Ctrl-C as well: rank 0 then tells the others to end after the last answer.
    for number in (signal.SIGTERM, *([signal.SIGINT] if group.size > 1 else [])):
        signal.signal(number, signal.default_int_handler)
    with Server(args.host, args.port, handler) as server:  # before the loading, which takes long
        try:
            generator = engine()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _announce(args.host, server.server_port, settings)
            _wait(stopping)
        except KeyboardInterrupt:
            if generator is None or generator.health == "loading":
                os._exit(130)  # nothing else stops the loading, and no answer has begun
        try:
            generator.drain(args.drain_seconds)
            _wait(generator.ended)
        except KeyboardInterrupt:  # the second signal
            generator.drain(0)
            _wait(generator.ended)
        server.shutdown()
        server.wait(_FINAL_WAIT)
    return _outcome(errors)


def _outcome(errors: list[Exception]) -> int:
    """Returns the exit status, or raises the first error."""
    if errors:
        raise ValueError(first_line(errors[0])) from errors[0]
    return 0


def _wait(event: threading.Event) -> None:
    """Waits for an event, in short intervals.

    The system may deliver Ctrl-C to another thread, which does not interrupt a long wait here.
    """
    while not event.wait(0.2):
        pass


def _check(args: argparse.Namespace) -> None:
    """Checks the values of mlx-lm's flags, which its parser does not check.

    Raises:
        ValueError: a value is out of its range.
    """
    least = {
        "decode_concurrency": 1,
        "prompt_concurrency": 1,
        "prefill_step_size": 1,
        "num_draft_tokens": 0,
        "port": 0,
    }
    for name, number in least.items():
        check_integer(f"--{name.replace('_', '-')}", getattr(args, name), number)
    if args.port > 65535:
        raise ValueError(f"--port must be at most 65535, got {args.port}")
    Sampling(temp=args.temp, top_p=args.top_p, top_k=args.top_k, min_p=args.min_p)
    if not isinstance(args.chat_template_args, dict):
        raise ValueError(
            f"--chat-template-args must be a JSON object, got {args.chat_template_args}"
        )


def _names(args: argparse.Namespace) -> tuple[str, ...]:
    """The names of the model that a request may use; the first is the server's own."""
    names = [] if args.model_name is None else [args.model_name]
    if args.model is None:
        names.append(DEMO)
    else:
        path = Path(args.model)
        names += [path.resolve().name, str(path.resolve())] if path.exists() else []
        names.append(args.model)
    return tuple(dict.fromkeys(names))


def _prompt_cache(args: argparse.Namespace, tokenizer: Any, group: Group = ALONE) -> PromptCache:
    """Makes the prompt cache for the arguments, after the model is loaded."""
    size = args.prompt_cache_bytes
    if size is None:
        size = max(capacity.spare() // 2, LEAST_CACHE)
    return PromptCache(
        max_bytes=size,
        max_sequences=args.prompt_cache_size,
        tokenizer=tokenizer,
        directory=args.prompt_cache_dir,
        fingerprint="" if args.prompt_cache_dir is None else fingerprint_of(args),
        group=group,
    )


def _api_key(text: str | None) -> str | None:
    """The key itself, for ``@FILE`` read from the file.

    Raises:
        ValueError: the key is empty.
    """
    if text is None:
        return None
    key = Path(text[1:]).expanduser().read_text().strip() if text.startswith("@") else text
    if not key:
        raise ValueError("--api-key is empty")
    return key


def _allow_files() -> None:
    """Raises the limit of open files: every connection takes one, and macOS allows only 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < enough:
        most = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _announce(host: str, port: int, settings: Settings) -> None:
    """Logs the server's address, with a warning if others can reach it without a key."""
    place = f"[{host}]" if ":" in host else host
    logging.info(f"{settings.names[0]} at http://{place}:{port}/v1")
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside and settings.api_key is None:
        logging.warning(f"{host} can be reached by others: --api-key keeps them out")
