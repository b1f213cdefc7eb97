-- A run that was rolled back has acted on the world under its activations' keys, and the next run's activations have the
-- same ids. How many runs of the thread were rolled back tells their keys apart.
alter table threads add column generation int not null default 0;

-- What names the attempt to the other side. None: an effect from before this column, whose key is TASK-ATTEMPT.
alter table effects add column idempotency_key text;
