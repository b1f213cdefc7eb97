//! The HTTP server under the Worker API: bounded connections, bounded headers, bounded patience.
//!
//! **Invariant:** every connection's task is owned by [`serve`] and has ended when it returns.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::tls::accept::Acceptor;

/// Open connections; more wait in the kernel's backlog.
const MAX_CONNECTIONS: usize = 1024;
/// How long a client may take to send the head of a request.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);
/// The most headers of one request, and the bytes of its head.
const MAX_HEADERS: usize = 64;
const MAX_HEAD_BYTES: usize = 32 << 10;

/// Serves until told to stop; then lets open requests end for a while.
pub(super) async fn serve(
    listener: &TcpListener,
    acceptor: Option<&Acceptor>,
    router: Router,
    stop: &CancellationToken,
    patience: Duration,
) {
    let places = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let accepted = async {
            let place = Arc::clone(&places).acquire_owned().await.ok()?;
            Some((listener.accept().await, place))
        };
        let accepted = tokio::select! {
            accepted = accepted => accepted,
            () = stop.cancelled() => break,
        };
        match accepted {
            Some((Ok((stream, _)), place)) => {
                let connection =
                    connection(stream, acceptor.cloned(), router.clone(), stop.clone());
                connections.spawn(async move {
                    connection.await;
                    drop(place);
                });
            }
            Some((Err(err), _)) => {
                // Out of descriptors, most likely: give the open connections time to end.
                tracing::warn!(error = %err, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            None => break,
        }
    }
    let ended = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout(patience, ended).await.is_err() {
        connections.shutdown().await;
    }
}

async fn connection(
    stream: TcpStream,
    acceptor: Option<Acceptor>,
    router: Router,
    stop: CancellationToken,
) {
    let _ = stream.set_nodelay(true);
    let Some(acceptor) = acceptor else { return http(stream, router, stop).await };
    let secured = tokio::select! {
        secured = acceptor.accept(stream) => secured,
        () = stop.cancelled() => return,
    };
    match secured {
        Ok(stream) => http(stream, router, stop).await,
        Err(err) => tracing::debug!(error = %err, "a TLS handshake failed"),
    }
}

async fn http(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    router: Router,
    stop: CancellationToken,
) {
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_PATIENCE);
    http.max_headers(MAX_HEADERS).max_buf_size(MAX_HEAD_BYTES);
    let service = TowerToHyperService::new(router);
    let serving = http.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(serving);
    let result = tokio::select! {
        result = serving.as_mut() => result,
        () = stop.cancelled() => {
            serving.as_mut().graceful_shutdown();
            serving.await
        }
    };
    if let Err(err) = result {
        tracing::debug!(error = %err, "a connection ended with an error");
    }
}
