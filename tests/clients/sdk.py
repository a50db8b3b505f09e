"""What a client in Python does: ``sdk.py CLIENT-STEP URL``; fails if the answer is not right.

The tool writes proof.txt. Each function is a step and imports its client, since only one of them is
installed.
"""

import sys
from pathlib import Path

KEY, MODEL, DONE = "none", "default", "All done."
QUESTION = "How is the weather in Paris?"
USER = {"role": "user", "content": QUESTION}
SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
CITY_SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "people": {"type": "integer"}},
    "required": ["name", "people"],
}
PARIS = {"name": "Paris", "people": 2_100_000}
LIMIT = 500  # tokens of an answer


def weather(city: str) -> str:
    """Tells the weather of a city.

    Args:
        city: its name.
    """
    Path("proof.txt").write_text("called")
    assert city == "Paris", city
    return "sunny"


def city_model():
    """The schema of a city, as a model of pydantic's."""
    from pydantic import BaseModel

    class City(BaseModel):
        """A city."""

        name: str
        people: int

    return City


# --- OpenAI's -------------------------------------------------------------------------------------
def _openai(url):
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)


def _chat_tool():
    function = {"name": "weather", "parameters": SCHEMA, "strict": True}
    return {"type": "function", "function": function}


def _chat_loop(complete):
    """A loop of calls in chat completions.

    Args:
        complete: messages -> the answer's message.
    """
    import json

    messages = [USER]
    while calls := (message := complete(messages)).tool_calls:
        messages.append(message)
        for call in calls:
            result = weather(**json.loads(call.function.arguments))
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert message.content == DONE, message


def openai_chat(url):
    create = _openai(url).chat.completions.create
    fields = {"model": MODEL, "tools": [_chat_tool()], "max_completion_tokens": LIMIT}
    _chat_loop(lambda messages: create(messages=messages, **fields).choices[0].message)


def openai_chat_stream(url):
    def complete(messages):
        fields = {"model": MODEL, "messages": messages, "tools": [_chat_tool()]}
        with _openai(url).chat.completions.stream(**fields) as stream:
            return stream.get_final_completion().choices[0].message

    _chat_loop(complete)


def openai_completions(url):
    client = _openai(url)
    fields = {"model": MODEL, "prompt": "def f(", "max_tokens": LIMIT, "logprobs": 1}
    assert client.completions.create(**fields).choices[0].text == DONE
    chunks = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == DONE


def openai_parse(url):
    city = city_model()
    parse = _openai(url).chat.completions.parse
    answer = parse(model=MODEL, messages=[USER], response_format=city)
    assert answer.choices[0].message.parsed == city(**PARIS)


def _responses_loop(respond):
    """A loop of calls in Responses; respond: items -> a response."""
    import json

    items = [USER]
    while True:
        response = respond(items)
        items += response.output
        calls = [item for item in response.output if item.type == "function_call"]
        if not calls:
            break
        for call in calls:
            result = weather(**json.loads(call.arguments))
            output = {"type": "function_call_output", "call_id": call.call_id, "output": result}
            items.append(output)
    assert response.output_text == DONE, response


def _responses_tool():
    return {"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}


def openai_responses(url):
    create = _openai(url).responses.create
    fields = {"model": MODEL, "tools": [_responses_tool()], "store": False}
    _responses_loop(lambda items: create(input=items, **fields))


def openai_responses_stream(url):
    def respond(items):
        fields = {"model": MODEL, "input": items, "tools": [_responses_tool()]}
        with _openai(url).responses.stream(**fields) as stream:
            return stream.get_final_response()

    _responses_loop(respond)


def openai_custom(url):
    """A tool of free text, and its result."""
    create = _openai(url).responses.create
    fields = {"model": MODEL, "tools": [{"type": "custom", "name": "patch"}]}
    items = [USER]
    response = create(input=items, **fields)
    (call,) = [item for item in response.output if item.type == "custom_tool_call"]
    Path("proof.txt").write_text("called")
    assert call.input == "*** Begin\n+1.0\n*** End", call
    result = {"type": "custom_tool_call_output", "call_id": call.call_id, "output": "ok"}
    assert create(input=[*items, *response.output, result], **fields).output_text == DONE


def openai_logprobs(url):
    create = _openai(url).responses.create
    include = ["message.output_text.logprobs"]
    fields = {"model": MODEL, "input": QUESTION, "include": include, "top_logprobs": 2}
    (message,) = create(**fields).output
    tokens = message.content[0].logprobs
    assert "".join(each.token for each in tokens) == DONE, tokens
    assert all(len(each.top_logprobs) == 2 for each in tokens)
    events = create(**fields, stream=True)
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(each.token for event in deltas for each in event.logprobs) == DONE


def openai_responses_parse(url):
    city = city_model()
    answer = _openai(url).responses.parse(model=MODEL, input=QUESTION, text_format=city)
    assert answer.output_parsed == city(**PARIS)


# --- Anthropic's ----------------------------------------------------------------------------------
def _anthropic(url):
    import anthropic

    return anthropic.Anthropic(base_url=url, api_key=KEY, max_retries=0)


def _messages_loop(ask):
    """A loop of calls in Messages; ask: messages -> a message."""
    messages = [USER]
    while (answer := ask(messages)).stop_reason == "tool_use":
        results = [
            {"type": "tool_result", "tool_use_id": use.id, "content": weather(**use.input)}
            for use in answer.content
            if use.type == "tool_use"
        ]
        messages += [{"role": "assistant", "content": answer.content}]
        messages += [{"role": "user", "content": results}]
    assert answer.content[-1].text == DONE, answer


def _messages_fields():
    tools = [{"name": "weather", "description": "Tells it.", "input_schema": SCHEMA}]
    return {"model": MODEL, "max_tokens": LIMIT, "tools": tools}


def anthropic_tools(url):
    create = _anthropic(url).messages.create
    _messages_loop(lambda messages: create(messages=messages, **_messages_fields()))


def anthropic_stream(url):
    def ask(messages):
        with _anthropic(url).messages.stream(messages=messages, **_messages_fields()) as stream:
            return stream.get_final_message()

    _messages_loop(ask)


def anthropic_runner(url):
    """The loop that the client runs itself."""
    from anthropic import beta_tool

    run = _anthropic(url).beta.messages.tool_runner
    runner = run(model=MODEL, max_tokens=LIMIT, tools=[beta_tool(weather)], messages=[USER])
    assert runner.until_done().content[-1].text == DONE


def anthropic_count(url):
    client = _anthropic(url)
    counted = client.messages.count_tokens(model=MODEL, messages=[USER])
    usage = client.messages.create(model=MODEL, max_tokens=LIMIT, messages=[USER]).usage
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


def anthropic_forced(url):
    tools = [{"name": "city", "input_schema": CITY_SCHEMA}]
    choice = {"type": "tool", "name": "city"}
    fields = {"model": MODEL, "max_tokens": LIMIT, "tools": tools, "tool_choice": choice}
    (use,) = _anthropic(url).messages.create(messages=[USER], **fields).content
    assert (use.name, use.input) == ("city", PARIS)


def anthropic_parse(url):
    city = city_model()
    parse = _anthropic(url).messages.parse
    answer = parse(model=MODEL, max_tokens=LIMIT, messages=[USER], output_format=city)
    assert answer.parsed_output == city(**PARIS)


# --- LangChain ------------------------------------------------------------------------------------
def _langchain(url, **options):
    from langchain_openai import ChatOpenAI

    return ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key=KEY, max_retries=0, **options)


def _langchain_loop(model):
    from langchain.agents import create_agent

    messages = create_agent(model, [weather]).invoke({"messages": [USER]})["messages"]
    assert messages[-1].text == DONE, messages


def langchain_tools(url):
    _langchain_loop(_langchain(url))


def langchain_responses(url):
    _langchain_loop(_langchain(url, use_responses_api=True))


def langchain_anthropic(url):
    from langchain_anthropic import ChatAnthropic

    _langchain_loop(ChatAnthropic(model=MODEL, base_url=url, api_key=KEY, max_retries=0))


def _langchain_structured(url, method):
    city = city_model()
    model = _langchain(url).with_structured_output(city, method=method)
    assert model.invoke(QUESTION) == city(**PARIS)


def langchain_function_calling(url):
    _langchain_structured(url, "function_calling")


def langchain_json_schema(url):
    _langchain_structured(url, "json_schema")


# --- pydantic-ai ----------------------------------------------------------------------------------
def _pydantic_ai(url, kind="chat", **options):
    from pydantic_ai import Agent

    if kind == "anthropic":
        from pydantic_ai.models.anthropic import AnthropicModel
        from pydantic_ai.providers.anthropic import AnthropicProvider

        model = AnthropicModel(MODEL, provider=AnthropicProvider(api_key=KEY, base_url=url))
    else:
        from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
        from pydantic_ai.providers.openai import OpenAIProvider

        models = {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}
        provider = OpenAIProvider(base_url=f"{url}/v1", api_key=KEY)
        model = models[kind](MODEL, provider=provider)
    return Agent(model, **options)


def _pydantic_ai_loop(url, kind):
    answer = _pydantic_ai(url, kind, tools=[weather]).run_sync(QUESTION)
    assert answer.output == DONE, answer


def pydantic_ai_chat(url):
    _pydantic_ai_loop(url, "chat")


def pydantic_ai_responses(url):
    _pydantic_ai_loop(url, "responses")


def pydantic_ai_anthropic(url):
    _pydantic_ai_loop(url, "anthropic")


def pydantic_ai_output(url):
    city = city_model()
    agent = _pydantic_ai(url, tools=[weather], output_type=city)
    assert agent.run_sync(QUESTION).output == city(**PARIS)


def pydantic_ai_native(url):
    from pydantic_ai import NativeOutput

    city = city_model()
    agent = _pydantic_ai(url, output_type=NativeOutput(city))
    assert agent.run_sync(QUESTION).output == city(**PARIS)


# --- instructor -----------------------------------------------------------------------------------
def _instructor(url, mode):
    import instructor

    city = city_model()
    client = instructor.from_openai(_openai(url), mode=getattr(instructor.Mode, mode))
    create = client.chat.completions.create
    answer = create(model=MODEL, messages=[USER], response_model=city, max_retries=0)
    assert answer.model_dump() == PARIS  # it has private fields beside them


def instructor_tools(url):
    _instructor(url, "TOOLS")


def instructor_json_schema(url):
    _instructor(url, "JSON_SCHEMA")


if __name__ == "__main__":
    step, address = sys.argv[1:]
    globals()[step.replace("-", "_")](address)
