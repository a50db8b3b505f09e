"""MTP heads, and the checkpoints they come from: a head may belong to another trunk.

A head's parameters fit every trunk of its shapes. A trunk that has none, Coder-Next's, may take a
sister's: its drafts are less often right then, and the tokens stay the same. The head computes with
its own checkpoint's config, whose ``rope_theta`` may differ from the trunk's; only the scaling of
positions is the trunk's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..model import layouts
from ..model.config import Config
from ..storage.safetensors import Tensor
from . import foreign
from .files import INDEX_FILE, MTP_FILE, read_headers, read_weight_map
from .hub import find_file

HEAD_CONFIG = "head_config"  # entry of layouts.MARK: the config that a head computes with

# The config's fields that head and trunk must share: they exchange hidden states, embeddings and
# logits, and are divided among processes and cached alike.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "num_experts",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
)


@dataclass(frozen=True)
class Head:
    """The MTP head of a checkpoint, on disk.

    Attributes:
        directory: the checkpoint's, for messages.
        config: the one that it computes with.
        tensors: name -> stored tensor of ``mtp.*``.
    """

    directory: Path
    config: Config
    tensors: dict[str, Tensor]


def find_head(path_or_repo: str | Path, trunk: Config) -> Head:
    """Finds the head of a checkpoint for another trunk; of a repository only its files are fetched.

    Args:
        path_or_repo: a local directory or a hub repository.
        trunk: the config of the trunk that is to take the head.

    Raises:
        ValueError: there is no head, or it cannot be read, or does not fit the trunk.
    """
    find, name = partial(find_file, path_or_repo), str(path_or_repo)
    file = find("config.json")
    if file is None:
        raise ValueError(f"{name} is no model repository: it has no config.json")
    config = Config.from_file(file)
    index = find(INDEX_FILE)
    weight_map = {} if index is None else read_weight_map(index)
    names = sorted({file for tensor, file in weight_map.items() if layouts.is_mtp(tensor)})
    if not names:
        names = [MTP_FILE] if index or find(MTP_FILE) else ["model.safetensors"]
    files = [found for found in map(find, names) if found is not None]
    tensors = {n: t for n, t in read_headers(files).items() if layouts.is_mtp(n)}
    if not tensors:
        raise ValueError(f"{name} has no MTP head (no tensor named mtp.*)")
    foreign.refuse_foreign(tensors, file.parent)
    foreign.refuse_fp8(tensors)
    return Head(file.parent, head_config(tensors, config, trunk), tensors)


def head_config(tensors: Mapping[str, Tensor], config: Config, trunk: Config) -> Config:
    """The config that a checkpoint's head computes with, after checking that it fits a trunk.

    Args:
        tensors: by name; the file of the head's may hold its own config.
        config: the checkpoint's, which is the head's as well unless the file says otherwise.
        trunk: the config of the trunk that takes the head.

    Raises:
        ValueError: it does not fit, or the file's config is none.
    """
    head = next(tensor for name, tensor in tensors.items() if layouts.is_mtp(name))
    try:
        mark: Any = json.loads(head.metadata.get(layouts.MARK, "{}"))
        config = Config.from_dict(mark[HEAD_CONFIG]) if HEAD_CONFIG in mark else config
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{head.file}: {HEAD_CONFIG} in its metadata: {error}") from None
    check_fit(config, trunk, str(head.file))
    return config


def check_fit(head: Config, trunk: Config, name: str) -> None:
    """Checks that a head's shapes are those of a trunk's head.

    Args:
        name: the head's file or checkpoint, for the message.

    Raises:
        ValueError: one is not.
    """
    for key in _SHARED:
        if getattr(head, key) != getattr(trunk, key):
            raise ValueError(
                f"the head of {name} does not fit this model: {key} is {getattr(head, key)} "
                f"there, {getattr(trunk, key)} here"
            )
