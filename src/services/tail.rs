//! What the readers of one run share: its events are read from the tables once for all of them.
//!
//! A tail keeps the last events of a run as long as anybody reads it. Who stands further back than what is
//! kept, since it began earlier or reads slowly, reads the tables by itself until it has caught up.
//!
//! **Invariant:** a tail is a copy of the tables and nothing else: without it a reader sees the same.
//!
//! **Invariant:** no reader waits for another one's client: the lock is held while the tables are read, and
//! never while something is sent.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use bytes::Bytes;
use tokio::time::Instant;

use super::Services;
use super::error::ServiceError;
use super::stream::POLL;
use crate::ids::RunId;
use crate::store::runs::{self, Progress, RunRow};
use crate::store::signals::Subscription;
use crate::store::stream_events::{self, StreamEvent};

/// Checkpoints of one look.
const PAGE: i64 = 64;
/// Rows of one look.
const EVENTS: i64 = 512;
/// The place of a checkpoint among the events of its seq: the last.
pub(super) const CHECKPOINT: i32 = i32::MAX;
/// The most that one run's tail keeps, in bytes of data and in events; the oldest go first.
const MAX_BYTES: usize = 256 << 10;
const MAX_ITEMS: usize = 1024;
/// What keeping an event takes beside its data, about, in bytes.
const ITEM_BYTES: usize = 128;

/// The place of an event in its run: (seq, place).
pub(super) type Place = (i64, i32);

/// Something that readers are told of. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) enum Item {
    /// A row beside the checkpoints.
    Event(Arc<Row>),
    /// A checkpoint of the root, by its seq.
    Checkpoint(i64),
}

/// A row of `stream_events`.
#[derive(Debug)]
pub(super) struct Row {
    pub(super) at: Place,
    pub(super) mode: String,
    pub(super) namespace: String,
    pub(super) data: Bytes,
}

/// What comes after a place.
#[derive(Debug, Default)]
pub(super) struct Page {
    pub(super) items: Vec<Item>,
    /// There may be more already.
    pub(super) more: bool,
    /// The branch that the run is on.
    pub(super) branch: i32,
    /// The run has ended, and all that it wrote is in this page or was before it.
    pub(super) end: Option<End>,
}

/// How there came to be no more events.
#[derive(Debug, Clone)]
pub(super) enum End {
    /// The run has ended.
    Ended(Arc<RunRow>),
    /// Its record was deleted.
    Gone,
}

/// The tails of the runs that somebody reads.
#[derive(Debug, Default)]
pub(super) struct Tails(Mutex<HashMap<RunId, Weak<Tail>>>);

/// The last events of one run.
#[derive(Debug)]
pub(super) struct Tail {
    services: Services,
    run: RunId,
    kept: tokio::sync::Mutex<Kept>,
}

#[derive(Debug)]
struct Kept {
    /// What comes after `from`, without gaps.
    items: VecDeque<Item>,
    bytes: usize,
    from: Place,
    to: Place,
    branch: i32,
    end: Option<End>,
    moved: Subscription,
    /// When the tables were read last, and whether that was all that there was.
    read: Option<(Instant, bool)>,
}

impl Item {
    pub(super) fn at(&self) -> Place {
        match self {
            Self::Event(row) => row.at,
            Self::Checkpoint(seq) => (*seq, CHECKPOINT),
        }
    }

    fn bytes(&self) -> usize {
        ITEM_BYTES
            + match self {
                Self::Event(row) => row.data.len(),
                Self::Checkpoint(_) => 0,
            }
    }
}

impl Tails {
    /// The tail of `run`; a new one begins at `from`.
    pub(super) fn of(&self, services: &Services, run: RunId, from: Place) -> Arc<Tail> {
        let mut tails = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tail) = tails.get(&run).and_then(Weak::upgrade) {
            return tail;
        }
        let kept = Kept {
            items: VecDeque::new(),
            bytes: 0,
            from,
            to: from,
            branch: 0,
            end: None,
            moved: services.hub().subscribe(run),
            read: None,
        };
        let kept = tokio::sync::Mutex::new(kept);
        let tail = Arc::new(Tail { services: services.clone(), run, kept });
        tails.insert(run, Arc::downgrade(&tail));
        tail
    }

    fn forget(&self, run: RunId) {
        let mut tails = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Another one may have been made meanwhile.
        if tails.get(&run).is_some_and(|tail| tail.strong_count() == 0) {
            tails.remove(&run);
        }
    }
}

impl Drop for Tail {
    fn drop(&mut self) {
        self.services.tails().forget(self.run);
    }
}

impl Tail {
    /// What comes after `at`. Reads the tables when something may have come since they were read last.
    pub(super) async fn after(&self, at: Place) -> Result<Page, ServiceError> {
        let mut kept = self.kept.lock().await;
        if at < kept.from {
            drop(kept);
            return read(&self.services, self.run, at).await;
        }
        if at >= kept.to && !kept.is_fresh() {
            // Marked before the read, so that what moves during it is looked at again; and only a read that came
            // to its end counts.
            kept.read = None;
            kept.moved.mark_seen();
            let begun = Instant::now();
            let page = read(&self.services, self.run, kept.to).await?;
            kept.read = Some((begun, !page.more));
            kept.take(page);
        }
        Ok(kept.after(at))
    }
}

impl Kept {
    fn is_fresh(&self) -> bool {
        if self.end.is_some() {
            return true;
        }
        let known = self.read.is_some_and(|(at, all)| all && at.elapsed() < POLL);
        known && !self.moved.has_news()
    }

    fn take(&mut self, page: Page) {
        for item in page.items {
            self.to = item.at();
            self.bytes += item.bytes();
            self.items.push_back(item);
        }
        self.branch = page.branch;
        self.end = page.end;
    }

    fn after(&mut self, at: Place) -> Page {
        let first = self.items.partition_point(|item| item.at() <= at);
        let items: Vec<Item> = self.items.range(first..).cloned().collect();
        let all = self.read.is_some_and(|(_, all)| all);
        let page = Page { items, more: !all, branch: self.branch, end: self.end.clone() };
        while self.bytes > MAX_BYTES || self.items.len() > MAX_ITEMS {
            let Some(oldest) = self.items.pop_front() else { break };
            self.bytes -= oldest.bytes();
            self.from = oldest.at();
        }
        page
    }
}

/// Reads what comes after `at` from the tables.
async fn read(services: &Services, run: RunId, at: Place) -> Result<Page, ServiceError> {
    let after = if at.1 == CHECKPOINT { at.0 } else { at.0 - 1 };
    let mut db = services.pool().acquire().await?;
    // In this order: what a run that has ended wrote is all there, and nothing that belongs before a checkpoint is
    // passed over.
    let Some(Progress { branch, ended, mut seqs }) =
        runs::progress(&mut db, run, after, PAGE).await?
    else {
        return Ok(Page { end: Some(End::Gone), ..Page::default() });
    };
    let mut events = stream_events::after(&mut db, run, at.0, at.1, EVENTS).await?;
    let more = cut(&mut seqs, &mut events);
    let end = if ended && !more {
        let row = runs::find(&mut db, run).await?;
        Some(row.map_or(End::Gone, |row| End::Ended(Arc::new(row))))
    } else {
        None
    };
    Ok(Page { items: merged(seqs, events), more, branch, end })
}

/// Both lists as one, in order: a checkpoint comes after the rows of its seq.
fn merged(seqs: Vec<i64>, events: Vec<StreamEvent>) -> Vec<Item> {
    let mut items = Vec::with_capacity(seqs.len() + events.len());
    let mut seqs = seqs.into_iter().peekable();
    for event in events {
        while let Some(seq) = seqs.next_if(|seq| *seq < event.seq) {
            items.push(Item::Checkpoint(seq));
        }
        items.push(Item::Event(Arc::new(Row {
            at: (event.seq, event.place),
            mode: event.mode,
            namespace: event.namespace,
            data: event.data.into(),
        })));
    }
    items.extend(seqs.map(Item::Checkpoint));
    items
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
            data: vec![b'x'; 10],
        }
    }

    fn kept() -> Kept {
        Kept {
            items: VecDeque::new(),
            bytes: 0,
            from: (-1, CHECKPOINT),
            to: (-1, CHECKPOINT),
            branch: 0,
            end: None,
            moved: Arc::new(crate::store::signals::Signals::default()).subscribe(RunId::new()),
            read: Some((Instant::now(), true)),
        }
    }

    fn places(items: &[Item]) -> Vec<Place> {
        items.iter().map(Item::at).collect()
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

    #[test]
    fn a_checkpoint_comes_after_the_rows_of_its_seq() {
        let items = merged(vec![0, 1, 3], vec![event(1, 0), event(1, 1), event(2, 0), event(4, 0)]);
        let at = CHECKPOINT;
        let expected = [(0, at), (1, 0), (1, 1), (1, at), (2, 0), (3, at), (4, 0)];
        assert_eq!(places(&items), expected);
    }

    #[test]
    fn each_reader_gets_what_comes_after_its_own_place() {
        let mut kept = kept();
        let items = merged(vec![1], vec![event(1, 0), event(1, 1)]);
        kept.take(Page { items, ..Page::default() });
        assert_eq!(places(&kept.after((-1, CHECKPOINT)).items), [(1, 0), (1, 1), (1, CHECKPOINT)]);
        assert_eq!(places(&kept.after((1, 0)).items), [(1, 1), (1, CHECKPOINT)]);
        assert!(kept.after((1, CHECKPOINT)).items.is_empty());
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_go_first() {
        let mut kept = kept();
        for place in 0..2 * i32::try_from(MAX_ITEMS).unwrap() {
            let items = merged(Vec::new(), vec![event(1, place)]);
            kept.take(Page { items, ..Page::default() });
            assert_eq!(kept.after((1, place - 1)).items.len(), 1);
        }
        assert_eq!(kept.items.len(), MAX_ITEMS);
        assert_eq!(kept.from, (1, i32::try_from(MAX_ITEMS).unwrap() - 1));
        let big = StreamEvent { data: vec![0; MAX_BYTES], ..event(2, 0) };
        kept.take(Page { items: merged(Vec::new(), vec![big]), ..Page::default() });
        // Who asked for it gets it, once.
        assert_eq!(kept.after(kept.from).items.len(), MAX_ITEMS + 1);
        assert_eq!((kept.items.len(), kept.bytes, kept.from), (0, 0, (2, 0)));
    }
}
