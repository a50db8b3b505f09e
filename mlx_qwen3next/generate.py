"""The command ``python -m mlx_qwen3next.generate``: mlx_lm.generate, for Qwen3-Next."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.generate import DEFAULT_MAX_TOKENS, DEFAULT_PROMPT, setup_arg_parser
from mlx_lm.models.cache import ArraysCache, load_prompt_cache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_adapters

from .cache import Cache, GatedDeltaCache
from .generation import GenerationResponse, check_depth, statistics, stream_generate
from .load import DEFAULT_CONTEXT, load

DEMO_PROMPT = "What does os.path.join do?"

EPILOG = """examples:
  %(prog)s                                       the bundled demo model answers
  %(prog)s --model Qwen/Qwen3-Next-80B-A3B-Instruct-MLX-4bit -p "Why is the sky blue?" -m 500
  git diff | %(prog)s --model DIR --system-prompt "Review this change." -p -
  %(prog)s --ignore-chat-template -p "def fibonacci(n):" -m 60
"""

# mlx_lm.generate's flags that have no meaning here, and why.
UNSUPPORTED = {
    "image": "Qwen3-Next takes no images",
    "draft_model": "the model drafts with its own MTP head: use --mtp",
    "quantize_activations": "activations stay in floating point here",
    "max_kv_size": "keys and values are kept whole, so that long prompts stay exact",
}


def parser() -> argparse.ArgumentParser:
    """mlx_lm.generate's parser with our additions; every stock flag keeps its default."""
    stock = setup_arg_parser()
    stock.prog = "python -m mlx_qwen3next.generate"
    stock.description = "Generate text with Qwen3-Next (Instruct, Thinking, Coder-Next)."
    stock.epilog = EPILOG
    stock.formatter_class = argparse.RawDescriptionHelpFormatter
    stock.conflict_handler = "resolve"  # the flags below replace stock ones of the same name
    stock.add_argument(
        "--model",
        help="A local directory or a Hugging Face repository, as published or converted to MLX. "
        "Without it, the small demo model that ships with this package runs.",
    )
    stock.add_argument(
        "--prompt",
        "-p",
        help="The message ('-' reads it from stdin). Default: 'hello', or for the demo model "
        f"{DEMO_PROMPT!r}.",
    )
    stock.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=DEFAULT_MAX_TOKENS,
        help="Tokens to generate at most; -1 for as many as the context takes (default: "
        "%(default)s).",
    )
    for flag, reason in UNSUPPORTED.items():
        option = "--" + flag.replace("_", "-")
        nargs: dict[str, Any] = {"nargs": "*"}
        if flag == "quantize_activations":
            stock.add_argument(option, "-qa", action="store_true", help=argparse.SUPPRESS)
        else:
            stock.add_argument(option, help=f"Not supported: {reason}.", **nargs)
    stock.add_argument("--num-draft-tokens", type=int, help=argparse.SUPPRESS)
    stock.add_argument(
        "--mtp",
        type=_depth,
        default="auto",
        metavar="{auto,off,1..8}",
        help="Tokens the model's own MTP head drafts ahead: a depth, 'off', or 'auto' to choose "
        "by measurement (default: %(default)s). Answers have the same distribution either way.",
    )
    return stock


def _depth(text: str) -> Any:
    try:
        return check_depth(int(text) if text.lstrip("-").isdigit() else text)  # type: ignore[arg-type]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status (2 for bad input, 130 for Ctrl-C)."""
    args = parser().parse_args(argv)
    # Whatever the terminal's encoding, text must not end in a traceback.
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure:
            reconfigure(errors="replace")
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    """Loads, generates, prints.

    Raises:
        ValueError: an argument, the model or the prompt is not usable.
    """
    for flag, reason in UNSUPPORTED.items():
        if getattr(args, flag, None):
            raise ValueError(f"--{flag.replace('_', '-')} is not supported: {reason}")
    template_options = _json_object("--chat-template-config", args.chat_template_config)
    if args.seed is not None:
        mx.random.seed(args.seed)

    cache, tokenizer_config = None, {}
    if args.prompt_cache_file is not None:
        cache, metadata = _load_cache(Path(args.prompt_cache_file))
        args.model = _cached_model(args.model, metadata)
        tokenizer_config = json.loads(metadata.get("tokenizer_config", "{}"))
    if args.trust_remote_code:
        tokenizer_config["trust_remote_code"] = True
    if args.model is None:
        print(
            "No --model given: running the bundled demo model, which knows a little Python.",
            file=sys.stderr,
        )
    if args.prompt is None:
        args.prompt = DEMO_PROMPT if args.model is None else DEFAULT_PROMPT

    model, tokenizer = load(
        args.model,
        context=max(DEFAULT_CONTEXT, args.max_tokens),
        tokenizer_config=tokenizer_config,
    )
    if args.adapter_path is not None:
        load_adapters(model, args.adapter_path)
    for token in args.extra_eos_token:
        tokenizer.add_eos_token(token)

    responses = stream_generate(
        model,
        tokenizer,
        _prompt_tokens(args, tokenizer, template_options, continued=cache is not None),
        args.max_tokens,
        mtp=args.mtp,
        prompt_cache=cache,
        prefill_step_size=args.prefill_step_size,
        kv_bits=args.kv_bits,
        kv_group_size=args.kv_group_size,
        quantized_kv_start=args.quantized_kv_start,
        temp=args.temp,
        top_p=args.top_p,
        min_p=args.min_p,
        min_tokens_to_keep=args.min_tokens_to_keep,
        top_k=args.top_k,
        xtc_probability=args.xtc_probability,
        xtc_threshold=args.xtc_threshold,
        xtc_special_tokens=(*tokenizer.encode("\n"), *tokenizer.eos_token_ids),
    )
    return _print(responses, verbose=args.verbose)


def _print(responses: Any, *, verbose: bool) -> int:
    """Streams the text; with ``verbose`` between rules, the statistics after it."""
    last: GenerationResponse | None = None
    status = 0
    if verbose:
        print("=" * 10)
    try:
        for last in responses:
            print(last.text, end="", flush=True)
    except KeyboardInterrupt:
        status = 130
    print()
    if verbose:
        print("=" * 10)
        print(statistics(last))
    if status:
        print("interrupted", file=sys.stderr)
    return status


def _prompt_tokens(
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
    if args.prompt == "-":
        text = sys.stdin.read()
    else:
        text = args.prompt.replace("\\n", "\n").replace("\\t", "\t")
    if not text.strip():
        raise ValueError("the prompt is empty")
    if args.ignore_chat_template or not tokenizer.has_chat_template:
        return tokenizer.encode(text)

    def render(content: str) -> str:
        messages = [{"role": "user", "content": content}]
        if args.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": args.system_prompt})
        if args.prefill_response is not None:
            messages.append({"role": "assistant", "content": args.prefill_response})
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            continue_final_message=args.prefill_response is not None,
            add_generation_prompt=args.prefill_response is None,
            **template_options,
        )

    rendered = render(text)
    if continued:
        rendered = rendered[render("<query>").index("<query>") :]
    return tokenizer.encode(rendered, add_special_tokens=False)


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
    if not file.exists():
        raise ValueError(
            f"--prompt-cache-file {file} does not exist; make it with: python -m mlx_lm "
            f"cache_prompt --model MODEL --prompt TEXT --prompt-cache-file {file}"
        )
    try:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    except (RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{file} is no prompt cache: {error}") from None
    own = [GatedDeltaCache.from_state(c.state) if type(c) is ArraysCache else c for c in cache]
    return own, metadata


def _cached_model(model: str | None, metadata: dict[str, str]) -> str | None:
    """The model a prompt cache was made with, which must be the one asked for."""
    made_with = metadata.get("model")
    if model is None or made_with is None or model == made_with:
        return model or made_with
    raise ValueError(f"the prompt cache was made with {made_with}, not with {model}")


if __name__ == "__main__":
    sys.exit(main())
