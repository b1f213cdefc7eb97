-- Where the end of a run is told.
alter table runs add column webhook text check (length(webhook) <= 8192);

-- Owns the runs that the server starts for itself; nobody can be it.
insert into users (user_id, name, admin, created_at)
values ('00000000-0000-0000-0000-000000000001', 'cynai-system', false, cynai_now());
