// A small chat model as an OpenAI-compatible endpoint, over node-llama-cpp's ready-made binary: nothing is compiled.
//
//   node chat.mjs MODULES WEIGHTS [PORT]      prints its address; MODULES is where npm installed node-llama-cpp
//
// Below /v1 it helps with JSON schemas, /plain/v1 ignores `response_format`, /late/v1 does so in the first answer of a
// conversation, /strict/v1 refuses it. Where a tool is to be
// called (`tool_choice`: required, or a name), a grammar sees to that; left to itself the model only talks. Two chats at
// a time; who comes later waits. GET /slots tells what is under way, in the form of llama.cpp's server.

import http from 'node:http';
import { createRequire } from 'node:module';
import path from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules, weights, port = '0'] = process.argv.slice(2);
const entry = createRequire(path.join(path.resolve(modules), 'package.json')).resolve('node-llama-cpp');
const { getLlama, LlamaChat, LlamaJsonSchemaGrammar } = await import(pathToFileURL(entry).href);

const NAME = 'smollm2-135m-instruct';
const CHATS = 2;
const CONTEXT = 4096; // tokens of a chat
const MOST_TOKENS = 1024; // of an answer whose request names no limit
const MOST_BYTES = 4 << 20; // of a request

const llama = await getLlama({ gpu: false, build: 'never', progressLogs: false, maxThreads: 1 });
const model = await llama.loadModel({ modelPath: weights });
const context = await model.createContext({ contextSize: CONTEXT, sequences: CHATS, threads: 1 });
const slots = Array.from({ length: CHATS }, (_, id) => ({ id, sequence: context.getSequence(), is_processing: false }));
const waiting = [];
let served = 0;

class Refusal extends Error {
  constructor(status, message, more = {}) {
    super(message);
    this.status = status;
    this.body = { error: { message, type: 'invalid_request_error', ...more } };
  }
}

async function take() {
  const free = slots.find((slot) => !slot.is_processing) ?? (await new Promise((resolve) => waiting.push(resolve)));
  free.is_processing = true;
  return free;
}

function give(slot) {
  slot.is_processing = false;
  const next = waiting.shift();
  if (next) {
    slot.is_processing = true;
    next(slot);
  }
}

const textOf = (content) =>
  typeof content === 'string' ? content : (content ?? []).map((part) => part.text ?? '').join('');

/** The conversation as the library wants it, with what the model is told about its tools. */
function history(request) {
  const turns = [];
  const calls = (message) =>
    (message.tool_calls ?? []).map(({ function: f }) => JSON.stringify({ name: f.name, arguments: f.arguments }));
  for (const message of request.messages) {
    const text = textOf(message.content);
    if (message.role === 'assistant') {
      turns.push({ type: 'model', response: [[text, ...calls(message)].filter(Boolean).join('\n')] });
    } else if (message.role === 'system') {
      turns.push({ type: 'system', text });
    } else {
      turns.push({ type: 'user', text: message.role === 'tool' ? `The tool answered: ${text}` : text });
    }
  }
  if (request.tools?.length) {
    const known = request.tools.map(({ function: f }) => `- ${f.name}: ${f.description}`).join('\n');
    turns.unshift({ type: 'system', text: `You have these tools:\n${known}` });
  }
  if (turns.at(-1)?.type !== 'model') turns.push({ type: 'model', response: [] });
  return turns;
}

/** The tools of which one is to be called; none when the model may talk. */
function forced({ tools, tool_choice: choice }) {
  if (!tools?.length || !choice || choice === 'auto' || choice === 'none') return [];
  const found = tools.filter((tool) => choice === 'required' || tool.function.name === choice.function?.name);
  if (!found.length) throw new Refusal(400, 'tool_choice names a tool that is not there');
  return found;
}

function grammar(schema) {
  try {
    return new LlamaJsonSchemaGrammar(llama, schema);
  } catch (error) {
    throw new Refusal(400, `no grammar can be made of the schema: ${error.message}`);
  }
}

/** What the answer has to look like. */
function shape(request, way, tools) {
  const calls = tools.map(({ function: f }) => ({
    type: 'object',
    properties: { name: { const: f.name }, arguments: f.parameters ?? { type: 'object', properties: {} } },
  }));
  if (calls.length) return grammar(calls.length === 1 ? calls[0] : { oneOf: calls });
  const format = request.response_format;
  if (!format || format.type === 'text') return undefined;
  if (way === 'strict') throw new Refusal(400, 'response_format is not supported', { param: 'response_format' });
  const first = !request.messages.some(({ role }) => role === 'assistant');
  if (way === 'plain' || (way === 'late' && first)) return undefined;
  return grammar(format.json_schema?.schema ?? { type: 'object', additionalProperties: true });
}

async function chat(request, way, response) {
  const gone = new AbortController();
  response.on('close', () => gone.abort());
  const tools = forced(request);
  const rules = shape(request, way, tools);
  const turns = history(request);
  const length = model.tokenize(turns.map((turn) => turn.text ?? turn.response.join('')).join('\n')).length;
  if (length > CONTEXT - 64) {
    const message = `the request has ${length} tokens and exceeds the available context of ${CONTEXT}`;
    throw new Refusal(400, message, { type: 'exceed_context_size_error' });
  }
  const slot = await take();
  try {
    if (!gone.signal.aborted) await answer(request, turns, rules, tools, slot.sequence, gone.signal, response);
  } finally {
    give(slot);
  }
}

async function answer(request, turns, rules, tools, sequence, signal, response) {
  await sequence.clearHistory();
  const before = sequence.tokenMeter.getState();
  const head = { id: `chatcmpl-${++served}`, created: Math.floor(Date.now() / 1000), model: NAME };
  const event = (delta, reason = null) => {
    const choices = [{ index: 0, delta, finish_reason: reason }];
    response.write(`data: ${JSON.stringify({ ...head, object: 'chat.completion.chunk', choices })}\n\n`);
  };
  if (request.stream) {
    response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
    event({ role: 'assistant', content: null });
  }
  const talker = new LlamaChat({ contextSequence: sequence });
  const made = await talker.generateResponse(turns, {
    grammar: rules,
    maxTokens: request.max_completion_tokens ?? request.max_tokens ?? MOST_TOKENS,
    temperature: request.temperature ?? 0.7,
    topP: request.top_p,
    seed: request.seed,
    customStopTriggers: [request.stop ?? []].flat(),
    // Left alone, so small a model says the same for ever.
    repeatPenalty: rules ? false : { lastTokens: 256, penalty: 1.2 },
    signal,
    stopOnAbortSignal: true,
    onTextChunk: (text) => request.stream && !tools.length && event({ content: text }),
  });
  talker.dispose({ disposeSequence: false });
  if (signal.aborted) return;
  const { usedInputTokens, usedOutputTokens } = sequence.tokenMeter.diff(before);
  const usage = {
    prompt_tokens: usedInputTokens,
    completion_tokens: usedOutputTokens,
    total_tokens: usedInputTokens + usedOutputTokens,
  };
  let reason = made.metadata.stopReason === 'maxTokens' ? 'length' : 'stop';
  let message = { role: 'assistant', content: made.response };
  if (tools.length) {
    // What was cut off is sent as it is, as any endpoint would.
    let call = { name: tools[0].function.name, arguments: made.response };
    try {
      call = JSON.parse(made.response);
      call.arguments = JSON.stringify(call.arguments);
      reason = 'tool_calls';
    } catch {}
    const calls = [{ index: 0, id: `call_${served}`, type: 'function', function: call }];
    message = { role: 'assistant', content: null, tool_calls: calls };
    if (request.stream) event({ tool_calls: calls });
  }
  if (!request.stream) {
    const choices = [{ index: 0, message, finish_reason: reason }];
    return send(response, 200, { ...head, object: 'chat.completion', choices, usage });
  }
  event({}, reason);
  if (request.stream_options?.include_usage) {
    response.write(`data: ${JSON.stringify({ ...head, object: 'chat.completion.chunk', choices: [], usage })}\n\n`);
  }
  response.end('data: [DONE]\n\n');
}

function send(response, status, body) {
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(JSON.stringify(body));
}

async function body(request) {
  const parts = [];
  let length = 0;
  for await (const part of request) {
    length += part.length;
    if (length > MOST_BYTES) throw new Refusal(413, `a request has at most ${MOST_BYTES} bytes`);
    parts.push(part);
  }
  try {
    return JSON.parse(Buffer.concat(parts).toString());
  } catch {
    throw new Refusal(400, 'the body is no JSON');
  }
}

async function serve(request, response) {
  const way = /^\/(?:(plain|late|strict)\/)?v1\/(.*)$/.exec(request.url);
  if (request.url === '/slots') {
    return send(response, 200, slots.map(({ id, is_processing }) => ({ id, is_processing })));
  }
  if (way?.[2] === 'models') {
    return send(response, 200, { object: 'list', data: [{ id: NAME, object: 'model', created: 0, owned_by: 'local' }] });
  }
  if (way?.[2] !== 'chat/completions') throw new Refusal(404, 'there is no such path');
  const asked = await body(request);
  if (!Array.isArray(asked.messages) || !asked.messages.length) throw new Refusal(400, 'messages: at least one is needed');
  await chat(asked, way[1] ?? '', response);
}

const server = http.createServer((request, response) => {
  serve(request, response).catch((error) => {
    if (!(error instanceof Refusal)) console.error(error);
    if (response.destroyed) return;
    // An answer that has begun can only be cut.
    if (response.headersSent) return response.destroy();
    const unknown = { error: { message: String(error.message), type: 'server_error' } };
    send(response, error.status ?? 500, error.body ?? unknown);
  });
});
server.listen(Number(port), '127.0.0.1', () => console.log(`http://127.0.0.1:${server.address().port}/v1`));
