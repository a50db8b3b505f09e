"""The agents: how each is told of the server, and how it is installed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

NAME = "mlx_qwen3next"  # of the provider, where an agent has several
_PATIENCE = 3600  # seconds; the first prompt of an agent takes minutes on a small machine
_ANSWER = 32_000  # tokens of an answer at most


class Place(NamedTuple):
    """A server and its model.

    Args:
        url: the address, without a path.
        key: the API key, or any text.
        model: the name.
        context: the length of the context, in tokens.
    """

    url: str
    key: str
    model: str
    context: int

    @property
    def answer(self) -> int:
        """The most tokens of an answer that leave room for a prompt."""
        return min(_ANSWER, self.context // 4)


class Start(NamedTuple):
    """The command and the settings of an agent.

    Args:
        arguments: of its command.
        environment: variables beside the user's.
    """

    arguments: list[str]
    environment: dict[str, str]


@dataclass(frozen=True)
class Agent:
    """An agent.

    Args:
        program: its command.
        install: the command that installs it.
        files: makes its configuration: paths below the user's home -> texts.
        start: makes its start from a place and the files' paths, which are temporary.
        hidden: variables of the user's that would lead it elsewhere.
    """

    program: str
    install: str
    files: Callable[[Place], dict[str, str]]
    start: Callable[[Place, Mapping[str, Path]], Start]
    hidden: tuple[str, ...] = ()


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


# --- Claude Code ----------------------------------------------------------------------------------
_CLAUDE = ".claude/settings.json"


def _claude(place: Place) -> dict[str, str]:
    models = ("MODEL", *(f"DEFAULT_{name}_MODEL" for name in ("OPUS", "SONNET", "HAIKU", "FABLE")))
    return {
        **{"ANTHROPIC_BASE_URL": place.url, "ANTHROPIC_AUTH_TOKEN": place.key},
        **{f"ANTHROPIC_{name}": place.model for name in models},
        "CLAUDE_CODE_SUBAGENT_MODEL": place.model,
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(place.context),
        "CLAUDE_CODE_AUTO_COMPACT_WINDOW": str(place.context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(place.answer),
        "API_TIMEOUT_MS": str(_PATIENCE * 1000),
        "CLAUDE_STREAM_IDLE_TIMEOUT_MS": str(_PATIENCE * 1000),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "CLAUDE_CODE_ATTRIBUTION_HEADER": "0",
    }


# --- Codex ----------------------------------------------------------------------------------------
def _codex(place: Place) -> dict[str, Any]:
    """The configuration: keys, of which those of the provider have dots, and their values."""
    provider = {
        **{"name": NAME, "base_url": f"{place.url}/v1", "wire_api": "responses"},
        "experimental_bearer_token": place.key,
        "stream_idle_timeout_ms": _PATIENCE * 1000,
    }
    return {
        **{"model": place.model, "model_provider": NAME, "model_context_window": place.context},
        "model_auto_compact_token_limit": place.context * 9 // 10,
        "web_search": "disabled",
        **{f"model_providers.{NAME}.{key}": value for key, value in provider.items()},
    }


def _codex_toml(place: Place) -> str:
    return "".join(f"{key} = {json.dumps(value)}\n" for key, value in _codex(place).items())


def _codex_start(place: Place, _: Mapping[str, Path]) -> Start:
    given = [f"{key}={json.dumps(value)}" for key, value in _codex(place).items()]
    return Start([part for pair in given for part in ("-c", pair)], {})


# --- opencode -------------------------------------------------------------------------------------
def _opencode(place: Place) -> dict[str, Any]:
    limits = {"limit": {"context": place.context, "output": place.answer}}
    provider = {
        **{"npm": "@ai-sdk/openai-compatible", "name": NAME},
        "options": {"baseURL": f"{place.url}/v1", "apiKey": place.key, "timeout": False},
        "models": {place.model: {"name": place.model} | limits},
    }
    model = f"{NAME}/{place.model}"
    return {"provider": {NAME: provider}, "model": model, "small_model": model}


# --- Qwen Code ------------------------------------------------------------------------------------
_QWEN = ".qwen/settings.json"


def _qwen_environment(place: Place) -> dict[str, str]:
    values = {"BASE_URL": f"{place.url}/v1", "API_KEY": place.key, "MODEL": place.model}
    return {f"OPENAI_{name}": value for name, value in values.items()}


def _qwen(place: Place) -> dict[str, Any]:
    config = {"contextWindowSize": place.context, "timeout": _PATIENCE * 1000}
    return {
        "security": {"auth": {"selectedType": "openai"}},
        "model": {"name": place.model, "generationConfig": config},
        "env": _qwen_environment(place),
    }


# --- aider ----------------------------------------------------------------------------------------
_AIDER, _AIDER_MODELS = ".aider.conf.yml", ".aider.model.metadata.json"


def _aider(place: Place) -> dict[str, str]:
    model = f"openai/{place.model}"
    config = {
        **{"model": model, "openai-api-base": f"{place.url}/v1", "openai-api-key": place.key},
        **{"timeout": _PATIENCE, "edit-format": "diff"},  # it would have whole files written
    }
    limits = {"max_input_tokens": place.context, "max_output_tokens": place.answer}
    kind = {"litellm_provider": "openai", "mode": "chat"}
    return {  # JSON is YAML
        _AIDER: _json(config),
        _AIDER_MODELS: _json({model: limits | kind}),
    }


AGENTS = {
    "claude": Agent(
        "claude",
        "npm install -g @anthropic-ai/claude-code",
        lambda place: {_CLAUDE: _json({"env": _claude(place)})},
        lambda place, files: Start(["--settings", str(files[_CLAUDE])], _claude(place)),
        hidden=("ANTHROPIC_API_KEY",),
    ),
    "codex": Agent(
        "codex",
        "npm install -g @openai/codex",
        lambda place: {".codex/config.toml": _codex_toml(place)},
        _codex_start,
    ),
    "opencode": Agent(
        "opencode",
        "npm install -g opencode-ai",
        lambda place: {".config/opencode/opencode.json": _json(_opencode(place))},
        lambda place, _: Start([], {"OPENCODE_CONFIG_CONTENT": json.dumps(_opencode(place))}),
    ),
    "qwen": Agent(
        "qwen",
        "npm install -g @qwen-code/qwen-code",
        lambda place: {_QWEN: _json(_qwen(place))},
        lambda place, files: Start(
            [],
            {"QWEN_CODE_SYSTEM_SETTINGS_PATH": str(files[_QWEN])} | _qwen_environment(place),
        ),
    ),
    "aider": Agent(
        "aider",
        "python -m pip install aider-install && aider-install",
        _aider,
        lambda _, files: Start(
            [
                *("--config", str(files[_AIDER])),
                *("--model-metadata-file", str(files[_AIDER_MODELS])),
            ],
            {},
        ),
    ),
}
