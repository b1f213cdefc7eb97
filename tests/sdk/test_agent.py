"""Streams of an agent's run by the unmodified Python SDK of LangGraph: left in the middle of a message, twice, and taken
up again after the last event. Nothing is missed, nothing comes twice.

Usage: test_agent.py URL, with the API token in CYNAI_TOKEN and the texts of the model's messages, as a JSON list, in
TEXTS. The server has the graph `helper`, whose model needs some time for each of its two messages.
"""

import asyncio
import json
import os
import sys

from langgraph_sdk import get_client, get_sync_client

URL = sys.argv[1]
TOKEN = os.environ["CYNAI_TOKEN"]
TEXTS = json.loads(os.environ["TEXTS"])
MODES = ["messages-tuple", "updates"]
# A reader leaves when it has seen so many pieces of the message with this number.
LEAVES = [(0, 3), (1, 2)]


def pieces(events):
    """Pieces of the model's messages, in the order in which they came."""
    return [e.data[0] for e in events if e.event == "messages" and e.data[0]["type"] == "AIMessageChunk"]


def texts(events) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in pieces(events):
        found[piece["id"]] = found.get(piece["id"], "") + piece["content"]
    return found


def leaves_at(events, leave) -> bool:
    message, count = leave
    ids = list(texts(events))
    return len(ids) == message + 1 and sum(p["id"] == ids[message] for p in pieces(events)) == count


def check(events, again):
    """`events` were read by three readers, one after the other; `again` by one, from the start."""
    ids = [event.id for event in events if event.event in ("messages", "updates")]
    assert len(ids) == len(set(ids)), "an event came twice"
    assert ids == [event.id for event in again if event.event in ("messages", "updates")], (ids, again)
    assert list(texts(events).values()) == TEXTS, texts(events)
    first, second = texts(events)
    last = [piece for piece in pieces(events) if piece["chunk_position"] == "last"]
    assert [piece["id"] for piece in last] == [first, second], last
    assert all(piece["usage_metadata"]["output_tokens"] == 2 for piece in last), last
    calls = [call for piece in pieces(events) for call in piece["tool_call_chunks"]]
    assert "".join(call["args"] for call in calls) == '{"words": "hello"}', calls
    tools = [e.data[0] for e in events if e.event == "messages" and e.data[0]["type"] == "tool"]
    assert [(tool["tool_call_id"], tool["status"]) for tool in tools] == [("call-1", "success")], tools
    nodes = {e.data[1]["langgraph_node"] for e in events if e.event == "messages"}
    assert nodes == {"think", "act"}, nodes
    updates = [event.data for event in events if event.event == "updates"]
    assert updates == [{"help": {"answer": TEXTS[1]}}], updates


def with_the_synchronous_client():
    with get_sync_client(url=URL, api_key=TOKEN) as client:
        tid = client.threads.create()["thread_id"]
        events = []
        stream = client.runs.stream(tid, "helper", input={}, stream_mode=MODES, stream_resumable=True)
        for leave in LEAVES:
            for event in stream:
                events.append(event)
                if leaves_at(events, leave):
                    break
            stream.close()
            run = events[0].data["run_id"]
            assert client.runs.get(tid, run)["status"] == "running", "it was to be left in the middle"
            stream = client.runs.join_stream(tid, run, stream_mode=MODES, last_event_id=events[-1].id)
        events.extend(stream)
        check(events, list(client.runs.join_stream(tid, run, stream_mode=MODES, last_event_id="-1")))
        # The other mode tells whole messages, also to one who comes late.
        whole = client.runs.join_stream(tid, run, stream_mode="messages", last_event_id="-1")
        complete = [event.data[0] for event in whole if event.event == "messages/complete"]
        assert [message["content"] for message in complete if message["type"] == "ai"] == TEXTS, complete


async def with_the_asynchronous_client():
    client = get_client(url=URL, api_key=TOKEN)
    tid = (await client.threads.create())["thread_id"]
    events = []
    stream = client.runs.stream(tid, "helper", input={}, stream_mode=MODES, stream_resumable=True)
    for leave in LEAVES:
        async for event in stream:
            events.append(event)
            if leaves_at(events, leave):
                break
        await stream.aclose()
        run = events[0].data["run_id"]
        assert (await client.runs.get(tid, run))["status"] == "running", "it was to be left in the middle"
        stream = client.runs.join_stream(tid, run, stream_mode=MODES, last_event_id=events[-1].id)
    events.extend([event async for event in stream])
    again = client.runs.join_stream(tid, run, stream_mode=MODES, last_event_id="-1")
    check(events, [event async for event in again])
    await client.aclose()


with_the_synchronous_client()
asyncio.run(with_the_asynchronous_client())
print("the agent's streams all went as they should")
