"""Tables of figures; those of other figures than the comparison's, one an option."""

from __future__ import annotations

from collections.abc import Sequence

NONE = "-"  # in place of a figure


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns rows of equal length; the first column is text, the others are figures."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for name, *figures in rows:
        cells = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *cells]).rstrip())
    return lines
