//! The list of a server's tools, fetched when it is first needed, when the server says that it changed, and
//! when it is some minutes old, since not every server says so.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;

use super::definition::{DefinitionHash, ToolDefinition};
use super::error::{Outcome, ToolError, ToolErrorKind, quoted};
use super::schema::Lazy;
use super::server::{InUse, Server};
use super::wire::Failure;

/// The most tools of one server.
const MAX_TOOLS: usize = 1000;
/// The most pages that they may come in.
const MAX_PAGES: usize = 100;
/// The most bytes of JSON of all pages together.
const MAX_BYTES: usize = 8 << 20;
/// The longest mark of a page.
const MAX_CURSOR: usize = 64 << 10;
/// A list that is older is fetched again.
const FRESH: Duration = Duration::from_secs(300);
/// JSON-RPC's code for a method that does not exist: such a server has no tools.
const NO_SUCH_METHOD: i32 = -32601;

/// A tool, ready to be called.
#[derive(Debug)]
pub(super) struct Tool {
    pub(super) definition: ToolDefinition,
    pub(super) hash: DefinitionHash,
    pub(super) input: Arc<Lazy>,
    pub(super) output: Option<Arc<Lazy>>,
}

/// What is known of a connection's tools.
#[derive(Debug, Default)]
pub(super) struct Listing(tokio::sync::Mutex<Option<Listed>>);

#[derive(Debug)]
struct Listed {
    at: Instant,
    tools: Arc<Vec<Arc<Tool>>>,
}

impl Server {
    /// The tools that may be used, as the server describes them now.
    pub(super) async fn tools(&self, live: &InUse) -> Result<Arc<Vec<Arc<Tool>>>, ToolError> {
        let deadline = Instant::now() + self.config.timeout;
        let listed = tokio::time::timeout_at(deadline, live.listing.0.lock()).await;
        let mut listed = listed.map_err(|_| self.list_failed(Failure::Timeout, live))?;
        // One who leaves while the list is fetched leaves none behind.
        if let Some(known) = listed.take()
            && !live.connection.take_tools_changed()
            && known.at.elapsed() < FRESH
        {
            let tools = Arc::clone(&known.tools);
            *listed = Some(known);
            return Ok(tools);
        }
        let entries = match self.pages(live, deadline).await {
            Err(Failure::Remote { code: NO_SUCH_METHOD, .. }) => Vec::new(),
            entries => entries.map_err(|failure| self.list_failed(failure, live))?,
        };
        let tools = Arc::new(self.usable(entries, live)?);
        *listed = Some(Listed { at: Instant::now(), tools: Arc::clone(&tools) });
        Ok(tools)
    }

    async fn pages(&self, live: &InUse, deadline: Instant) -> Result<Vec<Value>, Failure> {
        let nonsense = |problem: &str| Failure::Unreadable(problem.to_owned());
        let (mut entries, mut cursor, mut bytes) = (Vec::new(), None, 0);
        for _ in 0..MAX_PAGES {
            let mut page = live.connection.list(cursor.take(), deadline).await?;
            let Value::Array(more) = page["tools"].take() else {
                return Err(nonsense("its list of tools is none"));
            };
            bytes += more.iter().map(|entry| entry.to_string().len()).sum::<usize>();
            entries.extend(more);
            if entries.len() > MAX_TOOLS {
                let problem = format!("it has more than {MAX_TOOLS} tools");
                return Err(Failure::Unreadable(problem));
            }
            if bytes > MAX_BYTES {
                let problem = format!("it describes its tools with more than {MAX_BYTES} bytes");
                return Err(Failure::Unreadable(problem));
            }
            match page["nextCursor"].as_str() {
                None | Some("") => return Ok(entries),
                Some(next) if next.len() > MAX_CURSOR => {
                    return Err(nonsense("the mark of its next page is too long"));
                }
                Some(next) => cursor = Some(next.to_owned()),
            }
        }
        Err(Failure::Unreadable(format!("its list of tools has more than {MAX_PAGES} pages")))
    }

    fn usable(&self, entries: Vec<Value>, live: &InUse) -> Result<Vec<Arc<Tool>>, ToolError> {
        let mut names = HashSet::new();
        let mut tools = Vec::with_capacity(entries.len());
        for mut entry in entries {
            live.redactor.json(&mut entry);
            let definition = match ToolDefinition::read(&entry) {
                Ok(definition) => definition,
                Err(problem) => {
                    let problem = quoted(&problem);
                    tracing::warn!(
                        tools.server = self.name,
                        "a tool of {} is left out: {problem}",
                        self.name
                    );
                    continue;
                }
            };
            if !names.insert(definition.name.clone()) {
                let message = format!(
                    "the tool server {} lists the tool {} twice",
                    self.name,
                    quoted(&definition.name)
                );
                return Err(ToolError::new(ToolErrorKind::Protocol, message));
            }
            if self.allows(&definition.name) {
                let input = Arc::new(Lazy::new(definition.input_schema.clone()));
                let output =
                    definition.output_schema.clone().map(|schema| Arc::new(Lazy::new(schema)));
                let hash = definition.hash();
                tools.push(Arc::new(Tool { definition, hash, input, output }));
            }
        }
        tools.sort_by(|one, other| one.definition.name.cmp(&other.definition.name));
        Ok(tools)
    }

    /// Whether the configuration allows this tool.
    pub(super) fn allows(&self, tool: &str) -> bool {
        self.config.tools.as_ref().is_none_or(|allowed| allowed.iter().any(|name| name == tool))
    }

    fn list_failed(&self, failure: Failure, live: &InUse) -> ToolError {
        let err = self.failure(failure, live, false);
        let message = format!("the tools cannot be listed: {}", err.message);
        ToolError { message, ..err }.with_outcome(Outcome::NotSent)
    }
}
