//! Tools of MCP servers: which there are, whether they are what was approved, and calling them.
//!
//! A tool is pinned by the hash of its definition. What a server offers when it is first seen is trusted,
//! unless its configuration says `approve: always`; from then on a tool that is new or different is not
//! called until an administrator has approved it, while the others of its server go on. What waits for an
//! approval is stored, so that what is approved is what was shown, and not what the server says meanwhile.
//!
//! **Invariant:** no tool is called whose definition is not the pinned one at the moment of the call.
//! **Invariant:** no connection to the database is held while a server is waited for.

use std::time::Duration;

use chrono::{DateTime, Utc};
use futures::StreamExt;
use serde::Serialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::Services;
use super::access::only_admin;
use super::api::{Actor, optional_instant};
use super::error::ServiceError;
use crate::config::tools::Approve;
pub use crate::config::tools::Effect as ToolEffect;
use crate::config::tools::Effect;
use crate::store::crash;
use crate::store::tools::{self as store, PendingRow, PinRow};
use crate::tools::definition::{DefinitionHash, ToolDefinition};
use crate::tools::error::{Outcome, ToolError, ToolErrorKind};
use crate::tools::progress::ProgressSink;
use crate::tools::result::ToolResult;
use crate::tools::{ToolCall, Tools};

/// How long one server may take when all are listed.
const LIST_PATIENCE: Duration = Duration::from_secs(20);
/// Servers that are asked at once when all are listed.
const LISTED_AT_ONCE: usize = 8;

/// A tool server with its tools.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolServerView {
    /// Its name in the configuration.
    pub server: String,
    /// `stopped`, `starting`, `running` or `failed`.
    pub status: String,
    /// The version of MCP that is spoken.
    pub protocol: Option<String>,
    /// What it calls itself.
    pub name: Option<String>,
    /// Why its tools cannot be told now. Those that were approved are listed all the same.
    pub error: Option<String>,
    /// By name.
    pub tools: Vec<ToolView>,
}

/// Whether a tool is what was approved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ToolState {
    /// It is, and may be called.
    Pinned,
    /// It is another than the one that was approved.
    Changed,
    /// It was never approved.
    New,
    /// It was approved, and the server has it no more.
    Gone,
}

/// A tool.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolView {
    /// Its name.
    pub tool: String,
    /// Whether it may be called.
    pub state: ToolState,
    /// What it does to the world, as the configuration says, or else the approved definition.
    pub effect: Effect,
    /// For a model.
    pub description: Option<String>,
    /// JSON Schema of the arguments.
    #[schema(value_type = Object)]
    pub input_schema: Value,
    /// JSON Schema of the structured result.
    #[schema(value_type = Option<Object>)]
    pub output_schema: Option<Value>,
    /// SHA-256 of all that the server says of it.
    pub hash: String,
    /// What is different from the approved definition, a line each.
    pub changes: Vec<String>,
    /// The administrator who approved it; null when it was trusted at first sight.
    pub approved_by: Option<String>,
    /// When it was approved.
    #[serde(with = "optional_instant")]
    pub approved_at: Option<DateTime<Utc>>,
}

/// A tool that was approved just now.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ApprovedTool {
    /// Its name.
    pub tool: String,
    /// The hash of the approved definition.
    pub hash: String,
}

/// A call.
#[derive(Debug, Clone)]
pub struct CallTool {
    /// The server's name in the configuration.
    pub server: String,
    /// The tool's name.
    pub tool: String,
    /// Its arguments.
    pub arguments: Map<String, Value>,
    /// The same for every attempt at the same thing.
    pub idempotency_key: Option<String>,
    /// How long it may take; what the configuration says when absent.
    pub timeout: Option<Duration>,
}

impl Services {
    /// All tool servers, or one, with their tools. Servers that are not running are started.
    ///
    /// # Errors
    /// [`ToolErrorKind::UnknownServer`]; a server that fails is a part of the answer.
    pub async fn list_tools(
        &self,
        _actor: &Actor,
        server: Option<&str>,
    ) -> Result<Vec<ToolServerView>, ServiceError> {
        let Some(tools) = self.tools() else {
            return server.map_or(Ok(Vec::new()), |server| Err(no_server(server).into()));
        };
        let names: Vec<String> = match server {
            Some(server) => tools.config(server).map(|_| vec![server.to_owned()])?,
            None => tools.servers().map(str::to_owned).collect(),
        };
        let views = names.into_iter().map(async |name| self.tool_server(tools, name).await);
        let views = futures::stream::iter(views).buffered(LISTED_AT_ONCE);
        views.collect::<Vec<_>>().await.into_iter().collect()
    }

    /// Approves what waits for an approval on a server: one tool, or all. With `hash` it is approved only
    /// when it is still that definition. Only an administrator may.
    ///
    /// # Errors
    /// Nothing waits, or not this.
    pub async fn approve_tools(
        &self,
        actor: &Actor,
        server: &str,
        tool: Option<&str>,
        hash: Option<&str>,
    ) -> Result<Vec<ApprovedTool>, ServiceError> {
        let tools = self.tools().ok_or_else(|| no_server(server))?;
        tools.config(server)?;
        only_admin(actor)?;
        if hash.is_some() && tool.is_none() {
            return Err(ServiceError::invalid_at("/hash", "a `hash` goes with a `tool`"));
        }
        let waits = {
            let mut db = self.pool().acquire().await?;
            store::pending(&mut db, server).await?
        };
        if waits.is_empty() {
            // Nobody has looked at this server's tools lately.
            let seen = tools.list(server).await?;
            self.judge(tools, server, &seen).await?;
        }
        let mut tx = self.transaction().await?;
        store::lock_server(&mut tx, server).await?;
        let mut rows = store::pending(&mut tx, server).await?;
        rows.retain(|row| tool.is_none_or(|tool| row.tool == tool));
        if rows.is_empty() {
            let what = tool.map_or("no tool".to_owned(), |tool| format!("not the tool {tool}"));
            let message = format!("{what} of {server} waits for an approval");
            return Err(ServiceError::Conflict(message));
        }
        if let Some(row) = rows.iter().find(|row| hash.is_some_and(|hash| row.hash != hash)) {
            let message = format!(
                "the tool {} of {server} has changed again since; look at it once more",
                row.tool
            );
            return Err(ServiceError::Conflict(message));
        }
        let names: Vec<String> = rows.iter().map(|row| row.tool.clone()).collect();
        let now = self.clock().now();
        store::insert_pins(&mut tx, server, &rows, Some(&actor.name), now).await?;
        store::delete_pending(&mut tx, server, &names).await?;
        crash::commit(tx, "tools approved").await?;
        for row in &rows {
            tracing::info!(tools.server = server, tools.tool = row.tool, hash = row.hash, by = %actor.name,
                "the tool {} of {server} is approved", row.tool);
        }
        Ok(rows.into_iter().map(|row| ApprovedTool { tool: row.tool, hash: row.hash }).collect())
    }

    /// Calls a tool that is what was approved, for whom `by` names. When this is dropped, the server is told.
    ///
    /// # Errors
    /// [`ServiceError::Tool`], with what is known of the effects.
    pub async fn call_tool(
        &self,
        by: &str,
        call: CallTool,
        progress: Option<ProgressSink>,
    ) -> Result<ToolResult, ServiceError> {
        let tools = self.tools().ok_or_else(|| no_server(&call.server))?;
        tools.config(&call.server)?;
        let (server, tool) = (call.server.clone(), call.tool.clone());
        let pin = match self.pin_of(&server, &tool).await? {
            Some(pin) => pin,
            None => {
                let seen = tools.list(&server).await?;
                self.judge(tools, &server, &seen).await?;
                let pin = self.pin_of(&server, &tool).await?;
                pin.ok_or_else(|| not_approved(&server, &tool, &seen))?
            }
        };
        tracing::debug!(
            tools.server = server,
            tools.tool = tool,
            by,
            "the tool {tool} of {server} is called"
        );
        let call = ToolCall {
            server: call.server,
            tool: call.tool,
            arguments: call.arguments,
            idempotency_key: call.idempotency_key,
            timeout: call.timeout,
            pin: Some(DefinitionHash::stored(pin.hash.clone())),
        };
        match tools.call(call, progress).await {
            Err(err) if err.kind == ToolErrorKind::Changed => {
                let seen = tools.list(&server).await?;
                self.judge(tools, &server, &seen).await?;
                Err(changed(&server, &tool, &pin, &seen, err).into())
            }
            result => Ok(result?),
        }
    }

    /// What a tool does to the world: as the configuration says, or else the approved definition. A server that was
    /// never seen is asked first.
    ///
    /// # Errors
    /// [`ToolErrorKind::UnknownServer`]; or the tool is not approved, or the server that was never seen cannot be asked.
    pub async fn tool_effect(&self, server: &str, tool: &str) -> Result<Effect, ServiceError> {
        let config = self.tools().ok_or_else(|| no_server(server))?.config(server)?;
        if let Some(effect) = config.effects.get(tool) {
            return Ok(*effect);
        }
        let approved = self.approved_tools(server, Some(tool)).await?;
        Ok(approved.first().map_or(Effect::Effectful, ToolDefinition::hinted_effect))
    }

    /// The approved definitions of a server, or of one tool of it. A server that was never seen is asked first.
    pub(super) async fn approved_tools(
        &self,
        server: &str,
        tool: Option<&str>,
    ) -> Result<Vec<ToolDefinition>, ServiceError> {
        let tools = self.tools().ok_or_else(|| no_server(server))?;
        tools.config(server)?;
        let mut pins = store::pins(&mut *self.pool().acquire().await?, server).await?;
        let wanted = |pin: &PinRow| tool.is_none_or(|tool| tool == pin.tool);
        if !pins.iter().any(wanted) {
            let seen = tools.list(server).await?;
            pins = self.judge(tools, server, &seen).await?;
            if let Some(tool) = tool.filter(|_| !pins.iter().any(wanted)) {
                return Err(not_approved(server, tool, &seen).into());
            }
        }
        let mut found: Vec<_> =
            pins.iter().filter(|pin| wanted(pin)).filter_map(definition).collect();
        found.sort_by(|one, other| one.name.cmp(&other.name));
        Ok(found)
    }

    async fn pin_of(&self, server: &str, tool: &str) -> Result<Option<PinRow>, ServiceError> {
        let mut db = self.pool().acquire().await?;
        Ok(store::pin(&mut db, server, tool).await?)
    }

    async fn tool_server(
        &self,
        tools: &Tools,
        server: String,
    ) -> Result<ToolServerView, ServiceError> {
        let listed = tokio::time::timeout(LIST_PATIENCE, tools.list(&server)).await;
        let listed = listed.map_err(|_| format!("it did not answer within {LIST_PATIENCE:?}"));
        let listed = listed.and_then(|listed| listed.map_err(|err| err.message));
        let pins = match &listed {
            Ok(seen) => self.judge(tools, &server, seen).await?,
            Err(_) => store::pins(&mut *self.pool().acquire().await?, &server).await?,
        };
        let (status, config) = (tools.status(&server)?, tools.config(&server)?);
        let effect = |tool: &str, pinned: Option<&ToolDefinition>| {
            let said = pinned.map(ToolDefinition::hinted_effect);
            config.effects.get(tool).copied().or(said).unwrap_or(Effect::Effectful)
        };
        let mut views = Vec::new();
        for seen in listed.iter().flatten() {
            let pin = pins.iter().find(|pin| pin.tool == seen.name);
            let pinned = pin.and_then(definition);
            views.push(view(seen, pin, pinned.as_ref(), effect(&seen.name, pinned.as_ref())));
        }
        let seen: Vec<String> = views.iter().map(|view| view.tool.clone()).collect();
        for pin in pins.iter().filter(|pin| !seen.contains(&pin.tool)) {
            let Some(pinned) = definition(pin) else { continue };
            let mut view =
                view(&pinned, Some(pin), Some(&pinned), effect(&pin.tool, Some(&pinned)));
            if listed.is_ok() {
                view.state = ToolState::Gone;
            }
            views.push(view);
        }
        views.sort_by(|one, other| one.tool.cmp(&other.tool));
        let (protocol, name) = (status.protocol, status.name);
        let error = listed.err();
        Ok(ToolServerView {
            server,
            status: status.state.to_owned(),
            protocol,
            name,
            error,
            tools: views,
        })
    }

    /// Compares what a server offers with what is pinned, pins it when the server is first seen, and
    /// stores what waits for an approval. Answers the pins.
    async fn judge(
        &self,
        tools: &Tools,
        server: &str,
        seen: &[ToolDefinition],
    ) -> Result<Vec<PinRow>, ServiceError> {
        let (pins, pending) = {
            let mut db = self.pool().acquire().await?;
            (store::pins(&mut db, server).await?, store::pending(&mut db, server).await?)
        };
        let known = !pins.is_empty() || !pending.is_empty();
        if known && same(&unapproved(seen, &pins)?, &pending) {
            return Ok(pins);
        }
        let now = self.clock().now();
        let mut tx = self.transaction().await?;
        let first = store::insert_server(&mut tx, server, now).await?;
        store::lock_server(&mut tx, server).await?;
        let waits = unapproved(seen, &store::pins(&mut tx, server).await?)?;
        if first && tools.config(server)?.approve == Approve::FirstUse {
            store::insert_pins(&mut tx, server, &waits, None, now).await?;
            tracing::info!(
                tools.server = server,
                "{} tools of {server} are trusted at first sight",
                waits.len()
            );
        } else {
            store::replace_pending(&mut tx, server, &waits, now).await?;
            if !waits.is_empty() {
                tracing::warn!(
                    tools.server = server,
                    "{} tools of {server} wait for an approval",
                    waits.len()
                );
            }
        }
        let pins = store::pins(&mut tx, server).await?;
        crash::commit(tx, "tools seen").await?;
        Ok(pins)
    }
}

/// The definitions that are not pinned, as rows.
fn unapproved(seen: &[ToolDefinition], pins: &[PinRow]) -> Result<Vec<PendingRow>, ServiceError> {
    let mut rows = Vec::new();
    for seen in seen {
        let hash = seen.hash().as_str().to_owned();
        if pins.iter().any(|pin| pin.tool == seen.name && pin.hash == hash) {
            continue;
        }
        let definition = serde_json::to_vec(seen).map_err(ServiceError::internal)?;
        rows.push(PendingRow { tool: seen.name.clone(), hash, definition });
    }
    Ok(rows)
}

fn same(one: &[PendingRow], other: &[PendingRow]) -> bool {
    let hash = |row: &PendingRow| (row.tool.clone(), row.hash.clone());
    let sorted = |rows: &[PendingRow]| {
        let mut hashes: Vec<_> = rows.iter().map(hash).collect();
        hashes.sort();
        hashes
    };
    sorted(one) == sorted(other)
}

/// A pinned definition; none when what is stored cannot be read, which counts as not approved.
fn definition(pin: &PinRow) -> Option<ToolDefinition> {
    serde_json::from_slice(&pin.definition).ok()
}

fn view(
    seen: &ToolDefinition,
    pin: Option<&PinRow>,
    pinned: Option<&ToolDefinition>,
    effect: Effect,
) -> ToolView {
    let hash = seen.hash().as_str().to_owned();
    let state = match pin {
        None => ToolState::New,
        Some(pin) if pin.hash == hash => ToolState::Pinned,
        Some(_) => ToolState::Changed,
    };
    ToolView {
        tool: seen.name.clone(),
        state,
        effect,
        description: seen.description.clone(),
        input_schema: seen.input_schema.clone(),
        output_schema: seen.output_schema.clone(),
        hash,
        changes: pinned.map(|pinned| seen.changes_from(pinned)).unwrap_or_default(),
        approved_by: pin.and_then(|pin| pin.approved_by.clone()),
        approved_at: pin.map(|pin| pin.approved_at),
    }
}

fn no_server(server: &str) -> ToolError {
    let message = format!("there is no tool server {}: none is configured", server.escape_debug());
    tool_error(ToolErrorKind::UnknownServer, message)
}

fn not_approved(server: &str, tool: &str, seen: &[ToolDefinition]) -> ToolError {
    let shown = tool.escape_debug();
    if seen.iter().all(|seen| seen.name != tool) {
        let message = format!("the tool server {server} has no tool {shown} that may be used");
        return tool_error(ToolErrorKind::UnknownTool, message);
    }
    let message = format!(
        "the tool {shown} of {server} was not approved: look at it with `cynai tools list {server}`, and \
         approve it with `cynai tools approve {server} {shown}`"
    );
    tool_error(ToolErrorKind::Changed, message)
}

fn changed(
    server: &str,
    tool: &str,
    pin: &PinRow,
    seen: &[ToolDefinition],
    err: ToolError,
) -> ToolError {
    let now = seen.iter().find(|seen| seen.name == tool);
    let Some((now, old)) = now.zip(definition(pin)) else { return err };
    let message = format!(
        "the tool {tool} of {server} has changed since it was approved: {}. Approve it with `cynai tools \
         approve {server} {tool}`",
        now.changes_from(&old).join("; ")
    );
    ToolError { message, ..err }
}

fn tool_error(kind: ToolErrorKind, message: String) -> ToolError {
    ToolError { kind, outcome: Outcome::NotSent, message, path: None, retry_after: None }
}
