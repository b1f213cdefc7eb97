// Restate: its server with its own log (fsync on, as it comes), and a service with its TypeScript SDK.
//
//   node restate.mjs W1|W2|W4
//
// A step is a `ctx.run`: a closure whose result is durable before the next one starts. The service runs
// in this process, as a user's would beside the server; for W4 it runs in a child, which is killed.

import { spawn } from 'node:child_process';
import { randomUUID } from 'node:crypto';
import fs from 'node:fs';
import http2 from 'node:http2';
import { createRequire } from 'node:module';
import os from 'node:os';
import path from 'node:path';
import { BRANCHES, RUNS, STEPS, appendStep, cpuOf, emit, percentile, readSteps, sleep, spread, waitQuiet } from './measure.mjs';

// The SDK calls this, and waits for ever without it; it came with Node 22.
Promise.withResolvers ??= () => {
  let resolve, reject;
  const promise = new Promise((...settle) => ([resolve, reject] = settle));
  return { promise, resolve, reject };
};

const PEER = 'restate-ts';
const PEERS = path.resolve(process.env.CYNAI_PEERS_DIR ?? 'target/peers');
const PORTS = { ingress: 18090, admin: 19090, node: 15190, service: 19190 };
const require = createRequire(path.join(PEERS, 'package.json'));
const restate = require('@restatedev/restate-sdk');

const stepTimes = new Map();
const service = restate.service({
  name: 'bench',
  handlers: {
    chain: async (ctx, { id, log }) => {
      let count = 0;
      for (let step = 0; step < STEPS; step++) {
        count = await ctx.run('step', () => {
          stepTimes.get(id)?.push(performance.now());
          if (log) appendStep(log, step);
          return count + 1;
        });
      }
      return count;
    },
    fan: async ctx => {
      const branches = Array.from({ length: BRANCHES }, (_, i) => ctx.run(`branch ${i}`, () => [i]));
      const parts = await restate.RestatePromise.all(branches);
      return ctx.run('join', () => parts.flat().reduce((sum, part) => sum + part, 0));
    },
  },
});

async function serve() {
  const endpoint = restate.endpoint().bind(service);
  endpoint.setLogger(() => {});
  const server = http2.createServer(endpoint.http2Handler());
  server.listen(PORTS.service, '127.0.0.1');
  await new Promise((resolve, reject) => server.once('listening', resolve).once('error', reject));
}

class Server {
  constructor() {
    this.dir = fs.mkdtempSync(path.join(os.tmpdir(), 'cynai-restate-'));
  }

  async start() {
    const platform = process.arch === 'arm64' ? 'linux-arm64' : 'linux-x64';
    const program = path.join(PEERS, `node_modules/@restatedev/restate-server-${platform}/bin/restate-server`);
    const env = {
      ...process.env,
      RESTATE_ADMIN__BIND_IP: '127.0.0.1',
      RESTATE_ADMIN__BIND_PORT: String(PORTS.admin),
      RESTATE_INGRESS__BIND_IP: '127.0.0.1',
      RESTATE_INGRESS__BIND_PORT: String(PORTS.ingress),
      RESTATE_DISABLE_TELEMETRY: 'true',
      RESTATE_LOG_FILTER: 'warn',
    };
    const args = ['--no-logo', '--listen-mode', 'tcp', '--bind-ip', '127.0.0.1', '--bind-port', String(PORTS.node),
      '--base-dir', path.join(this.dir, 'data'), '--node-name', 'bench'];
    const log = fs.openSync(path.join(this.dir, 'log'), 'a');
    this.child = spawn(program, args, { env, stdio: ['ignore', log, log] });
    const urls = [`http://127.0.0.1:${PORTS.admin}/health`, `http://127.0.0.1:${PORTS.ingress}/restate/health`];
    for (let tries = 0; tries < 1500; tries++) {
      if (this.child.exitCode !== null) break;
      const answers = await Promise.allSettled(urls.map(url => fetch(url)));
      if (answers.every(answer => answer.value?.ok)) return;
      await sleep(20);
    }
    throw new Error(`restate-server did not start: ${fs.readFileSync(path.join(this.dir, 'log'), 'utf8').slice(-500)}`);
  }

  async register() {
    const body = JSON.stringify({ uri: `http://127.0.0.1:${PORTS.service}`, force: true, use_http_11: false });
    const headers = { 'content-type': 'application/json' };
    const answer = await fetch(`http://127.0.0.1:${PORTS.admin}/deployments`, { method: 'POST', headers, body });
    if (!answer.ok) throw new Error(await answer.text());
  }

  async kill() {
    const ended = new Promise(resolve => this.child.once('exit', resolve));
    this.child.kill('SIGKILL');
    await ended;
  }

  remove() {
    this.child?.kill('SIGKILL');
    fs.rmSync(this.dir, { recursive: true, force: true, maxRetries: 5 });
  }
}

async function call(handler, input) {
  const headers = { 'content-type': 'application/json' };
  const url = `http://127.0.0.1:${PORTS.ingress}/bench/${handler}`;
  const answer = await fetch(url, { method: 'POST', headers, body: JSON.stringify(input) });
  if (!answer.ok) throw new Error(await answer.text());
  return answer.json();
}

async function runChain() {
  const id = randomUUID();
  stepTimes.set(id, []);
  const count = await call('chain', { id });
  if (count !== STEPS) throw new Error(`counted ${count}`);
  return id;
}

async function w1(server) {
  await serve();
  await server.start();
  await server.register();
  for (let warm = 0; warm < 3; warm++) await runChain();
  for (const [atOnce, total] of Object.entries(RUNS)) {
    const noise = await waitQuiet(server.child.pid);
    const ids = [];
    const cpu = [cpuOf(process.pid), cpuOf(server.child.pid)];
    const begun = performance.now();
    await spread(total, Number(atOnce), async () => ids.push(await runChain()));
    const seconds = (performance.now() - begun) / 1000;
    const steps = total * STEPS;
    const gaps = ids.flatMap(id => stepTimes.get(id).slice(1).map((at, i) => at - stepTimes.get(id)[i]));
    const perStep = (pid, since) => ((cpuOf(pid) - since) * 1000) / steps;
    emit(PEER, 'W1.chain', `steps_per_s@${atOnce}`, steps / seconds, 'steps/s', { noise });
    emit(PEER, 'W1.chain', `step_p50@${atOnce}`, percentile(gaps, 50), 'ms');
    emit(PEER, 'W1.chain', `step_p99@${atOnce}`, percentile(gaps, 99), 'ms');
    emit(PEER, 'W1.chain', `cpu_engine_per_step@${atOnce}`, perStep(process.pid, cpu[0]), 'us', { note: 'service' });
    emit(PEER, 'W1.chain', `cpu_pg_per_step@${atOnce}`, perStep(server.child.pid, cpu[1]), 'us', { note: 'restate-server' });
  }
}

async function w2(server) {
  await serve();
  await server.start();
  await server.register();
  const expected = (BRANCHES * (BRANCHES - 1)) / 2;
  const one = async () => {
    const begun = performance.now();
    const total = await call('fan', {});
    if (total !== expected) throw new Error(`added up to ${total}`);
    return performance.now() - begun;
  };
  await one();
  const noise = await waitQuiet(server.child.pid);
  const took = [];
  for (let run = 0; run < 10; run++) took.push(await one());
  const sum = took.reduce((a, b) => a + b);
  emit(PEER, 'W2', 'run_p50@1', percentile(took, 50), 'ms', { noise });
  emit(PEER, 'W2', 'run_max@1', Math.max(...took), 'ms');
  emit(PEER, 'W2', 'branches_per_s@1', (1000 * took.length * BRANCHES) / sum, 'branches/s');
  const begun = performance.now();
  await Promise.all(Array.from({ length: 16 }, one));
  emit(PEER, 'W2', 'branches_per_s@16', (16 * BRANCHES * 1000) / (performance.now() - begun), 'branches/s');
}

// The service in a process of its own; resolves when it listens.
async function startService() {
  const child = spawn(process.execPath, [process.argv[1], 'service'], { stdio: ['ignore', 'pipe', 'inherit'] });
  await new Promise((resolve, reject) => child.stdout.once('data', resolve) && child.once('exit', reject));
  return child;
}

// Kills the service half-way, and in another run the server; the harness restarts only what it killed.
async function w4(server) {
  await server.start();
  for (const victim of ['service', 'server']) {
    let child = await startService();
    await server.register();
    const log = path.join(server.dir, `steps-${victim}`);
    const noise = await waitQuiet(server.child.pid, child.pid);
    const answer = call('chain', { id: victim, log }).catch(() => null); // it breaks when the server dies
    while (readSteps(log).length < STEPS / 2) await sleep(1);
    const ended = new Promise(resolve => child.once('exit', resolve));
    if (victim === 'server') await server.kill();
    else await (child.kill('SIGKILL'), ended);
    const before = readSteps(log).length;
    const restarted = Date.now();
    if (victim === 'server') await server.start();
    else child = await startService();
    const ready = Date.now();
    const missing = () => STEPS - new Set(readSteps(log).map(row => row.step)).size;
    for (let tries = 0; tries < 6000 && missing() > 0; tries++) await sleep(10);
    const rows = readSteps(log);
    const again = rows.length - new Set(rows.map(row => row.step)).size;
    const first = rows[before]?.at ?? NaN;
    const peer = `${PEER}/${victim}`;
    emit(peer, 'W4', 'restart_to_first_step', first - restarted, 'ms', { noise });
    emit(peer, 'W4', 'ready_to_first_step', first - ready, 'ms');
    emit(peer, 'W4', 'steps_run_again', again, 'steps', { complete: missing() === 0, by_itself: true });
    await answer;
    child.kill('SIGKILL');
  }
}

const workload = process.argv[2];
if (workload === 'service') {
  await serve();
  console.log('ready');
} else {
  const measures = { W1: w1, W2: w2, W4: w4 };
  if (!measures[workload]) {
    console.error('usage: restate.mjs W1|W2|W4');
    process.exit(2);
  }
  const server = new Server();
  process.once('exit', () => server.remove());
  for (const signal of ['SIGINT', 'SIGTERM']) process.once(signal, () => process.exit(1));
  await measures[workload](server);
  process.exit(0);
}
