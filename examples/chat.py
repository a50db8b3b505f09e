"""A chat in the terminal. Each turn processes only its new tokens.

    python examples/chat.py [--model DIR_OR_REPO] [--system TEXT] [--mtp auto] [-m 500]

An empty line, Ctrl-D or Ctrl-C at the prompt ends the chat. Ctrl-C during an answer ends the
answer. ``/undo`` removes the last question and its answer.
"""

from __future__ import annotations

import argparse

from mlx_qwen3next import load, stream_generate
from mlx_qwen3next.prompt_cache import PromptCache

GB = 10**9


def answer(model, tokenizer, messages: list[dict], cache: PromptCache, **options) -> str:
    """Prints the answer to the last message as it comes, and returns it."""
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    text, last = "", None
    responses = stream_generate(model, tokenizer, prompt, prompt_cache=cache, **options)
    try:
        for last in responses:
            print(last.text, end="", flush=True)
            text += last.text
    except KeyboardInterrupt:
        pass
    finally:
        responses.close()
    if last is not None:
        new = last.prompt_tokens - last.cached_tokens
        print(f"\n[{new} of {last.prompt_tokens} tokens processed, ", end="")
        print(f"{last.generation_tps:.0f} tokens per second]")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a directory or a repository (default: the demo model)")
    parser.add_argument("--system", help="the system prompt")
    parser.add_argument("--mtp", default="auto", help="draft depth: auto, off or 1 to 8")
    parser.add_argument("-m", "--max-tokens", type=int, default=500)
    parser.add_argument("--temp", type=float, default=0.0)
    args = parser.parse_args()
    mtp = int(args.mtp) if args.mtp.isdigit() else args.mtp
    model, tokenizer = load(args.model)
    cache = PromptCache(max_bytes=2 * GB, tokenizer=tokenizer)
    opening = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages = list(opening)
    while True:
        try:
            question = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if question == "/undo":
            del messages[max(len(messages) - 2, len(opening)) :]
            continue
        if not question:
            break
        messages.append({"role": "user", "content": question})
        text = answer(
            model, tokenizer, messages, cache, mtp=mtp, max_tokens=args.max_tokens, temp=args.temp
        )
        messages.append({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
