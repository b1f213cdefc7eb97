//! Streams of a run's events, read from what is stored: any process can serve any stream, and a client
//! that comes back takes up where it left.
//!
//! An event's id is `SEQ-PLACE`: what happened on the way to checkpoint SEQ in order, and the
//! checkpoint itself last. The readers of a run share what is read of it: see [`super::tail`].
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
use super::tail::{CHECKPOINT, End, Item, Place, Row, Tail};
use crate::graph::model::Graph;
use crate::ids::ThreadId;
use crate::store::checkpoints;
use crate::store::runs::{RunOptions, RunRow};
use crate::store::signals::{Signals, Subscription};

/// Wakes the streams and waiters of this process when something was committed.
pub type Hub = Arc<Signals>;

/// Without a signal, the tables are looked at this often.
pub(super) const POLL: Duration = Duration::from_millis(500);
/// The place of what the end of a run adds, after all that happened: the second is the last of all.
const ENDING: [i32; 2] = [i32::MAX - 2, i32::MAX - 1];

struct Reader {
    services: Services,
    tail: Arc<Tail>,
    thread: ThreadId,
    branch: i32,
    graph: Arc<Graph>,
    modes: Vec<StreamMode>,
    subgraphs: bool,
    /// The last event that was given out, or passed over.
    at: Place,
    ready: VecDeque<StreamItem>,
    moved: Subscription,
    ended: bool,
    /// Up to here nothing is given out: it is read again for what `messages` need from it.
    given: Place,
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
            tail: self.tails().of(self, key.run, at),
            thread: run.thread_id,
            branch: run.branch,
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

    async fn start_of(&self, run: &RunRow, from: &StreamFrom) -> Result<Place, ServiceError> {
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
            let more = self.look().await?;
            if self.ready.is_empty() && !more && !self.ended {
                self.moved.moved(POLL).await;
            }
        }
    }

    fn wants(&self, mode: StreamMode) -> bool {
        self.modes.contains(&mode)
    }

    /// Takes what has come since the last look. True: there may be more already.
    async fn look(&mut self) -> Result<bool, ServiceError> {
        let page = self.tail.after(self.at).await?;
        self.branch = page.branch;
        for item in page.items {
            self.at = item.at();
            match item {
                Item::Event(row) => self.event(&row),
                Item::Checkpoint(seq) => self.checkpoint(seq).await?,
            }
        }
        match page.end {
            Some(End::Ended(run)) => self.end(&run)?,
            Some(End::Gone) => self.ended = true,
            None => {}
        }
        Ok(page.more)
    }

    fn event(&mut self, event: &Row) {
        let below = !event.namespace.is_empty();
        let suffix =
            if below && self.subgraphs { format!("|{}", event.namespace) } else { String::new() };
        if event.mode == StreamMode::Messages.as_str() {
            let mut parts = Vec::new();
            if self.wants(StreamMode::Messages) {
                let gathered = self.messages.take(&event.data).into_iter();
                parts.extend(gathered.map(|(name, data)| (format!("{name}{suffix}"), data.into())));
            }
            if self.wants(StreamMode::MessagesTuple) {
                parts.push((format!("messages{suffix}"), event.data.clone()));
            }
            self.push_all(self.at, parts);
            return;
        }
        let wanted = StreamMode::parse(&event.mode).is_some_and(|mode| self.wants(mode));
        if wanted && (!below || self.subgraphs) {
            self.push(self.at, format!("{}{suffix}", event.mode), event.data.clone());
        }
    }

    async fn checkpoint(&mut self, seq: i64) -> Result<(), ServiceError> {
        if !self.wants(StreamMode::Values) || (seq, CHECKPOINT) <= self.given {
            return Ok(());
        }
        let mut db = self.services.pool().acquire().await?;
        let standing =
            checkpoints::standing(&mut db, self.thread, self.branch, Some(seq), &self.graph)
                .await?;
        let values = standing.state.to_json(&self.graph).to_string();
        self.push((seq, CHECKPOINT), "values".to_owned(), values.into());
        Ok(())
    }

    fn end(&mut self, run: &RunRow) -> Result<(), ServiceError> {
        self.ended = true;
        // A reader that comes back may have seen a part of the end.
        let seen = ENDING.contains(&self.at.1);
        let seq = if seen { self.at.0 } else { self.at.0 + 1 };
        let [first, last] = ENDING.map(|place| (seq, place));
        if let Some(error) = &run.error {
            self.push(last, "error".to_owned(), error.clone().into());
            return Ok(());
        }
        let Some(result) = &run.result else { return Ok(()) };
        let result: Value = serde_json::from_slice(result).map_err(ServiceError::internal)?;
        let Some(interrupts) = result.get("__interrupt__") else { return Ok(()) };
        let update = serde_json::json!({ "__interrupt__": interrupts }).to_string();
        if self.wants(StreamMode::Updates) {
            self.push(first, "updates".to_owned(), update.into());
        }
        if self.wants(StreamMode::Values) {
            self.push(last, "values".to_owned(), result.to_string().into());
        }
        Ok(())
    }

    fn push(&mut self, at: Place, event: String, data: Bytes) {
        self.push_all(at, vec![(event, data)]);
    }

    /// Gives out the events of one place. Only the last one has its id: a reader that was cut off before it has not
    /// got all of them, and gets them again.
    fn push_all(&mut self, (seq, place): Place, events: Vec<(String, Bytes)>) {
        if (seq, place) <= self.given {
            return;
        }
        let last = events.len().saturating_sub(1);
        for (at, (event, data)) in events.into_iter().enumerate() {
            let id = (at == last).then(|| format!("{seq}-{place}"));
            self.ready.push_back(StreamItem { id, event, data });
        }
    }
}
