"""What the commands have in common."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn


class Parser(argparse.ArgumentParser):
    """The parser of an mlx-lm command with flags of ours; its errors are one line.

    Flags added to it replace stock ones of the same name.
    """

    def __init__(self, stock: argparse.ArgumentParser, **options: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            parents=[stock],
            conflict_handler="resolve",
            **options,
        )
        self._ours = 0

    def add_argument_group(self, *args: Any, **options: Any) -> Any:
        """A group of flags, which ``--help`` shows before the stock ones."""
        group = super().add_argument_group(*args, **options)
        if hasattr(self, "_ours"):  # not argparse's own groups, or those of the stock parser
            self._action_groups.insert(self._ours, self._action_groups.pop())
            self._ours += 1
        return group

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message} (--help lists the options)\n")
