"""Writes the golden of a DFlash drafter: random weights, and what the reference drafts with them.

    python tests/goldens/make_dflash.py DIR            # a checkout of github.com/z-lab/dflash
    python tests/goldens/make_dflash.py DIR --check    # compares with the files here

Needs torch and transformers 5. The drafter reads the layers of the golden `base`, whose embedding
and output it uses. `dflash` is a directory as the hub has it, `config.json` and `model.safetensors`
(bf16), and `expected.safetensors`, float32 results for base's tokens (B block_size, n target
layers, V vocab_size):

    points [p]              context lengths; the drafter reads what is new since the one before
    hidden [p, B, H]        after the last norm, for the block of tokens[point] and B - 1 masks
    logits [p, B - 1, V]    of the drafts
"""

import argparse
import filecmp
import importlib.util
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, Qwen3Config

HERE = Path(__file__).parent
POINTS = [1, 2, 10, 15, 64, 129]
CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 6,
    "dflash_config": {"mask_token_id": 95, "target_layer_ids": [0, 2]},
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "layer_types": ["full_attention"] * 3,
    "max_position_embeddings": 4096,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "num_target_layers": 4,
    "rms_norm_eps": 1e-3,
    "rope_scaling": None,
    "rope_theta": 1000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 96,
}


def reference(checkout):
    """The module dflash/model.py of a checkout."""
    spec = importlib.util.spec_from_file_location("dflash_model", checkout / "dflash" / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build(module):
    """The drafter, its weights rounded to bf16 and held in float32."""
    rng = np.random.default_rng(0)
    config = Qwen3Config(**{k: v for k, v in CONFIG.items() if k != "rope_theta"})
    config.rope_parameters = {"rope_type": "default", "rope_theta": CONFIG["rope_theta"]}
    config._attn_implementation = "eager"
    drafter = module.DFlashDraftModel(config).eval()
    for name, parameter in drafter.named_parameters():
        values = rng.normal(size=tuple(parameter.shape))
        if "norm" in name:  # far from 1, so that a norm left out or moved shows
            values = 1 + 0.4 * values
        else:
            values *= 1.5 * parameter.shape[-1] ** -0.5
        parameter.copy_(torch.from_numpy(values).bfloat16())
    return drafter


def expected(drafter):
    """The tensors of `expected.safetensors`."""
    weights = load_file(HERE / "base" / "model.safetensors")
    embedding, output = (
        weights[name].float() for name in ("model.embed_tokens.weight", "lm_head.weight")
    )
    base = load_file(HERE / "base" / "expected.safetensors")
    ids, size = drafter.target_layer_ids, CONFIG["block_size"]
    states = torch.cat([base[f"hidden.{i + 1}"] for i in ids], dim=-1)[None]
    cache, read, hidden = DynamicCache(), 0, []
    for point in POINTS:
        block = torch.full((size,), drafter.mask_token_id)
        block[0] = base["tokens"][point]
        hidden.append(
            drafter(
                target_hidden=states[:, read:point],
                noise_embedding=embedding[block][None],
                position_ids=torch.arange(read, point + size)[None],
                past_key_values=cache,
                use_cache=True,
                is_causal=False,
            )[0]
        )
        cache.crop(-size)  # the block
        read = point
    hidden = torch.stack(hidden)
    logits = hidden[:, 1:] @ output.T
    return {"points": torch.tensor(POINTS, dtype=torch.int32), "hidden": hidden, "logits": logits}


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/z-lab/dflash")
    parser.add_argument("--check", action="store_true", help="compare with the files here")
    args = parser.parse_args()
    torch.set_num_threads(1)  # the order of float32 sums, and so the bytes, depend on it
    drafter = build(reference(args.checkout))
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) if args.check else HERE / "dflash"
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
        tensors = {name: x.bfloat16() for name, x in drafter.state_dict().items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        save_file(expected(drafter), directory / "expected.safetensors")
        made = sorted(file.name for file in directory.iterdir())
        _, differing, missing = filecmp.cmpfiles(HERE / "dflash", directory, made, shallow=False)
        if differing or missing:
            raise SystemExit(f"not reproduced: {differing + missing}")


if __name__ == "__main__":
    main()
