"""Helpers of the tests of speculation: drafters and depths by a script."""

import itertools

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from mlx_qwen3next.decoding.draft_depth import MAX_DEPTH, Offer
from mlx_qwen3next.decoding.drafters import Drafter
from mlx_qwen3next.decoding.sampling import Chooser
from mlx_qwen3next.decoding.speculative import Decoding


class Script(Drafter):
    """A drafter whose rounds are right up to given depths."""

    source = "script"

    def __init__(self, truth, rights):
        self.truth, self.rights, self.at = truth, iter(rights), 0

    def offer(self, ahead=False):
        return Offer(self.source, [0.5] * MAX_DEPTH, range(1, MAX_DEPTH + 1))

    def propose(self, token, depth, choose):
        right = next(self.rights, 0)
        ahead = self.truth[self.at : self.at + depth]
        drafts = [t if i < right else (t + 1) % 96 for i, t in enumerate(ahead)]
        return [mx.array([t], mx.uint32) for t in drafts]

    def committed(self, tokens, hidden):
        assert hidden.shape[:2] == (1, tokens.size)
        self.at += tokens.size


class Cycle:
    """Depths in turns, of the last drafter: plain steps and rounds follow in every order."""

    def __init__(self, *depths):
        self.depths = itertools.cycle(depths)

    def idle(self, source):
        return False

    def choose(self, offers, room):
        return len(offers) - 1, min(next(self.depths), room)

    def record(self, source, depth, seconds):
        pass


def decoding(model, prompt, cache, depth, *drafters):
    """The greedy decoding of a prompt, of which the cache already holds all but the last token."""
    last = mx.array(prompt[-1:], mx.uint32)
    return Decoding(model, cache, last, Chooser(greedy_sampler, [], last), depth, drafters)
