"""The sampling that a checkpoint recommends, in transformers' ``generation_config.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..checkpoint.files import GENERATION_CONFIG
from ..checkpoint.hub import find_file
from ..model.config import read_json
from .sampling import Sampling

_OPTIONS = {"temperature": "temp", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}


def recommended_sampling(path_or_repo: str | Path | None = None) -> dict[str, float]:
    """Reads the sampling that a checkpoint recommends.

    Args:
        path_or_repo: as for :func:`mlx_qwen3next.load`. Of a repository only this file is fetched.

    Returns:
        Options for :func:`mlx_qwen3next.stream_generate`: those of ``temp``, ``top_p``, ``top_k``
        and ``min_p`` that the file has. ``temp`` is 0 where ``do_sample`` is false, and 1 where it
        is true without a temperature, as in transformers. Empty without such a file.

    Raises:
        ValueError: there is no such model, or the file cannot be used; the message names the field.
    """
    file = find_file(path_or_repo, GENERATION_CONFIG)
    if file is None:
        return {}
    raw = {field: value for field, value in read_json(file).items() if value is not None}
    found = {
        option: _checked(file, field, raw[field])
        for field, option in _OPTIONS.items()
        if field in raw
    }
    samples = raw.get("do_sample")
    if not isinstance(samples, bool | None):
        raise ValueError(f"{file}: do_sample must be true or false, got {samples!r}")
    if samples is False:
        found["temp"] = 0.0
    elif samples:
        found.setdefault("temp", 1.0)
    return found


def _checked(file: Path, field: str, value: Any) -> float:
    """Returns the value of a field as its option takes it.

    Raises:
        ValueError: it is of another type, or out of the option's range.
    """
    option, is_whole = _OPTIONS[field], field == "top_k"
    if type(value) not in ((int,) if is_whole else (int, float)):
        kind = "a whole number" if is_whole else "a number"
        raise ValueError(f"{file}: {field} must be {kind}, got {value!r}")
    value = 0 if is_whole and value == -1 else value  # other servers' way of writing "off"
    try:
        Sampling(**{option: value})
    except ValueError as error:
        raise ValueError(f"{file}: {str(error).replace(option, field, 1)}") from None
    return value
