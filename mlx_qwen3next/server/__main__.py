"""The command ``python -m mlx_qwen3next.server``."""

import sys
from collections.abc import Sequence

from ..decoding.queueing import set_command_buffers, use_one_heap


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    set_command_buffers()
    use_one_heap()
    from .command import main  # imports MLX

    return main(argv)


if __name__ == "__main__":
    sys.exit(main())
