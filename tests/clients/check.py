"""Runs real clients against the server, and prints a table of what they did.

Each is installed from npm or PyPI in a scratch folder, which is also its home, and runs without a
terminal. The server is the real one, with a tiny model that says what the client's script holds: a
call of a tool, and a last word after the result. The check is whether the client connects, runs the
call, sends the second turn and ends, and how much of that turn's prompt was known.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent / "helpers")]

import stage  # noqa: E402
from client_list import CLIENTS, Client, Row  # noqa: E402

_PATIENCE = 300  # seconds for a row
_NODE = "node@22"  # npm's package of it
# Variables that a client needs to run and to install; all others stay here.
_KEPT = ("PATH", "LANG", "TERM", "NODE_EXTRA_CA_CERTS", "REQUESTS_CA_BUNDLE")
_KEPT_KINDS = ("PIP_", "SSL_", "npm_config_", "http_", "https_", "HTTP_", "HTTPS_", "no_", "NO_")
_HEADER = ("client", "version", "steps", "result", "prompt", "same", "known", "processed", "new")


@contextlib.contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process, which ends here with all that it has started."""
    process = subprocess.Popen(command, start_new_session=True, text=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@dataclass
class Place:
    """A scratch folder with a client in it.

    Args:
        folder: holds the client, its home and the folders that it works in.
    """

    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if name in _KEPT or name.startswith(_KEPT_KINDS)
        }
        home, temporary = self.folder / "home", self.folder / "tmp"
        home.mkdir(exist_ok=True)
        temporary.mkdir(exist_ok=True)
        programs = [self.folder / "node_modules/.bin", self.folder / "venv/bin"]
        path = os.pathsep.join([*map(str, programs), kept["PATH"]])
        return kept | {"HOME": str(home), "TMPDIR": str(temporary), "PATH": path, "NO_COLOR": "1"}

    def install(self, client: Client) -> str:
        """Installs a client; returns the version of its first package."""
        name = client.packages[0].partition("[")[0]
        if client.node:
            options = ("--no-audit", "--no-fund", "--loglevel", "error")
            # Without a tag npm takes what the installed node can run, which may be old.
            packages = [f"{package}@latest" for package in client.packages]
            self._run("npm", "install", "--prefix", str(self.folder), *options, _NODE, *packages)
            manifest = self.folder / "node_modules" / name / "package.json"
            return json.loads(manifest.read_text())["version"]
        self._run(sys.executable, "-m", "venv", str(self.folder / "venv"))
        python = str(self.folder / "venv/bin/python")
        self._run(python, "-m", "pip", "install", "--quiet", *client.packages)
        code = f"from importlib.metadata import version; print(version({name!r}))"
        return self._run(python, "-c", code).strip()

    def _run(self, *command: str) -> str:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with started(command, env=self.environment, cwd=self.folder, **pipes) as process:
            told, faults = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {faults[-2000:]}")
        return told

    def work(self, row: Row, url: str, log: Path) -> tuple[Path, int | None]:
        """Runs a row; returns the folder that it worked in and its exit status, None if it hung."""
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        for name, text in row.files.items():
            (work / name).write_text(text)
        given = {"{url}": url, "{port}": url.rpartition(":")[2]}
        command = [given.get(part, part) for part in row.command]
        if command[0].endswith((".py", ".mjs")):
            program = shutil.copy(HERE / command[0], self.folder)  # node looks there for packages
            command = ["node" if program.endswith(".mjs") else "python", program, *command[1:]]
        if command[0] == "launch":
            command = [sys.executable, "-m", "mlx_qwen3next.launch", *command[1:]]
        with log.open("wb") as file:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": file, "stderr": file}
            with started(command, env=self.environment, cwd=work, **pipes) as process:
                try:
                    return work, process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    return work, None


def result(row: Row, engine: stage.ScriptedEngine, work: Path, status: int | None) -> str:
    """What a row has come to: "passed", or the first thing that did not happen."""
    if not engine.turns:
        return "did not connect"
    proof = work / "proof.txt"
    if row.calls and (not proof.exists() or "called" not in proof.read_text()):
        return "no call executed"
    if row.second is not None and engine.second_turn is None:
        return "no second turn"
    if status is None:
        return f"did not end within {_PATIENCE} s"
    return "passed" if status == 0 else f"ended with {status}"


def check(client: Client, keep: bool) -> list[tuple[str, ...]]:
    """Installs a client and runs its rows; returns the lines of the table."""
    lines = []
    folder = Path(tempfile.mkdtemp(prefix="mlx_qwen3next-clients-"))
    try:
        place = Place(folder)
        try:
            version = place.install(client)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return [(client.name, "", "", "not installed", *["-"] * 5)]
        for row in client.rows:
            with stage.serving(row.first, row.second) as (engine, url):
                log = folder / f"{row.name}.log"
                work, status = place.work(row, url, log)
                outcome = result(row, engine, work, status)
                counts = ["-"] * 5
                if row.second is not None and engine.second_turn is not None:
                    counts = [str(count) for count in engine.counts()]
            if row.needs and outcome != "passed":
                outcome = f"needs {row.needs}"
            if outcome != "passed":
                print(f"--- {client.name}, {row.name}: {outcome}", file=sys.stderr)
                print(log.read_text(errors="replace")[-4000:], file=sys.stderr)
            lines.append((client.name, version, row.name, outcome, *counts))
    finally:
        if keep:
            print(f"{client.name} is in {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
    return lines


def joined(lines: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The lines of a table, with those that differ only in their steps as one."""
    steps: dict[tuple[str, ...], list[str]] = {}
    for client, version, step, *rest in lines:
        steps.setdefault((client, version, *rest), []).append(step)
    return [(*line[:2], ", ".join(names), *line[2:]) for line, names in steps.items()]


def main() -> int:
    """Checks the clients that are named, or all; returns 1 if one of them has not passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [client.name for client in CLIENTS]
    parser.add_argument("clients", nargs="*", metavar="CLIENT", help=", ".join(names))
    parser.add_argument("--keep", action="store_true", help="Keep the scratch folders.")
    args = parser.parse_args()
    if unknown := [name for name in args.clients if name not in names]:
        parser.error(f"there is no client {unknown[0]}; the clients are {', '.join(names)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that all is cleaned up
    lines = []
    for client in CLIENTS:
        if not args.clients or client.name in args.clients:
            lines += check(client, args.keep)
            print(lines[-1], file=sys.stderr)
    for line in (_HEADER, ("---",) * len(_HEADER), *joined(lines)):
        print("|", " | ".join(line), "|")
    return int(any(line[3] != "passed" for line in lines))


if __name__ == "__main__":
    sys.exit(main())
