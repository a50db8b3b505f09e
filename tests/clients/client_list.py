"""The clients: how each is installed, what it is asked, and what the model answers."""

from __future__ import annotations

from dataclasses import dataclass, field

from stage import Call

_COMMAND = "echo called > proof.txt"
_TASK = "Write the word 'called' to proof.txt with a shell command."
_DONE = "All done."
_WEATHER = Call("weather", {"city": "Paris"})
_CITY = '{"name": "Paris", "people": 2100000}'
_CITY_CALL = {"name": "Paris", "people": 2_100_000}


@dataclass(frozen=True)
class Row:
    """One run of a client.

    Args:
        name: of what it does.
        command: its words; ``launch`` stands for this package's, a file for a program beside it.
        first, second: the model's answers; no second answer, no second turn.
        files: names and texts in the folder that it works in.
        calls: whether proof of a call, or of an edit, must be in that folder.
    """

    name: str
    command: list[str]
    first: Call | str
    second: Call | str | None = _DONE
    files: dict[str, str] = field(default_factory=dict)
    calls: bool = True


@dataclass(frozen=True)
class Client:
    """A client.

    Args:
        packages: of npm or PyPI; the version told is that of the first.
        node: whether they are npm's.
    """

    name: str
    packages: list[str]
    rows: list[Row]
    node: bool = False


def _agent(name: str, package: str, call: Call, *arguments: str) -> Client:
    command = ["launch", name, "--port", "{port}", "--", *arguments]
    return Client(name, [package], [Row("tool", command, call)], node=True)


def _python(name: str, packages: list[str], *rows: Row) -> Client:
    return Client(name, packages, list(rows))


def _loop(client: str, name: str, program: str = "sdk.py") -> Row:
    """A row with a call and its result."""
    return Row(name, [program, f"{client}-{name}", "{url}"], _WEATHER)


def _single(client: str, name: str, answer: Call | str, program: str = "sdk.py") -> Row:
    """A row with one answer, which the program checks."""
    command = [program, f"{client}-{name}", "{url}"]
    return Row(name, command, answer, second=None, calls=False)


_EDIT = """proof.txt
```
<<<<<<< SEARCH
nothing
=======
called
>>>>>>> REPLACE
```
"""
# Fails once, so that aider sends the output back.
_TEST = "sh -c 'test -f tested || { touch tested; echo it fails; exit 1; }'"

CLIENTS = [
    _agent(
        "claude",
        "@anthropic-ai/claude-code",
        Call("Bash", {"command": _COMMAND, "description": "Write a word"}),
        *("-p", _TASK, "--allowedTools", "Bash"),
    ),
    _agent(
        "codex",
        "@openai/codex",
        Call("exec_command", {"cmd": _COMMAND}),
        *("exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", _TASK),
    ),
    _agent(
        "opencode",
        "opencode-ai",
        Call("bash", {"command": _COMMAND, "description": "Write a word"}),
        *("run", _TASK),
    ),
    _agent(
        "qwen",
        "@qwen-code/qwen-code",
        Call("run_shell_command", {"command": _COMMAND, "is_background": False}),
        *("--yolo", "-p", _TASK),
    ),
    _python(
        "aider",
        ["aider-chat"],
        Row(
            "edit",
            [
                *("launch", "aider", "--port", "{port}", "--", "--yes-always", "--no-git"),
                *("--no-check-update", "--no-show-model-warnings", "--analytics-disable"),
                *("--auto-test", "--test-cmd", _TEST, "--message", _TASK, "proof.txt"),
            ],
            _EDIT,
            files={"proof.txt": "nothing\n"},
        ),
    ),
    _python(
        "openai",
        ["openai"],
        *(_loop("openai", name) for name in ("chat", "chat-stream", "responses")),
        _loop("openai", "responses-stream"),
        Row(
            "custom tool",
            ["sdk.py", "openai-custom", "{url}"],
            Call("patch", {"input": "*** Begin\n+1.0\n*** End"}),
        ),
        _single("openai", "logprobs", _DONE),
        _single("openai", "completions", _DONE),
        _single("openai", "parse", _CITY),
        _single("openai", "responses-parse", _CITY),
    ),
    _python(
        "anthropic",
        ["anthropic"],
        *(_loop("anthropic", name) for name in ("tools", "stream", "runner")),
        _single("anthropic", "count", _DONE),
        _single("anthropic", "forced", Call("city", _CITY_CALL)),
        _single("anthropic", "parse", _CITY),
    ),
    _python(
        "langchain",
        ["langchain", "langchain-openai", "langchain-anthropic"],
        *(_loop("langchain", name) for name in ("tools", "anthropic", "responses")),
        _single("langchain", "function_calling", Call("City", _CITY_CALL)),
        _single("langchain", "json_schema", _CITY),
    ),
    _python(
        "pydantic-ai",
        ["pydantic-ai-slim[openai,anthropic]"],
        *(_loop("pydantic-ai", name) for name in ("chat", "responses", "anthropic")),
        Row(
            "output",
            ["sdk.py", "pydantic-ai-output", "{url}"],
            _WEATHER,
            Call("final_result", _CITY_CALL),
        ),
        _single("pydantic-ai", "native", _CITY),
    ),
    Client(
        "ai-sdk",
        ["ai", "@ai-sdk/openai-compatible", "@ai-sdk/openai", "@ai-sdk/anthropic", "zod"],
        [
            *(_loop("ai-sdk", name, "sdk.mjs") for name in ("chat", "chat-stream", "responses")),
            _loop("ai-sdk", "anthropic", "sdk.mjs"),
            _single("ai-sdk", "forced", Call("city", _CITY_CALL), program="sdk.mjs"),
            _single("ai-sdk", "object", _CITY, program="sdk.mjs"),
        ],
        node=True,
    ),
    _python(
        "instructor",
        ["instructor"],
        _single("instructor", "tools", Call("City", _CITY_CALL)),
        _single("instructor", "json_schema", _CITY),
    ),
]
