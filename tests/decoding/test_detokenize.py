"""Stop words end a text where they should, and nothing else is lost of it."""

import random

import pytest

from mlx_qwen3next.decoding.detokenize import StopWords


def told(words, pieces, reason="length"):
    """What is told of pieces of text, piece by piece, and whether a word stopped it."""
    holder, out = StopWords(words), []
    for i, piece in enumerate(pieces):
        text, stopped = holder.add(piece, reason if i == len(pieces) - 1 else None)
        out.append(text)
        if stopped:
            return out, True
    return out, False


@pytest.mark.parametrize(
    ("words", "pieces", "out", "stopped"),
    [
        (["STOP"], ["a STOP b"], ["a "], True),  # within a token
        (["STOP"], ["a S", "TO", "P b"], ["a ", "", ""], True),  # across tokens
        (["STOP"], ["a S", "TO", "x"], ["a ", "", "STOx"], False),
        (["aab"], ["a", "a", "a", "b"], ["", "", "a", ""], True),  # it begins again within itself
        (["abc", "bd"], ["ab", "d"], ["", "a"], True),  # one within the beginning of another
        (["d", "cd"], ["abcd"], ["ab"], True),  # whichever comes first
        (["\n\n"], ["a\n", "b\n", "\nc"], ["a", "\nb", ""], True),
        (["é🙂"], ["xé", "🙂"], ["x", ""], True),
        (["STOP"], ["a S", "TO"], ["a ", "STO"], False),  # the end gives back what was held
        ([], ["a", "b"], ["a", "b"], False),
    ],
)
def test_stop_words(words, pieces, out, stopped):
    assert told(words, pieces) == (out, stopped)


def test_a_text_of_stop_words_loses_nothing():
    """However it is cut, all before the first stop word is told, and nothing else; nothing is held
    that cannot be a stop word's beginning."""
    rng = random.Random(3)
    for _ in range(2000):
        words = ["".join(rng.choices("abé", k=rng.randint(1, 4))) for _ in range(rng.randint(1, 3))]
        text = "".join(rng.choices("abé", k=rng.randint(1, 14)))
        cuts = sorted(rng.choices(range(len(text) + 1), k=3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        out, stopped = told(words, pieces)
        read = ""
        for i, piece in enumerate(pieces[: len(out)]):
            read += piece
            ends = [at for word in words if (at := read.find(word)) >= 0]
            so_far, last = "".join(out[: i + 1]), i == len(pieces) - 1
            if ends:  # the first word that is complete
                assert stopped and len(out) == i + 1
                assert so_far == read[: min(ends)]
            else:
                held = read[len(so_far) :]
                assert so_far + held == read
                assert not held or (not last and any(word.startswith(held) for word in words))
        assert bool(ends) == stopped
