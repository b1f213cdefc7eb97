//! Calls of models, and the tools that they may ask for.

use super::Services;
use super::api::Actor;
use super::error::ServiceError;
use crate::graph::names::offered_name;
use crate::models::Models;
use crate::models::answer::{ChatAnswer, Sink};
use crate::models::failure::ModelError;
use crate::models::json::{JsonAnswer, JsonForm};
pub use crate::models::listing::Listing;
use crate::models::messages::Message;
use crate::models::request::{ChatRequest, ToolSpec};

/// A tool as a model may ask for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedTool {
    /// The name for the model: letters, digits, `_` and `-`.
    pub name: String,
    /// The server's name in the configuration.
    pub server: String,
    /// The tool's name on that server.
    pub tool: String,
}

impl Services {
    /// Gives these operations the endpoints of models; the first ones stay. Without any there are no models.
    pub fn set_models(&self, models: Models) {
        let _ = self.0.models.set(models);
    }

    fn models(&self, model: &str) -> Result<&Models, ModelError> {
        self.0.models.get().ok_or_else(|| ModelError::UnknownModel {
            model: model.to_owned(),
            problem: "the configuration names no endpoints".to_owned(),
        })
    }

    /// Asks a model for a message. Its pieces go to `sink`.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub async fn chat(
        &self,
        request: &ChatRequest,
        sink: &dyn Sink,
    ) -> Result<ChatAnswer, ModelError> {
        self.models(&request.model)?.chat(request, sink).await
    }

    /// Asks a model for JSON that fits a schema.
    ///
    /// # Errors
    /// See [`ModelError`].
    pub async fn chat_json(
        &self,
        request: &ChatRequest,
        form: &JsonForm<'_>,
        sink: &dyn Sink,
    ) -> Result<JsonAnswer, ModelError> {
        self.models(&request.model)?.chat_json(request, form, sink).await
    }

    /// The endpoints and routes, and which models they have. Every endpoint is asked.
    pub async fn list_models(&self, _actor: &Actor) -> Listing {
        match self.0.models.get() {
            Some(models) => models.list().await,
            None => Listing::default(),
        }
    }

    /// What a model is told of the tools that `patterns` (`SERVER/TOOL`, `SERVER/*`) name, and which they are.
    ///
    /// # Errors
    /// A server cannot be asked, or a name fits no tool that was approved.
    pub async fn offered_tools(
        &self,
        patterns: &[String],
    ) -> Result<Vec<(OfferedTool, ToolSpec)>, ServiceError> {
        let mut offered: Vec<(OfferedTool, ToolSpec)> = Vec::new();
        for pattern in patterns {
            let (server, wanted) = pattern.split_once('/').unwrap_or((pattern, "*"));
            for definition in
                self.approved_tools(server, Some(wanted).filter(|name| *name != "*")).await?
            {
                let name = offered_name(server, &definition.name);
                if offered.iter().any(|(known, _)| known.name == name) {
                    continue;
                }
                let spec = ToolSpec {
                    name: name.clone(),
                    description: definition.description.clone().unwrap_or_default(),
                    parameters: definition.input_schema.clone(),
                };
                let tool =
                    OfferedTool { name, server: server.to_owned(), tool: definition.name.clone() };
                offered.push((tool, spec));
            }
        }
        Ok(offered)
    }

    /// The tool that a model means by `name`, among those that `patterns` allow; `None` when there is none.
    ///
    /// # Errors
    /// A server cannot be asked.
    pub async fn tool_named(
        &self,
        patterns: &[String],
        name: &str,
    ) -> Result<Option<OfferedTool>, ServiceError> {
        let offered = self.offered_tools(patterns).await?;
        Ok(offered.into_iter().map(|(tool, _)| tool).find(|tool| tool.name == name))
    }
}

/// Reads a list of messages in any of the known forms.
///
/// # Errors
/// One is none; the text says which, and why.
pub fn read_messages(list: &serde_json::Value) -> Result<Vec<Message>, String> {
    let items = list.as_array().ok_or("the messages are no list")?;
    let read = |(at, item)| Message::read(item).map_err(|err| format!("message {at}: {err}"));
    items.iter().enumerate().map(read).collect()
}
