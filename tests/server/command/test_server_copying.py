"""Copied drafts in the server: while a sequence is alone, whatever came and went."""

import pytest
from helpers_caches import assert_holds
from helpers_generate import forced, golden, greedy
from helpers_scripted import scripted
from helpers_serving import Sequences

from mlx_qwen3next.decoding.draft_depth import FixedDepth
from mlx_qwen3next.server.engine.lone_sequence import Drafted

PROMPT = [5, 9, 60, 33, 7, 21] * 4
SAYS = [40, *PROMPT[:14], 41, *range(50, 60), 42, *range(50, 60)]  # from the prompt, and of itself
OTHER = [80, 2, 2, 17] * 3


def model():
    return golden("permutation")[0]


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("steps", [0, 4, 9, 16])
def test_another_joins_and_leaves(head, steps):
    """The tokens that the batch chose are in the index when the sequence is alone again."""
    sequences = Sequences(model(), FixedDepth(head, lookup=5), step_size=10)
    uid = sequences.insert(PROMPT, len(SAYS), processors=[forced(SAYS, len(PROMPT))])
    sources = {"before": set(), "after": set()}
    others = []
    while sequences.live():
        if len(sequences.told[uid]) >= steps and not others:
            others.append(sequences.insert(OTHER, 4))
        _, generated = sequences.step()
        when = "after" if others and others[0] in sequences.ends else "before"
        sources[when] |= {r.source for r in generated if isinstance(r, Drafted) and r.uid == uid}
    assert sequences.told == {uid: SAYS, others[0]: greedy(model(), OTHER, 4, mtp="off")}
    for each in sequences.told:
        end = sequences.ends[each]
        assert_holds(model(), end.prompt_cache, end.all_tokens, head=head > 0)
    assert "lookup" in sources["after"]


def test_usage_names_the_sources_of_accepted_drafts():
    text = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all."
    with scripted("--lookup", 7) as server:
        seed, messages = server.say(text), [{"role": "user", "content": f"Repeat this: {text}"}]
        for answer in (server.whole(messages, seed), server.streamed(messages, seed)):
            assert answer.content == text
            details = answer.usage.completion_tokens_details
            (source, n), *others = details.accepted_drafts.items()
            assert (source, others) == ("lookup", [])
            assert details.accepted_prediction_tokens == n
            assert answer.usage.completion_tokens / 2 < n < answer.usage.completion_tokens
    with scripted() as server:
        answer = server.whole(messages, server.say(text))
        assert answer.content == text and answer.usage.completion_tokens_details is None
