-- The first schema. Names are unqualified everywhere: one pool serves one schema.
--
-- Hot tables are keyed by thread first, and no constraint crosses threads, so that threads can be
-- partitioned by the hash of their id. Channel values are `bytea` (JSON text): PostgreSQL's own JSON
-- types refuse a \u0000, and one such value must not sink a batch of other people's commits.

-- Time that must agree between processes. Tests put their own before it in the search path.
create function cynai_now() returns timestamptz
  language sql stable parallel safe
  as $$ select statement_timestamp() $$;

------------------------------------------------------------------------------------------- access

create table users (
  user_id     uuid primary key,
  name        text not null unique check (name ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
  admin       boolean not null default false,
  created_at  timestamptz not null
);

-- An API token is 256 random bits; only their SHA-256 is kept.
create table tokens (
  token_id     uuid primary key,
  user_id      uuid not null references users on delete cascade,
  name         text not null check (length(name) between 1 and 100),
  hash         bytea not null unique check (length(hash) = 32),
  created_at   timestamptz not null,
  expires_at   timestamptz,
  last_used_at timestamptz,
  revoked_at   timestamptz
);
create index tokens_user on tokens (user_id, token_id);

--------------------------------------------------------------------------------------------- runs

-- Every version of every graph that a run was ever started with; a run is pinned to a hash.
create table graphs (
  hash        bytea primary key check (length(hash) = 32),
  name        text not null,
  definition  text not null,              -- canonical JSON of the graph file
  subgraphs   jsonb not null,             -- name -> hex hash of each graph that it calls, at any depth
  created_at  timestamptz not null
);

-- The version that a new run of a name gets.
create table graph_names (
  name        text primary key,
  hash        bytea not null references graphs,
  updated_at  timestamptz not null
);

-- A configured graph. One without an owner is the default of its graph, seen by everybody.
create table assistants (
  assistant_id uuid primary key,
  user_id      uuid references users on delete cascade,
  graph_name   text not null references graph_names,
  name         text not null,
  description  text,
  config       jsonb not null default '{}',
  context      jsonb not null default '{}',
  metadata     jsonb not null default '{}',
  version      int not null default 1,
  created_at   timestamptz not null,
  updated_at   timestamptz not null
);
create index assistants_user on assistants (user_id, created_at desc);

create table threads (
  thread_id        uuid primary key,
  user_id          uuid not null references users on delete cascade,
  status           text not null default 'idle' check (status in ('idle', 'busy', 'interrupted', 'error')),
  fence            bigint not null default 0,   -- grows with every grant of authority over the thread
  branch           int not null default 0,      -- the current branch; the others are history
  active_run       uuid,                        -- the one run that may move the thread; others wait
  metadata         jsonb not null default '{}',
  config           jsonb not null default '{}',
  -- A projection for reading and searching, made when a run ends, not at each step.
  state_values     bytea,
  interrupts       bytea,
  error            bytea,
  graph_hash       bytea,                       -- of the last run or update
  created_at       timestamptz not null,
  updated_at       timestamptz not null,
  state_updated_at timestamptz not null,
  check ((status = 'busy') = (active_run is not null))
);
create index threads_user on threads (user_id, created_at desc, thread_id);
create index threads_metadata on threads using gin (metadata jsonb_path_ops);

-- Cold: written when a run is accepted, when it first starts and when it ends.
create table runs (
  run_id             uuid primary key,
  thread_id          uuid not null,
  user_id            uuid not null,
  assistant_id       uuid not null,
  graph_hash         bytea not null,
  branch             int not null default 0,    -- the branch that it runs on
  status             text not null default 'pending'
                     check (status in ('pending', 'running', 'success', 'error', 'timeout', 'interrupted')),
  multitask_strategy text not null default 'enqueue'
                     check (multitask_strategy in ('reject', 'interrupt', 'rollback', 'enqueue')),
  priority           int not null default 0,
  not_before         timestamptz,               -- a delayed start
  input              bytea,                     -- JSON of what it begins with, when it has not begun
  stream_modes       text[] not null default '{}',
  options            bytea not null,            -- JSON: what the client asked for, echoed and read by the driver
  metadata           jsonb not null default '{}',
  temporary_thread   boolean not null default false,
  error              bytea,                     -- JSON: {"error": class, "message": text}
  result             bytea,                     -- JSON: what waiting for the run answers
  cancel_reason      text,
  created_at         timestamptz not null,
  updated_at         timestamptz not null,
  started_at         timestamptz,
  ended_at           timestamptz,
  check ((status in ('pending', 'running')) = (ended_at is null))
);
create index runs_thread on runs (thread_id, run_id desc);
create index runs_user on runs (user_id, run_id desc);
create index runs_temporary on runs (ended_at) where temporary_thread and ended_at is not null;

-- Hot: one narrow row for each run that has not ended. A step's commit changes seq and claims only,
-- and no index names them, so the update stays in its page.
create table heads (
  run_id      uuid primary key,
  thread_id   uuid not null,
  fence       bigint not null default 0,
  seq         bigint not null default -1,       -- the root namespace's last checkpoint; -1: not begun
  first_seq   bigint not null default -1,       -- its input checkpoint
  wake        bigint not null default 0,        -- grows when something arrives from outside
  epoch       bigint,
  instance_id uuid,
  branch      int not null default 0,
  wake_below  int not null default 0,           -- a parked run wakes when so few tasks are outstanding
  claims      smallint not null default 0,      -- processes that died with this run and without a commit of it
  status      text not null check (status in ('pending', 'queued', 'running', 'parked')),
  check ((status = 'running') = (instance_id is not null))
) with (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_threshold = 2000);
create index heads_thread on heads (thread_id);
create index heads_running on heads (instance_id, epoch) where status = 'running';

-- Runs that may be claimed now ('ready'; 'suspect' after a crash, one at a time) or at a time ('later').
-- A claimed row is gone.
create table queue (
  run_id    uuid primary key,
  thread_id uuid not null,
  user_id   uuid not null,
  priority  int not null default 0,
  state     text not null check (state in ('ready', 'suspect', 'later')),
  due       timestamptz not null
) with (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.01, autovacuum_vacuum_threshold = 1000,
        autovacuum_vacuum_cost_delay = 0);
create index queue_ready on queue (user_id, priority desc, due) where state = 'ready';
create index queue_suspect on queue (due) where state = 'suspect';
create index queue_later on queue (due) where state = 'later';

-- One row for each driver process's installation; a run names (instance_id, epoch), so that a lease
-- costs one update a driver and not one a run.
create table instances (
  instance_id uuid primary key,
  epoch       bigint not null,
  deadline    timestamptz not null,
  host        text not null,
  started_at  timestamptz not null
) with (fillfactor = 50);

-- One row for each superstep. Columns are ordered by alignment: this is the table that grows.
create table checkpoints (
  thread_id     uuid not null,
  run_id        uuid not null,
  seq           bigint not null,
  at            timestamptz not null,
  parent_seq    bigint,                         -- null: the row before, on the same branch
  branch        int not null,
  parent_branch int,
  source        smallint not null,              -- 0 input, 1 loop, 2 update, 3 fork
  namespace     text not null,                  -- '' is the root
  next          text not null,                  -- names of the nodes that run next, separated by commas
  changed       bytea not null,                 -- JSON of what this superstep changed
  keyframe      bytea,                          -- JSON of the whole state, by value or by reference
  primary key (thread_id, namespace, branch, seq)
);
alter table checkpoints alter column changed set storage main, alter column keyframe set storage main;

-- Large channel values, stored once for each version.
create table channel_values (
  thread_id uuid not null,
  namespace text not null,
  branch    int not null,
  seq       bigint not null,
  channel   text not null,
  value     bytea not null,
  primary key (thread_id, namespace, branch, seq, channel)
);
alter table channel_values alter column value set compression lz4;

-- Results of finished activations of a superstep that was not complete yet. The first writer wins.
create table writes (
  thread_id uuid not null,
  namespace text not null,
  branch    int not null,
  seq       bigint not null,                    -- of the checkpoint that planned the superstep
  task_id   uuid not null,
  writes    bytea not null,
  primary key (thread_id, namespace, branch, seq, task_id)
);

-- Activations that wait for something, or whose attempts are counted.
create table pending (
  thread_id  uuid not null,
  namespace  text not null,
  branch     int not null,
  seq        bigint not null,
  task_id    uuid not null,
  run_id     uuid not null,
  node       text not null,
  kind       text not null check (kind in ('attempt', 'retry', 'job', 'timer', 'event', 'interrupt')),
  attempt    int not null default 1,
  round      int not null default 0,            -- grows with each wait of the activation
  settled    boolean not null default false,
  due        timestamptz,
  name       text,                              -- of the event that it waits for
  data       bytea,                             -- JSON: the interrupts, the job, the last failure
  answer     bytea,                             -- JSON: what settled it
  primary key (thread_id, namespace, branch, seq, task_id)
);
create index pending_run on pending (run_id) where not settled;
create index pending_thread on pending (thread_id) where not settled;

-- Named events sent to a thread that nobody has waited for yet.
create table events (
  thread_id  uuid not null,
  event_id   bigint generated always as identity,
  name       text not null,
  payload    bytea not null,
  created_at timestamptz not null,
  primary key (thread_id, event_id)
);

-- What a stream shows beside the checkpoints, ordered within the run by (seq, place).
create table stream_events (
  run_id    uuid not null,
  seq       bigint not null,
  place     int not null,
  mode      text not null,
  namespace text not null,
  data      bytea not null,
  primary key (run_id, seq, place)
);

--------------------------------------------------------------------------------------------- work

create table jobs (
  job_id      uuid primary key,                 -- a hash of task and attempt: sending it twice is harmless
  run_id      uuid not null,
  thread_id   uuid not null,
  user_id     uuid not null,
  namespace   text not null,
  branch      int not null,
  seq         bigint not null,
  task_id     uuid not null,
  attempt     int not null,
  node        text not null,
  worker      text,                             -- the worker that it was sent to
  status      text not null check (status in
              ('intent', 'sent', 'completed', 'failed', 'timeout', 'canceling', 'canceled', 'lost')),
  request     bytea not null,
  result      bytea,
  created_at  timestamptz not null,
  sent_at     timestamptz,
  ended_at    timestamptz
);
create index jobs_task on jobs (task_id, attempt);
create index jobs_open on jobs (worker, status) where status in ('intent', 'sent', 'canceling');
create index jobs_run on jobs (run_id);
