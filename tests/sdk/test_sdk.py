"""What a user of the unmodified Python SDK of LangGraph meets: every step below is one that a program takes.

Usage: test_sdk.py URL, with the API token in CYNAI_TOKEN. The server has the graphs of examples/ and two of its
tests' own: `chatty`, which streams custom items, and `slow`, which takes a minute. Ends with one line that says what
was checked; a failed assertion ends it with the line of the step.
"""

import asyncio
import os
import sys
import uuid

from langgraph_sdk import get_client, get_sync_client
from langgraph_sdk.errors import ConflictError, NotFoundError, UnprocessableEntityError
from langgraph_sdk.schema import StreamPart

URL = sys.argv[1]
TOKEN = os.environ["CYNAI_TOKEN"]
MODES = ["values", "updates", "custom", "tasks"]


def refused(kind, call, *args, **kwargs):
    """The call is refused with this kind of error, whose text is given back."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    raise AssertionError(f"not refused with {kind.__name__}")


def of(events: list[StreamPart], mode: str) -> list:
    """The data of the events of a mode."""
    return [event.data for event in events if event.event == mode]


def assistants(client):
    found = client.assistants.search(limit=100)
    names = {assistant["graph_id"] for assistant in found}
    assert {"approval", "fan-out", "loop", "hello", "subgraph"} <= names, names
    approval = next(a for a in found if a["graph_id"] == "approval")
    assert client.assistants.get(approval["assistant_id"])["name"] == "approval"
    graph = client.assistants.get_graph(approval["assistant_id"])
    nodes = {node["id"] for node in graph["nodes"]}
    assert {"__start__", "__end__", "ask", "nobody", "small"} <= nodes, nodes
    assert any(edge.get("conditional") for edge in graph["edges"]), graph["edges"]
    schemas = client.assistants.get_schemas(approval["assistant_id"])
    assert "amount" in schemas["input_schema"]["properties"], schemas
    assert client.assistants.count(graph_id="approval") == 1


def interrupt_and_resume(client) -> str:
    thread = client.threads.create(metadata={"who": "sdk"})
    tid = thread["thread_id"]
    assert thread["status"] == "idle" and thread["metadata"]["who"] == "sdk", thread
    assert client.threads.get_state(tid)["next"] == []

    events = list(client.runs.stream(tid, "approval", input={"amount": 500}, stream_mode=MODES))
    assert events[0].event == "metadata" and uuid.UUID(events[0].data["run_id"]), events[0]
    values = of(events, "values")
    assert values[0]["amount"] == 500, values
    asked = values[-1]["__interrupt__"]
    assert [question["value"]["question"] for question in asked] == ["Spend 500 euros?"], asked
    assert "__interrupt__" in of(events, "updates")[-1], of(events, "updates")
    assert any(task["name"] == "ask" for task in of(events, "tasks")), of(events, "tasks")

    run = client.runs.get(tid, events[0].data["run_id"])
    assert run["status"] == "success", run
    thread = client.threads.get(tid)
    assert thread["status"] == "interrupted", thread
    assert [q["id"] for qs in thread["interrupts"].values() for q in qs] == [asked[0]["id"]], thread
    state = client.threads.get_state(tid)
    assert state["next"] == ["ask"], state
    assert state["tasks"][0]["interrupts"][0]["value"]["amount"] == 500, state["tasks"]
    assert client.threads.search(status="interrupted", metadata={"who": "sdk"})[0]["thread_id"] == tid

    wrong = {"resume": {"approve": "perhaps"}}
    text = refused(UnprocessableEntityError, client.runs.create, tid, "approval", command=wrong)
    assert "approve" in text or "boolean" in text, text

    answer = {"resume": {"approve": True, "why": "needed"}}
    events = list(client.runs.stream(tid, "approval", command=answer, stream_mode="updates"))
    assert of(events, "updates") == [{"ask": {"approved": True, "note": "needed"}}], events
    state = client.threads.get_state(tid)
    assert state["values"] == {"amount": 500, "approved": True, "note": "needed"}, state
    assert state["next"] == [] and client.threads.get(tid)["status"] == "idle"
    refused(ConflictError, client.runs.create, tid, "approval", command=answer)
    return tid


def history_and_forks(client, tid: str):
    history = client.threads.get_history(tid, limit=100)
    assert [state["metadata"]["source"] for state in history] == ["loop", "input"], history
    assert history[0]["parent_checkpoint"]["checkpoint_id"] == history[1]["checkpoint"]["checkpoint_id"]
    asking = next(state for state in history if state["next"] == ["ask"])
    checkpoint = asking["checkpoint"]
    at = client.threads.get_state(tid, checkpoint_id=checkpoint["checkpoint_id"])
    assert at["values"]["amount"] == 500 and at["next"] == ["ask"], at
    page = client.threads.get_history(tid, limit=1, before=history[0]["checkpoint"])
    assert [state["checkpoint"] for state in page] == [history[1]["checkpoint"]], page

    # The question comes again, on a branch of its own, and may be answered otherwise.
    again = client.runs.wait(tid, "approval", input=None, checkpoint_id=checkpoint["checkpoint_id"])
    assert len(again["__interrupt__"]) == 1, again
    answered = client.runs.wait(tid, "approval", command={"resume": {"approve": False, "why": "no"}})
    assert answered["approved"] is False and answered["note"] == "no", answered
    forked = client.threads.get_history(tid, limit=100)
    fork = next(state for state in forked if state["metadata"]["source"] == "fork")
    assert fork["parent_checkpoint"]["checkpoint_id"] == checkpoint["checkpoint_id"], fork
    old = client.threads.get_state(tid, checkpoint_id=history[0]["checkpoint"]["checkpoint_id"])
    assert old["values"]["approved"] is True, "the other branch is as it was"

    updated = client.threads.update_state(tid, {"note": "edited"}, as_node="ask")
    state = client.threads.get_state(tid)
    assert state["checkpoint"]["checkpoint_id"] == updated["checkpoint"]["checkpoint_id"], (state, updated)
    assert state["values"]["note"] == "edited" and state["metadata"]["source"] == "update", state
    before = client.threads.update_state(tid, {"amount": 50}, checkpoint=checkpoint, as_node="__start__")
    went = client.runs.wait(tid, "approval", input=None, checkpoint_id=before["checkpoint"]["checkpoint_id"])
    assert went["note"] == "small enough to go without", went


def streams(client):
    tid = client.threads.create()["thread_id"]
    words = ["a", "bb", "ccc"]
    events = list(client.runs.stream(tid, "fan-out", input={"words": words}, stream_mode=MODES))
    measured = [update["measure"] for update in of(events, "updates") if "measure" in update]
    assert sorted(next(iter(m["lengths"])) for m in measured) == words, measured
    starts = [task for task in of(events, "tasks") if "input" in task and task["name"] == "measure"]
    ends = [task for task in of(events, "tasks") if "result" in task and task["name"] == "measure"]
    assert len(starts) == len(ends) == 3, of(events, "tasks")
    assert of(events, "values")[-1]["report"] == "3 words, the longest has 3 letters", events
    # The last event has no id of its own: the SDK shows the one before.
    ids = [event.id for event in events if event.id and event.event != "end"]
    assert len(ids) == len(set(ids)), ids

    events = list(client.runs.stream(None, "chatty", input={}, stream_mode="custom"))
    assert {"sleeping_ms": 120} in of(events, "custom"), events

    people = {"people": ["Ann", "Ben"]}
    below = client.runs.stream(None, "subgraph", input=people, stream_mode="updates", stream_subgraphs=True)
    assert any("|" in event.event for event in below)

    # A stream that is taken up again tells the rest, or all of it.
    run = client.runs.create(tid, "loop", input={"goal": 5}, stream_mode="values", stream_resumable=True)
    client.runs.join(tid, run["run_id"])
    all_of_it = list(client.runs.join_stream(tid, run["run_id"], stream_mode="values", last_event_id="-1"))
    values = of(all_of_it, "values")
    assert values[-1].get("n") == 5 and len(values) >= 6, all_of_it
    middle = [event for event in all_of_it if event.event == "values"][2]
    rest = list(client.runs.join_stream(tid, run["run_id"], stream_mode="values", last_event_id=middle.id))
    assert of(rest, "values") == values[3:], (rest, values)


def runs(client):
    tid = client.threads.create()["thread_id"]
    assert client.runs.wait(None, "hello", input={"name": "Ann"}) == {"greeting": "Hello, Ann!"}
    run = client.runs.create(tid, "slow", input={}, metadata={"n": 1})
    assert run["status"] == "pending" and run["metadata"]["n"] == 1, run
    refused(ConflictError, client.runs.create, tid, "hello", input={}, multitask_strategy="reject")
    queued = client.runs.create(tid, "hello", input={"name": "later"}, multitask_strategy="enqueue")
    assert [r["run_id"] for r in client.runs.list(tid)] == [queued["run_id"], run["run_id"]]
    client.runs.cancel(tid, run["run_id"], wait=True)
    assert client.runs.get(tid, run["run_id"])["status"] == "interrupted"
    assert client.runs.join(tid, queued["run_id"])["greeting"] == "Hello, later!"
    refused(NotFoundError, client.runs.cancel, tid, run["run_id"])
    client.runs.delete(tid, run["run_id"])
    refused(NotFoundError, client.runs.get, tid, run["run_id"])

    other = client.threads.create()["thread_id"]
    first = client.runs.create(other, "slow", input={})
    over = client.runs.wait(other, "hello", input={"name": "now"}, multitask_strategy="interrupt")
    assert over["greeting"] == "Hello, now!", over
    assert client.runs.get(other, first["run_id"])["status"] == "interrupted"

    for thread in (tid, other):
        client.threads.delete(thread)
        refused(NotFoundError, client.threads.get, thread)
    refused(NotFoundError, client.threads.get, str(uuid.uuid4()))
    refused(NotFoundError, client.runs.create, None, "no-such-graph", input={})
    text = refused(UnprocessableEntityError, client.runs.create, None, "approval", input={"amount": "much"})
    assert "amount" in text, text
    failed = client.runs.wait(None, "loop", input={"goal": 100}, config={"recursion_limit": 3}, raise_error=False)
    assert failed["__error__"]["error"] == "superstep_limit", failed


async def the_same_with_the_asynchronous_client():
    client = get_client(url=URL, api_key=TOKEN)
    tid = (await client.threads.create())["thread_id"]
    events = [event async for event in client.runs.stream(tid, "approval", input={"amount": 500}, stream_mode=MODES)]
    assert of(events, "values")[-1]["__interrupt__"], events
    answer = {"resume": {"approve": True}}
    assert (await client.runs.wait(tid, "approval", command=answer))["approved"] is True
    history = await client.threads.get_history(tid)
    asking = next(state for state in history if state["next"] == ["ask"])
    fork = asking["checkpoint"]["checkpoint_id"]
    assert (await client.runs.wait(tid, "approval", input=None, checkpoint_id=fork))["__interrupt__"]
    await client.threads.update_state(tid, {"approved": False}, as_node="ask")
    assert (await client.threads.get_state(tid))["values"]["approved"] is False

    # Many at once, and one that is cancelled while its stream is read.
    async def greet(name: str) -> str:
        return (await client.runs.wait(None, "hello", input={"name": name}))["greeting"]

    names = [f"n{at}" for at in range(20)]
    assert await asyncio.gather(*map(greet, names)) == [f"Hello, {name}!" for name in names]
    slow = (await client.threads.create())["thread_id"]
    run = await client.runs.create(slow, "slow", input={})

    async def follow() -> list[StreamPart]:
        return [event async for event in client.runs.join_stream(slow, run["run_id"])]

    following = asyncio.create_task(follow())
    await client.runs.cancel(slow, run["run_id"], wait=True)
    await asyncio.wait_for(following, 10)
    assert (await client.runs.get(slow, run["run_id"]))["status"] == "interrupted"
    await client.aclose()


def main():
    with get_sync_client(url=URL, api_key=TOKEN) as client:
        assistants(client)
        tid = interrupt_and_resume(client)
        history_and_forks(client, tid)
        streams(client)
        runs(client)
    asyncio.run(the_same_with_the_asynchronous_client())
    print("the SDK's steps all went as they should")


main()
