"""The needs of a conversion, before it starts: sizes, memory, disk, and the Macs it suits."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mlx_qwen3next.checkpoint.files import MTP_FILE
from mlx_qwen3next.model import capacity
from mlx_qwen3next.model.capacity import GB, GPU_SHARE

from . import weights
from .plan import Conversion
from .repository import Repository
from .weights import Chunk, File

MACS = (16, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)  # GB of memory that Macs come with
_CONTEXTS = (8_192, 262_144)
# Peak of a conversion on the largest layers; NOTES.md has the measurement.
_WORKING_MEMORY = 0.5 * GB


def _size(count: float) -> str:
    return f"{count / GB:.2f} GB" if count >= 0.1 * GB else f"{count / 1e6:.1f} MB"


def disk_needed(conversion: Conversion, files: Sequence[File], work: Sequence[Chunk]) -> int:
    """Bytes to be written beside the target: the output, and source files that are streamed."""
    output = sum(file.size for file in files)
    if isinstance(conversion.source, Repository) and conversion.source.streamed:
        output += weights.peak_source_bytes(work, conversion.source.sizes)
    return output


def check_disk(
    folder: Path, conversion: Conversion, files: Sequence[File], work: Sequence[Chunk]
) -> None:
    """Checks that the disk has room, counting files that are in ``folder`` already.

    Raises:
        ValueError: there is too little room for the output or for the hub's cache.
    """
    there = sum(f.stat().st_blocks * 512 for f in folder.rglob("*") if f.is_file())
    needed = [(folder, disk_needed(conversion, files, work) - there)]
    if isinstance(conversion.source, Repository) and not conversion.source.streamed:
        needed.append((conversion.source.directory, conversion.source.missing_bytes()))
    disks: dict[int, tuple[Path, int]] = {}
    for path, count in needed:
        place = next(p for p in (path, *path.absolute().parents) if p.exists())
        place, before = disks.get(place.stat().st_dev, (place, 0))
        disks[place.stat().st_dev] = place, before + count
    for place, count in disks.values():
        free = shutil.disk_usage(place).free
        if count > free:
            raise ValueError(
                f"the conversion needs {_size(count)} more on disk, but {place} has "
                f"{_size(free)} free"
            )


def describe(
    conversion: Conversion,
    files: Sequence[File],
    work: Sequence[Chunk],
    recipe: Sequence[str] = (),
) -> str:
    """The report of ``--dry-run``.

    Args:
        recipe: lines about what ``--fit`` chose.
    """
    source, config = conversion.source, conversion.source.config
    kinds = Counter(tensor.dtype for tensor in source.tensors.values())
    bytes_in = sum(tensor.nbytes for tensor in source.tensors.values())
    lines = [
        f"source       {source.name}" + (f" @ {source.revision}" if source.revision else ""),
        f"             {len(source.tensors):,} tensors ("
        + ", ".join(f"{count:,} {dtype}" for dtype, count in kinds.most_common())
        + f"), {_size(bytes_in)}, MTP head: {'yes' if source.has_head else 'no'}",
    ]
    for file in files:
        lines.append(
            f"{'output' if file is files[0] else '':12} {file.path.name}: "
            f"{len(file.places):,} tensors, {_size(file.size)}"
        )
    by_file = {name: sum(p.nbytes for p in ps) for name, ps in conversion.parameters.items()}
    output = sum(by_file.values())
    lines += [
        f"             together {_size(output)}, {conversion.bits_per_weight:.3f} bits per weight",
        *(f"{'recipe' if i == 0 else '':12} {line}" for i, line in enumerate(recipe)),
        f"disk         {_size(disk_needed(conversion, files, work))}",
    ]
    if isinstance(source, Repository) and not source.streamed:
        lines.append(
            f"download     {_size(source.missing_bytes())} into the hub's cache "
            "(--stream keeps one file at a time)"
        )
    lines.append(f"memory       less than {_WORKING_MEMORY / GB:.1f} GB while converting")
    for context in sorted({min(c, config.max_position_embeddings) for c in _CONTEXTS}):
        cache = capacity.cache_bytes(
            config, context, mtp=MTP_FILE in by_file, itemsize=conversion.dtype.size
        )
        need = conversion.resident_bytes + cache
        macs = [f"{mac} GB" for mac in MACS if GPU_SHARE * mac * 2**30 >= need]
        lines.append(
            f"to run       {_size(need)} with {context:,} tokens of context: "
            + (f"Macs with {macs[0]} or more" if macs else "no Mac")
        )
    lines.append(
        f"             (macOS lets the GPU keep about {GPU_SHARE:.0%} of the memory resident)"
    )
    return "\n".join(lines)
