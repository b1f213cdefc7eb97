//! Commits that leave the checkpoints as they are: pieces of a message for the streams, and what an attempt is about
//! to do. They are the most frequent ones of a run that calls models, and the statement that can write anything costs
//! several times as much.

use std::collections::HashSet;

use sqlx::PgConnection;

use super::Request;
use super::columns::Columns;
use crate::graph::checkpoint::{Commit, EffectChange, WaitKind};
use crate::store::StoreError;

/// Whether [`execute`] can write `request`.
pub(super) fn fits(request: &Request) -> bool {
    let Commit {
        namespace: _,
        planned: _,
        checkpoint,
        writes,
        waits,
        settles,
        stream: _,
        effects,
        end,
    } = &*request.commit;
    checkpoint.is_none()
        && end.is_none()
        && writes.is_empty()
        && !settles
        // A wait for an event takes one that has come before it.
        && waits.iter().all(|wait| wait.kind != WaitKind::Event)
        && effects.iter().all(|row| matches!(row.change, EffectChange::Intent { .. }))
}

/// Writes the rows of streams, waits and intents of `requests`, each of which [`fits`].
///
/// # Errors
/// The database's; nothing is written then.
pub(super) async fn execute(
    db: &mut PgConnection,
    requests: &[&Request],
) -> Result<HashSet<usize>, StoreError> {
    let c = Columns::of(requests);
    let passed = if c.waits.request.is_empty() && c.effects.request.is_empty() {
        streamed(db, &c).await?
    } else {
        intended(db, &c).await?
    };
    Ok(passed.into_iter().filter_map(|number| usize::try_from(number).ok()).collect())
}

/// Rows of streams only.
async fn streamed(db: &mut PgConnection, c: &Columns) -> Result<Vec<i32>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"with gate as materialized (
             select (b.number - 1)::int as request, b.run_id, h.claims
               from heads h join unnest($1::uuid[], $2::bigint[], $3::bigint[])
                 with ordinality as b (run_id, fence, root_seq, number) using (run_id)
              where h.fence = b.fence and h.seq = b.root_seq and h.status = 'running'
              order by h.run_id for no key update of h skip locked),
           moved as (
             update heads h set claims = 0 from gate where h.run_id = gate.run_id and gate.claims <> 0),
           streamed as (
             insert into stream_events (run_id, seq, place, mode, namespace, data)
             select g.run_id, s.seq, s.place, s.mode, s.namespace, s.data
               from unnest($4::int[], $5::bigint[], $6::int[], $7::text[], $8::text[], $9::bytea[])
                 as s (request, seq, place, mode, namespace, data) join gate g using (request)
             on conflict do nothing)
           select request as "request!" from gate"#,
        &c.runs,
        &c.fences,
        &c.root_seqs,
        &c.stream.request,
        &c.stream.seq,
        &c.stream.place,
        &c.stream.mode,
        &c.stream.namespace,
        &c.stream.data,
    )
    .fetch_all(db)
    .await
}

/// Rows of streams, waits and intents.
#[expect(clippy::too_many_lines, reason = "one statement and its columns")]
async fn intended(db: &mut PgConnection, c: &Columns) -> Result<Vec<i32>, sqlx::Error> {
    sqlx::query_scalar!(
        r#"with gate as materialized (
             select (b.number - 1)::int as request, b.run_id, b.thread_id, h.claims
               from heads h join unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::uuid[])
                 with ordinality as b (run_id, fence, root_seq, thread_id, number) using (run_id)
              where h.fence = b.fence and h.seq = b.root_seq and h.status = 'running'
              order by h.run_id for no key update of h skip locked),
           moved as (
             update heads h set claims = 0 from gate where h.run_id = gate.run_id and gate.claims <> 0),
           waits as (
             insert into pending (thread_id, namespace, branch, seq, task_id, run_id, node, kind, attempt, round,
                                  settled, due, name, data, answer)
             select g.thread_id, p.namespace, p.branch, p.seq, p.task_id, g.run_id, p.node, p.kind, p.attempt, p.round,
                    false, coalesce(p.at, cynai_now() + make_interval(secs => p.after)), p.name, p.data, p.answer
               from unnest($5::int[], $6::text[], $7::int[], $8::bigint[], $9::uuid[], $10::text[], $11::text[],
                           $12::int[], $13::int[], $14::float8[], $15::timestamptz[], $16::text[], $17::bytea[],
                           $18::bytea[])
                 as p (request, namespace, branch, seq, task_id, node, kind, attempt, round, after, at, name, data, answer)
               join gate g using (request)
             on conflict (thread_id, namespace, branch, seq, task_id) do update
                set run_id = excluded.run_id, kind = excluded.kind, attempt = excluded.attempt, round = excluded.round,
                    settled = excluded.settled, due = excluded.due, name = excluded.name, data = excluded.data,
                    answer = excluded.answer
              where pending.round < excluded.round),
           streamed as (
             insert into stream_events (run_id, seq, place, mode, namespace, data)
             select g.run_id, s.seq, s.place, s.mode, s.namespace, s.data
               from unnest($19::int[], $20::bigint[], $21::int[], $22::text[], $23::text[], $24::bytea[])
                 as s (request, seq, place, mode, namespace, data) join gate g using (request)
             on conflict do nothing),
           intended as (
             insert into effects (thread_id, task_id, attempt, run_id, namespace, branch, seq, node, kind, target, effect,
                                  status, sends, started_at, request_hash, request, idempotency_key)
             select g.thread_id, e.task_id, e.attempt, g.run_id, e.namespace, e.branch, e.seq, e.node, e.kind, e.target,
                    e.effect, e.status, 1, cynai_now(), e.hash, e.body, e.key
               from unnest($25::int[], $26::text[], $27::int[], $28::bigint[], $29::uuid[], $30::int[], $31::text[],
                           $32::text[], $33::text[], $34::text[], $35::text[], $36::bytea[], $37::bytea[], $38::text[])
                 as e (request, namespace, branch, seq, task_id, attempt, status, node, kind, target, effect, hash, body, key)
               join gate g using (request)
             on conflict (thread_id, task_id, attempt) do update
                set run_id = excluded.run_id, status = excluded.status, sends = effects.sends + 1, ended_at = null,
                    outcome = null, idempotency_key = excluded.idempotency_key)
           select request as "request!" from gate"#,
        &c.runs,
        &c.fences,
        &c.root_seqs,
        &c.threads,
        &c.waits.request,
        &c.waits.namespace,
        &c.waits.branch,
        &c.waits.seq,
        &c.waits.task,
        &c.waits.node,
        &c.waits.kind,
        &c.waits.attempt,
        &c.waits.round,
        &c.waits.after as &[Option<f64>],
        &c.waits.at as &[Option<chrono::DateTime<chrono::Utc>>],
        &c.waits.name as &[Option<String>],
        &c.waits.data as &[Option<Vec<u8>>],
        &c.waits.answer as &[Option<Vec<u8>>],
        &c.stream.request,
        &c.stream.seq,
        &c.stream.place,
        &c.stream.mode,
        &c.stream.namespace,
        &c.stream.data,
        &c.effects.request,
        &c.effects.namespace,
        &c.effects.branch,
        &c.effects.seq,
        &c.effects.task,
        &c.effects.attempt,
        &c.effects.status,
        &c.effects.node as &[Option<String>],
        &c.effects.kind as &[Option<String>],
        &c.effects.target as &[Option<String>],
        &c.effects.effect as &[Option<String>],
        &c.effects.hash as &[Option<Vec<u8>>],
        &c.effects.body,
        &c.effects.key as &[Option<String>],
    )
    .fetch_all(db)
    .await
}
