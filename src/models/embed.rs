//! Embeddings: texts as vectors.
//!
//! All vectors of one call come from one candidate: those of two models cannot be compared. For the same
//! reason a route for embeddings should list the same model at several endpoints, or one endpoint.

use std::time::Duration;

use futures::{StreamExt, TryStreamExt};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use super::answer::{Attempt, Usage};
use super::calls::{self, Operation, Target, time_is_up};
use super::exchange::Wire;
use super::failure::{Failure, FailureKind, ModelError};
use super::redact::quote;
use super::request::{counted, idempotency};
use super::{Models, metrics};

/// Texts of one call.
const MAX_TEXTS: usize = 2048;
/// One text.
const MAX_TEXT_BYTES: usize = 256 << 10;
/// All texts together.
const MAX_TOTAL_BYTES: usize = 16 << 20;
/// Texts of one request: so many large vectors fit into the usual `max_answer`.
const BATCH: usize = 32;
/// Requests of one call at once.
const PARALLEL: usize = 4;
const MAX_DIMENSIONS: u32 = 65_536;
/// Of a model, as the endpoint calls it.
const MAX_NAME_BYTES: usize = 256;

/// Texts that are to become vectors.
#[derive(Debug, Clone, Default)]
pub struct EmbedRequest {
    /// A route's name, or `ENDPOINT/MODEL`.
    pub model: String,
    /// 1 to 2,048 texts, none of them empty.
    pub texts: Vec<String>,
    /// Shorter vectors, where the model can.
    pub dimensions: Option<u32>,
    /// Names the effect: sent as `Idempotency-Key`, with the number of the batch.
    pub idempotency_key: Option<String>,
    /// For the whole call; none leaves it to the endpoints' own `total`.
    pub timeout: Option<Duration>,
}

/// Vectors, in the order of their texts.
#[derive(Debug, Clone)]
pub struct Embeddings {
    /// One for each text, all of the same length.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens and cost.
    pub usage: Usage,
    /// The model, as the endpoint calls it: what the vectors may be compared with.
    pub model: String,
    /// The endpoint that answered.
    pub endpoint: String,
    /// What was tried, in order.
    pub attempts: Vec<Attempt>,
}

impl Models {
    /// Asks for the vectors of texts.
    pub async fn embed(&self, request: &EmbedRequest) -> Result<Embeddings, ModelError> {
        request.check()?;
        let targets = self.targets(&request.model)?;
        let mut embed = Embed { models: self, request };
        let outcome = Box::pin(calls::run(&targets, request.timeout, &mut embed)).await;
        let failed = |failure| ModelError::Failed {
            model: super::named(&request.model).to_owned(),
            failure,
            attempts: outcome.attempts.clone(),
        };
        let (vectors, usage, model, endpoint) = outcome.result.map_err(failed)?;
        Ok(Embeddings { vectors, usage, model, endpoint, attempts: outcome.attempts })
    }
}

impl EmbedRequest {
    fn check(&self) -> Result<(), ModelError> {
        counted("texts", self.texts.len(), 1, MAX_TEXTS)?;
        for (at, text) in self.texts.iter().enumerate() {
            counted(&format!("texts[{at}] (bytes)"), text.len(), 1, MAX_TEXT_BYTES)?;
        }
        let total = self.texts.iter().map(String::len).sum();
        counted("texts (bytes together)", total, 1, MAX_TOTAL_BYTES)?;
        if let Some(dimensions) = self.dimensions {
            let dimensions = usize::try_from(dimensions).unwrap_or(usize::MAX);
            counted("dimensions", dimensions, 1, MAX_DIMENSIONS as usize)?;
        }
        idempotency(self.idempotency_key.as_deref())
    }
}

struct Embed<'a> {
    models: &'a Models,
    request: &'a EmbedRequest,
}

impl Operation for Embed<'_> {
    type Output = (Vec<Vec<f32>>, Usage, String, String);

    async fn attempt(&mut self, target: &Target, until: Instant) -> Result<Self::Output, Failure> {
        let this = &*self;
        let batches = this.request.texts.chunks(BATCH).enumerate().map(|(at, texts)| {
            let asking = this.batch(target, at, texts);
            async move { timeout_at(until, asking).await.map_err(|_| time_is_up())? }
        });
        // Boxed one by one: the compiler cannot see through the closure's lifetimes otherwise.
        let batches: Vec<_> = batches.map(futures::FutureExt::boxed).collect();
        let mut answered = futures::stream::iter(batches).buffered(PARALLEL);
        let mut vectors: Vec<Vec<f32>> = Vec::with_capacity(this.request.texts.len());
        let mut usage = Usage::default();
        let mut model = None;
        while let Some((part, used, named)) = answered.try_next().await? {
            vectors.extend(part);
            usage += used;
            model = model.or(named);
        }
        let length = vectors.first().map_or(0, Vec::len);
        if vectors.iter().any(|vector| vector.len() != length) {
            return Err(malformed("vectors of different lengths"));
        }
        let usage = usage.priced(target.endpoint.config.price.as_ref());
        metrics::tokens(&target.endpoint.name, &usage);
        let model = model.unwrap_or_else(|| target.model.clone());
        Ok((vectors, usage, model, target.endpoint.name.clone()))
    }
}

#[derive(Deserialize)]
struct Answer {
    data: Vec<Item>,
    #[serde(default)]
    model: Option<String>,
    #[serde(default)]
    usage: Option<Value>,
}

#[derive(Deserialize)]
struct Item {
    #[serde(default)]
    index: Option<usize>,
    embedding: Vec<f32>,
}

impl Embed<'_> {
    async fn batch(
        &self,
        target: &Target,
        at: usize,
        texts: &[String],
    ) -> Result<(Vec<Vec<f32>>, Usage, Option<String>), Failure> {
        let key = self.request.idempotency_key.as_ref().map(|key| format!("{key}.{at}"));
        let (keys, clock) = (self.models.keys(), self.models.clock());
        let wire = Wire::open(&target.endpoint, keys, clock, key.as_deref(), false).await?;
        let mut body = json!({ "model": target.model, "input": texts });
        if let Some(dimensions) = self.request.dimensions {
            body["dimensions"] = dimensions.into();
        }
        let embeddings = wire.client.embeddings();
        let answer = embeddings.create_byot::<Value, Value>(body).await;
        let answer = answer.map_err(|err| wire.failure(&err))?;
        if let Some(error) = answer.get("error").filter(|error| !error.is_null()) {
            return Err(super::refusal::of_error(error, &wire.redactor));
        }
        let answer = Answer::deserialize(answer)
            .map_err(|err| malformed(&wire.redactor.clean(&err.to_string())))?;
        let usage = Usage::read(answer.usage.as_ref());
        let model = answer.model.map(|model| quote(&model, MAX_NAME_BYTES));
        Ok((ordered(answer.data, texts.len())?, usage, model))
    }
}

/// The vectors by their indexes; an answer without indexes is in order.
fn ordered(items: Vec<Item>, count: usize) -> Result<Vec<Vec<f32>>, Failure> {
    if items.len() != count {
        return Err(malformed(&format!("{} vectors for {count} texts", items.len())));
    }
    let mut vectors: Vec<Vec<f32>> = vec![Vec::new(); count];
    for (at, item) in items.into_iter().enumerate() {
        if item.embedding.is_empty() || !item.embedding.iter().all(|number| number.is_finite()) {
            return Err(malformed("a vector is empty, or has a number that is none"));
        }
        match vectors.get_mut(item.index.unwrap_or(at)) {
            Some(place) if place.is_empty() => *place = item.embedding,
            _ => return Err(malformed("the indexes are not those of the texts")),
        }
    }
    Ok(vectors)
}

fn malformed(what: &str) -> Failure {
    Failure::new(
        FailureKind::Malformed,
        format!("the answer is not as the protocol wants it: {what}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_are_matched_with_their_texts() {
        let item = |index, first: f32| Item { index, embedding: vec![first, 1.0] };
        let found = ordered(vec![item(Some(1), 5.0), item(Some(0), 4.0)], 2).unwrap();
        assert_eq!(found, [[4.0, 1.0], [5.0, 1.0]]);
        assert_eq!(ordered(vec![item(None, 4.0)], 1).unwrap(), [[4.0, 1.0]]);
        for wrong in [
            vec![item(Some(0), 1.0)],
            vec![item(Some(0), 1.0), item(Some(0), 1.0)],
            vec![item(Some(0), 1.0), item(Some(2), 1.0)],
            vec![item(Some(0), 1.0), item(Some(1), f32::NAN)],
        ] {
            assert_eq!(ordered(wrong, 2).unwrap_err().kind, FailureKind::Malformed);
        }
    }
}
