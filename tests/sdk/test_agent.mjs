// Streams of an agent's run by the unmodified JavaScript SDK of LangGraph: left in the middle of a message, twice, and
// taken up again after the last event. Nothing is missed, nothing comes twice.
//
// Usage: test_agent.mjs URL DIRECTORY, where the SDK is installed; with the API token in CYNAI_TOKEN and the texts of the
// model's messages, as a JSON list, in TEXTS. The server has the graph `helper`.

import assert from "node:assert/strict";
import { createRequire } from "node:module";
import path from "node:path";

const [url, directory] = process.argv.slice(2);
const { Client } = createRequire(path.join(directory, "package.json"))("@langchain/langgraph-sdk");
const TEXTS = JSON.parse(process.env.TEXTS);
const streamMode = ["messages-tuple", "updates"];
// A reader leaves when it has seen so many pieces of the message with this number.
const LEAVES = [[0, 3], [1, 2]];

const of = (events, type) =>
  events.filter((event) => event.event === "messages" && event.data[0].type === type).map((event) => event.data[0]);
const pieces = (events) => of(events, "AIMessageChunk");

function texts(events) {
  const found = new Map();
  for (const piece of pieces(events)) found.set(piece.id, (found.get(piece.id) ?? "") + piece.content);
  return found;
}

function leavesAt(events, [message, count]) {
  const ids = [...texts(events).keys()];
  return ids.length === message + 1 && pieces(events).filter((piece) => piece.id === ids[message]).length === count;
}

async function all(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

const client = new Client({ apiUrl: url, apiKey: process.env.CYNAI_TOKEN });
const { thread_id: thread } = await client.threads.create();
const events = [];
let run;
let stream = client.runs.stream(thread, "helper", { input: {}, streamMode, streamResumable: true });
for (const leave of LEAVES) {
  for await (const event of stream) {
    events.push(event);
    if (leavesAt(events, leave)) break;
  }
  run = events[0].data.run_id;
  assert.equal((await client.runs.get(thread, run)).status, "running", "it was to be left in the middle");
  stream = client.runs.joinStream(thread, run, { streamMode, lastEventId: events.at(-1).id });
}
events.push(...(await all(stream)));

const ids = (list) => list.filter((event) => ["messages", "updates"].includes(event.event)).map((event) => event.id);
const again = await all(client.runs.joinStream(thread, run, { streamMode, lastEventId: "-1" }));
assert.equal(new Set(ids(events)).size, ids(events).length, "an event came twice");
assert.deepEqual(ids(events), ids(again));
assert.deepEqual([...texts(events).values()], TEXTS);
const last = pieces(events).filter((piece) => piece.chunk_position === "last");
assert.deepEqual(last.map((piece) => piece.id), [...texts(events).keys()]);
const calls = pieces(events).flatMap((piece) => piece.tool_call_chunks);
assert.equal(calls.map((call) => call.args).join(""), '{"words": "hello"}');
assert.deepEqual(of(events, "tool").map((tool) => [tool.tool_call_id, tool.status]), [["call-1", "success"]]);
const updates = events.filter((event) => event.event === "updates").map((event) => event.data);
assert.deepEqual(updates, [{ help: { answer: TEXTS[1] } }]);

// What else a program does first: waits, asks for states, resumes.
const values = await client.threads.getState(thread);
assert.equal(values.values.answer, TEXTS[1]);
const asked = await client.runs.wait(thread, "approval", { input: { amount: 500 } });
assert.equal(asked.__interrupt__.length, 1);
const answered = await client.runs.wait(thread, "approval", { command: { resume: { approve: true } } });
assert.equal(answered.approved, true);
assert.equal((await client.threads.getHistory(thread)).length > 2, true);
assert.equal((await client.assistants.search({ graphId: "helper" })).length, 1);
console.log("the agent's streams all went as they should");
process.exit(0);
