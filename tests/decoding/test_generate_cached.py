"""Where checkpoints of a prompt belong, and generation that keeps and finds them."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers_generate import bundled, greedy, narrow

from mlx_qwen3next import generate_step, stream_generate
from mlx_qwen3next.decoding import sequence
from mlx_qwen3next.prompt_cache import store as prompt_cache
from mlx_qwen3next.prompt_cache.store import PromptCache


# --- where checkpoints belong --------------------------------------------------------------------
@pytest.mark.parametrize(
    ("turns", "length", "held", "expected"),
    [
        ((), 10, 0, [9]),  # before the last token
        ((), 10, 9, []),
        ((), 1, 0, []),
        ((0, 300, 400, 700), 800, 0, [300, 700, 799]),  # turns, but not close together
        ((0, 300, 400, 700), 800, 100, [400, 700, 799]),
        ((0, 100, 200), 250, 0, [249]),  # the end in any case
        ((0, 6000), 9000, 0, [4096, 6000, 8999]),  # now and then within a turn
        ((0, 300, 5000), 9000, 0, [300, 4396, 8492, 8999]),  # close, beside what comes after
        ((0, 5000), 9000, 0, [4096, 5000, 8999]),  # but the end of a system prompt in any case
        ((0, 9000), 40_001, 30_000, [34096, 38192, 40_000]),
        ((0,), 40_001, 0, [8000, 14400, 19520, 23616, 27712, 31808, 35904, 40_000]),
        ((0,), 9000, 4000, [8096, 8999]),
    ],
)
def test_places(turns, length, held, expected):
    _, tokenizer = bundled()
    turn = tokenizer.convert_tokens_to_ids("<|im_start|>")
    tokens = [turn if i in turns else 5 for i in range(length)]
    assert PromptCache(max_bytes=1, tokenizer=tokenizer).places(tokens, held) == expected


@pytest.mark.parametrize("held", [0, 30_000])
@pytest.mark.parametrize(
    "turns",
    [
        *(np.arange(0, 100_000, apart) for apart in (10, 260, 3000, 50_000)),
        np.flatnonzero(np.random.default_rng(0).random(100_000) < 0.001),
    ],
    ids=["10", "260", "3000", "50000", "random"],
)
def test_going_on_from_the_checkpoint_before_takes_a_quarter_more(turns, held):
    """Or, from a turn, few tokens; and a long history has few checkpoints."""
    tokens = np.full(100_000, 5)
    tokens[turns] = 1
    marks = SimpleNamespace(convert_tokens_to_ids=lambda mark: int(mark == prompt_cache.TURN))
    places = PromptCache(max_bytes=1, tokenizer=marks).places(tokens, held)
    assert places == sorted({*places}) and places[0] > held and places[-1] == 99_999
    assert len(places) <= 30
    known = np.array([held, *places])
    for at, few in (turns, prompt_cache.SPACING), (np.arange(100_000), prompt_cache.EVERY):
        after = 99_999 - at[at >= held]
        again = 99_999 - known[np.searchsorted(known, at[at >= held], side="right") - 1]
        assert (again <= np.maximum(after * 1.25, after + few)).all()


def test_turns_are_unknown_without_a_tokenizer():
    assert PromptCache(max_bytes=1).places([1, *[5] * 300] * 2) == [601]


def test_reasoning_that_a_prompt_opens_comes_after_its_checkpoint():
    """In the next turn's prompt it is no more."""
    marks = {"<|im_start|>": 1, "<think>": 2}
    cache = PromptCache(
        max_bytes=1, tokenizer=SimpleNamespace(convert_tokens_to_ids=lambda mark: marks[mark])
    )
    question = [1, *[5] * 40, 1, 6, 7]
    assert cache.places([*question, 2, 7]) == [len(question)]
    assert cache.places([*question, 2, *[7] * 20]) == [len(question) + 20]  # it is an answer's
    assert cache.places([*question, 2, 7], held=len(question)) == []


def test_generation_with_a_prompt_cache():
    """The tokens are those without one; what a text begins with is not processed again."""
    model, tokenizer = bundled()
    cache = PromptCache(max_bytes=10**9, tokenizer=tokenizer)
    chat = [{"role": "user", "content": "What does math.sqrt do?"}]
    processed = []
    for question in ("And math.sin?", "And now?"):
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
        options = {"max_tokens": 30, "mtp": 2, "repetition_penalty": 1.1, "temp": 0.7}
        texts = []
        for store in (None, cache):
            mx.random.seed(1)
            responses = [*stream_generate(model, tokenizer, prompt, prompt_cache=store, **options)]
            texts.append("".join(response.text for response in responses))
        assert texts[0] == texts[1]
        processed.append(len(prompt) - responses[-1].cached_tokens)
        assert responses[-1].prompt_tokens == len(prompt)
        chat += [{"role": "assistant", "content": texts[0]}, {"role": "user", "content": question}]
    assert processed[0] == 16 and processed[1] < 16
    # Its own answer is known to the end, the head's part as well.
    told = [response.token for response in responses]
    known, held = cache.fetch([*prompt, *told, 0])
    assert held == len(prompt) + len(told)
    assert len(known) == len(model.layers) + 1 and known[-1].offset == held - 1


def test_generation_that_is_stopped_leaves_what_it_has(monkeypatch):
    model, tokenizer = narrow()
    prompt = tokenizer.encode("import os\n" * 110)
    cache = PromptCache(max_bytes=10**9)
    monkeypatch.setattr(prompt_cache, "EVERY", 100)
    steps = generate_step(prompt, model, prompt_cache=cache, max_tokens=50)
    told = [next(steps).token for _ in range(3)]
    steps.close()
    assert cache.fetch([*prompt, *told, 0])[1] == len(prompt) + 3
    assert cache.fetch(prompt[:250])[1] == 200


@pytest.mark.parametrize("mtp", ["off", 2])
@pytest.mark.parametrize("chunks", [0, 1, 3])
def test_a_prompt_that_is_interrupted_is_kept_as_far_as_it_was_read(monkeypatch, chunks, mtp):
    """Within a chunk, far from the prompt's own checkpoints; the head follows, if it drafts."""
    model, tokenizer = narrow()
    prompt = tokenizer.encode("import os\n" * 80)
    cache, forward, calls = PromptCache(max_bytes=10**9), sequence.forward, []
    options = {"prompt_cache": cache, "prefill_step_size": 50, "mtp": mtp}

    def interrupted(*args):
        hidden = forward(*args)
        calls.append(hidden)
        if len(calls) > chunks:
            raise KeyboardInterrupt
        return hidden

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sequence, "forward", interrupted)
        greedy(model, prompt, 10, **options)
    known, held = cache.fetch(prompt)
    assert (held, len(cache)) == (50 * chunks, chunks > 0)
    if chunks and mtp != "off":
        assert known[-1].offset == held - 1
    assert greedy(model, prompt, 10, **options) == greedy(model, prompt, 10, mtp=mtp)


def test_the_head_reads_a_prompt_only_if_somebody_will_draft(monkeypatch):
    """With a prompt cache, too, whether that knows the head's part or not."""
    model, tokenizer = narrow()
    prompt = tokenizer.encode("import os\n" * 40)
    cache, read, call = PromptCache(max_bytes=10**9), [], type(model.mtp).__call__

    def counting(head, hidden, *rest):
        read.append(hidden.shape[1])
        return call(head, hidden, *rest)

    monkeypatch.setattr(type(model.mtp), "__call__", counting)
    known = [5, *prompt]
    for text, mtp in (prompt, "off"), (known, 2), ([*known, 7], "off"):
        expected = greedy(model, text, 5, mtp="off")
        assert read == []
        assert greedy(model, text, 5, mtp=mtp, prompt_cache=cache) == expected
        assert sum(read) >= len(text) if mtp == 2 else read == []
        read.clear()
    assert len(cache.fetch(known)[0]) == len(model.layers) + 1  # what is known stays so
