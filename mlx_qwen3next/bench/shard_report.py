"""``--shard-plan``: its options, the model it is about, its tables."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.nn as nn
from huggingface_hub import snapshot_download

from .. import checkpoint, shards
from ..command import refuse
from ..config import Config
from ..load import hub_errors, local_directory, quantization
from ..memory import GB
from ..sharding import Mode
from . import shapes
from .report import NONE, table
from .run import write_json
from .shard_plan import (
    KEPT,
    MACS,
    MODES,
    RATES,
    Division,
    Quantization,
    divide,
    parameters,
    quantized,
    smallest_mac,
)

MACHINES, MOST, CONTEXT = [1, 2, 4, 8], 256, 32768
_MEASURED = ("layers", "tokens", "dtype", "without_mlx_lm", "growth", "repeats", "limit", "plots")
_WAYS = ("pipeline", "expert_parallel")

Divisions = dict[tuple[str, Mode, int], Division]  # by quantization, mode and machines


def asked(args: argparse.Namespace, parser: argparse.ArgumentParser) -> bool:
    """Whether ``--shard-plan`` was given; refuses what has no effect with it, or without it."""
    if not args.shard_plan:
        refuse(args, parser, dict.fromkeys(["machines", *RATES], "it is for --shard-plan alone"))
        return False
    refuse(args, parser, dict.fromkeys(_MEASURED, "--shard-plan measures nothing"))
    refuse(args, parser, dict.fromkeys(_WAYS, "--shard-plan shows all ways to divide a model"))
    if args.contexts is parser.get_default("contexts"):
        args.contexts = [CONTEXT]
    return True


def run(args: argparse.Namespace) -> None:
    """Computes and reports, as the command's options say.

    Raises:
        ValueError: an option or the model is no good.
    """
    sizes = sorted(set(args.machines or MACHINES))
    if sizes[-1] > MOST:
        raise ValueError(f"--machines must be at most {MOST}, got {sizes[-1]}")
    if args.json is not None and not args.json.parent.is_dir():
        raise ValueError(f"{args.json} cannot be written: there is no directory {args.json.parent}")
    rates = {name: getattr(args, name) or default for name, default in RATES.items()}
    name, config, head, own_bits = _model(args)
    context = min(args.contexts[0], config.max_position_embeddings)
    ways: dict[str, Quantization] = {"its own": own_bits} if own_bits else {}
    ways["bfloat16"] = lambda path, module: False
    for bits in (8, 6, 4):
        ways[f"{bits} bits"] = quantized({"group_size": shapes.GROUP, "bits": bits})
    divisions: Divisions = {}
    refused: dict[tuple[int, str], dict[Mode, None]] = {}
    for way, choose in ways.items():
        tensors = parameters(config, choose, head)
        for size, mode in ((size, mode) for size in sizes for mode in MODES):
            try:
                divisions[way, mode, size] = divide(config, tensors, size, mode, context, rates)
            except ValueError as error:
                refused.setdefault((size, str(error)), {})[mode] = None
    notes = [f"{n} machines, {' and '.join(refused[n, why])}: {why}" for n, why in sorted(refused)]
    about = f"{name}, {config.num_hidden_layers} layers{' and the MTP head' if head else ''}"
    lines = [*_heading(about, context, rates), *_tables(divisions, list(ways), sizes)]
    print("\n".join([*lines, *(["", "not divided (-):", *notes] if notes else [])]))
    if args.json is not None:
        content = {
            "computed": "nothing of it was measured",
            **{"model": about, "context": context, **rates, "not_divided": notes},
            "divisions": [
                {"quantization": way, "mode": mode, "machines": size, **asdict(division)}
                | {"smallest_mac_gb": smallest_mac(max(division.held))}
                for (way, mode, size), division in divisions.items()
            ],
        }
        write_json(args.json, content)


def _model(args: argparse.Namespace) -> tuple[str, Config, bool, Quantization | None]:
    """Name, config, whether it has an MTP head (if no file says: yes), its own quantization."""
    if args.model is None:
        shape = args.shape or "80b"
        layers = shapes.FULL if shape == "80b" else 2 * shapes.PERIOD
        return f"--shape {shape}", Config.from_dict(shapes.config(shape, layers)), True, None
    directory = local_directory(args.model)
    if directory is None:
        with hub_errors(args.model):
            directory = Path(snapshot_download(args.model, allow_patterns=["config.json"]))
    config = Config.from_file(directory / "config.json")
    if not any(directory.glob("*.safetensors")):
        said = config.quantization
        return args.model, config, True, None if said is None else quantized(said)
    tensors = shards.read_headers(shards.find_files(directory))

    def as_stored(path: str, module: nn.Module) -> bool | dict[str, Any]:
        weight, scales = (tensors.get(f"{path}.{leaf}") for leaf in ("weight", "scales"))
        if weight is None or scales is None or not hasattr(module, "to_quantized"):
            return False
        return quantization(path, weight, scales, columns=module.weight.shape[-1])

    is_quantized = any(name.endswith(".scales") for name in tensors)
    head = any(map(checkpoint.is_mtp, tensors))
    return args.model, config, head, as_stored if is_quantized else None


def _heading(about: str, context: int, rates: Mapping[str, float]) -> list[str]:
    return [
        f"dividing {about}; {context} tokens of context, bfloat16 activations",
        "",
        "computed, nothing of it was measured:",
        f"  seconds a token = bytes read / {rates['memory_bandwidth']:g} GB/s + bytes sent / "
        f"{rates['link']:g} GB/s + messages * {rates['latency']:g} µs",
        "  bytes read: states and weights, of the experts those of a token; in a pipeline by all",
        "    machines, one after the other, else by the slowest, which in 'expert' has most of",
        "    the token's experts, were any as likely, and the shared one",
        "  bytes sent, messages: around a ring, those that wait for each other; the chosen token's",
        "    included, which all machines are told",
        "  left out: launches and all other work (docs/figures.md), drafts",
    ]


def _tables(divisions: Divisions, ways: Sequence[str], sizes: Sequence[int]) -> list[str]:
    def row(
        name: str, mode: Mode, cell: Callable[[Division], str], ways: Sequence[str] = ways
    ) -> list[str]:
        """Of the first of these quantizations that divides so."""
        cells = [name]
        for size in sizes:
            found = [divisions[way, mode, size] for way in ways if (way, mode, size) in divisions]
            cells.append(cell(found[0]) if found else NONE)
        return cells

    def rows(cell: Callable[[Division], str], modes: Sequence[Mode] = MODES) -> list[list[str]]:
        return [row(f"{way}, {mode}", mode, cell, [way]) for way in ways for mode in modes]

    def memory(d: Division) -> str:
        gb = max(d.held) / GB
        return f"{gb:.1f}" if gb >= 1 else f"{gb:.4f}"

    def of_link(d: Division) -> str:
        return f"{1e3 * (d.seconds[1] + d.seconds[2]):.2f}"

    def mac(d: Division) -> str:
        gb = smallest_mac(max(d.held))
        return "none" if gb is None else f"{gb} GB"

    def titled(title: str, rows: Sequence[Sequence[str]]) -> list[str]:
        return ["", *table([[f"{title}; machines:", *map(str, sizes)], *rows])]

    times = rows(lambda d: f"{1e3 * sum(d.seconds):.2f}")
    times += [row(f"of it the link, {mode}", mode, of_link) for mode in MODES]
    sent = [row(f"KB, {mode}", mode, lambda d: f"{max(d.sent) / 1e3:.1f}") for mode in MODES]
    sent += [row(f"messages, {mode}", mode, lambda d: str(d.messages)) for mode in MODES]
    return [
        *titled("GB of weights and cache on the fullest", rows(memory)),
        *titled("computed: ms a token", times),
        *titled("a machine sends for a token", sent),
        *titled("smallest Mac that can hold it", rows(mac, ["tensor", "pipeline"])),
        f"  of {', '.join(map(str, MACS))} GB, of which macOS lets the GPU keep about {KEPT:.0%};",
        "  activations and kept prompts come on top. In a pipeline Macs may differ: each gets as",
        "  many layers as its memory holds; here all are alike",
    ]
