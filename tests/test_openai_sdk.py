"""The official OpenAI SDK, unchanged, pointed at the router: what it sends, parses and raises."""

from __future__ import annotations

import asyncio
import base64
import json
import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from pydantic import BaseModel
from upstream import (
    HELLO,
    KEY,
    Hang,
    Reply,
    Request,
    Stream,
    chat_stream,
    chunks,
    completion,
    delta,
    good,
    html,
    provider,
)

MODEL = "hermes-router"
LIMITED = Reply(429, {"error": {"message": "Rate limit reached"}}, {"Retry-After": "33"})


@pytest.fixture
def sdk(upstream, serve) -> Iterator[Any]:
    """sdk(answer or function, ..., SETTING=...): (scripted provider, SDK client)."""
    made: list[openai.OpenAI] = []

    def make(*script: Any, key: str = KEY, timeout: float = 30.0, **settings: Any):
        up = upstream(*script)
        settings = {**provider("groq", up, "m1"), "TTFT_TIMEOUT": "5", **settings}
        base = f"{serve(**settings).url}/v1"
        client = openai.OpenAI(base_url=base, api_key=key, timeout=timeout, max_retries=0)
        made.append(client)
        return up, client

    yield make
    for client in made:
        client.close()


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **options})


# --- chat -------------------------------------------------------------------------------


def test_chat(sdk):
    up, client = sdk(good("hello from upstream"))
    got = ask(client, temperature=0.2, seed=7, user="me")
    assert got.choices[0].message.content == "hello from upstream"
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.total_tokens == 10
    seen = up.requests[0]
    assert seen.json["model"] == "m1"
    assert (seen.json["temperature"], seen.json["seed"], seen.json["user"]) == (0.2, 7, "me")
    assert seen.key == "groq-key-1"


def test_several_choices_and_logprobs_pass_through(sdk):
    body = completion("a")
    second = {**body["choices"][0], "index": 1, "message": {"role": "assistant", "content": "b"}}
    token = {"token": "b", "bytes": [98], "logprob": -0.1, "top_logprobs": []}
    second["logprobs"] = {"content": [token], "refusal": None}
    body["choices"].append(second)
    up, client = sdk(Reply(200, body))
    got = ask(client, n=2, logprobs=True)
    assert [choice.message.content for choice in got.choices] == ["a", "b"]
    assert got.choices[1].logprobs.content[0].logprob == -0.1
    assert up.requests[0].json["n"] == 2


def test_stream(sdk):
    up, client = sdk(chat_stream("one ", "two ", "thrée"))
    got = list(ask(client, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in got) == "one two thrée"
    assert got[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in got)
    assert up.requests[0].json["stream_options"] == {"include_usage": True}


def test_stream_with_usage(sdk):
    _, client = sdk(chat_stream("a", "b"))
    *words, last = ask(client, stream=True, stream_options={"include_usage": True})
    assert last.choices == []
    assert last.usage.total_tokens == 10
    assert "".join(chunk.choices[0].delta.content or "" for chunk in words) == "ab"


def test_a_stream_may_be_left_early(sdk):
    up, client = sdk(Stream(chunks=chunks("a", "b"), hold_after=2))
    with ask(client, stream=True) as stream:
        for chunk in stream:
            if chunk.choices[0].delta.content:
                break
    assert up.requests[0].closed.wait(5)


def test_the_stream_helper_collects_the_answer(sdk):
    _, client = sdk(chat_stream("a", "b"))
    with client.chat.completions.stream(model=MODEL, messages=HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "ab"


# --- tools --------------------------------------------------------------------------------

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "id": "call_abcdefghijklmnopqrstuvwx",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city":"Zürich"}'},
}


def test_a_tool_call_and_its_result(sdk):
    up, client = sdk(Reply(200, completion(None, tool_calls=[CALL])), good("sunny"))
    first = ask(client, tools=[WEATHER], tool_choice="auto", parallel_tool_calls=False)
    call = first.choices[0].message.tool_calls[0]
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    assert json.loads(call.function.arguments) == {"city": "Zürich"}
    assert first.choices[0].finish_reason == "tool_calls"

    result = {"role": "tool", "tool_call_id": call.id, "content": "21 °C"}
    second = ask(client, tools=[WEATHER], messages=[*HELLO, first.choices[0].message, result])
    assert second.choices[0].message.content == "sunny"
    sent = up.requests[1].json
    assert sent["messages"][1]["tool_calls"] == [CALL]
    assert sent["messages"][2] == result
    assert sent["tools"] == [WEATHER]


def test_streamed_tool_calls(sdk):
    pieces = ['{"ci', 'ty":"', "Zür", 'ich"}']
    first = {"index": 0, **CALL, "function": {"name": "get_weather", "arguments": ""}}
    events = [delta(role="assistant", content=None, tool_calls=[first])]
    for index in (0, 1):
        if index:
            second = {**first, "index": 1, "id": "call_2"}
            events.append(delta(tool_calls=[second]))
        part = ({"index": index, "function": {"arguments": piece}} for piece in pieces)
        events += [delta(tool_calls=[one]) for one in part]
    events.append(delta("tool_calls"))
    _, client = sdk(Stream(chunks=events))
    with client.chat.completions.stream(model=MODEL, messages=HELLO, tools=[WEATHER]) as stream:
        message = stream.get_final_completion().choices[0].message
    assert [call.id for call in message.tool_calls] == [CALL["id"], "call_2"]
    arguments = [json.loads(call.function.arguments) for call in message.tool_calls]
    assert arguments == [{"city": "Zürich"}] * 2


# --- vision and structured output -------------------------------------------------------------


def test_vision_content_reaches_the_provider(sdk):
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
    content = [{"type": "text", "text": "what is this?"}, image]
    up, client = sdk(good("a pixel"))
    got = ask(client, messages=[{"role": "user", "content": content}])
    assert got.choices[0].message.content == "a pixel"
    assert up.requests[0].json["messages"] == [{"role": "user", "content": content}]


class City(BaseModel):
    name: str
    people: int


def test_structured_output(sdk):
    up, client = sdk(good('{"name": "Zürich", "people": 434000}'))
    got = client.chat.completions.parse(model=MODEL, messages=HELLO, response_format=City)
    assert got.choices[0].message.parsed == City(name="Zürich", people=434_000)
    wanted = up.requests[0].json["response_format"]
    assert wanted["type"] == "json_schema"
    assert set(wanted["json_schema"]["schema"]["required"]) == {"name", "people"}
    assert wanted["json_schema"]["strict"] is True


def test_structured_output_streamed(sdk):
    _, client = sdk(chat_stream('{"name": "Bern",', ' "people": 134000}'))
    options = {"model": MODEL, "messages": HELLO, "response_format": City}
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == City(name="Bern", people=134_000)


# --- embeddings ------------------------------------------------------------------------------

VECTOR = [0.5, -0.25, 0.125]  # exact in 32 bits


def embedding(request: Request) -> Reply:
    """A provider that knows both encodings."""
    raw = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    vector = raw if request.json.get("encoding_format") == "base64" else VECTOR
    texts = request.json["input"]
    count = len(texts) if isinstance(texts, list) else 1
    rows = [{"object": "embedding", "index": i, "embedding": vector} for i in range(count)]
    used = {"prompt_tokens": 2, "total_tokens": 2}
    model = request.json["model"]
    return Reply(200, {"object": "list", "data": rows, "model": model, "usage": used})


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_embeddings(sdk, encoding):
    up, client = sdk(embedding, GROQ_EMBED_MODEL="embed-1")
    options = {"encoding_format": encoding} if encoding else {}
    got = client.embeddings.create(model=MODEL, input=["a", "b"], dimensions=3, **options)
    vectors = [row.embedding for row in got.data]
    if encoding == "base64":
        vectors = [list(struct.unpack("<3f", base64.b64decode(raw))) for raw in vectors]
    assert vectors == [VECTOR, VECTOR]
    assert got.model == "embed-1"
    seen = up.requests[0].json
    assert (seen["model"], seen["input"], seen["dimensions"]) == ("embed-1", ["a", "b"], 3)
    assert up.requests[0].path.endswith("/embeddings")


@pytest.mark.parametrize("wanted", ["float", "base64"])
@pytest.mark.parametrize("known", ["float", "base64"])
def test_embeddings_of_a_provider_that_knows_one_encoding(sdk, wanted, known):
    def stubborn(request: Request) -> Reply:
        body = json.dumps({**request.json, "encoding_format": known}).encode()
        return embedding(replace(request, body=body))

    _, client = sdk(stubborn, GROQ_EMBED_MODEL="embed-1")
    got = client.embeddings.with_raw_response.create(
        model=MODEL, input="a", encoding_format=wanted
    ).http_response.json()
    raw = base64.b64encode(struct.pack("<3f", *VECTOR)).decode()
    assert got["data"] == [
        {"object": "embedding", "index": 0, "embedding": VECTOR if wanted == "float" else raw}
    ]


# --- models ------------------------------------------------------------------------------------


def test_models(sdk):
    _, client = sdk(good())
    listed = [model.id for model in client.models.list()]
    assert listed[0] == MODEL
    assert "groq/m1" in listed
    one = client.models.retrieve(MODEL)
    assert (one.id, one.object) == (MODEL, "model")
    assert isinstance(one.created, int) and one.owned_by
    assert client.models.retrieve("groq/m1").id == "groq/m1"


def test_an_unknown_model_is_not_found(sdk):
    _, client = sdk(good())
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("no-such-model")
    assert caught.value.code == "model_not_found"


def test_an_unmodified_client_may_ask_for_gpt(sdk):
    up, client = sdk(good())
    assert ask(client, model="gpt-4o").choices[0].message.content == "hello"
    assert up.requests[0].json["model"] == "m1"


# --- headers ------------------------------------------------------------------------------------


def test_raw_response_headers(sdk):
    _, client = sdk(good())
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=HELLO)
    assert raw.headers["x-provider"] == "groq"
    assert "m1" in raw.headers["x-hermes-model"]
    assert raw.headers["x-hermes-attempts"] == "1"
    assert raw.headers["x-hermes-cache"]
    assert raw.request_id == raw.headers["x-request-id"]
    assert raw.parse().choices[0].message.content == "hello"


def test_streaming_response_headers(sdk):
    _, client = sdk(good())
    create = client.chat.completions.with_streaming_response.create
    with create(model=MODEL, messages=HELLO, stream=True) as raw:
        assert raw.headers["x-provider"] == "groq"
        assert raw.headers["x-request-id"]
        assert raw.headers["content-type"].startswith("text/event-stream")
        assert "[DONE]" in list(filter(None, raw.iter_lines()))[-1]


def test_request_ids_differ(sdk):
    _, client = sdk(good())
    assert len({ask(client)._request_id for _ in range(5)}) == 5


# --- errors --------------------------------------------------------------------------------------


def test_authentication_error(sdk):
    up, client = sdk(good(), key="sk-wrong")
    with pytest.raises(openai.AuthenticationError) as caught:
        ask(client)
    assert caught.value.code == "invalid_api_key"
    assert caught.value.type == "authentication_error"
    assert "unauthorized" in caught.value.message
    assert not up.requests


@pytest.mark.parametrize("key", ["x" * 5000, KEY.upper(), KEY + "x", KEY[:-1]])
def test_a_nearly_right_key_is_wrong(sdk, key):
    _, client = sdk(good(), key=key)
    with pytest.raises(openai.AuthenticationError):
        ask(client)


def test_bad_request_from_the_router(sdk):
    up, client = sdk(good())
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, messages=[])
    assert caught.value.type == "invalid_request_error"
    assert caught.value.param == "messages"
    assert not up.requests


def test_bad_request_from_the_provider(sdk):
    reason = {"message": "temperature must be below 2", "param": "temperature", "code": "range"}
    up, client = sdk(Reply(400, {"error": {**reason, "type": "invalid_request_error"}}))
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, temperature=3)
    assert "temperature must be below 2" in caught.value.message
    assert len(up.requests) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_rate_limit_error(sdk, stream):
    _, client = sdk(LIMITED)
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client, stream=stream)
    assert 31 <= int(caught.value.response.headers["retry-after"]) <= 34
    assert caught.value.type == "rate_limit_error"


def test_not_found_error(sdk):
    _, client = sdk(good())
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.list()


@pytest.mark.parametrize("stream", [False, True])
def test_internal_server_error_when_everything_fails(sdk, stream):
    _, client = sdk(html(502))
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client, stream=stream)
    assert caught.value.status_code == 503
    assert caught.value.type == "router_error"


def test_timeout_of_the_client(sdk):
    up, client = sdk(Hang(30), timeout=0.5)
    with pytest.raises(openai.APITimeoutError):
        ask(client)
    assert up.requests[0].closed.wait(5)


def test_an_error_in_the_middle_of_a_stream_is_raised(sdk):
    failing = [*chunks("a", "b")[:3], {"error": {"message": "overloaded", "code": 503}}]
    _, client = sdk(Stream(chunks=failing, done=False))
    got = []
    with pytest.raises(openai.APIError) as caught:
        got.extend(chunk.choices[0].delta.content for chunk in ask(client, stream=True))
    assert caught.value.message


def test_a_stream_cut_in_the_middle_is_raised(sdk):
    _, client = sdk(Stream(chunks=chunks("a", "b"), stop_at=600))
    with pytest.raises(openai.APIError):
        list(ask(client, stream=True))


# --- asynchronous ---------------------------------------------------------------------------------


def run_async(client: openai.OpenAI, talk: Any) -> Any:
    """Run talk(async client) against the same router."""

    async def main() -> Any:
        base, key = client.base_url, client.api_key
        async with openai.AsyncOpenAI(base_url=base, api_key=key, max_retries=0) as other:
            return await talk(other)

    return asyncio.run(main())


def test_async_chat_and_stream(sdk):
    _, client = sdk(good("hello"))

    async def talk(other: openai.AsyncOpenAI) -> tuple[str, str]:
        whole = await other.chat.completions.create(model=MODEL, messages=HELLO)
        stream = await other.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        words = [chunk.choices[0].delta.content or "" async for chunk in stream]
        return whole.choices[0].message.content, "".join(words)

    assert run_async(client, talk) == ("hello", "hello")


def test_async_errors(sdk):
    _, client = sdk(LIMITED)

    async def talk(other: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.RateLimitError):
            await other.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            await other.models.retrieve("nothing")

    run_async(client, talk)


def test_async_requests_side_by_side(sdk):
    _, client = sdk(lambda request: good(request.json["messages"][0]["content"])(request))

    async def one(other: openai.AsyncOpenAI, number: int) -> str:
        said = [{"role": "user", "content": f"nonce {number}"}]
        got = await other.chat.completions.create(model=MODEL, messages=said)
        return got.choices[0].message.content

    async def talk(other: openai.AsyncOpenAI) -> list[str]:
        return await asyncio.gather(*(one(other, number) for number in range(20)))

    assert run_async(client, talk) == [f"nonce {number}" for number in range(20)]


def test_async_cancellation_frees_the_provider(sdk):
    up, client = sdk(Hang(30))

    async def talk(other: openai.AsyncOpenAI) -> None:
        create = other.chat.completions.create(model=MODEL, messages=HELLO)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(create, 0.5)

    run_async(client, talk)
    assert up.requests[0].closed.wait(5)
