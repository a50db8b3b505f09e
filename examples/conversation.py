"""The cost of each turn of a chat, beside stock mlx_lm.server.

    python examples/conversation.py [--model DIR] [--system-tokens 2000] [--turns 10]

Both servers have the same float32 files and take turns in the same conversation: a long system
prompt, then questions. The program prints, for each turn, how many of the prompt's tokens were
processed and the time to the first piece of text. Then it edits an earlier turn, and after that it
restarts the servers. It compares all answers with those of this package's server without a prompt
cache (mlx_lm.server drops a space at the beginning of an answer).
"""

import argparse
import inspect
import statistics
import tempfile
import textwrap
from pathlib import Path

from served import OURS, STOCK, Served, float32_copy

from mlx_qwen3next.checkpoint.hub import BUNDLED
from mlx_qwen3next.checkpoint.loading import load

QUESTIONS = [
    "What does math.sqrt do?",
    "How do I use itertools.chain?",
    "What is collections.deque?",
    "What does os.path.join return?",
    "What is the signature of shutil.copyfile?",
    "What does json.dumps do?",
    "What is itertools.count?",
    "How do I use functools.reduce?",
    "What does re.compile return?",
    "What is a threading.Lock?",
]
OPTIONS = {"temperature": 0, "max_tokens": 96}


def system_prompt(tokenizer, tokens: int) -> str:
    """The given number of tokens of Python source."""
    ids = tokenizer.encode(inspect.getsource(textwrap) + inspect.getsource(statistics))
    return tokenizer.decode(ids[:tokens])


def turns(servers: dict[str, Served], messages: list[dict], questions: list[str]) -> dict:
    """The answers of each server to the questions of one conversation; the servers take turns."""
    answers = {name: [] for name in servers}
    for question in questions:
        messages.append({"role": "user", "content": question})
        for name, server in servers.items():
            answers[name].append(server.ask(messages, **OPTIONS))
        messages.append({"role": "assistant", "content": answers["ours"][-1].text})
        row = {name: answer[-1] for name, answer in answers.items()}
        new = {name: a.usage["prompt_tokens"] - a.cached for name, a in row.items()}
        print(
            f"{len(answers['ours']):4} {row['ours'].usage['prompt_tokens']:8}"
            + "".join(f" {new[name]:9} {1000 * a.first:9.0f}" for name, a in row.items()),
            flush=True,
        )
        if row["ours"].text != row["no cache"].text:
            print("     ANSWERS DIFFER: " + repr({n: a.text for n, a in row.items()}))
        if row["ours"].text.lstrip() != row["mlx_lm.server"].text.lstrip():
            print("     mlx_lm.server differs: " + repr({n: a.text for n, a in row.items()}))
    return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=BUNDLED)
    parser.add_argument("--system-tokens", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=len(QUESTIONS))
    args = parser.parse_args()
    _, tokenizer = load(args.model)
    opening = {"role": "system", "content": system_prompt(tokenizer, args.system_tokens)}
    questions = [QUESTIONS[i % len(QUESTIONS)] for i in range(args.turns)]
    with tempfile.TemporaryDirectory() as scratch:
        kept, model = Path(scratch) / "kept", Path(scratch) / "model"
        model.mkdir()
        float32_copy(model, args.model)
        ours = [OURS, "--model", model, "--prompt-cache-dir", kept]
        with (
            Served(*ours) as server,
            Served(STOCK, "--model", model) as stock,
            Served(OURS, "--model", model, "--prompt-cache-bytes", 1) as without,
        ):
            servers = {"ours": server, "mlx_lm.server": stock, "no cache": without}
            head = "".join(f" {name:>19}" for name in servers)
            print(f"turn   prompt{head}\n" + " " * 13 + " processed  first ms" * len(servers))
            messages = [opening]
            answers = turns(servers, messages, questions)
            seconds = {n: statistics.median(a.first for a in of[1:]) for n, of in answers.items()}
            print("median of turns 2…: ", end="")
            print(", ".join(f"{n} {1000 * s:.0f} ms" for n, s in seconds.items()))
            print(f"mlx_lm.server / ours: {seconds['mlx_lm.server'] / seconds['ours']:.2f}")

            print("\nwith turn 5 edited:")
            edited = messages[: 1 + 2 * 4]
            turns(servers, edited, ["What does glob.glob return?"])

            for restarted in (server, stock):
                restarted.stop()
                restarted.start()
            print("\nafter a restart, turn 11:")
            turns(servers, messages, ["What is a heap?"])
            print("\nafter the restart, the edited turn once more, and the next:")
            turns(servers, edited[:-2], ["What does glob.glob return?", "What is a heap?"])


if __name__ == "__main__":
    main()
