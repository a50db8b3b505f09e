"""Writes the demo model in the hub's layout, as Qwen publishes Qwen3-Next."""

import json
import os
import shutil
from pathlib import Path

from data import END, STOP
from modeling import Qwen3Next
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer


def hub_tensors(model: Qwen3Next) -> dict[str, Tensor]:
    """The weights in bfloat16 by the hub's names, one tensor per expert."""
    tensors = {}
    for name, p in model.state_dict().items():
        prefix, fused, kind = name.partition(".experts.")
        parts = {name: p}
        if fused and kind == "gate_up_proj":
            gates, ups = p.chunk(2, 1)
            parts = {f"{prefix}.experts.{e}.gate_proj.weight": w for e, w in enumerate(gates)}
            parts |= {f"{prefix}.experts.{e}.up_proj.weight": w for e, w in enumerate(ups)}
        elif fused:
            parts = {f"{prefix}.experts.{e}.down_proj.weight": w for e, w in enumerate(p)}
        tensors |= {n: w.bfloat16().contiguous() for n, w in parts.items()}
    return tensors


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def export(model: Qwen3Next, out: Path) -> Path:
    """Writes ``out/hf`` from the model and the files of data.py; returns the folder.

    A temporary folder takes the files and is renamed at the end. There are two shards: the trunk,
    and the output head with ``mtp.*``, because the hub keeps ``mtp.*`` in the last shard.
    """
    folder = out / "hf.partial"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(out / "tokenizer", folder)
    shutil.copy(out / "heldout.txt", folder)

    tensors = hub_tensors(model)
    shards: dict[str, dict[str, Tensor]] = {}
    for name in sorted(tensors):
        number = 1 if name.startswith("model.") else 2
        shards.setdefault(f"model-{number:05d}-of-00002.safetensors", {})[name] = tensors[name]
    for file, part in shards.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    weight_map = {name: file for file, part in shards.items() for name in part}
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end, stop = tokenizer.convert_tokens_to_ids([END, STOP])
    config = model.config.hub() | {"bos_token_id": end, "eos_token_id": stop}
    write_json(folder / "config.json", config)
    stops = {"eos_token_id": [stop, end], "pad_token_id": end, "bos_token_id": end}
    write_json(folder / "generation_config.json", stops)

    target, old = out / "hf", out / "hf.old"
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.rename(target, old)
    os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)
    return target
