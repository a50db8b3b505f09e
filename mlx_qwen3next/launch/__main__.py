"""The command ``python -m mlx_qwen3next.launch``: an agent, set up for the server."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ..cli import LineParser, guarded
from ..storage.replacing import write_text
from .agents import AGENTS, Agent, Place
from .running import place_of, started

CONTEXT = 262_144  # tokens, of the published models
ENOUGH = 32_768  # tokens of context below which an agent's own instructions hardly fit
EPILOG = """examples:
  %(prog)s claude --model DIR_OR_REPO
      start the server, unless one runs at the port, and Claude Code with it
  %(prog)s codex -- exec "What does this project do?"
      hand arguments on to the agent
  %(prog)s opencode --print
      print the configuration to paste, and start nothing
"""


def parser() -> argparse.ArgumentParser:
    """Makes the command's parser."""
    result = LineParser(
        prog="python -m mlx_qwen3next.launch",
        usage="%(prog)s AGENT [--model DIR_OR_REPO] [other options] [-- ARGUMENTS OF THE AGENT]",
        description="Run a coding agent on a local Qwen3-Next. Its configuration is temporary.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("agent", choices=AGENTS, metavar="AGENT", help=", ".join(AGENTS))
    result.add_argument(
        "--model",
        metavar="DIR_OR_REPO",
        help="Model of the server, if one must be started (default: the demo model).",
    )
    result.add_argument(
        "--port", type=int, default=8080, metavar="N", help="Port of the server (default: 8080)."
    )
    result.add_argument(
        "--api-key", default="none", metavar="KEY", help="Key of the server, if it wants one."
    )
    result.add_argument(
        "--print", action="store_true", help="Print the agent's configuration, and start nothing."
    )
    result.add_argument(
        "--write",
        action="store_true",
        help="Write the configuration into the agent's own files, and start nothing.",
    )
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs an agent and returns its exit status; 2 for bad input."""
    given = list(sys.argv[1:] if argv is None else argv)
    end = given.index("--") if "--" in given else len(given)
    args = parser().parse_args(given[:end])
    return guarded(lambda: run(args, given[end + 1 :]))


def run(args: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs an agent, or prints or writes its configuration; returns the exit status.

    Args:
        rest: arguments of the agent.

    Raises:
        ValueError: the agent is not installed, or the server cannot answer.
    """
    agent = AGENTS[args.agent]
    url = f"http://127.0.0.1:{args.port}"
    if args.print or args.write:
        place = place_of(url, args.api_key) or Place(url, args.api_key, _name(args.model), CONTEXT)
        for name, text in agent.files(place).items():
            if args.print:
                print(f"# ~/{name}\n{text}")
            if args.write:
                print(f"wrote {write(Path.home() / name, text)}")
        return 0
    if (program := shutil.which(agent.program)) is None:
        raise ValueError(f"{agent.program} is not installed; install it with: {agent.install}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mlx_qwen3next-")))
        running = place_of(url, args.api_key)
        if running is None:
            log = folder / "server.log"
            print(f"starting the server; its log is {log}", file=sys.stderr)
            running = stack.enter_context(started(url, args.api_key, server_flags(args), log))
        print(f"{agent.program} uses {running.model} at {running.url}", file=sys.stderr)
        if running.context < ENOUGH:
            message = f"its context of {running.context} tokens is too short for most work"
            print(f"warning: {message}", file=sys.stderr)
        return _run(agent, program, running, folder, rest)


def server_flags(args: argparse.Namespace) -> list[str]:
    """The flags of a server for an agent."""
    flags = ["--port", str(args.port)]
    if args.api_key != "none":
        flags += ["--api-key", args.api_key]
    return flags if args.model is None else [*flags, "--model", args.model]


def _name(model: str | None) -> str:
    """The name that a server gives a model."""
    if model is None:
        return "qwen3-next-demo"
    return Path(model).resolve().name if Path(model).exists() else model


def _run(agent: Agent, program: str, place: Place, folder: Path, rest: Sequence[str]) -> int:
    """Runs the agent with a temporary configuration; returns its exit status."""
    files = {}
    for name, text in agent.files(place).items():
        files[name] = folder / Path(name).name
        files[name].write_text(text)
    arguments, environment = agent.start(place, files)
    known = {name: value for name, value in os.environ.items() if name not in agent.hidden}
    process = subprocess.Popen([program, *arguments, *rest], env=known | environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # which is for the agent
            pass


def write(path: Path, text: str) -> Path:
    """Writes a configuration, or adds it to the one that is there, which is kept beside it.

    Returns:
        The path.

    Raises:
        ValueError: the file is there, and holds no JSON object.
    """
    if path.exists():
        before = path.read_text(encoding="utf-8")
        try:
            mine, theirs = json.loads(text), json.loads(before)
        except ValueError:
            mine = theirs = None
        if not isinstance(mine, dict) or not isinstance(theirs, dict):
            raise ValueError(f"{path} is there already: add by hand what --print prints")
        kept = path.with_name(f"{path.name}.before")
        if not kept.exists():  # a second time would lose the user's own
            write_text(kept, before)
        text = json.dumps(_merged(theirs, mine), indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def _merged(before: dict[str, Any], added: dict[str, Any]) -> dict[str, Any]:
    """An object with all that was added, at any depth."""
    result = dict(before)
    for key, value in added.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict)
        result[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return result


if __name__ == "__main__":
    sys.exit(main())
