"""Real edits as texts to decode: files before and after a change, and agents' transcripts of them.

The changes are those of this repository's own history, and those between two releases of packages
with permissive licences, which pip fetches when the example runs.
"""

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

from mlx_lm.tokenizer_utils import TokenizerWrapper

ROOT = Path(__file__).parents[1]
RELEASES = [  # package, releases, licence
    ("attrs", "23.1.0", "23.2.0"),  # MIT
    ("click", "8.1.6", "8.1.7"),  # BSD-3-Clause
    ("requests", "2.30.0", "2.31.0"),  # Apache-2.0
]
SUFFIXES = (".py", ".md", ".metal")
LEAST, MOST = 800, 16_000  # characters of a file
TRANSCRIPTS = 5
CONTEXT = 2  # lines around a change that an agent's edit repeats


@dataclass(frozen=True)
class Edit:
    """A file, a change of it, and the file after the change."""

    name: str
    instruction: str
    old: str
    new: str

    @property
    def is_usable(self) -> bool:
        """Whether the file is of a fair size, and there is a change."""
        return self.old != self.new and all(LEAST <= len(x) <= MOST for x in (self.old, self.new))


@dataclass(frozen=True)
class Turn:
    """A prompt, and the answer that is forced after it, as token ids."""

    prompt: list[int]
    answer: list[int]


def history(revision: str, count: int) -> list[Edit]:
    """The last change of each of the first ``count`` usable files, up to a revision."""
    names = [n for n in _git("ls-tree", "-r", "--name-only", revision).splitlines()]
    edits: list[Edit] = []
    for name in names:
        if len(edits) == count:
            break
        if not name.endswith(SUFFIXES):
            continue
        last = _git("log", "-1", "--diff-filter=M", "--format=%H%x00%s", revision, "--", name)
        if last:
            commit, subject = last.strip().split("\0")
            old, new = _git("show", f"{commit}^:{name}"), _git("show", f"{commit}:{name}")
            edits.append(Edit(name, subject, old, new))
            edits = [edit for edit in edits if edit.is_usable]
    return edits


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def releases() -> list[Edit]:
    """The usable files that changed between two releases of each package."""
    edits = []
    for package, before, after in RELEASES:
        old, new = (dict(_fetch(f"{package}=={version}")) for version in (before, after))
        for name in sorted(old.keys() & new.keys()):
            edits.append(Edit(name, f"Bring {package} to {after}", old[name], new[name]))
    return [edit for edit in edits if edit.is_usable]


def _fetch(requirement: str) -> Iterator[tuple[str, str]]:
    """Name and text of each Python file of a package."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["-qqq", "--no-deps", "--only-binary", ":all:", "--dest", folder]
        command = [sys.executable, "-m", "pip", "download", *options, requirement]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".py"):
                    yield name, archive.read(name).decode()


def whole_file(edit: Edit, tokenizer: TokenizerWrapper) -> list[Turn]:
    """The old file and an instruction; the answer is the new file."""
    request = f"{edit.instruction}. Answer with the whole file.\n\n```\n{edit.old}```"
    messages = [
        {"role": "user", "content": request},
        {"role": "assistant", "content": f"```\n{edit.new}```"},
    ]
    return turns(messages, tokenizer)


def transcript(edit: Edit, tokenizer: TokenizerWrapper) -> list[Turn]:
    """An agent's work: it reads the file, edits it hunk by hunk, and shows the largest hunk."""
    messages = [
        {"role": "user", "content": f"{edit.instruction}. The file is {edit.name}."},
        _call("read_file", path=edit.name),
        {"role": "tool", "content": edit.old},
    ]
    shown = ""
    for before, after in hunks(edit):
        messages.append(_call("edit_file", path=edit.name, old_text=before, new_text=after))
        messages.append({"role": "tool", "content": f"{edit.name} was changed.\n{after}"})
        shown = max(shown, after, key=len)
    answer = f"I have changed {edit.name}. The main part is now:\n\n```\n{shown}```"
    messages.append({"role": "assistant", "content": answer})
    return turns(messages, tokenizer)


def _call(name: str, **arguments: str) -> dict[str, object]:
    return {"role": "assistant", "tool_calls": [{"name": name, "arguments": arguments}]}


def hunks(edit: Edit) -> list[tuple[str, str]]:
    """Pairs of an old and a new passage, with some lines around the change."""
    old, new = edit.old.splitlines(keepends=True), edit.new.splitlines(keepends=True)
    groups = SequenceMatcher(None, old, new, autojunk=False).get_grouped_opcodes(CONTEXT)
    spans = [(g[0][1], g[-1][2], g[0][3], g[-1][4]) for g in groups]
    return [("".join(old[a:b]), "".join(new[c:d])) for a, b, c, d in spans]


def turns(messages: list[dict[str, object]], tokenizer: TokenizerWrapper) -> list[Turn]:
    """A turn for each of the assistant's messages; a prompt holds everything before its answer."""
    found, before, tokens = [], "", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opened = tokenizer.apply_chat_template(
            messages[:i], tokenize=False, add_generation_prompt=True
        )
        closed = tokenizer.apply_chat_template(messages[: i + 1], tokenize=False)
        tokens = tokens + _encode(tokenizer, opened.removeprefix(before))
        answer = _encode(tokenizer, closed.removeprefix(opened))
        found.append(Turn(tokens, answer))
        tokens, before = tokens + answer, closed
    return found


def _encode(tokenizer: TokenizerWrapper, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)
