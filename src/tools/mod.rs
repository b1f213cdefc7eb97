//! Tools of MCP servers: which there are, and calling them.
//!
//! A server may be anything that somebody published: it crashes, hangs, floods, changes its tools under
//! way. So each is held at arm's length: as a process group of its own or behind HTTP, with a limit on
//! everything that it sends, what it claims checked against its own schemas, and none of it able to harm
//! another server, or another call of the same one.
//!
//! Who may use what, and whether a tool is still what it was, is not decided here but in `services`.
//!
//! **Invariant:** one folder, `wire`, knows the library that speaks the protocol.

mod call;
mod child;
pub mod definition;
pub mod error;
pub mod keys;
mod lines;
mod listing;
mod login;
mod open;
pub mod progress;
mod questions;
pub mod result;
mod schema;
mod server;
mod wire;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::config::tools::{ToolServerConfig, ToolsConfig};
use definition::ToolDefinition;
use error::{ToolError, ToolErrorKind, quoted};
use keys::Keys;
use progress::ProgressSink;
use result::ToolResult;
use server::{Context, Server};

pub use call::ToolCall;
pub use server::ServerStatus;

/// How long ending all servers may take, beyond which their processes are killed.
const CLOSE_PATIENCE: Duration = Duration::from_secs(10);

/// All configured tool servers. Cheap to clone; the last one that is dropped ends them.
#[derive(Debug, Clone)]
pub struct Tools(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    servers: BTreeMap<String, Arc<Server>>,
    context: Arc<Context>,
    _ends: DropGuard,
}

impl Tools {
    /// The servers of `config`, none of them started. Their values come from `keys` when they are.
    #[must_use]
    pub fn new(config: ToolsConfig, keys: Arc<dyn Keys>) -> Self {
        let closing = CancellationToken::new();
        let context = Arc::new(Context {
            homes: config.homes,
            path: config.path,
            keys,
            tasks: TaskTracker::new(),
            closing: closing.clone(),
        });
        let server = |(name, config): (String, ToolServerConfig)| {
            let server = Server::new(name.clone(), config, Arc::clone(&context));
            (name, Arc::new(server))
        };
        let servers = config.servers.into_iter().map(server).collect();
        Self(Arc::new(Inner { servers, context, _ends: closing.drop_guard() }))
    }

    /// The names of the configured servers, in order.
    pub fn servers(&self) -> impl Iterator<Item = &str> {
        self.0.servers.keys().map(String::as_str)
    }

    /// A server's configuration.
    ///
    /// # Errors
    /// [`ToolErrorKind::UnknownServer`].
    pub fn config(&self, server: &str) -> Result<&ToolServerConfig, ToolError> {
        self.server(server).map(|server| &server.config)
    }

    /// How a server is now; it is not started by asking.
    ///
    /// # Errors
    /// [`ToolErrorKind::UnknownServer`].
    pub fn status(&self, server: &str) -> Result<ServerStatus, ToolError> {
        self.server(server).map(|server| server.status())
    }

    /// The tools of a server that its configuration allows, by name. Starts the server when it is not
    /// running.
    ///
    /// # Errors
    /// Why they cannot be told now.
    pub async fn list(&self, server: &str) -> Result<Vec<ToolDefinition>, ToolError> {
        let server = self.server(server)?;
        let live = server.in_use().await?;
        let tools = server.tools(&live).await?;
        Ok(tools.iter().map(|tool| tool.definition.clone()).collect())
    }

    /// Calls a tool. `progress` gets the server's notes, at most some each second. When this is dropped
    /// the server is told that nobody waits any more.
    ///
    /// # Errors
    /// The situation, with what is known of the effects. A tool that says itself that it failed is no
    /// error here: see [`ToolResult::is_error`].
    pub async fn call(
        &self,
        call: ToolCall,
        progress: Option<ProgressSink>,
    ) -> Result<ToolResult, ToolError> {
        let server = self.server(&call.server)?;
        Box::pin(server.call(call, progress)).await
    }

    /// Begins a login to a server, and answers where a person agrees to it. That page leads to
    /// `redirect_uri` in the end, with parameters that [`Self::finish_login`] wants to see.
    ///
    /// # Errors
    /// The server has no `oauth` in its configuration, or does not tell how to log in.
    pub async fn begin_login(
        &self,
        server: &str,
        redirect_uri: &url::Url,
    ) -> Result<String, ToolError> {
        Box::pin(self.server(server)?.begin_login(redirect_uri)).await
    }

    /// Finishes the login that was begun last, with the address that the person was led to. The next use of
    /// the server is with this login.
    ///
    /// # Errors
    /// No login was begun, or it was refused.
    pub async fn finish_login(&self, server: &str, led_to: &url::Url) -> Result<(), ToolError> {
        Box::pin(self.server(server)?.finish_login(led_to)).await
    }

    /// Ends all servers with everything that they started. Calls under way fail; later ones too.
    pub async fn close(&self) {
        let context = &self.0.context;
        context.closing.cancel();
        context.tasks.close();
        if tokio::time::timeout(CLOSE_PATIENCE, context.tasks.wait()).await.is_err() {
            tracing::warn!("a tool server did not end within {CLOSE_PATIENCE:?}");
        }
    }

    fn server(&self, name: &str) -> Result<&Arc<Server>, ToolError> {
        self.0.servers.get(name).ok_or_else(|| {
            let known = self.servers().collect::<Vec<_>>().join(", ");
            let known = if known.is_empty() { "none".to_owned() } else { known };
            let message = format!("there is no tool server {}; configured: {known}", quoted(name));
            ToolError::new(ToolErrorKind::UnknownServer, message)
        })
    }
}
