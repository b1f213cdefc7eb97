//! Errors of the Worker API as problem documents (RFC 9457).
//!
//! **Invariant:** a problem carries nothing of a request but ids and the names of its fields; what went
//! wrong inside the worker stays in its log.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::{Deserialize, Serialize};

use crate::worker::jobs::JobsError;
use crate::worker::wire::InvalidRequest;

/// The media type of problem documents.
const MEDIA_TYPE: &str = "application/problem+json";

/// A problem document. `kind` is the last part of its `type`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// A stable name, `urn:cynai:problem:...`.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    pub status: u16,
    pub detail: String,
    /// The id of the request.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<String>,
    /// Seconds after which the same request may succeed; also in the `Retry-After` header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retry_after: Option<u64>,
}

impl Problem {
    pub(super) fn new(status: StatusCode, kind: &str, detail: impl Into<String>) -> Self {
        let mut title = kind.replace('-', " ");
        if let Some(first) = title.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        Self {
            kind: format!("urn:cynai:problem:{kind}"),
            title,
            status: status.as_u16(),
            detail: detail.into(),
            instance: None,
            retry_after: None,
        }
    }

    pub(super) fn retry_after(self, seconds: u64) -> Self {
        Self { retry_after: Some(seconds), ..self }
    }

    pub(super) fn invalid(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid-request", detail)
    }
}

impl From<InvalidRequest> for Problem {
    fn from(err: InvalidRequest) -> Self {
        let kind = match err {
            InvalidRequest::UnsupportedVersion { .. } => "unsupported-payload-version",
            InvalidRequest::UnknownImage { .. } => "unknown-image",
            InvalidRequest::ImageNotAllowed { .. } => "image-not-allowed",
            InvalidRequest::UnknownMount { .. } => "unknown-mount",
            _ => "invalid-request",
        };
        Self::new(StatusCode::BAD_REQUEST, kind, err.to_string())
    }
}

impl From<JobsError> for Problem {
    fn from(err: JobsError) -> Self {
        let text = err.to_string();
        match err {
            JobsError::Conflict { .. } => Self::new(StatusCode::CONFLICT, "job-conflict", text),
            JobsError::Unknown { .. } => Self::new(StatusCode::NOT_FOUND, "unknown-job", text),
            JobsError::NotFinished { .. } => {
                Self::new(StatusCode::CONFLICT, "job-not-finished", text)
            }
            JobsError::Full { retry_after, .. } => {
                let seconds = retry_after.as_secs().max(1);
                Self::new(StatusCode::TOO_MANY_REQUESTS, "worker-full", text).retry_after(seconds)
            }
            JobsError::ShuttingDown => {
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "shutting-down", text).retry_after(5)
            }
            JobsError::Disk(err) => {
                tracing::error!(
                    error = &err as &dyn std::error::Error,
                    "the state directory failed"
                );
                let detail = "the worker could not use its state directory";
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "worker-fault", detail)
            }
        }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::to_vec(&self).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
        if let Some(seconds) = self.retry_after {
            headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // The outer layer adds the request's id.
        response.extensions_mut().insert(self);
        response
    }
}
