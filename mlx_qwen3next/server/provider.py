"""The provider of the model that the server runs."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_lm.server import ModelProvider

from ..checkpoint.loading import load
from ..group import Group


class Provider(ModelProvider):
    """Loads the only model of the server, in place of mlx-lm's provider.

    Args:
        args: the arguments of the command.
        group: the processes that run the model together.
        divided: how they divide it, as options of :func:`mlx_qwen3next.load`.
    """

    def __init__(self, args: argparse.Namespace, group: Group, divided: dict[str, Any]):
        self._group, self._divided = group, divided
        super().__init__(args)

    def load_default(self) -> None:
        """Loads the model that the arguments name; see ``_load``."""
        self._load(self.cli_args.model, self.cli_args.adapter_path)

    def _load(
        self,
        model_path: str | None,
        adapter_path: str | None = None,
        draft_model_path: str | None = None,
    ) -> None:
        """Loads a model.

        Raises:
            ValueError: the model cannot be loaded, or not with these arguments.
        """
        model, tokenizer = load(
            model_path,
            tokenizer_config=self._tokenizer_config,
            adapter_path=adapter_path,
            group=self._group,
            **self._divided,
        )
        if self.cli_args.use_default_chat_template and tokenizer.chat_template is None:
            tokenizer.chat_template = tokenizer.default_chat_template
        key = model_path, adapter_path, draft_model_path
        vars(self).update(model_key=key, model=model, tokenizer=tokenizer, is_batchable=True)
