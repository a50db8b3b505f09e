"""Generates an answer on the terminal: the work of ``python -m mlx_qwen3next.generate``."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import load_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from .checkpoint.loading import DEFAULT_CONTEXT, load
from .cli import fingerprint_of, given, load_options, take_recommendation
from .compute.proof import set_kernels
from .decoding.generation import GenerationResponse, statistics, stream_generate
from .decoding.preparation import prepare
from .decoding.queueing import limit_cache
from .decoding.recommended import recommended_sampling
from .decoding.sampling import Sampling
from .decoding.validation import check_max_tokens
from .group import Group, join
from .model import capacity
from .model.cache import Cache
from .prompt_cache.files import is_ours
from .prompt_cache.store import PromptCache

# The options of Sampling that are flags.
SAMPLING = (
    "temp",
    "top_p",
    "min_p",
    "min_tokens_to_keep",
    "top_k",
    "xtc_probability",
    "xtc_threshold",
)


def run(args: argparse.Namespace, *, demo_prompt: str, default_prompt: str) -> int:
    """Loads, generates, prints; with other processes, if ``mlx.launch`` started several.

    Args:
        demo_prompt, default_prompt: the message where none is given, for the demo model and others.

    Raises:
        ValueError: an argument, the model or the prompt is not usable.
    """
    with join() as group:
        return _run(args, group, demo_prompt, default_prompt)


def _run(args: argparse.Namespace, group: Group, demo_prompt: str, default_prompt: str) -> int:
    # A large model takes a while to load: what can be refused before it, is.
    check_max_tokens(args.max_tokens)
    set_kernels(args.kernels)
    Sampling(**given(args, SAMPLING))
    template_options = _json_object("--chat-template-config", args.chat_template_config)
    if args.seed is not None:
        if not 0 <= args.seed < 2**64:
            raise ValueError(f"--seed must be within 0 and 2^64 - 1, got {args.seed}")
        mx.random.seed(args.seed)

    cache: Cache | PromptCache | None = None
    tokenizer_config = {}
    options = load_options(args, group.size)
    file = None if args.prompt_cache_file is None else Path(args.prompt_cache_file)
    if file is not None and group.size > 1:
        raise ValueError("--prompt-cache-file is not supported on several machines")
    of_mlx_lm = file is not None and file.exists() and not is_ours(file)
    if file is not None and of_mlx_lm:
        if args.rope_scaling is not None:
            raise ValueError(
                f"{file} was made by mlx-lm, whose keys have the checkpoint's own positions; "
                "--rope-scaling needs a new --prompt-cache-file"
            )
        cache, metadata = _load_cache(file)
        args.model = _cached_model(args.model, metadata)
        tokenizer_config = json.loads(metadata.get("tokenizer_config", "{}"))
    if args.trust_remote_code:
        tokenizer_config["trust_remote_code"] = True
    message = _message(args.prompt, demo_prompt if args.model is None else default_prompt)
    said = take_recommendation(args, group.decide("sampling", recommended_sampling(args.model)))
    if said and args.temp:
        print(said, file=sys.stderr)

    model, tokenizer = load(
        args.model,
        context=max(DEFAULT_CONTEXT, args.max_tokens),
        tokenizer_config=tokenizer_config,
        group=group,
        **options,
    )
    limit_cache()
    if model.streamed is not None:
        print(model.streamed.plan, file=sys.stderr)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)

    prompt = _prompt_tokens(message, args, tokenizer, template_options, continued=of_mlx_lm)
    if file is not None and not of_mlx_lm:
        cache = _prompt_cache(file, args, tokenizer)
    progress = _PromptProgress()
    responses = stream_generate(
        model,
        tokenizer,
        prompt,
        args.max_tokens,
        mtp=args.mtp,
        lookup=args.lookup,
        prompt_cache=cache,
        prompt_progress_callback=progress,
        prefill_step_size=args.prefill_step_size,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        xtc_special_tokens=(*tokenizer.encode("\n"), *tokenizer.eos_token_ids),
        **given(args, SAMPLING),
    )
    if args.model is None:
        print(
            "No --model given: running the bundled demo model, which knows a little Python.",
            file=sys.stderr,
        )
    prepare(
        model,
        mtp=args.mtp,
        lookup=args.lookup,
        chunk=args.prefill_step_size,
        say=partial(print, file=sys.stderr, flush=True),
    )
    generated: list[int] = []
    try:
        return _print(responses, generated, progress, verbose=args.verbose)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        # Python flushes stdout at its end, which must not fail again (its documentation says how).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        group.leave(128 + signal.SIGPIPE)
        return 128 + signal.SIGPIPE
    finally:
        responses.close()
        if file is not None and isinstance(cache, PromptCache):
            cache.export([*prompt, *generated], file)


def _print(
    responses: Iterator[GenerationResponse],
    generated: list[int],
    progress: _PromptProgress,
    *,
    verbose: bool,
) -> int:
    """Prints the text as it comes, between rules and with statistics if ``verbose``.

    Args:
        generated: takes the tokens.
    """
    last: GenerationResponse | None = None
    status = 0
    if verbose:
        print("=" * 10)
    try:
        for last in responses:
            generated.append(last.token)
            print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        progress.close()
        status = 130
    print(flush=True)
    if verbose:
        print("=" * 10)
        print(statistics(last), flush=True)
    if status:
        print("interrupted", file=sys.stderr)
    return status


class _PromptProgress:
    """A bar on a terminal's stderr while a long prompt is processed; a short one ends before.

    It shows the tokens a second and the time left, by what is read and not by what was known. A
    prompt of more than ``LONG`` unread tokens has it at once, since its first chunk may take long.
    """

    LONG = 8192

    _bar: tqdm | None = None

    def __call__(self, processed: int, total: int) -> None:
        if self._bar is None:
            self._bar = tqdm(
                desc="prompt",
                total=total,
                initial=processed,
                unit="token",
                leave=False,
                delay=0 if total - processed > self.LONG else 2,
                disable=None,
            )
        self._bar.update(processed - self._bar.n)
        if processed >= total:
            self.close()

    def close(self) -> None:
        """Clears the bar, also in the middle of a prompt."""
        if self._bar is not None:
            self._bar.close()


def _message(prompt: str | None, default: str) -> str:
    """The user's message, as given.

    Raises:
        ValueError: it is empty.
    """
    if prompt is None:
        return default
    text = prompt.replace("\\n", "\n").replace("\\t", "\t") if prompt != "-" else sys.stdin.read()
    if not text.strip():
        raise ValueError("the prompt is empty")
    return text


def _prompt_tokens(
    message: str,
    args: argparse.Namespace,
    tokenizer: TokenizerWrapper,
    template_options: dict[str, Any],
    *,
    continued: bool,
) -> list[int]:
    """The prompt's token ids, through the chat template unless that is off or missing.

    Args:
        continued: the prompt follows a cached prefix, so the template's opening is left out.
    """
    through_template = tokenizer.has_chat_template and not args.ignore_chat_template

    def render(content: str) -> str:
        if not through_template:
            return content
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if args.prefill_response is not None:
            messages.append({"role": "assistant", "content": args.prefill_response})
        try:
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                continue_final_message=args.prefill_response is not None,
                add_generation_prompt=args.prefill_response is None,
                **template_options,
            )
        except Exception as error:  # a template is a program, and not ours
            raise ValueError(f"the chat template fails: {error}") from error

    text = render(message)
    if continued and through_template:
        text = text[render("<query>").index("<query>") :]
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("the prompt is not valid UTF-8") from None
    return tokenizer.encode(text, add_special_tokens=not through_template)


def _json_object(flag: str, text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{flag} must be a JSON object, got {text}")
    return value


def _load_cache(file: Path) -> tuple[Cache, dict[str, str]]:
    """A prompt cache as mlx-lm saves it, whoever made it."""
    try:
        return load_prompt_cache(str(file), return_metadata=True)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is no prompt cache: {error}") from None


def _prompt_cache(file: Path, args: argparse.Namespace, tokenizer: TokenizerWrapper) -> PromptCache:
    """The prompt cache of a file of ours, which need not exist yet."""
    if not file.parent.is_dir():
        raise ValueError(f"--prompt-cache-file {file}: there is no such directory")
    options: dict[str, Any] = {
        "max_bytes": capacity.spare(),
        "tokenizer": tokenizer,
        "fingerprint": fingerprint_of(args),
    }
    return PromptCache.load(file, **options) if file.exists() else PromptCache(**options)


def _cached_model(model: str | None, metadata: dict[str, str]) -> str | None:
    """The model a prompt cache was made with, which must be the one asked for."""
    made_with = metadata.get("model")
    if model is None or made_with is None or model == made_with:
        return model or made_with
    raise ValueError(f"the prompt cache was made with {made_with}, not with {model}")
