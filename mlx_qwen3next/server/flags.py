"""The flags of ``python -m mlx_qwen3next.server``: all those of mlx_lm.server, and ours.

A test compares the names, types and defaults with mlx-lm's; the help texts are ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..cli import (
    LineParser,
    add_experts_in_memory,
    add_group_options,
    add_kv_options,
    add_rope_scaling,
    add_sampling_options,
    add_speed_options,
    byte_count,
    count,
    positive_seconds,
    seconds,
)
from .engine import DECODE_CONCURRENCY
from .http.access import Settings
from .requests.checks import MAX_INTEGER
from .requests.fields import ALIASES

# Flags of mlx_lm.server that would have no effect here, with the reasons.
UNSUPPORTED = {
    "num_draft_tokens": "use --mtp",
}

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
    result = LineParser(
        prog="python -m mlx_qwen3next.server",
        usage="%(prog)s [--model DIR_OR_REPO] [--mtp DEPTH] [--prompt-cache-dir DIR] "
        "[other options]",
        description="Serve Qwen3-Next (Instruct, Thinking, Coder-Next) to OpenAI clients.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
        "--alias",
        type=lambda text: [name.strip().lower() for name in text.split(",") if name.strip()],
        default=list(ALIASES),
        metavar="NAMES",
        help="Other names that requests may use, separated by commas; * stands for any characters "
        f"(default: {','.join(ALIASES)}).",
    )
    essential.add_argument(
        "--max-tokens",
        type=count,
        default=MAX_INTEGER,
        metavar="N",
        help="Most tokens of an answer if the request does not say (default: as many as the "
        "context takes).",
    )
    essential.add_argument(
        "--adapter-path",
        metavar="DIR",
        help="Directory of an adapter made by mlx_lm.lora, which is applied to the model.",
    )
    add_speed_options(essential)
    add_rope_scaling(essential)
    add_experts_in_memory(essential)
    add_group_options(result)
    add_sampling_options(result.add_argument_group("sampling, where a request does not say"))
    _add_chat_options(result.add_argument_group("chats"))
    fairness = result.add_argument_group("many requests at once")
    fairness.add_argument(
        "--decode-concurrency",
        type=int,
        metavar="N",
        help=f"Requests that are answered together (default: {DECODE_CONCURRENCY}, "
        "but 1 where experts are read from disk: several requests want more of them).",
    )
    fairness.add_argument(
        "--prompt-concurrency",
        type=int,
        default=8,
        metavar="N",
        help="Prompts that are read together (default: %(default)s).",
    )
    fairness.add_argument(
        "--prefill-step-size",
        type=int,
        metavar="N",
        help="Most tokens of a prompt to process at a time (default: as many as time and memory "
        "allow, at most 8192).",
    )
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
    add_kv_options(cache)
    access = result.add_argument_group("access")
    access.add_argument(
        "--host",
        default="127.0.0.1",
        help="Address to listen at; 0.0.0.0 lets other machines in (default: %(default)s, this "
        "machine only).",
    )
    access.add_argument(
        "--port",
        type=int,
        default=8080,
        metavar="N",
        help="Port to listen at; 0 takes a free one (default: %(default)s).",
    )
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
    other = result.add_argument_group("other options")
    other.add_argument(
        "--log-level",
        default="INFO",
        choices=["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
        help="The least important messages that are logged (default: %(default)s).",
    )
    other.add_argument(
        "--log-requests",
        type=Path,
        metavar="DIR",
        help="Directory in which to store every request with its answer, for reproducing a report "
        "(default: none is stored).",
    )
    other.add_argument(
        "--num-draft-tokens", type=int, default=3, help=_unsupported("num_draft_tokens")
    )
    return result


def _add_chat_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--chat-template",
        default="",
        metavar="TEXT",
        help="Chat template in place of the model's own, in Jinja's language.",
    )
    group.add_argument(
        "--use-default-chat-template",
        action="store_true",
        help="Use the tokenizer's default chat template if the model has none.",
    )
    group.add_argument(
        "--chat-template-args",
        type=json.loads,
        default="{}",
        metavar="JSON",
        help="Variables for the chat template, as a JSON object such as "
        "'{\"enable_thinking\": false}'; requests may set others (default: %(default)s).",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="Let the tokenizer run Python code from the model's files.",
    )


def _unsupported(flag: str) -> str:
    return f"Not supported: {UNSUPPORTED[flag]}."
