//! Threads: create, read, change, delete, search. What a thread's state is belongs to `state`.

use serde_json::value::RawValue;

use super::api::{Actor, CreateThread, IfExists, Object, Page, SearchThreads, ThreadView};
use super::error::ServiceError;
use super::{Services, checks};
use crate::ids::ThreadId;
use crate::store::status::ThreadStatus;
use crate::store::threads::{self as store, ThreadPage, ThreadQuery, ThreadRow};
use crate::store::{StoreError, crash};

const IDS_AT_MOST: usize = 1000;

impl Services {
    /// Makes an idle thread.
    pub async fn create_thread(
        &self,
        actor: &Actor,
        request: CreateThread,
    ) -> Result<ThreadView, ServiceError> {
        self.check_metadata(&request.metadata)?;
        let thread = request.thread_id.unwrap_or_else(ThreadId::new);
        let now = self.clock().now();
        let mut db = self.pool().acquire().await?;
        let insert = store::insert(&mut db, thread, actor.user_id, &request.metadata, now);
        let new = crash::around("thread made", insert).await?;
        // A foreign thread with this id is a conflict too: the id is taken, and nothing else is told.
        let taken = || ServiceError::Conflict(format!("there is a thread {thread} already"));
        if !new && request.if_exists == IfExists::Raise {
            return Err(taken());
        }
        let row = store::find(&mut db, thread, actor.user_id).await?.ok_or_else(taken)?;
        view(row)
    }

    /// One thread.
    pub async fn get_thread(
        &self,
        actor: &Actor,
        thread: ThreadId,
    ) -> Result<ThreadView, ServiceError> {
        let mut db = self.pool().acquire().await?;
        let row = store::find(&mut db, thread, actor.user_id).await?;
        view(row.ok_or_else(|| ServiceError::not_found("thread", thread))?)
    }

    /// Lays `metadata` over the thread's own.
    pub async fn update_thread(
        &self,
        actor: &Actor,
        thread: ThreadId,
        metadata: &Object,
    ) -> Result<ThreadView, ServiceError> {
        self.check_metadata(metadata)?;
        let limit = self.limits().metadata_bytes;
        let now = self.clock().now();
        let mut tx = self.transaction().await?;
        let size = store::merge_metadata(&mut tx, thread, actor.user_id, metadata, now).await?;
        let size = size.ok_or_else(|| ServiceError::not_found("thread", thread))?;
        let size = usize::try_from(size).unwrap_or(usize::MAX);
        if size > limit {
            return Err(checks::over("metadata", size, limit));
        }
        let row = store::find(&mut tx, thread, actor.user_id).await?;
        crash::commit(tx, "thread changed").await?;
        view(row.ok_or_else(|| ServiceError::not_found("thread", thread))?)
    }

    /// Deletes a thread with its runs, checkpoints and events. A busy one is not deleted.
    pub async fn delete_thread(&self, actor: &Actor, thread: ThreadId) -> Result<(), ServiceError> {
        let mut db = self.pool().acquire().await?;
        if crash::around("thread deleted", store::delete(&mut db, thread, actor.user_id)).await? {
            return Ok(());
        }
        match store::find_status(&mut db, thread, actor.user_id).await? {
            Some(_) => Err(ServiceError::Conflict(format!(
                "thread {thread} is busy: cancel its runs first"
            ))),
            None => Err(ServiceError::not_found("thread", thread)),
        }
    }

    /// Threads of the actor.
    ///
    /// The total is exact on the last page only; before, it says that there is more.
    pub async fn search_threads(
        &self,
        actor: &Actor,
        request: &SearchThreads,
    ) -> Result<Page<ThreadView>, ServiceError> {
        let limit = self.page_limit(request.limit)?;
        let ids = thread_ids(request)?;
        self.check_filters(request)?;
        let page = ThreadPage {
            sort_by: request.sort_by.as_str(),
            ascending: request.ascending,
            limit: limit + 1,
            offset: request.offset.into(),
            with_values: request.with_values,
        };
        let mut db = self.pool().acquire().await?;
        let query = thread_query(actor, request, ids.as_deref());
        let rows = store::search(&mut db, &query, &page).await?;
        Page::cut(rows, request.limit, request.offset, view)
    }

    /// How many threads of the actor there are.
    pub async fn count_threads(
        &self,
        actor: &Actor,
        request: &SearchThreads,
    ) -> Result<u64, ServiceError> {
        let ids = thread_ids(request)?;
        self.check_filters(request)?;
        let mut db = self.pool().acquire().await?;
        let query = thread_query(actor, request, ids.as_deref());
        let count = store::count(&mut db, &query).await?;
        u64::try_from(count).map_err(ServiceError::internal)
    }

    /// What a thread of the actor is doing; [`ServiceError::NotFound`] when there is none.
    pub async fn thread_status(
        &self,
        actor: &Actor,
        thread: ThreadId,
    ) -> Result<ThreadStatus, ServiceError> {
        let mut db = self.pool().acquire().await?;
        let status = store::find_status(&mut db, thread, actor.user_id).await?;
        status.ok_or_else(|| ServiceError::not_found("thread", thread))
    }

    /// Refuses metadata that is too large or cannot be stored.
    pub(super) fn check_metadata(&self, metadata: &Object) -> Result<(), ServiceError> {
        checks::object("metadata", metadata, self.limits().metadata_bytes)
    }

    /// Refuses a page of no rows or of too many.
    pub(super) fn page_limit(&self, limit: u32) -> Result<i64, ServiceError> {
        let most = self.limits().page;
        if limit == 0 || limit > most {
            return Err(ServiceError::invalid_at("/limit", format!("`limit` must be 1 to {most}")));
        }
        Ok(limit.into())
    }

    fn check_filters(&self, request: &SearchThreads) -> Result<(), ServiceError> {
        self.check_metadata(&request.metadata)?;
        checks::object("values", &request.values, self.limits().metadata_bytes)
    }
}

impl<T> Page<T> {
    /// Makes a page of `rows`, which were read with one more than `limit`.
    pub(super) fn cut<R>(
        mut rows: Vec<R>,
        limit: u32,
        offset: u32,
        view: impl Fn(R) -> Result<T, ServiceError>,
    ) -> Result<Self, ServiceError> {
        let more = rows.len() > limit as usize;
        rows.truncate(limit as usize);
        let end = u64::from(offset) + rows.len() as u64;
        let items = rows.into_iter().map(view).collect::<Result<_, _>>()?;
        Ok(Self { items, total: end + u64::from(more), next: more.then_some(end) })
    }
}

fn thread_ids(request: &SearchThreads) -> Result<Option<Vec<uuid::Uuid>>, ServiceError> {
    if request.ids.len() > IDS_AT_MOST {
        let message = format!("`ids` may name at most {IDS_AT_MOST} threads");
        return Err(ServiceError::invalid_at("/ids", message));
    }
    let ids = request.ids.iter().map(|id| id.0).collect::<Vec<_>>();
    Ok((!ids.is_empty()).then_some(ids))
}

fn thread_query<'a>(
    actor: &Actor,
    request: &'a SearchThreads,
    ids: Option<&'a [uuid::Uuid]>,
) -> ThreadQuery<'a> {
    ThreadQuery {
        user: actor.user_id,
        ids,
        metadata: &request.metadata,
        values: (!request.values.is_empty()).then_some(&request.values),
        status: request.status,
    }
}

fn view(row: ThreadRow) -> Result<ThreadView, ServiceError> {
    Ok(ThreadView {
        thread_id: row.thread_id,
        created_at: row.created_at,
        updated_at: row.updated_at,
        state_updated_at: row.state_updated_at,
        metadata: row.metadata.0,
        status: row.status,
        config: row.config.0,
        values: row.state_values.map(|json| raw("state of a thread", json)).transpose()?,
        interrupts: match row.interrupts {
            Some(json) => raw("interrupts of a thread", json)?,
            None => raw("interrupts of a thread", b"{}".to_vec())?,
        },
        error: row.error.map(|json| raw("error of a thread", json)).transpose()?,
    })
}

/// Stored JSON text as it is, checked for being JSON.
pub(super) fn raw(what: &'static str, json: Vec<u8>) -> Result<Box<RawValue>, ServiceError> {
    serde_json::from_slice(&json).map_err(|source| StoreError::Corrupt { what, source }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_says_whether_there_is_more() {
        fn check(rows: usize, limit: u32, offset: u32, expected: (usize, u64, Option<u64>)) {
            let page = Page::cut(vec![(); rows], limit, offset, Ok).unwrap();
            assert_eq!((page.items.len(), page.total, page.next), expected);
        }
        check(0, 10, 0, (0, 0, None));
        check(10, 10, 0, (10, 10, None));
        check(11, 10, 0, (10, 11, Some(10)));
        check(11, 10, 20, (10, 31, Some(30)));
    }
}
