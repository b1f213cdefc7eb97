--------------------------------------------------------------------------------------------- fleet

-- One row a worker machine. Its status is derived (worker_status), never stored.
create table workers (
  worker_id      uuid primary key,
  slug           text not null unique check (slug ~ '^[a-z0-9][a-z0-9._-]{0,62}$'),
  name           text,                            -- as it calls itself
  labels         text[] not null default '{}',    -- as reported
  created_at     timestamptz not null,            -- first registration
  registered_at  timestamptz not null,            -- latest registration
  server_url     text not null,                   -- the server as the worker reached it
  base_url       text,                            -- its Worker API, as reported
  url_override   text,                            -- the same, as an operator says
  server_cert    text,                            -- PEM: the certificate that its Worker API shows, and no other
  drained_at     timestamptz,
  drained_by     text,
  drain_reason   text,
  patch          jsonb not null default '{}',     -- merge patch over the policy of all workers
  token_serial   int not null default 1,          -- the bearer token that the newest configuration brings
  policy_revision bigint not null default 0,      -- of fleet_policy, when the newest configuration was made
  issued_version text,                            -- the newest configuration
  config_version text,                            -- the last one that was applied
  ack_version    text,                            -- the one that was acknowledged last
  config_ack_at  timestamptz,
  config_ack_status text check (config_ack_status in ('applied', 'failed', 'rolled_back')),
  config_ack_error  text
);

create index workers_patched on workers (worker_id) where patch <> '{}';

-- What a worker said last of what it can do, whole.
create table worker_reports (
  worker_id   uuid primary key references workers on delete cascade,
  reported_at timestamptz not null,               -- by the worker's clock
  received_at timestamptz not null,
  report      jsonb not null
);

-- Signs of life: narrow, and no index on what changes, so that updates stay HOT.
create table worker_beats (
  worker_id    uuid primary key references workers on delete cascade,
  last_seen_at timestamptz not null,
  ready        boolean not null default false,
  running      int not null default 0,
  queued       int not null default 0
) with (fillfactor = 50);

-- Tokens of workers, as SHA-256.
create table worker_tokens (
  hash       bytea primary key,
  worker_id  uuid not null references workers on delete cascade,
  created_at timestamptz not null,
  expires_at timestamptz not null,
  used       boolean not null default false
);
create index worker_tokens_worker on worker_tokens (worker_id, created_at);

-- Configurations, without their secrets: those are named, and opened when a worker fetches it.
create table worker_configs (
  worker_id      uuid not null references workers on delete cascade,
  config_version text not null,
  issued_at      timestamptz not null,
  content        jsonb not null,
  primary key (worker_id, config_version)
);

-- What holds for all workers: one row. A new revision has every worker's configuration made again.
create table fleet_policy (
  one        boolean primary key default true check (one),
  policy     jsonb not null,
  revision   bigint not null,
  updated_at timestamptz,
  updated_by text
);
insert into fleet_policy (policy, revision) values ('{}', 1);

create function worker_status(w workers, last_seen_at timestamptz, stale_seconds double precision) returns text
language sql stable as $$
  select case
    when w.drained_at is not null then 'drained'
    when w.config_ack_status is distinct from 'applied' then 'registered'
    when last_seen_at is null or last_seen_at < cynai_now() - make_interval(secs => stale_seconds) then 'inactive'
    else 'active' end
$$;
