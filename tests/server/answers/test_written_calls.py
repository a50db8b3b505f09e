"""How the model wrote its calls: what is kept, and for which calls that come back."""

from mlx_qwen3next.server.answers import written_calls
from mlx_qwen3next.server.answers.written_calls import WrittenCalls


def back(calls, arguments, name="f", template=None):
    """The arguments of a call that comes back, as the template gets them."""
    call = {"id": "1", "function": {"name": name, "arguments": arguments}}
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    first, second = calls.restored(template, messages)
    assert first == messages[0]
    (call,) = second["tool_calls"]
    return call["function"]["arguments"]


def same(x, y):
    """Whether two values are written alike, for which 1, 1.0 and True are three."""
    return repr(x) == repr(y)


def test_values_are_those_that_the_model_wrote():
    calls = WrittenCalls()
    calls.put(None, "f", {"on": False, "x": "a", "n": 1.0}, {"on": "false", "n": "1.00"})
    expected = {"on": "false", "x": "a", "n": "1.00"}
    for number in (1, 1.0):
        assert same(back(calls, {"on": False, "x": "a", "n": number}), expected)
    for other in ({"on": True, "x": "a", "n": 1}, {"on": False, "n": 1}, {}):
        assert same(back(calls, other), other)
    given = {"on": False, "x": "a", "n": 1}
    assert same(back(calls, given, name="g"), given)
    assert same(back(calls, given, template="other"), given)


def test_numbers_in_json_keep_their_points():
    calls = WrittenCalls()
    calls.put(None, "f", {"a": {"b": [1.0, 2]}, "c": 3}, {})
    assert same(back(calls, {"a": {"b": [1, 2]}, "c": 3}), {"a": {"b": [1.0, 2]}, "c": 3})
    calls.put(None, "f", {"a": {"b": [1, 2]}, "c": 3}, {})  # written without, the next time
    assert same(back(calls, {"a": {"b": [1, 2]}, "c": 3}), {"a": {"b": [1, 2]}, "c": 3})


def test_what_is_kept_has_a_bound(monkeypatch):
    monkeypatch.setattr(written_calls, "MOST", 2)
    monkeypatch.setattr(written_calls, "MOST_BYTES", 100)
    calls = WrittenCalls()

    def held():
        return [i for i in range(5) if back(calls, {"n": i})["n"] != i]

    for i in range(3):
        calls.put(None, "f", {"n": i}, {"n": f"{i}.0"})
    assert held() == [1, 2]
    calls.put(None, "f", {"n": 3}, {"n": "3." + "0" * 80})
    assert held() == [3]
    calls.put(None, "f", {"n": 3}, {"n": "3.0"})
    calls.put(None, "f", {"n": 4}, {"n": "4.0"})
    assert held() == [3, 4]
