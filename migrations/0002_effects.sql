-- What attempts do to the world: told before they act, and what came of it. One row for each attempt; the
-- idempotency key is the task's id and the attempt's number.
create table effects (
  thread_id    uuid not null,
  task_id      uuid not null,
  attempt      int not null,
  run_id       uuid not null,
  namespace    text not null,
  branch       int not null,
  seq          bigint not null,                 -- of the checkpoint that planned the activation
  node         text not null,
  kind         text not null,                   -- 'tool', 'model', 'use'
  target       text not null,                   -- what is called
  effect       text not null check (effect in ('idempotent', 'effectful')),
  status       text not null check (status in ('intent', 'done', 'failed', 'not_sent', 'unknown', 'waiting')),
  sends        int not null,                    -- how often it was about to be sent
  started_at   timestamptz not null,
  ended_at     timestamptz,
  request_hash bytea not null,                  -- SHA-256 of the whole request's JSON
  request      bytea not null,                  -- JSON; of a long one, a text with its beginning
  outcome      bytea,                           -- JSON: the output or the failure, clipped likewise
  primary key (thread_id, task_id, attempt)
);
create index effects_run on effects (run_id, started_at);
