"""Streams of Anthropic's Messages and OpenAI's Responses, read by the rules of their order."""

from helpers_server import exchange, strict_json

MESSAGES_PATH, RESPONSES_PATH = "/v1/messages", "/v1/responses"


def post(server, path, body, headers=None):
    """Sends a POST; returns status and answer."""
    status, _, raw = exchange(server, "POST", path, body, headers)
    return status, strict_json(raw)


def stream(server, path, body, headers=None):
    """The events of a streamed answer, whose names are their types."""
    status, got, raw = exchange(server, "POST", path, body | {"stream": True}, headers)
    assert (status, got["Content-Type"]) == (200, "text/event-stream"), raw
    parts = raw.decode().split("\n\n")
    assert parts.pop() == ""
    events = []
    for part in parts:
        if part.startswith(":"):
            continue
        name, data = part.split("\n")
        events.append(strict_json(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def message_of(events):
    """The message that a stream of Messages makes; checks that its events are in order."""
    first, *events = events
    assert first["type"] == "message_start"
    message = first["message"]
    assert (message["content"], message["stop_reason"]) == ([], None)
    deltas = {
        **{"text": {"text_delta": "text"}, "tool_use": {"input_json_delta": "partial_json"}},
        "thinking": {"thinking_delta": "thinking", "signature_delta": "signature"},
    }
    is_open, given = False, ""
    while events[0]["type"].startswith("content_block"):
        event = events.pop(0)
        content = message["content"]
        if event["type"] == "content_block_start":
            assert not is_open and event["index"] == len(content)
            is_open, given = True, ""
            content.append(event["content_block"])
            key = {"tool_use": "input"}.get(content[-1]["type"], content[-1]["type"])
            assert not content[-1][key]
            continue
        assert is_open and event["index"] == len(content) - 1
        block = content[-1]
        if event["type"] == "content_block_stop":
            is_open = False
            if block["type"] == "tool_use":
                block["input"] = strict_json(given)
            assert block["type"] != "thinking" or block["signature"]
            continue
        assert event["type"] == "content_block_delta"
        key = deltas[block["type"]][event["delta"]["type"]]
        if key == "partial_json":
            given += event["delta"][key]
        else:
            block[key] += event["delta"][key]
    assert not is_open
    delta, stop = events
    assert (delta["type"], stop) == ("message_delta", {"type": "message_stop"})
    assert delta["usage"].items() >= {**message["usage"], **delta["usage"]}.items()
    return message | delta["delta"] | {"usage": delta["usage"]}


def response_of(events):
    """The response that a stream of Responses makes; checks that its events are in order."""
    assert [event["sequence_number"] for event in events] == [*range(len(events))]
    created, in_progress, *events, last = events
    assert (created["type"], in_progress["type"]) == ("response.created", "response.in_progress")
    assert created["response"] == in_progress["response"]
    assert (created["response"]["status"], created["response"]["output"]) == ("in_progress", [])
    output = []
    while events:
        added = _next(events, "output_item.added", output_index=len(output))
        item = added["item"]
        place = {"item_id": item["id"], "output_index": len(output)}
        if item["type"] in _CALLS:
            stem, key = _CALLS[item["type"]]
            assert item[key] == ""
            item[key], _ = _text(events, stem, key, place)
        else:
            assert item["content"] == []
            place["content_index"] = 0
            part = _next(events, "content_part.added", **place)["part"]
            assert part["text"] == ""
            kind = {"message": "output_text", "reasoning": "reasoning_text"}[item["type"]]
            assert part["type"] == kind
            text, logprobs = _text(events, kind, "text", place)
            part = _next(events, "content_part.done", **place)["part"]
            assert (part["text"], part.get("logprobs", [])) == (text, logprobs)
            item["content"].append(part)
        done = _next(events, "output_item.done", output_index=len(output))["item"]
        status = {} if "status" not in item else {"status": done["status"]}
        sealed = {"encrypted_content": done.get("encrypted_content")}
        assert done == item | status | (sealed if sealed["encrypted_content"] else {})
        output.append(done)
    response = last["response"]
    assert last["type"] == f"response.{response['status']}"
    assert response["output"] == output
    assert created["response"].items() <= (response | _BEFORE).items()
    return response


_CALLS = {
    "function_call": ("function_call_arguments", "arguments"),
    "custom_tool_call": ("custom_tool_call_input", "input"),
}
_BEFORE = {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}


def _next(events, kind, **fields):
    event = events.pop(0)
    assert event["type"] == f"response.{kind}"
    assert fields.items() <= event.items()
    return event


def _text(events, stem, key, place):
    """The text that deltas make, and the log-probabilities of its tokens."""
    text, logprobs = "", []
    while events[0]["type"] == f"response.{stem}.delta":
        delta = _next(events, f"{stem}.delta", **place)
        assert delta["delta"]
        text += delta["delta"]
        logprobs += delta.get("logprobs", [])
    done = _next(events, f"{stem}.done", **place)
    assert (done[key], done.get("logprobs", [])) == (text, logprobs)
    return text, logprobs


def seen(answer):
    """The parts of an answer of either protocol: kind, then text or name and arguments."""
    parts = []
    for part in answer.get("content") or answer.get("output") or []:
        match part["type"]:
            case "tool_use":
                parts.append(("call", part["name"], part["input"]))
            case "function_call":
                parts.append(("call", part["name"], strict_json(part["arguments"])))
            case "custom_tool_call":
                parts.append(("call", part["name"], part["input"]))
            case "thinking":
                parts.append(("reasoning", part["thinking"]))
            case "text":
                parts.append(("text", part["text"]))
            case kind:
                name = {"message": "text"}.get(kind, kind)
                parts.append((name, "".join(content["text"] for content in part["content"])))
    return parts
