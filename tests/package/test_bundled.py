"""The demo model that ships: whole, small, and better at unseen Python than a packer."""

import lzma
import math
import sysconfig
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from helpers_generate import bundled
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model as load_with_mlx_lm

from mlx_qwen3next import stream_generate
from mlx_qwen3next.checkpoint.hub import BUNDLED

HELDOUT = "graphlib.py"  # in every Python from 3.9 on
TOKENS = 1024


@pytest.fixture(scope="module")
def unseen():
    """(tokens ``[1, TOKENS]``, their UTF-8 bytes) of a file the model was not trained on."""
    assert HELDOUT in (BUNDLED / "heldout.txt").read_text().split()
    _, tokenizer = bundled()
    text = (Path(sysconfig.get_path("stdlib")) / HELDOUT).read_text(encoding="utf-8")
    tokens = tokenizer.encode("<|endoftext|>" + text)[:TOKENS]
    return mx.array([tokens]), tokenizer.decode(tokens[1:]).encode()


def test_it_is_whole_and_small():
    model, tokenizer = bundled()
    assert model.mtp is not None
    assert {"linear_attention", "full_attention"} == set(model.args.layer_types)
    assert model.args.quantization["bits"] == 4
    assert tokenizer.has_chat_template
    assert sum(file.stat().st_size for file in BUNDLED.iterdir() if file.is_file()) <= 12e6


def test_it_packs_unseen_python_better_than_xz(unseen):
    model, _ = bundled()
    tokens, text = unseen
    losses = nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
    bits = losses.sum().item() / math.log(2)
    packed = 8 * len(lzma.compress(text, preset=9))
    assert bits < 0.6 * packed


def test_its_head_drafts_what_the_trunk_chooses(unseen):
    """Recursion included: depths 1, 2 and 3, each given that the drafts before it were right."""
    model, _ = bundled()
    tokens = unseen[0][:, :260]
    hidden = model.model(tokens)
    greedy = model.logits(hidden)[0].argmax(axis=-1).tolist()
    text = tokens[0].tolist()
    cache = model.mtp.make_cache()
    asked, right = [0, 0, 0], [0, 0, 0]
    for i in range(256):
        m = model.mtp(hidden[:, i : i + 1], tokens[:, i + 1 : i + 2], cache)
        for depth in range(3):
            # As in a greedy round: the text so far is what the trunk would have written.
            if text[i + 1 + depth] != greedy[i + depth]:
                break
            draft = model.logits(m).argmax(axis=-1)
            asked[depth] += 1
            if draft.item() != greedy[i + 1 + depth]:
                break
            right[depth] += 1
            m = model.mtp(m, draft, cache)
        cache[0].trim(cache[0].offset - (i + 1))  # the drafts' entries were provisional
    assert [r / max(n, 1) > 0.3 for r, n in zip(right, asked, strict=True)] == [True] * 3, (
        right,
        asked,
    )


def test_it_answers_and_stops():
    model, tokenizer = bundled()
    chat = [{"role": "user", "content": "What is the signature of shutil.copyfile?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    responses = list(stream_generate(model, tokenizer, prompt, max_tokens=100))
    assert responses[-1].finish_reason == "stop"
    assert "shutil.copyfile(src, dst" in "".join(r.text for r in responses)


def test_stock_mlx_lm_loads_the_same_files():
    """Only its norms are rounded; with the exact ones it computes the same."""
    model, _ = bundled()
    stock, _ = load_with_mlx_lm(BUNDLED)
    assert {w.dtype for _, w in tree_flatten(stock.parameters())} == {mx.bfloat16, mx.uint32}
    stock.set_dtype(mx.float32)
    tokens = mx.array([[5, 100, 2000, 7, 42]])
    a, b = model(tokens), stock(tokens)
    assert mx.linalg.norm(a - b).item() <= 0.02 * mx.linalg.norm(b).item()
    stock.load_weights(str(BUNDLED / "norms.safetensors"), strict=False)
    b = stock(tokens)
    assert mx.linalg.norm(a - b).item() <= 1e-4 * mx.linalg.norm(b).item()
