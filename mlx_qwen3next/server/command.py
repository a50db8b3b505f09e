"""The command ``python -m mlx_qwen3next.server``: mlx_lm.server for Qwen3-Next.

The server takes the flags of mlx_lm.server and answers in its form. It refuses models of other
types, which mlx_lm.server serves.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import platform
import resource
import signal
import threading
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..checkpoint.hub import read_config
from ..checkpoint.loading import load
from ..cli import fingerprint_of, given, guarded, load_options, refuse, take_recommendation
from ..compute.proof import set_kernels
from ..decoding.preparation import prepare
from ..decoding.queueing import limit_cache
from ..decoding.recommended import recommended_sampling
from ..decoding.sampling import Sampling, check_integer
from ..decoding.validation import check_kv_quantization
from ..errors import first_line
from ..group import ALONE, Group, join
from ..model import capacity
from ..model.qwen3_next import Model
from ..prompt_cache.store import PromptCache
from .engine import mlx_lm_interface
from .engine.engine import Engine
from .flags import UNSUPPORTED, parser
from .http.access import Settings
from .http.connections import MAX_CONNECTIONS, Server
from .http.exchange import RequestLog
from .http.handler import Handler
from .protocols.stored import Stored
from .requests.fields import SAMPLING_FLAGS

DEMO = "qwen3-next-demo"  # the name of the bundled model
LEAST_CACHE = 256 * 2**20  # bytes of the prompt cache at least, however full the memory is
_FINAL_WAIT = 5.0  # seconds for clients to read the end of their answers


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
    options = load_options(args, group.size)
    set_kernels(args.kernels)
    _allow_files()
    settings = Settings(
        names=_names(args),
        aliases=tuple(args.alias),
        adapter=args.adapter_path,
        allowed_origins=tuple(args.allowed_origins),
        api_key=_api_key(args.api_key),
        max_body_bytes=args.max_body_bytes,
    )
    refuse(args, parser(), UNSUPPORTED)
    config = read_config(args.model)  # checks the model before 45 GB are fetched or read
    kv_quantization = args.kv_bits, args.kv_group_size, args.quantized_kv_start
    check_kv_quantization(config.head_dim, *kv_quantization)
    if group.size > 1 and args.prompt_cache_dir is not None:
        raise ValueError("--prompt-cache-dir is not supported on several machines")

    generator: Engine | None = None
    errors: list[Exception] = []
    stopping = threading.Event()
    system, stored, log = _system_fingerprint(), Stored(), None
    if args.log_requests is not None and group.rank == 0:
        about = {"model": settings.names[0], "system_fingerprint": system}
        log = RequestLog(args.log_requests, about)
        logging.info(f"--log-requests {args.log_requests}: {RequestLog.STORES}")

    def handler(*connection: Any) -> Handler:
        return Handler(generator, settings, stored, *connection, system_fingerprint=system, log=log)

    def failed(error: Exception) -> None:
        errors.append(error)
        stopping.set()

    def engine() -> Engine:
        model = partial(_load, args, group, options)
        cache = partial(_prompt_cache, args, group=group)
        return Engine(args, model, cache, args.mtp, failed)

    if group.rank > 0:  # follows rank 0, without clients of its own
        logging.disable()
        _wait(engine().ended)
        return _outcome(errors)

    if said := take_recommendation(args, recommended_sampling(args.model)):
        logging.info(said)
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
    """Checks the values of mlx-lm's flags, which the parser does not check.

    Raises:
        ValueError: a value is out of its range.
    """
    least = {
        "decode_concurrency": 1,
        "prompt_concurrency": 1,
        "prefill_step_size": 1,
        "port": 0,
    }
    for name, number in least.items():
        if (value := getattr(args, name)) is not None:
            check_integer(f"--{name.replace('_', '-')}", value, number)
    if args.port > 65535:
        raise ValueError(f"--port must be at most 65535, got {args.port}")
    Sampling(**given(args, SAMPLING_FLAGS))
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


def _load(
    args: argparse.Namespace, group: Group, options: dict[str, Any]
) -> tuple[Model, TokenizerWrapper]:
    """Loads the model that the arguments name, and prepares it for the first answer.

    Args:
        options: those of :func:`mlx_qwen3next.load` that the flags set.

    Raises:
        ValueError: the model cannot be loaded, or not with these arguments.
    """
    config: dict[str, Any] = {"trust_remote_code": args.trust_remote_code}
    if args.chat_template:
        config["chat_template"] = args.chat_template
    model, tokenizer = load(args.model, tokenizer_config=config, group=group, **options)
    limit_cache()
    if model.streamed is not None:
        logging.info(model.streamed.plan)
    if args.use_default_chat_template and tokenizer.chat_template is None:
        tokenizer.chat_template = tokenizer.default_chat_template
    prepare(
        model,
        mtp=args.mtp,
        lookup=args.lookup,
        chunk=args.prefill_step_size,
        say=logging.info,
    )
    return model, tokenizer


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


def _system_fingerprint() -> str:
    """The versions and the machine that answers depend on, as mlx_lm.server writes them."""
    chip = mx.device_info()["architecture"]
    return f"{version('mlx-lm')}-{version('mlx')}-{platform.platform()}-{chip}"


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
