-- Tools of MCP servers: what was approved, and what was seen since.

-- Servers that were seen. The first sight of one is what its tools are pinned by.
create table tool_servers (
  server        text primary key,               -- its name in the configuration
  first_seen_at timestamptz not null
);

-- The definitions that may be used.
create table tool_pins (
  server      text not null,
  tool        text not null,
  hash        text not null,                    -- SHA-256 of the definition's canonical JSON, hexadecimal
  definition  bytea not null,                   -- JSON; bytea because PostgreSQL's own types refuse a NUL
  approved_by text,                             -- the administrator's name; none: trusted at first sight
  approved_at timestamptz not null,
  primary key (server, tool)
);

-- The definitions that were seen last and are not approved: what an administrator is shown and approves.
create table tool_pending (
  server     text not null,
  tool       text not null,
  hash       text not null,
  definition bytea not null,
  seen_at    timestamptz not null,
  primary key (server, tool)
);
