"""Checks structured output: over 200 schemas, drawn at temperature 1.5, in a batch and alone.

    python examples/schemas.py [--model DIR] [--clients 32] [--tokens 96] [--only TEXT]

Every answer that has ended must be valid by ``jsonschema``, and every other one must be as long as
it may be. A server answers all schemas at once, to many clients, and then one after the other, with
drafts: of the grammar, copied, and of the MTP head. Another one answers them plainly. All three
must say the same. A number that lies between two tokens to the last digit may give either, by
rounding; such tokens are neighbours, since a draw is a point on the line of all tokens in the order
of their ids.
"""

import argparse
import collections
import json
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from schema_corpus import Schema, schemas
from served import OURS, Served, float32_copy

from mlx_qwen3next.checkpoint.hub import BUNDLED

TEMPERATURE = 1.5
NEAR = 16  # ids from one neighbour to the other, at most; there may be others that are not allowed


@dataclass
class Answer:
    """An answer: its text, its tokens, how it has ended, and what it has used."""

    status: int
    text: str = ""
    tokens: Sequence[int] = ()
    finish_reason: str | None = None
    usage: dict[str, Any] = field(default_factory=dict)


def ask(served: Served, name: str, schema: Schema, tokens: int) -> Answer:
    """An answer that is to fit a schema; its numbers belong to the schema's name."""
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {
        "messages": [{"role": "user", "content": f"Fill in: {name}"}],
        "response_format": form,
        "temperature": TEMPERATURE,
        "seed": sum(name.encode()),
        "max_tokens": tokens,
        "logprobs": True,
    }
    with served.request("POST", "/v1/chat/completions", body) as response:
        answer = json.load(response)
    if response.status != 200:
        return Answer(response.status, str(answer))
    (choice,) = answer["choices"]
    ids = [entry["id"] for entry in choice["logprobs"]["content"]]
    text, reason = choice["message"]["content"] or "", choice["finish_reason"]
    return Answer(200, text, ids, reason, answer["usage"])


def is_rounding(one: Answer, other: Answer) -> bool:
    """Whether the first tokens in which two answers differ are neighbours."""
    first = next(
        (pair for pair in zip(one.tokens, other.tokens, strict=False) if len({*pair}) > 1), None
    )
    return first is not None and abs(first[0] - first[1]) <= NEAR


def fault(answer: Answer, schema: Schema, tokens: int) -> str | None:
    """Returns an answer's fault; None if there is none."""
    if answer.status != 200:
        return f"status {answer.status}: {answer.text}"
    if answer.finish_reason == "length":
        used = answer.usage["completion_tokens"]
        return None if used == tokens else f"cut after {used} tokens"
    try:
        jsonschema.validate(json.loads(answer.text), schema, jsonschema.Draft202012Validator)
    except ValueError as error:
        return f"no JSON: {error}"
    except jsonschema.ValidationError as error:
        return error.message
    return None if answer.finish_reason == "stop" else f"ended by {answer.finish_reason}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96, help="of an answer, at most")
    parser.add_argument("--only", default="", help="schemas whose names contain this")
    options = parser.parse_args()
    wanted = {name: schema for name, schema in schemas().items() if options.only in name}
    answers: dict[str, dict[str, Answer]] = {}
    drafted: collections.Counter[str] = collections.Counter()

    def answer_all(way: str, served: Served, clients: int) -> None:
        def one(item: tuple[str, Any]) -> Answer:
            return ask(served, *item, options.tokens)

        start = time.perf_counter()
        with ThreadPoolExecutor(clients) as pool:
            answers[way] = dict(zip(wanted, pool.map(one, wanted.items()), strict=True))
        print(f"{way}: {len(wanted)} answers in {time.perf_counter() - start:.0f} s", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        model = float32_copy(Path(folder), options.model)
        common = "--model", model, "--decode-concurrency", options.clients, "--log-level", "ERROR"
        with Served(OURS, *common, "--mtp", 2, "--lookup", 7) as served:
            answer_all(f"{options.clients} clients", served, options.clients)
            answer_all("alone, with drafts", served, 1)
        with Served(OURS, *common, "--mtp", "off", "--lookup", "off") as served:
            answer_all("alone, plain", served, 1)

    ends: collections.Counter[str] = collections.Counter()
    wrong = 0
    plain = answers["alone, plain"]
    for way, given in answers.items():
        for name, answer in given.items():
            found = fault(answer, wanted[name], options.tokens)
            if found is None and answer.tokens != plain[name].tokens:
                if is_rounding(answer, plain[name]):
                    ends["by rounding"] += 1
                else:
                    found = f"other than plain: {plain[name].text}"
            if found is not None:
                wrong += 1
                print(f"{way}, {name}: {found}\n  {answer.text}")
            ends[str(answer.finish_reason)] += 1
            details = answer.usage.get("completion_tokens_details", {})
            drafted.update(details.get("accepted_drafts", {}))
            drafted["all"] += answer.usage.get("completion_tokens", 0)
    total = drafted.pop("all")
    shares = ", ".join(f"{count} {source}" for source, count in drafted.items())
    print(f"{len(wanted)} schemas, {dict(ends)}, {wrong} wrong; of {total} tokens drafts: {shares}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
