"""One sequence's life: it reads its prompt in chunks, then generates token by token.

``generate_step`` runs one for a caller, the server one for a request that is alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing

import mlx.core as mx

from ..model.cache import Cache, Undo, tokens_held
from ..model.quantized_kv import NOT_QUANTIZED, KVQuantization
from ..model.qwen3_next import Model
from .draft_depth import Depth
from .drafters import Drafter
from .drafters.forced import ForcedDrafter
from .pace import PromptPace
from .sampling import Chooser
from .speculative import Decoding, Token, forward
from .validation import held_by


def prefill(
    model: Model,
    trunk: Cache,
    tokens: mx.array,
    drafters: Sequence[Drafter] = (),
    after_forward: Callable[[], None] = lambda: None,
) -> None:
    """Feeds tokens ``[n]`` of a prompt, or nothing of them if interrupted, and waits for them.

    Args:
        trunk: the cache's entries of the layers.
        drafters: told of the tokens.
        after_forward: called while the device computes.
    """
    with Undo(trunk):
        _, hidden = forward(model, trunk, tokens, drafters)
        after_forward()
        # The states that wait for a drafter, too: they must not refer to keys and values.
        reads_states = any(drafter.reads_states for drafter in drafters)
        mx.eval([c.state for c in trunk], hidden if reads_states else [])
    for drafter in drafters:
        drafter.committed(tokens, hidden)
    mx.clear_cache()


class TokenSequence:
    """A sequence of tokens, its cache, and its drafters.

    Args:
        model: computes it.
        cache: one entry a layer, then any others; advanced in place. While the sequence lives it is
            nobody else's to read.
        held: the tokens that the cache holds already, as far as they are known.
        segments: the prompt's tokens that are not in the cache. A chunk that is read ends at the
            latest where its segment does. The last segment is one token, which decoding feeds.
        depth: chooses who drafts and how many tokens.
        drafters: those that follow the sequence.
        keep_drafters: whether they are told of every token, for their next user.
        step_size: prompt tokens read at a time, at most.
        pace: sizes the chunks of the prompt; by default they have the full ``step_size``.
        quantization: of the trunk's keys and values.

    Attributes:
        tokens: those in the cache, as far as they are known.
        last: the sequence's last token, which is in the cache after :meth:`finish` alone.
        trunk: the cache's entries of the layers.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        held: Iterable[int],
        segments: Iterable[Sequence[int]],
        *,
        depth: Depth,
        drafters: Sequence[Drafter] = (),
        keep_drafters: bool = True,
        step_size: int = 2048,
        pace: PromptPace | None = None,
        quantization: KVQuantization = NOT_QUANTIZED,
    ):
        self._model, self._cache, self.trunk = model, cache, cache[: len(model.layers)]
        self._depth, self._drafters, self._keep_drafters = depth, drafters, keep_drafters
        self._step_size, self._pace = step_size, pace or PromptPace()
        self._quantization = quantization
        self.tokens = list(held)
        *unread, (self.last,) = segments
        self._unread = deque(list(segment) for segment in unread if len(segment))
        self._room = tokens_held(self.trunk) + sum(map(len, self.segments))
        quantization.reserve(self.trunk, self._room)
        self._decoding: Decoding | None = None
        self._handed_over = False

    # --- the prompt ------------------------------------------------------------------------------
    @property
    def segments(self) -> list[list[int]]:
        """The prompt's tokens that are still to be read, the one that decoding feeds last."""
        return [*self._unread, [self.last]]

    @property
    def is_reading(self) -> bool:
        """Whether there are prompt tokens to be read before decoding."""
        return bool(self._unread)

    def read(self) -> bool:
        """Reads the next chunk of the prompt and waits for it; nothing of it if interrupted.

        Returns:
            Whether a segment ends with it.
        """
        held = tokens_held(self.trunk)
        chunk = self._unread[0][: self._limited(self._pace.size(self._step_size, held))]
        tokens = mx.array(chunk, mx.uint32)
        self._pace.start()
        self._quantize()
        prefill(self._model, self.trunk, tokens, self._drafters, self._tell)
        self._pace.stop(len(chunk), held)
        self.tokens += chunk
        rest = self._unread[0][len(chunk) :]
        if rest:
            self._unread[0] = rest
        else:
            self._unread.popleft()
        return not rest

    # --- its continuation ------------------------------------------------------------------------
    def generate(self, chooser: Chooser, count: int) -> Generator[Token]:
        """Yields the next ``count`` tokens.

        However it ends, the cache then holds every token yielded, the last one included, except
        after :meth:`hand_over`.

        Args:
            chooser: chooses them; knows all tokens up to ``last``.
        """
        assert not self.is_reading
        drafters = [*self._drafters]
        constraint = chooser.constraint
        if constraint is not None and not self._depth.idle(ForcedDrafter.source):
            drafters.insert(0, ForcedDrafter(constraint))
        for drafter in drafters:
            drafter.follow([*self.tokens, self.last])
        self._decoding = Decoding(
            self._model,
            self.trunk,
            mx.array([self.last], mx.uint32),
            chooser,
            self._depth,
            drafters,
            self._keep_drafters,
            self._quantize,
            self._limited,
        )
        return self._generate(self._decoding.tokens(count))

    def _generate(self, tokens: Generator[Token]) -> Generator[Token]:
        try:
            with closing(tokens):
                for token in tokens:
                    self.tokens.append(self.last)
                    self.last = token.token
                    yield token
        finally:
            if not self._handed_over:
                self._close()

    def hand_over(self) -> None:
        """Ends :meth:`generate` soon: it yields what is chosen already.

        Somebody else goes on from there, with ``last`` to feed.
        """
        self._handed_over = True
        if self._decoding is not None:
            self._decoding.hand_over()

    def finish(self) -> None:
        """Feeds ``last`` if :meth:`generate` has not: after :meth:`hand_over`, or if it never
        began."""
        if self._decoding is not None:
            self._decoding.feed()
        self._handed_over = False
        self._close()

    def _close(self) -> None:
        if self._decoding is not None:
            self._decoding = None
            self.tokens.append(self.last)

    def _tell(self) -> None:
        """Does what is to be done while the device reads a chunk."""
        for drafter in self._drafters:
            drafter.follow(self.tokens)

    def _quantize(self) -> None:
        """Makes the cache ready for more tokens."""
        if self._quantization.kv_bits is not None:
            self._quantization.apply(self.trunk, self._room)
            self._cache[: len(self.trunk)] = self.trunk

    def _limited(self, tokens: int) -> int:
        """Returns how many of the next tokens may share a forward."""
        if self._quantization.kv_bits is None:
            return tokens
        return self._quantization.limited(tokens, held_by(self._model, self.trunk))
