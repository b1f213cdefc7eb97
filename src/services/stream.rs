//! Streams of a run's events, read from what is stored: any process can serve any stream, and a client
//! that comes back takes up where it left.
//!
//! An event's id is `SEQ-PLACE`: what happened on the way to checkpoint SEQ in order, and the
//! checkpoint itself last. Checkpoints are read before the rows beside them, so that nothing that
//! belongs before a checkpoint is passed over.
//!
//! **Invariant:** a reader is never waited for: it reads tables at its own speed.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::stream::BoxStream;
use serde_json::Value;

use super::Services;
use super::api::{Actor, RunKey, StreamFrom, StreamItem, StreamMode, StreamRequest};
use super::error::ServiceError;
use super::gathered::Gathered;
use crate::graph::model::Graph;
use crate::store::runs::{RunOptions, RunRow};
use crate::store::signals::{Signals, Subscription};
use crate::store::stream_events::{self, StreamEvent};
use crate::store::{checkpoints, runs};

/// Wakes the streams and waiters of this process when something was committed.
pub type Hub = Arc<Signals>;

/// Without a signal, the tables are looked at this often.
const POLL: Duration = Duration::from_millis(500);
/// Checkpoints of one look.
const PAGE: i64 = 64;
/// Rows of one look.
const EVENTS: i64 = 512;
/// The place of a checkpoint among the events of its seq: the last.
const CHECKPOINT: i32 = i32::MAX;
/// The place of what the end of a run adds, after all that happened: the second is the last of all.
const ENDING: [i32; 2] = [i32::MAX - 2, i32::MAX - 1];

struct Reader {
    services: Services,
    run: RunRow,
    graph: Arc<Graph>,
    modes: Vec<StreamMode>,
    subgraphs: bool,
    /// The last event that was given out, or passed over.
    at: (i64, i32),
    ready: VecDeque<StreamItem>,
    moved: Subscription,
    ended: bool,
    /// Up to here nothing is given out: it is read again for what `messages` need from it.
    given: (i64, i32),
    messages: Gathered,
}

impl Services {
    /// The events of a run, until it has ended. The stream does not hold the run: dropping it leaves the
    /// run as it is.
    pub async fn stream_run(
        &self,
        actor: &Actor,
        key: RunKey,
        request: StreamRequest,
    ) -> Result<BoxStream<'static, Result<StreamItem, ServiceError>>, ServiceError> {
        // Subscribed before the first look, so that nothing moves unseen in between.
        let moved = self.hub().subscribe(key.run);
        let run = self.run_row(actor, key).await?;
        let graph = self.versions().get(&run.graph_hash).await?;
        let options: RunOptions =
            serde_json::from_slice(&run.options).map_err(ServiceError::internal)?;
        let modes = if request.modes.is_empty() { requested(&options) } else { request.modes };
        let given = self.start_of(&run, &request.from).await?;
        // A message that was under way when the reader left is gathered from its beginning.
        let whole = modes.contains(&StreamMode::Messages);
        let at = if whole { (-1, CHECKPOINT) } else { given };
        let subgraphs = request.subgraphs.unwrap_or(options.engine.stream_subgraphs);
        let reader = Reader {
            services: self.clone(),
            run,
            graph,
            modes,
            subgraphs,
            at,
            ready: VecDeque::new(),
            moved,
            ended: false,
            given,
            messages: Gathered::default(),
        };
        Ok(futures::stream::unfold(Some(reader), |reader| async move {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(item)) => Some((Ok(item), Some(reader))),
                Ok(None) => None,
                Err(err) => Some((Err(err), None)),
            }
        })
        .boxed())
    }

    async fn start_of(&self, run: &RunRow, from: &StreamFrom) -> Result<(i64, i32), ServiceError> {
        let parsed = match from {
            StreamFrom::Start => return Ok((-1, CHECKPOINT)),
            StreamFrom::After(id) => id
                .split_once('-')
                .and_then(|(seq, place)| Some((seq.parse().ok()?, place.parse().ok()?))),
            StreamFrom::Now => None,
        };
        if let Some(at) = parsed {
            return Ok(at);
        }
        let mut db = self.pool().acquire().await?;
        let rows = checkpoints::rows(&mut db, run.thread_id, "", run.branch, None).await?;
        Ok((rows.last().map_or(-1, |row| row.position.seq), CHECKPOINT))
    }
}

/// The modes that the run was created with.
fn requested(options: &RunOptions) -> Vec<StreamMode> {
    let modes = options.kwargs.get("stream_mode").and_then(Value::as_array).into_iter().flatten();
    let modes: Vec<StreamMode> =
        modes.filter_map(|mode| StreamMode::parse(mode.as_str()?)).collect();
    if modes.is_empty() { vec![StreamMode::Values] } else { modes }
}

impl Reader {
    async fn next(&mut self) -> Result<Option<StreamItem>, ServiceError> {
        loop {
            if let Some(item) = self.ready.pop_front() {
                return Ok(Some(item));
            }
            if self.ended {
                return Ok(None);
            }
            if !self.look().await? {
                self.moved.moved(POLL).await;
            }
        }
    }

    fn wants(&self, mode: StreamMode) -> bool {
        self.modes.contains(&mode)
    }

    /// Reads what has come since the last look. True: there may be more already.
    async fn look(&mut self) -> Result<bool, ServiceError> {
        let mut db = self.services.pool().acquire().await?;
        // The status is read first: what a run that has ended wrote is all there.
        let Some(run) = runs::find(&mut db, self.run.run_id).await? else {
            self.ended = true;
            return Ok(true);
        };
        self.run = run;
        let after = if self.at.1 == CHECKPOINT { self.at.0 } else { self.at.0 - 1 };
        let (thread, run_id) = (self.run.thread_id, self.run.run_id);
        let mut seqs =
            checkpoints::of_run(&mut db, thread, run_id, self.run.branch, after, PAGE).await?;
        let mut events =
            stream_events::after(&mut db, run_id, self.at.0, self.at.1, EVENTS).await?;
        drop(db);
        let more = cut(&mut seqs, &mut events);
        let found = !seqs.is_empty() || !events.is_empty();
        let mut events = events.into_iter().peekable();
        for seq in seqs {
            while let Some(event) = events.next_if(|event| event.seq <= seq) {
                self.event(event);
            }
            self.checkpoint(seq).await?;
            self.at = (seq, CHECKPOINT);
        }
        for event in events {
            self.event(event);
        }
        if self.run.ended_at.is_some() && !more {
            self.end()?;
        }
        Ok(more || found || self.ended)
    }

    fn event(&mut self, event: StreamEvent) {
        self.at = (event.seq, event.place);
        let below = !event.namespace.is_empty();
        let suffix =
            if below && self.subgraphs { format!("|{}", event.namespace) } else { String::new() };
        if event.mode == StreamMode::Messages.as_str() {
            let mut parts = Vec::new();
            if self.wants(StreamMode::Messages) {
                let gathered = self.messages.take(&event.data).into_iter();
                parts.extend(gathered.map(|(name, data)| (format!("{name}{suffix}"), data)));
            }
            if self.wants(StreamMode::MessagesTuple) {
                parts.push((format!("messages{suffix}"), event.data));
            }
            self.push_all(self.at, parts);
            return;
        }
        let wanted = StreamMode::parse(&event.mode).is_some_and(|mode| self.wants(mode));
        if wanted && (!below || self.subgraphs) {
            self.push(self.at, format!("{}{suffix}", event.mode), event.data);
        }
    }

    async fn checkpoint(&mut self, seq: i64) -> Result<(), ServiceError> {
        if !self.wants(StreamMode::Values) || (seq, CHECKPOINT) <= self.given {
            return Ok(());
        }
        let mut db = self.services.pool().acquire().await?;
        let thread = self.run.thread_id;
        let standing =
            checkpoints::standing(&mut db, thread, self.run.branch, Some(seq), &self.graph).await?;
        let values = standing.state.to_json(&self.graph).to_string().into_bytes();
        self.push((seq, CHECKPOINT), "values".to_owned(), values);
        Ok(())
    }

    fn end(&mut self) -> Result<(), ServiceError> {
        self.ended = true;
        // A reader that comes back may have seen a part of the end.
        let seen = ENDING.contains(&self.at.1);
        let seq = if seen { self.at.0 } else { self.at.0 + 1 };
        let [first, last] = ENDING.map(|place| (seq, place));
        if let Some(error) = self.run.error.take() {
            self.push(last, "error".to_owned(), error);
            return Ok(());
        }
        let Some(result) = &self.run.result else { return Ok(()) };
        let result: Value = serde_json::from_slice(result).map_err(ServiceError::internal)?;
        let Some(interrupts) = result.get("__interrupt__") else { return Ok(()) };
        let update = serde_json::json!({ "__interrupt__": interrupts }).to_string().into_bytes();
        if self.wants(StreamMode::Updates) {
            self.push(first, "updates".to_owned(), update);
        }
        if self.wants(StreamMode::Values) {
            self.push(last, "values".to_owned(), result.to_string().into_bytes());
        }
        Ok(())
    }

    fn push(&mut self, at: (i64, i32), event: String, data: Vec<u8>) {
        self.push_all(at, vec![(event, data)]);
    }

    /// Gives out the events of one place. Only the last one has its id: a reader that was cut off before it has not
    /// got all of them, and gets them again.
    fn push_all(&mut self, (seq, place): (i64, i32), events: Vec<(String, Vec<u8>)>) {
        if (seq, place) <= self.given {
            return;
        }
        let last = events.len().saturating_sub(1);
        for (at, (event, data)) in events.into_iter().enumerate() {
            let id = (at == last).then(|| format!("{seq}-{place}"));
            self.ready.push_back(StreamItem { id, event, data: Bytes::from(data) });
        }
    }
}

/// Keeps what is known to be complete: neither list may run ahead of where the other was cut off.
fn cut(seqs: &mut Vec<i64>, events: &mut Vec<StreamEvent>) -> bool {
    let seqs_full = i64::try_from(seqs.len()).unwrap_or(0) == PAGE;
    let events_full = i64::try_from(events.len()).unwrap_or(0) == EVENTS;
    if let (true, Some(last)) = (seqs_full, seqs.last().copied()) {
        events.retain(|event| event.seq <= last);
    }
    if let (true, Some(last)) = (events_full, events.last().map(|event| event.seq)) {
        seqs.retain(|seq| *seq < last);
    }
    seqs_full || events_full
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(seq: i64, place: i32) -> StreamEvent {
        StreamEvent {
            seq,
            place,
            mode: "updates".to_owned(),
            namespace: String::new(),
            data: Vec::new(),
        }
    }

    #[test]
    fn a_full_page_of_events_holds_back_the_checkpoints_that_may_have_more() {
        let mut seqs = vec![1, 2, 3];
        let mut events: Vec<StreamEvent> =
            (0..i32::try_from(EVENTS).unwrap()).map(|place| event(2, place)).collect();
        assert!(cut(&mut seqs, &mut events));
        assert_eq!(seqs, [1]);
    }

    #[test]
    fn a_full_page_of_checkpoints_holds_back_later_events() {
        let mut seqs: Vec<i64> = (0..PAGE).collect();
        let mut events = vec![event(PAGE - 1, 0), event(PAGE, 0)];
        assert!(cut(&mut seqs, &mut events));
        assert_eq!(events.len(), 1);
    }
}
