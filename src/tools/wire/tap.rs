//! What passes over a wire, seen once by us before the library sees it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rmcp::model::{
    ClientNotification, ClientRequest, GetMeta, JsonRpcMessage, NumberOrString, ProgressToken,
    RequestId, ServerNotification,
};
use rmcp::service::{RoleClient, RxJsonRpcMessage, TxJsonRpcMessage};
use rmcp::transport::Transport;
use tokio_util::sync::CancellationToken;

use crate::tools::progress::Flight;

/// Questions of the server that are open at once; one that asks more is not served any longer.
const MAX_ASKED: usize = 64;

/// What the taps of a connection see, for its callers.
#[derive(Debug, Default)]
pub(super) struct Shared {
    open: Mutex<Open>,
    pub(super) tools_changed: AtomicBool,
    pub(super) subscribed: AtomicBool,
    pub(super) closed: CancellationToken,
}

#[derive(Debug, Default)]
struct Open {
    requests: HashMap<RequestId, Option<(ProgressToken, Arc<Flight>)>>,
    by_token: HashMap<ProgressToken, Arc<Flight>>,
    /// Questions of the server that were not answered yet.
    asked: usize,
}

/// The flight that a message belongs to.
pub(super) fn flight_of(
    message: &TxJsonRpcMessage<RoleClient>,
) -> Option<(ProgressToken, Arc<Flight>)> {
    let JsonRpcMessage::Request(request) = message else { return None };
    let extensions = match &request.request {
        ClientRequest::CallToolRequest(call) => &call.extensions,
        ClientRequest::ListToolsRequest(list) => &list.extensions,
        _ => return None,
    };
    let flight = Arc::clone(extensions.get::<Arc<Flight>>()?);
    Some((request.request.get_meta().get_progress_token()?, flight))
}

/// The number of a request.
pub(super) fn request_number(message: &TxJsonRpcMessage<RoleClient>) -> Option<i64> {
    match message {
        JsonRpcMessage::Request(request) => match &request.id {
            NumberOrString::Number(number) => Some(*number),
            NumberOrString::String(_) => None,
        },
        _ => None,
    }
}

/// What becomes of a message that came in.
enum Verdict {
    Pass,
    Drop,
    End,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn going_out(&self, message: &TxJsonRpcMessage<RoleClient>) {
        let mut open = self.lock();
        match message {
            JsonRpcMessage::Request(request) => {
                let flight = flight_of(message);
                if let Some((token, flight)) = &flight {
                    open.by_token.insert(token.clone(), Arc::clone(flight));
                }
                open.requests.insert(request.id.clone(), flight);
            }
            JsonRpcMessage::Notification(notification) => {
                if let ClientNotification::CancelledNotification(cancelled) =
                    &notification.notification
                    && let Some(id) = &cancelled.params.request_id
                {
                    open.forget(id);
                }
            }
            _ => open.asked = open.asked.saturating_sub(1),
        }
    }

    fn coming_in(&self, message: &RxJsonRpcMessage<RoleClient>) -> Verdict {
        match message {
            JsonRpcMessage::Response(response) => self.answered(&response.id),
            JsonRpcMessage::Error(error) => {
                error.id.as_ref().map_or(Verdict::Pass, |id| self.answered(id))
            }
            JsonRpcMessage::Request(_) => {
                let mut open = self.lock();
                open.asked += 1;
                if open.asked > MAX_ASKED { Verdict::End } else { Verdict::Pass }
            }
            JsonRpcMessage::Notification(notification) => match &notification.notification {
                ServerNotification::ProgressNotification(note) => {
                    let flight = self.lock().by_token.get(&note.params.progress_token).cloned();
                    if let Some(flight) = flight {
                        flight.note(
                            note.params.progress,
                            note.params.total,
                            note.params.message.as_deref(),
                        );
                    }
                    Verdict::Drop
                }
                ServerNotification::ToolListChangedNotification(_) => {
                    self.tools_changed.store(true, Ordering::SeqCst);
                    if self.subscribed.load(Ordering::SeqCst) {
                        Verdict::Pass
                    } else {
                        Verdict::Drop
                    }
                }
                ServerNotification::CancelledNotification(_)
                | ServerNotification::SubscriptionsAcknowledgedNotification(_) => Verdict::Pass,
                _ => Verdict::Drop,
            },
        }
    }

    /// The first answer to something that was asked is an answer; others are noise.
    fn answered(&self, id: &RequestId) -> Verdict {
        if self.lock().forget(id) { Verdict::Pass } else { Verdict::Drop }
    }

    /// The flight of the request of this number.
    pub(super) fn flight(&self, id: i64) -> Option<Arc<Flight>> {
        let open = self.lock();
        open.requests
            .get(&NumberOrString::Number(id))?
            .as_ref()
            .map(|(_, flight)| Arc::clone(flight))
    }
}

impl Open {
    fn forget(&mut self, id: &RequestId) -> bool {
        let number = match id {
            NumberOrString::String(text) => text.parse().ok().map(NumberOrString::Number),
            NumberOrString::Number(_) => None,
        };
        let found = self.requests.remove(id).or_else(|| self.requests.remove(&number?));
        if let Some(Some((token, _))) = &found {
            self.by_token.remove(token);
        }
        found.is_some()
    }
}

/// A wire, seen by [`Shared`].
pub(super) struct Tap<T> {
    pub(super) wire: T,
    pub(super) shared: Arc<Shared>,
}

impl<T: Transport<RoleClient> + 'static> Transport<RoleClient> for Tap<T> {
    type Error = T::Error;

    fn send(
        &mut self,
        message: TxJsonRpcMessage<RoleClient>,
    ) -> impl Future<Output = Result<(), T::Error>> + Send + 'static {
        self.shared.going_out(&message);
        self.wire.send(message)
    }

    async fn receive(&mut self) -> Option<RxJsonRpcMessage<RoleClient>> {
        loop {
            let closed = self.shared.closed.clone();
            let message = tokio::select! {
                message = self.wire.receive() => message,
                () = closed.cancelled() => None,
            };
            match message.as_ref().map(|message| self.shared.coming_in(message)) {
                Some(Verdict::Pass) => return message,
                Some(Verdict::Drop) => {}
                Some(Verdict::End) | None => {
                    self.shared.closed.cancel();
                    return None;
                }
            }
        }
    }

    async fn close(&mut self) -> Result<(), T::Error> {
        self.shared.closed.cancel();
        self.wire.close().await
    }
}

impl<T> Drop for Tap<T> {
    fn drop(&mut self) {
        self.shared.closed.cancel();
    }
}
