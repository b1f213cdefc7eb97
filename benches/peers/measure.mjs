// What every measurement in JavaScript shares; measure.py is its twin and says more.

import fs from 'node:fs';
import { setTimeout as sleep } from 'node:timers/promises';

export const RUNS = { 1: 10, 16: 32, 64: 64 }; // at once -> how many in all
export const STEPS = 100;
export const BRANCHES = 100;

const REP = Number(process.env.REP ?? 1);
const QUIET_WAIT_MS = 1000 * Number(process.env.QUIET_WAIT ?? 10);
const QUIET_AT = 0.6;
const MS_PER_TICK = 10; // USER_HZ is 100 on every Linux that Node runs on

export { sleep };

export function emit(peer, workload, metric, value, unit, more = {}) {
  const load = Number(fs.readFileSync('/proc/loadavg', 'utf8').split(' ')[0]);
  const rounded = Math.round(value * 1e4) / 1e4;
  console.log(JSON.stringify({ peer, workload, metric, value: rounded, unit, rep: REP, load, ...more }));
}

export function percentile(values, percent) {
  const ordered = [...values].sort((a, b) => a - b);
  return ordered[Math.ceil((percent / 100) * ordered.length) - 1];
}

// The fields of /proc/PID/stat after the name, or null when the process has ended.
function stat(pid) {
  try {
    return fs.readFileSync(`/proc/${pid}/stat`, 'utf8').split(')').pop().trim().split(' ');
  } catch {
    return null;
  }
}

async function noise(ours) {
  const samples = 8;
  const kernel = 2;
  let seen = 0;
  for (let sample = 0; sample < samples; sample++) {
    for (const name of fs.readdirSync('/proc')) {
      const fields = /^\d+$/.test(name) ? stat(name) : null;
      if (!fields || ours.includes(Number(name)) || Number(fields[1]) === kernel) continue;
      if (fields[0] === 'R' && Number(fields[16]) < 5) seen++;
    }
    await sleep(100);
  }
  return seen / samples;
}

// Waits, for a bounded time, until the machine is ours; returns the noise that is left.
export async function waitQuiet(...pids) {
  const ours = [process.pid, ...pids];
  const deadline = performance.now() + QUIET_WAIT_MS;
  for (;;) {
    const level = await noise(ours);
    if (level <= QUIET_AT || performance.now() > deadline) return level;
  }
}

// Milliseconds of CPU that a process has used.
export function cpuOf(pid) {
  const fields = stat(pid);
  return (Number(fields[11]) + Number(fields[12])) * MS_PER_TICK;
}

export function appendStep(path, step) {
  fs.appendFileSync(path, `${step} ${Date.now()}\n`);
}

export function readSteps(path) {
  if (!fs.existsSync(path)) return [];
  const lines = fs.readFileSync(path, 'utf8').split('\n').filter(line => line.includes(' '));
  return lines.map(line => line.split(' ').map(Number)).map(([step, at]) => ({ step, at }));
}

// Calls `work` `total` times, at most `atOnce` at a time.
export async function spread(total, atOnce, work) {
  let next = 0;
  const client = async () => {
    while (next < total) await work(next++);
  };
  await Promise.all(Array.from({ length: atOnce }, client));
}
