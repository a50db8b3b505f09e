"""The command ``python -m mlx_qwen3next.bench``."""

import sys
from collections.abc import Sequence

from ..decoding.queueing import set_command_buffers


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    set_command_buffers()
    from .command import main  # imports MLX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
