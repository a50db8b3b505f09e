"""Helpers of the tests of speculation: drafters and depths by a script."""

import itertools

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler

from mlx_qwen3next.decoding.sampling import Chooser
from mlx_qwen3next.decoding.speculative import Decoding


class Script:
    """A drafter whose rounds are right up to given depths."""

    def __init__(self, truth, rights):
        self.truth, self.rights, self.at = truth, iter(rights), 0

    def propose(self, token, depth, choose):
        right = next(self.rights, 0)
        ahead = self.truth[self.at : self.at + depth]
        drafts = [t if i < right else (t + 1) % 96 for i, t in enumerate(ahead)]
        return [mx.array([t], mx.uint32) for t in drafts]

    def expect(self, tokens, hidden, token, depth, choose):
        pass

    def committed(self, tokens, hidden):
        assert hidden.shape[:2] == (1, tokens.size)
        self.at += tokens.size

    def settle(self):
        pass


class Cycle:
    """Depths in turns: plain steps and rounds follow each other in every order."""

    idle = False

    def __init__(self, *depths):
        self.depths = itertools.cycle(depths)

    def choose(self, room):
        return min(next(self.depths), room)

    def record(self, depth, accepted, seconds):
        pass


def decoding(model, prompt, cache, depth, drafter):
    """The greedy decoding of a prompt, of which the cache already holds all but the last token."""
    last = mx.array(prompt[-1:], mx.uint32)
    return Decoding(model, cache, last, Chooser(greedy_sampler, [], last), depth, drafter)
