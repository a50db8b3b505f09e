"""The drafter that copies: where it looks, what it expects, how sure it is."""

import random

import pytest

from mlx_qwen3next.decoding.drafters.lookup import LONGEST, Copier, LookupDrafter


def texts():
    """Texts with much, little and no repetition."""
    for seed, alphabet in [(0, 2), (1, 3), (2, 8), (3, 40), (4, 10**6)]:
        generator = random.Random(seed)
        yield [generator.randrange(alphabet) for _ in range(200)]
    yield [1, 2, 3] * 40
    yield [7] * 60


def places(text, start=1):
    """For each end of a text, from one on that is looked at anew: the place that it goes on from.

    It is the one after the last place if that was right, or the last one after the same two tokens.
    """
    place, result = None, {}
    for end in range(start, len(text) + 1):
        if place is not None and end > start and text[place] == text[end - 1]:
            place += 1
        else:
            pair = text[end - 2 : end] if end > 1 else None
            same = [i for i in range(2, end) if text[i - 2 : i] == pair]
            place = same[-1] if same else None
        result[end] = place
    return result


@pytest.mark.parametrize("text", [*texts()], ids=lambda text: str(text[:6]))
def test_it_expects_what_came_last_time(text):
    copier, where = Copier(), places(text)
    for end, token in enumerate(text, start=1):
        expected = copier.expected(1)
        assert copier.append(token) == (expected[0] == token if expected else None)
        place = where[end]
        assert (copier.length > 0) == (place is not None)
        ahead = text[:end]
        for _ in range(15 if place is not None else 0):  # as if it came as expected
            ahead.append(ahead[place + len(ahead) - end])
        assert copier.expected(15) == ahead[end:]
        if place is not None:
            n = min(copier.length, LONGEST, place)
            assert n >= 2 and text[place - n : place] == text[end - n : end]


@pytest.mark.parametrize("pieces", [(0, 200), (1, 199), (2, 1, 197), (60, 0, 70, 70)], ids=str)
def test_many_tokens_at_once(pieces):
    text = next(texts())
    copier, end = Copier(), 0
    for size in pieces:
        copier.extend(text[end : end + size])
        end += size
        assert len(copier) == end
        place = places(text[:end], end)[end] if size else None
        if place is not None:
            assert copier.expected(1) == [text[place]]
    single = Copier()
    for token in text:
        single.append(token)
    assert vars(copier)["_places"] == vars(single)["_places"]


def test_the_length_of_a_match():
    copier = Copier()
    copier.extend([9, 1, 2, 3, 4, 5, 8, 2, 3, 4])
    assert copier.length == 3
    assert [copier.append(token) for token in (5, 8, 0)] == [True, True, False]
    assert copier.length == 0 and copier.expected(3) == []
    copier.extend(range(100, 200))
    copier.extend(range(100, 190))
    assert copier.length == LONGEST
    assert copier.append(190) and copier.length == LONGEST + 1


def test_an_edit_is_followed_by_the_rest():
    """After a changed token, the copy goes on two tokens later."""
    copier = Copier()
    copier.extend([*range(20), *range(10), 50])
    assert copier.length == 0
    assert [copier.append(token) for token in (11, 12, 13)] == [None, None, True]


# --- what it promises ---------------------------------------------------------------------------
def drafter(text):
    result = LookupDrafter()
    result.follow(text)
    return result


def test_it_is_silent_without_a_match():
    assert drafter(range(50)).offer().shares == []
    assert drafter([5]).offer(ahead=True).shares == []


def test_longer_matches_promise_more():
    short, long = drafter([1, 2, 3, 9, 1, 2]), drafter([*range(20), *range(16)])
    assert len(short.offer().shares) == len(long.offer().shares) == 15
    assert 0.4 < short.offer().shares[0] < 0.6 < long.offer().shares[0]
    assert sorted(short.offer().shares) == short.offer().shares


def test_a_token_on_its_way_has_to_be_the_expected_one():
    here = drafter([*range(9), 0, 1])
    now, ahead = here.offer().shares, here.offer(ahead=True).shares
    assert len(ahead) == 15
    assert ahead[0] == now[0] * now[1]
    assert ahead[1:14] == now[2:]


def test_it_learns_from_every_token():
    """Also where nothing was drafted: what was expected is compared with what came."""
    here = drafter([1, 2, 3])
    for _ in range(60):
        for token in (1, 2, 3):
            here.extend(token)
    assert here.offer().shares[0] > 0.95


def test_what_is_known_belongs_to_a_length():
    """That short matches are wrong says nothing of long ones."""
    here = drafter([1, 2, 3])
    for i in range(10, 40):
        for token in (1, 2, i):
            here.extend(token)
    shares = here.offer().shares
    assert shares == []  # the last token is new
    here.extend(1)
    here.extend(2)
    shares = here.offer().shares
    assert shares[0] < 0.1 and shares[3] > 0.5


def test_what_is_known_already_is_not_added_again():
    here = drafter([1, 2, 3, 4])
    here.follow([1, 2, 3, 4])
    here.extend(1)
    here.follow([1, 2, 3, 4, 1, 2])
    assert len(here._copier) == 6
    assert [t.item() for t in here.propose(None, 3, None)] == [3, 4, 1]
