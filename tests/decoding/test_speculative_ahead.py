"""The next round's drafts, built while the device is busy with this one."""

import mlx.core as mx
import pytest
from float64 import relative_error
from helpers_generate import golden, golden_tokens, tokens_of
from helpers_speculative import Cycle

from mlx_qwen3next import generate_step
from mlx_qwen3next.decoding.drafters.mtp import MTPDrafter
from mlx_qwen3next.decoding.drafters.speculation import Speculation
from mlx_qwen3next.model.mtp_head import MTPHead


def greedy(logits, drafts):
    return logits.argmax(axis=-1)


def following(case, ahead, came, depth=2):
    """What a drafter proposes after a round of which ``came`` tokens stay, if it expected
    ``ahead`` of them (None: nothing), and what is in its cache at the end."""
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    text = prompt + expected
    tokens = mx.array(text[:40], mx.uint32)
    hidden = model.model(tokens[None])
    drafter = Speculation.of(model).drafter()
    drafter.committed(tokens[:30], hidden[:, :30])
    drafter.propose(tokens[30:31], 2, greedy)
    if ahead is not None:
        end = 30 + ahead
        new = tokens[30:end], hidden[:, 30:end]
        drafter.expect(*new, tokens[end : end + 1], 2, greedy)
    end = 30 + came
    drafter.committed(tokens[30:end], hidden[:, 30:end])
    drafts = drafter.propose(tokens[end : end + 1], depth, greedy)
    drafter.committed(tokens[end : end + 2], hidden[:, end : end + 2])
    drafter.settle()
    return [draft.item() for draft in drafts], drafter._entry


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("came", [1, 2, 3])
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_what_was_expected_or_not(case, came, depth):
    drafts, entry = following(case, 3, came, depth)
    others, other = following(case, None, came, depth)
    assert drafts == others and len(drafts) == depth
    assert entry.offset == other.offset
    for a, b in zip(entry.keys_and_values(), other.keys_and_values(), strict=True):
        assert relative_error(a, b) < 1e-5
    assert relative_error(entry.hidden, other.hidden) == 0


def events(monkeypatch, depths, prompt, expected, model):
    """Calls of the head, and ``(drafted, accepted)`` of rounds when they are judged, in order."""
    log = []
    call, judged = MTPHead.__call__, MTPDrafter.judged

    def called(*args):
        log.append("head")
        return call(*args)

    def recorded(self, drafted, accepted):
        log.append((drafted, accepted))
        judged(self, drafted, accepted)

    monkeypatch.setattr(MTPHead, "__call__", called)
    monkeypatch.setattr(MTPDrafter, "judged", recorded)
    monkeypatch.setattr(Speculation.of(model), "measured", Cycle(*depths))
    assert tokens_of(generate_step(prompt, model, max_tokens=len(expected))) == expected
    return log


def test_built_before_the_host_waits(monkeypatch):
    """After a round that was right in whole; and if the next is, too, nothing is built twice."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    log = events(monkeypatch, [1], prompt, expected, model)
    rounds = [i for i, event in enumerate(log) if event != "head"][:-2]  # near the end is no room
    used = wasted = 0
    for last, this, following in zip(rounds, rounds[1:], rounds[2:], strict=False):
        heads = log[last + 1 : this].count("head"), log[this + 1 : following].count("head")
        if log[last] == log[this] == (1, 1):
            assert heads[1] == 1  # for the round after the next: the next one's was there
            used += 1
        if log[last] == (1, 1) and log[this] == (1, 0):
            assert heads[0] >= 1 and heads[1] == 1  # once in vain, once anew
            wasted += 1
    assert used > 0 and wasted > 0


def test_nothing_is_built_for_a_round_that_will_not_come(monkeypatch):
    """The last round of an answer, and one whose drafts would not fit."""
    model, (prompt, expected) = golden("permutation")[0], golden_tokens("permutation")
    heads = []
    call = MTPHead.__call__
    monkeypatch.setattr(
        MTPHead, "__call__", lambda *args: heads.append(args[2].size) or call(*args)
    )
    for count in range(2, 6):
        heads.clear()
        steps = generate_step(prompt, model, max_tokens=count, mtp=1)
        assert tokens_of(steps) == expected[:count]
        # A draft takes two tokens' room: itself and what follows it. The prompt is read besides,
        # and what the last round gave, in rest().
        assert len(heads) <= count // 2 * 2 + 2


@pytest.mark.parametrize("depths", [(2, 0), (1, 3), (3, 1), (2, 2, 0, 0, 1)], ids=str)
@pytest.mark.parametrize("case", ["base", "permutation"])
def test_another_depth_than_expected(monkeypatch, case, depths):
    model, (prompt, expected) = golden(case)[0], golden_tokens(case)
    expected = expected[:50]
    monkeypatch.setattr(Speculation.of(model), "measured", Cycle(*depths))
    cache = model.make_cache() + model.mtp.make_cache()
    steps = generate_step(prompt, model, max_tokens=len(expected), prompt_cache=cache)
    assert tokens_of(steps) == expected
    text = mx.array([prompt + expected])
    head = model.mtp.make_cache()
    hidden = model.model(text, model.make_cache())
    model.mtp(hidden[:, :-1], text[:, 1:], head)
    assert cache[-1].offset == head[0].offset
    for a, b in zip(cache[-1].keys_and_values(), head[0].keys_and_values(), strict=True):
        assert relative_error(a, b) < 1e-4
