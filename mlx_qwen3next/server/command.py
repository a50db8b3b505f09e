"""The command ``python -m mlx_qwen3next.server``: mlx_lm.server, for Qwen3-Next.

mlx-lm's own parser, handler and batch do the work that is not ours; nothing in mlx-lm is changed.
A model of another type is refused: mlx_lm.server serves it.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import resource
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any, NoReturn

from mlx_lm import server as stock
from mlx_lm.utils import _parse_size

from ..checkpoint.loading import load, read_config
from ..cli import (
    Parser,
    add_group_options,
    add_speed_options,
    division,
    fingerprint_of,
    guarded,
    refuse,
)
from ..compute.proof import set_kernels
from ..decoding.sampling import Sampling, check_integer
from ..decoding.validation import check_kv_quantization
from ..errors import first_line
from ..group import ALONE, Group, join
from ..model import capacity
from ..prompt_cache.store import PromptCache
from . import mlx_lm_interface
from .engine import Engine
from .handler import MAX_CONNECTIONS, Handler, Server, Settings

DEMO = "qwen3-next-demo"  # what the bundled model is called
LEAST_CACHE = 256 * 2**20  # bytes of the prompt cache, however full the memory is
# Flags that would have no effect, and why.
_UNSUPPORTED = {
    "draft_model": "the model drafts with its own MTP head: use --mtp",
    "num_draft_tokens": "use --mtp",
}
_LAST_WORDS = 5.0  # seconds that clients have to read the end of their answers

EPILOG = """examples:
  %(prog)s
      the bundled demo model, at http://127.0.0.1:8080/v1
  %(prog)s --model DIR_OR_REPO --port 1234 --prompt-cache-dir ~/.cache/prompts
      a real one, where LM Studio would be, with a prompt cache that survives restarts
  curl localhost:8080/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"messages": [{"role": "user", "content": "What does math.sqrt do?"}]}'
"""


def parser() -> argparse.ArgumentParser:
    """mlx_lm.server's parser with our additions; every stock flag works."""
    result = Parser(
        _stock_parser(),
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
        help="A local directory or a Hugging Face repository. The only model that is served. "
        "Without it, the small demo model that ships with this package.",
    )
    essential.add_argument(
        "--model-name",
        metavar="NAME",
        help="What the model is called in /v1/models and answers, and may be in requests (default: "
        "the repository, or the directory's name).",
    )
    add_speed_options(essential)
    add_group_options(result)
    cache = result.add_argument_group("prompt cache")
    cache.add_argument(
        "--prompt-cache-bytes",
        type=_bytes,
        metavar="SIZE",
        help="What the prompt cache and the requests being answered may take together, such as "
        "8GB (default: half of the memory the model leaves).",
    )
    cache.add_argument(
        "--prompt-cache-size",
        type=_positive,
        metavar="N",
        help="Different texts in the prompt cache at most (default: as many as fit).",
    )
    cache.add_argument(
        "--prompt-cache-dir",
        type=Path,
        metavar="DIR",
        help="Keep the prompt cache on disk as well, so that it survives restarts. It takes as "
        "much room there as in memory.",
    )
    access = result.add_argument_group("access")
    access.add_argument(
        "--api-key",
        metavar="KEY",
        help="Answer only requests that carry this key; @FILE reads it from a file.",
    )
    access.add_argument(
        "--allowed-origins",
        type=lambda text: [origin.strip() for origin in text.split(",") if origin.strip()],
        default=[],
        metavar="ORIGINS",
        help="Web pages that may use the server, separated by commas, or * for all (default: "
        "none).",
    )
    access.add_argument(
        "--max-body-bytes",
        type=_bytes,
        default=Settings.max_body_bytes,
        metavar="SIZE",
        help="The largest request that is read (default: %(default)s).",
    )
    access.add_argument(
        "--drain-seconds",
        type=_seconds,
        default=30.0,
        metavar="SECONDS",
        help="After SIGTERM or Ctrl-C, how long requests are still answered (default: "
        "%(default)s).",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Serves until it is told to stop; returns the exit status (2 for bad input)."""
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=getattr(logging, args.log_level),
        format="%(asctime)s - %(levelname)s - %(message)s",
    )
    return guarded(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    """Loads and serves; returns the exit status.

    Raises:
        ValueError: an argument or the model is not usable.
        OSError: the port cannot be had.
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
    config = read_config(args.model)  # before 45 GB are fetched or read
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

    if group.rank > 0:  # does what rank 0 does, without clients
        logging.disable()
        _wait(engine().ended)
        return _outcome(errors)

    # Ctrl-C as well, where there are others: they are told to end after the last answer.
    for number in (signal.SIGTERM, *([signal.SIGINT] if group.size > 1 else [])):
        signal.signal(number, signal.default_int_handler)
    with Server(args.host, args.port, handler) as server:  # the port first: loading takes long
        try:
            generator = engine()
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _announce(args.host, server.server_port, settings)
            _wait(stopping)
        except KeyboardInterrupt:
            if generator is None or generator.health == "loading":
                os._exit(130)  # nothing is begun, and nothing else stops a loading
        try:
            generator.drain(args.drain_seconds)
            _wait(generator.ended)
        except KeyboardInterrupt:  # told twice
            generator.drain(0)
            _wait(generator.ended)
        server.shutdown()
        server.wait(_LAST_WORDS)
    return _outcome(errors)


def _outcome(errors: list[Exception]) -> int:
    if errors:
        raise ValueError(first_line(errors[0])) from errors[0]
    return 0


def _wait(event: threading.Event) -> None:
    """Waits for an event or Ctrl-C, which the system may give to another thread than this one."""
    while not event.wait(0.2):
        pass


class Provider(stock.ModelProvider):
    """Loads the one model there is, in place of mlx-lm's provider.

    Args:
        group, divided: who serves it together, and how: see :func:`mlx_qwen3next.load`.
    """

    def __init__(self, args: argparse.Namespace, group: Group, divided: dict[str, Any]):
        self._group, self._divided = group, divided
        super().__init__(args)

    def load_default(self) -> None:
        """Loads the model; see ``_load``."""
        self._load(self.cli_args.model, self.cli_args.adapter_path)

    def _load(
        self,
        model_path: str | None,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        """Loads a model.

        Raises:
            ValueError: it cannot be loaded, or not serve as asked for.
        """
        args = self.cli_args
        model, tokenizer = load(
            model_path,
            tokenizer_config=self._tokenizer_config,
            adapter_path=adapter_path,
            group=self._group,
            **self._divided,
        )
        if args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        key = model_path, adapter_path, draft_model_path
        vars(self).update(model_key=key, model=model, tokenizer=tokenizer, is_batchable=True)


class _Parsed(Exception):
    """Carries mlx_lm.server's parser out of its main()."""


class _StockParser(argparse.ArgumentParser):
    def parse_args(self, *_: Any) -> NoReturn:  # type: ignore[override]
        raise _Parsed(self)


def _stock_parser() -> argparse.ArgumentParser:
    """mlx_lm.server's parser, which only its main() makes: that runs as far as the parsing."""
    names = {**vars(stock), "argparse": SimpleNamespace(ArgumentParser=_StockParser)}
    try:
        FunctionType(stock.main.__code__, names)()
    except _Parsed as parsed:
        return parsed.args[0]
    raise ValueError("mlx_lm.server's main() parses no arguments")


def _check(args: argparse.Namespace) -> None:
    """Checks mlx-lm's own flags, which are used without further checks.

    Raises:
        ValueError: one is out of its range.
    """
    least = {
        "max_tokens": 1,
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
    """What the model may be called in a request, its own name first."""
    names = [] if args.model_name is None else [args.model_name]
    if args.model is None:
        names.append(DEMO)
    else:
        path = Path(args.model)
        names += [path.resolve().name, str(path.resolve())] if path.exists() else []
        names.append(args.model)
    return tuple(dict.fromkeys(names))


def _prompt_cache(args: argparse.Namespace, tokenizer: Any, group: Group = ALONE) -> PromptCache:
    """The prompt cache that the arguments ask for, once the model is loaded."""
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
    """The key, from its file if that is what was given.

    Raises:
        ValueError: there is none.
    """
    if text is None:
        return None
    key = Path(text[1:]).expanduser().read_text().strip() if text.startswith("@") else text
    if not key:
        raise ValueError("--api-key is empty")
    return key


def _allow_files() -> None:
    """A connection takes one, and macOS allows a shell's programs 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = 4 * MAX_CONNECTIONS
    if soft != resource.RLIM_INFINITY and soft < enough:
        most = enough if hard == resource.RLIM_INFINITY else min(enough, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _announce(host: str, port: int, settings: Settings) -> None:
    place = f"[{host}]" if ":" in host else host
    logging.info(f"{settings.names[0]} at http://{place}:{port}/v1")
    try:
        inside = ipaddress.ip_address(host).is_loopback
    except ValueError:
        inside = host == "localhost"
    if not inside and settings.api_key is None:
        logging.warning(f"{host} can be reached by others: --api-key keeps them out")


def _number(text: str, least: float, convert: Callable[[str], Any]) -> Any:
    try:
        value = convert(text)
    except (ValueError, KeyError, ArithmeticError):  # what mlx-lm's _parse_size raises
        value = None
    if value is None or not value >= least:
        raise argparse.ArgumentTypeError(f"must be at least {least:g}, got {text!r}")
    return value


def _bytes(text: str) -> int:
    return _number(text, 1, _parse_size)


def _positive(text: str) -> int:
    return _number(text, 1, int)


def _seconds(text: str) -> float:
    return _number(text, 0, float)
