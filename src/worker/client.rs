//! The caller's side of the Worker API.
//!
//! What matters to a caller is what it may conclude: [`ClientError::Busy`] and [`ClientError::Refused`]
//! say that nothing was accepted; after [`ClientError::Unreachable`] the job may or may not run, and
//! only asking again with the same id tells.
//!
//! **Invariant:** every request has a timeout that is longer than what the worker may take to answer.

use std::time::Duration;

use reqwest::{Method, RequestBuilder, Response, StatusCode};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::agent::{Capabilities, Problem};
use super::config::Token;
use super::wire::{
    Acknowledged, FinishedJobs, JobRequest, JobResult, JobStatus, StopAnswer, StopRequest, VERSION,
};
use crate::ids::JobId;

/// For answers that need no waiting: a sync of a worker's disk, at most.
const QUICK: Duration = Duration::from_secs(30);
/// What the network and the worker's start-up may add to a wait.
const SLACK: Duration = Duration::from_secs(60);
/// The largest answer that is read: a page of results.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// The problem of a worker whose trial sandboxes failed.
const NO_SANDBOX: &str = "urn:cynai:problem:sandbox-unavailable";

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The worker does not accept this request, and waiting would not change that.
    #[error("the worker refused the request: {}", problem.detail)]
    Refused { problem: Box<Problem> },
    /// Nothing was accepted; the same request may succeed later, or elsewhere.
    #[error("the worker cannot take the request now: {}", problem.detail)]
    Busy { problem: Box<Problem>, retry_after: Duration },
    /// No answer, or none that says what happened: the outcome is unknown.
    #[error("no usable answer from the worker: {reason}")]
    Unreachable {
        reason: String,
        #[source]
        source: Option<reqwest::Error>,
    },
    /// The token is not the worker's.
    #[error("the worker did not accept the token")]
    Unauthorized,
}

impl ClientError {
    /// Whether the worker certainly took nothing: there was no connection, or it did not know who asked.
    #[must_use]
    pub fn nothing_was_sent(&self) -> bool {
        match self {
            Self::Unauthorized | Self::Refused { .. } | Self::Busy { .. } => true,
            Self::Unreachable { source, .. } => {
                source.as_ref().is_some_and(|err| err.is_connect() || err.is_builder())
            }
        }
    }

    /// The problem document's type, without its prefix, when the worker sent one.
    #[must_use]
    pub fn problem_kind(&self) -> Option<&str> {
        match self {
            Self::Refused { problem } | Self::Busy { problem, .. } => {
                problem.kind.strip_prefix("urn:cynai:problem:")
            }
            Self::Unreachable { .. } | Self::Unauthorized => None,
        }
    }
}

/// Speaks to one worker.
#[derive(Debug, Clone)]
pub struct WorkerClient {
    pub base_url: String,
    pub token: Token,
    pub http: reqwest::Client,
}

impl WorkerClient {
    /// A client for the worker at `base_url`. `http` should follow no redirects: the token goes with it.
    #[must_use]
    pub fn new(base_url: impl Into<String>, token: Token, http: reqwest::Client) -> Self {
        let base_url = base_url.into().trim_end_matches('/').to_owned();
        Self { base_url, token, http }
    }

    /// Hands a job over. Safe to repeat: the same id with the same request never runs twice.
    pub async fn accept(&self, request: &JobRequest) -> Result<JobStatus, ClientError> {
        self.send(self.post("/v1/worker/jobs", request), QUICK).await
    }

    /// A job as it is now; `None` when the worker does not know it.
    pub async fn status(&self, job: JobId) -> Result<Option<JobStatus>, ClientError> {
        known(self.send(self.get(&format!("/v1/worker/jobs/{job}")), QUICK).await)
    }

    /// Results that were not acknowledged yet, oldest first; waits for the first one, at most a minute.
    pub async fn finished(
        &self,
        wait: Duration,
        limit: usize,
    ) -> Result<FinishedJobs, ClientError> {
        let wait = wait.min(Duration::from_secs(60));
        let query = format!("state=finished&wait={}&limit={limit}", wait.as_secs());
        self.send(self.get(&format!("/v1/worker/jobs?{query}")), wait + QUICK).await
    }

    /// Tells the worker that the result is stored. Safe to repeat; false when the worker has forgotten
    /// the job, which is as good.
    pub async fn acknowledge(&self, job: JobId) -> Result<bool, ClientError> {
        let request = self.request(Method::POST, &format!("/v1/worker/jobs/{job}/ack"));
        Ok(known::<Acknowledged>(self.send(request, QUICK).await)?.is_some())
    }

    /// Asks for the end of a job. Safe to repeat.
    pub async fn stop(
        &self,
        task_id: uuid::Uuid,
        job_id: JobId,
    ) -> Result<StopAnswer, ClientError> {
        let body = StopRequest { version: VERSION, task_id, job_id };
        self.send(self.post("/v1/worker/jobs:stop", &body), QUICK).await
    }

    /// Runs a job and waits for its result. `patience` must cover the queue and the job's own timeout.
    pub async fn run(
        &self,
        request: &JobRequest,
        patience: Duration,
    ) -> Result<JobResult, ClientError> {
        self.send(self.post("/v1/worker/jobs:run", request), patience + SLACK).await
    }

    /// What the worker offers and enforces.
    pub async fn capabilities(&self) -> Result<Capabilities, ClientError> {
        self.send(self.get("/v1/worker/capabilities"), QUICK + SLACK).await
    }

    fn get(&self, path: &str) -> RequestBuilder {
        self.request(Method::GET, path)
    }

    fn post(&self, path: &str, body: &impl Serialize) -> RequestBuilder {
        self.request(Method::POST, path).json(body)
    }

    fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.http
            .request(method, format!("{}{path}", self.base_url))
            .bearer_auth(self.token.expose())
    }

    async fn send<T: DeserializeOwned>(
        &self,
        request: RequestBuilder,
        patience: Duration,
    ) -> Result<T, ClientError> {
        let response = request.timeout(patience).send().await.map_err(transport)?;
        let status = response.status();
        let body = read(response).await?;
        if status.is_success() {
            return serde_json::from_slice(&body)
                .map_err(|err| unusable(format!("bad answer: {err}")));
        }
        Err(refusal(status, &body))
    }
}

/// The worker's 404 for a job is an answer.
fn known<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match answer {
        Err(err) if err.problem_kind() == Some("unknown-job") => Ok(None),
        other => other.map(Some),
    }
}

async fn read(mut response: Response) -> Result<Vec<u8>, ClientError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(transport)? {
        if body.len() + chunk.len() > MAX_ANSWER_BYTES {
            return Err(unusable(format!("the answer is over {MAX_ANSWER_BYTES} bytes")));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn refusal(status: StatusCode, body: &[u8]) -> ClientError {
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return ClientError::Unauthorized;
    }
    let Ok(problem) = serde_json::from_slice::<Problem>(body) else {
        return unusable(format!("status {status} without a problem document"));
    };
    let problem = Box::new(problem);
    match status {
        // A person has to repair the machine: a job that waited for that would wait in silence.
        StatusCode::SERVICE_UNAVAILABLE if problem.kind == NO_SANDBOX => {
            ClientError::Refused { problem }
        }
        StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
            let retry_after = Duration::from_secs(problem.retry_after.unwrap_or(5));
            ClientError::Busy { problem, retry_after }
        }
        status if status.is_client_error() => ClientError::Refused { problem },
        _ => unusable(format!("status {status}: {}", problem.detail)),
    }
}

fn transport(err: reqwest::Error) -> ClientError {
    // Without the URL: it may be logged.
    let err = err.without_url();
    ClientError::Unreachable { reason: err.to_string(), source: Some(err) }
}

fn unusable(reason: String) -> ClientError {
    ClientError::Unreachable { reason, source: None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(status: u16, body: &str, expected: &str) {
        let found = refusal(StatusCode::from_u16(status).unwrap(), body.as_bytes());
        let name = match found {
            ClientError::Refused { .. } => "refused".to_owned(),
            ClientError::Busy { retry_after, .. } => format!("busy {}", retry_after.as_secs()),
            ClientError::Unreachable { .. } => "unknown".to_owned(),
            ClientError::Unauthorized => "unauthorized".to_owned(),
        };
        assert_eq!(name, expected, "{status} {body}");
    }

    #[test]
    fn a_caller_learns_whether_anything_was_accepted() {
        let problem = |status: u16, more: &str| {
            format!(
                r#"{{"type":"urn:cynai:problem:x","title":"X","status":{status},"detail":"d"{more}}}"#
            )
        };
        check(400, &problem(400, ""), "refused");
        check(409, &problem(409, ""), "refused");
        check(413, &problem(413, ""), "refused");
        check(429, &problem(429, r#","retry_after":7"#), "busy 7");
        check(503, &problem(503, ""), "busy 5");
        check(500, &problem(500, ""), "unknown");
        check(400, "<html>", "unknown");
        let broken = problem(503, "").replace("problem:x", "problem:sandbox-unavailable");
        check(503, &broken, "refused");
        check(503, "", "unknown");
        check(401, "", "unauthorized");
    }
}
