"""A DFlash drafter in the server: it follows its sequence in and out of batches."""

import mlx.core as mx
import pytest
from checkpoints import GOLDENS, relative_error
from helpers_generate import greedy
from helpers_serving import Sequences
from helpers_speculative import Cycle

from mlx_qwen3next import load_model
from mlx_qwen3next.decoding.drafters import speculation
from mlx_qwen3next.decoding.drafters.dflash import DFlashDrafter
from mlx_qwen3next.decoding.speculative import forward

PROMPTS = [[5, 9, 33, 7, 2, 41, 60], [8, 8, 3]]
TOLD = [20, 9]


@pytest.mark.parametrize("joins_after", [0, 2, 9])
def test_tokens_stay_the_same_and_it_knows_every_token(monkeypatch, joins_after):
    model = load_model(GOLDENS / "base", dtype=mx.float32, draft_model=GOLDENS / "dflash")
    made = []

    def drafter(*given):
        made.append(DFlashDrafter(*given))
        return made[-1]

    monkeypatch.setattr(speculation, "DFlashDrafter", drafter)
    sequences = Sequences(model, Cycle(0, 3, 5))
    uids = [sequences.insert(PROMPTS[0], TOLD[0])]
    for _ in range(joins_after):
        sequences.step()
    uids.append(sequences.insert(PROMPTS[1], TOLD[1]))
    sequences.run()
    for uid, prompt, n, own in zip(uids, PROMPTS, TOLD, made, strict=True):
        assert sequences.told[uid] == greedy(model, prompt, n, mtp="off")
        assert len(sequences.ends[uid].prompt_cache) == len(model.layers)
        text = mx.array(sequences.text(uid), mx.uint32)
        whole = DFlashDrafter(model)
        whole.committed(text, forward(model, model.make_cache(), text, [whole])[1])
        for each in (own, whole):
            each.settle()
        known = own._cache[0].offset
        assert known in (text.size - 1, text.size)  # the last token may not have been fed
        for one, other in zip(own._cache, whole._cache, strict=True):
            assert relative_error(one.keys[..., :known, :], other.keys[..., :known, :]) < 1e-5
