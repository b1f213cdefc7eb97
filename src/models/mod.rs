//! Models behind OpenAI-compatible endpoints: chats, JSON of a schema, embeddings.
//!
//! [`Models`] is what a caller holds. A request names a route or `ENDPOINT/MODEL`; `calls` tries the
//! candidates in order, `chat`, `json` and `embed` say what is asked for, `exchange` is one HTTP exchange
//! through async-openai, `frames` and `assembly` read what comes back, `refusal` what is refused. `messages`
//! turns LangChain's messages into OpenAI's and back.
//!
//! Whatever an endpoint does, a call ends: in an answer, or in an error whose kind says what to do. Nothing
//! is durable here: who calls a model for a run keeps the record of it.
//!
//! **Invariant:** only this part knows the client library, and none of the library's errors leaves it.
//! **Invariant:** every read is bounded in bytes and in time.

pub mod answer;
mod assembly;
mod backoff;
mod breaker;
mod calls;
mod chat;
pub mod embed;
mod endpoint;
mod exchange;
pub mod failure;
mod frames;
pub mod json;
pub mod keys;
pub mod listing;
pub mod messages;
mod metrics;
mod redact;
mod refusal;
pub mod request;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use crate::clock::Clock;
use crate::config::models::{DEFAULT_ATTEMPTS, EndpointConfig, ModelsConfig, ModelsConfigError};
use calls::Target;
use endpoint::Endpoint;
use failure::ModelError;
use keys::Keys;

/// The route that is meant when a request names none.
const USUAL_ROUTE: &str = "default";
const MAX_NAME_BYTES: usize = 512;

/// All configured models. Cheap to clone.
#[derive(Clone)]
pub struct Models(Arc<Inner>);

struct Inner {
    config: ModelsConfig,
    endpoints: BTreeMap<String, Arc<Endpoint>>,
    keys: Arc<dyn Keys>,
    clock: Arc<dyn Clock>,
}

impl fmt::Debug for Models {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Models").field("config", &self.0.config).finish_non_exhaustive()
    }
}

impl Models {
    /// The models of a configuration, each endpoint with connections of its own. The process must have
    /// installed a provider for TLS.
    pub fn new(
        config: ModelsConfig,
        keys: Arc<dyn Keys>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self, ModelsConfigError> {
        Self::with_http(config, keys, clock, |_, _, builder| builder.build())
    }

    /// As [`Models::new`], with a say in how each endpoint's HTTP client is made: `make` gets its name,
    /// its configuration and a builder that has the timeouts, follows no redirects and uses no proxy.
    pub fn with_http(
        config: ModelsConfig,
        keys: Arc<dyn Keys>,
        clock: Arc<dyn Clock>,
        make: impl Fn(
            &str,
            &EndpointConfig,
            reqwest::ClientBuilder,
        ) -> Result<reqwest::Client, reqwest::Error>,
    ) -> Result<Self, ModelsConfigError> {
        config.check()?;
        metrics::describe();
        let mut endpoints = BTreeMap::new();
        for (name, endpoint) in &config.endpoints {
            let builder = endpoint::http(endpoint.timeouts.connect);
            let http = make(name, endpoint, builder).map_err(|err| ModelsConfigError {
                field: format!("models.endpoints.{name}"),
                problem: format!("no HTTP client can be made: {}", err.without_url()),
            })?;
            let endpoint = Endpoint::new(name.clone(), endpoint.clone(), http);
            endpoints.insert(name.clone(), Arc::new(endpoint));
        }
        Ok(Self(Arc::new(Inner { config, endpoints, keys, clock })))
    }

    /// What is configured.
    #[must_use]
    pub fn config(&self) -> &ModelsConfig {
        &self.0.config
    }

    /// Whether a request may name this model, for those who check graphs before they run.
    pub fn check_name(&self, model: &str) -> Result<(), ModelError> {
        self.targets(model).map(drop)
    }

    fn endpoints(&self) -> impl Iterator<Item = &Arc<Endpoint>> {
        self.0.endpoints.values()
    }

    fn keys(&self) -> &dyn Keys {
        &*self.0.keys
    }

    fn clock(&self) -> Arc<dyn Clock> {
        Arc::clone(&self.0.clock)
    }

    /// The candidates for a model's name. A route's name has no slash, so the two cannot be confused.
    fn targets(&self, model: &str) -> Result<Vec<Target>, ModelError> {
        let named = named(model);
        if let Some(candidates) = self.0.config.routes.get(named) {
            let targets = candidates.iter().filter_map(|candidate| {
                Some(Target {
                    endpoint: Arc::clone(self.0.endpoints.get(&candidate.endpoint)?),
                    model: candidate.model.clone(),
                    attempts: candidate.attempts,
                })
            });
            return Ok(targets.collect());
        }
        let direct = named.split_once('/').and_then(|(endpoint, name)| {
            let endpoint = Arc::clone(self.0.endpoints.get(endpoint)?);
            let sayable = (1..=MAX_NAME_BYTES).contains(&name.len());
            sayable.then(|| Target { endpoint, model: name.to_owned(), attempts: DEFAULT_ATTEMPTS })
        });
        direct.map(|target| vec![target]).ok_or_else(|| self.unknown(named))
    }

    fn unknown(&self, model: &str) -> ModelError {
        let routes: Vec<&str> = self.0.config.routes.keys().map(String::as_str).collect();
        let endpoints: Vec<&str> = self.0.endpoints.keys().map(String::as_str).collect();
        let problem = if endpoints.is_empty() {
            "no model endpoint is configured; add one under `models.endpoints`".to_owned()
        } else {
            let near = routes
                .iter()
                .map(|route| (strsim::jaro_winkler(route, model), route))
                .filter(|(likeness, _)| *likeness > 0.85)
                .max_by(|left, right| left.0.total_cmp(&right.0));
            let hint = near.map(|(_, route)| format!(" (did you mean `{route}`?)"));
            format!(
                "routes: {}; or ENDPOINT/MODEL with one of the endpoints {}{}",
                if routes.is_empty() { "none".to_owned() } else { routes.join(", ") },
                endpoints.join(", "),
                hint.unwrap_or_default()
            )
        };
        ModelError::UnknownModel { model: redact::quote(model, 200), problem }
    }
}

/// The name that a request means.
fn named(model: &str) -> &str {
    if model.is_empty() { USUAL_ROUTE } else { model }
}
