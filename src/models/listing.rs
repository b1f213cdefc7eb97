//! What there is: endpoints, whether they answer, their models, and the routes to them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;
use tokio::time::{Instant, timeout};

use super::Models;
use super::endpoint::Endpoint;
use super::exchange::Wire;
use super::failure::{Failure, FailureKind};
use super::redact::quote;

/// For one endpoint's answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// Of one endpoint.
const MAX_MODELS: usize = 1000;
const MAX_NAME_BYTES: usize = 256;

/// All that is configured, as it is now.
#[derive(Debug, Clone, Default, Serialize, utoipa::ToSchema)]
pub struct Listing {
    /// By name.
    pub endpoints: Vec<EndpointStatus>,
    /// Candidates as `ENDPOINT/MODEL`, by route.
    pub routes: BTreeMap<String, Vec<String>>,
}

/// One endpoint as it is now.
#[derive(Debug, Clone, Serialize, utoipa::ToSchema)]
pub struct EndpointStatus {
    /// As it is configured.
    pub name: String,
    /// Its address, without what is secret in it.
    pub url: String,
    /// Why it did not answer; none when it did.
    #[schema(value_type = Option<String>)]
    pub failure: Option<FailureKind>,
    /// The same, for a person.
    pub problem: Option<String>,
    /// Its models' names, at most 1,000.
    pub models: Vec<String>,
    /// How long the answer took, in milliseconds.
    #[schema(value_type = u64)]
    pub took_ms: u128,
}

impl Models {
    /// Asks all endpoints at once for their models. It takes ten seconds at most.
    pub async fn list(&self) -> Listing {
        let asking = self.endpoints().map(|endpoint| self.status(endpoint));
        let endpoints = futures::future::join_all(asking).await;
        let routes = self.config().routes.iter().map(|(name, candidates)| {
            let written = candidates.iter().map(|one| format!("{}/{}", one.endpoint, one.model));
            (name.clone(), written.collect())
        });
        Listing { endpoints, routes: routes.collect() }
    }

    async fn status(&self, endpoint: &Arc<Endpoint>) -> EndpointStatus {
        let started = Instant::now();
        let asked = timeout(PATIENCE, self.names(endpoint)).await.unwrap_or_else(|_| {
            let message = format!("no answer within {} s", PATIENCE.as_secs());
            Err(Failure::new(FailureKind::TimeoutFirstToken, message))
        });
        let took_ms = started.elapsed().as_millis();
        let failure = asked.as_ref().err().map(|failure| failure.kind);
        let problem = asked.as_ref().err().map(|failure| failure.message.clone());
        EndpointStatus {
            name: endpoint.name.clone(),
            url: endpoint.config.url.to_string(),
            failure,
            problem,
            models: asked.unwrap_or_default(),
            took_ms,
        }
    }

    async fn names(&self, endpoint: &Endpoint) -> Result<Vec<String>, Failure> {
        let wire = Wire::open(endpoint, self.keys(), self.clock(), None, false).await?;
        let listed = wire.client.models().list_byot::<Value>().await;
        let listed = listed.map_err(|err| wire.failure(&err))?;
        let Some(models) = listed["data"].as_array() else {
            return Err(Failure::new(FailureKind::Malformed, "the list of models has no `data`"));
        };
        let names = models.iter().filter_map(|model| model["id"].as_str());
        Ok(names.take(MAX_MODELS).map(|name| quote(name, MAX_NAME_BYTES)).collect())
    }
}
