//! Connections: accepts them, bounds them, and ends them in good order.
//!
//! A client that sends its head slowly, or never, is cut off; a head over its size is refused by the
//! HTTP implementation (431). When the server stops, streams end at once (clients come back by their
//! ids), short requests get [`super::GatewayConfig::drain`] to finish, and the rest is cut.

use std::future::Future;
use std::io;
use std::time::Duration;

use hyper::server::conn::http1::Builder;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::{Gateway, metrics, router};
use crate::tls::accept::Acceptor;

const HEAD_BYTES: usize = 64 << 10;
const HEAD_FIELDS: usize = 100;
const HEAD_TIMEOUT: Duration = Duration::from_secs(60);
const UPKEEP: Duration = Duration::from_secs(5);

/// Serves `gateway` on `listener`, over TLS when there is an acceptor for it, until `shutdown`, and returns when every connection has ended.
pub async fn serve(
    listener: TcpListener,
    gateway: Gateway,
    tls: Option<Acceptor>,
    shutdown: impl Future<Output = ()> + Send,
) -> io::Result<()> {
    let service = TowerToHyperService::new(router(gateway.clone()));
    let mut background = background(&gateway);
    let mut connections = JoinSet::new();
    let limit = gateway.config().connections;
    tokio::pin!(shutdown);
    loop {
        tokio::select! {
            () = &mut shutdown => break,
            accepted = listener.accept(), if connections.len() < limit => match accepted {
                Ok((stream, _)) => {
                    let (service, gateway) = (service.clone(), gateway.clone());
                    connections.spawn(connection(stream, tls.clone(), service, gateway));
                }
                Err(err) => pause_after(&err).await,
            },
            Some(ended) = connections.join_next() => report(ended),
        }
    }
    drop(listener);
    gateway.0.closing.cancel();
    let drained = tokio::time::timeout(gateway.config().drain, async {
        while let Some(ended) = connections.join_next().await {
            report(ended);
        }
    });
    if drained.await.is_err() {
        tracing::warn!(
            connections = connections.len(),
            "connections are cut: they took too long to end"
        );
        connections.shutdown().await;
    }
    background.shutdown().await;
    Ok(())
}

fn background(gateway: &Gateway) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    let notes = gateway.clone();
    tasks.spawn(async move { notes.0.disconnects.run(notes.services(), &notes.0.closing).await });
    tasks.spawn(async {
        let Some(registry) = metrics::registry() else { return };
        let mut beat = tokio::time::interval(UPKEEP);
        loop {
            // Samples pile up in memory until they are counted, also when nobody reads them.
            beat.tick().await;
            registry.run_upkeep();
        }
    });
    tasks
}

async fn connection(
    stream: TcpStream,
    tls: Option<Acceptor>,
    service: TowerToHyperService<axum::Router>,
    gateway: Gateway,
) {
    // Small events must not wait for the acknowledgement of earlier ones.
    if let Err(err) = stream.set_nodelay(true) {
        tracing::debug!(error = %err, "a connection ended before it began");
        return;
    }
    let Some(tls) = tls else { return http(stream, service, gateway).await };
    let secured = tokio::select! {
        secured = tls.accept(stream) => secured,
        () = gateway.0.closing.cancelled() => return,
    };
    match secured {
        Ok(stream) => http(stream, service, gateway).await,
        Err(err) => tracing::debug!(error = %err, "a TLS handshake failed"),
    }
}

async fn http(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    service: TowerToHyperService<axum::Router>,
    gateway: Gateway,
) {
    let mut builder = Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(HEAD_BYTES)
        .max_headers(HEAD_FIELDS);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = gateway.0.closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(err) = ended {
        tracing::debug!(error = %err, "a connection ended early");
    }
}

/// Without file descriptors every accept fails at once: a busy loop would not free any.
async fn pause_after(err: &io::Error) {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    if matches!(err.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset) {
        return;
    }
    tracing::error!(error = %err, "no connection could be accepted");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(err) = ended
        && err.is_panic()
    {
        tracing::error!(error = %err, "a connection's task panicked");
    }
}
