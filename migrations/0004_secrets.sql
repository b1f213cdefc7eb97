-- Secrets, each sealed with a random key of its own, which is wrapped with a master key that is not in this
-- database. A value is bound to its name and version: a row that is moved or changed does not open.
create table secrets (
  name        text primary key check (length(name) between 1 and 128),
  version     int not null check (version > 0),   -- grows each time that it is set
  key_id      text not null,                      -- names the master key
  wrapped     bytea not null,                     -- the data key: nonce and ciphertext
  sealed      bytea not null,                     -- the value: nonce and ciphertext
  owner       uuid references users on delete set null,  -- who set it last
  created_at  timestamptz not null,
  rotated_at  timestamptz                         -- when its data key was last wrapped anew
);
-- Rotation looks for what is not under the newest key.
create index secrets_key on secrets (key_id, name);
