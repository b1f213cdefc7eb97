//! Errors on the wire: one JSON body for all of them, which the clients of both protocols read.
//!
//! **Invariant:** the body of a 5xx never carries a cause; the log does, once, under the request's id.

use std::error::Error;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::services::error::ServiceError;
use crate::tools::error::{ToolError, ToolErrorKind};

/// What went wrong, for a client.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub(super) struct ErrorBody {
    /// A sentence for a person.
    pub(super) detail: String,
    /// The same; other clients read this key.
    pub(super) message: String,
    /// A word for a program: `not_found`, `invalid`, ...
    pub(super) code: String,
    /// `path`: JSON Pointer to the value to blame; `request_id`: what to look for in the logs.
    pub(super) metadata: ErrorMetadata,
}

/// What helps to find the cause.
#[derive(Debug, Clone, Default, Serialize, ToSchema)]
pub(super) struct ErrorMetadata {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) path: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) request_id: Option<String>,
    /// Of a call to a tool: `not_sent`, `unknown` or `answered`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outcome: Option<String>,
}

/// An error on its way to a client.
#[derive(Debug)]
pub(super) struct ApiError {
    status: StatusCode,
    code: &'static str,
    message: String,
    path: Option<String>,
    outcome: Option<&'static str>,
    extra: Extra,
}

/// A header that goes with an error.
#[derive(Debug, Clone, Copy)]
enum Extra {
    None,
    /// How to prove who asks.
    Authenticate,
    /// After how many seconds trying again makes sense.
    RetryAfter(u64),
}

impl ApiError {
    /// An error without a service behind it.
    pub(super) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            code,
            message: message.into(),
            path: None,
            outcome: None,
            extra: Extra::None,
        }
    }

    /// A request that is understood and breaks a rule.
    pub(super) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid", message)
    }

    /// As [`Self::invalid`], with the value to blame.
    pub(super) fn invalid_at(path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { path: Some(path.into()), ..Self::invalid(message) }
    }

    /// A defect.
    pub(super) fn internal() -> Self {
        let message =
            "something went wrong on the server; its log tells more under the request's id";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
    }

    fn with(self, extra: Extra) -> Self {
        Self { extra, ..self }
    }

    /// The word for a program.
    pub(super) fn code(&self) -> &'static str {
        self.code
    }

    /// The sentence for a person.
    pub(super) fn message(&self) -> &str {
        &self.message
    }

    /// The body.
    pub(super) fn body(&self, request_id: Option<String>) -> ErrorBody {
        ErrorBody {
            detail: self.message.clone(),
            message: self.message.clone(),
            code: self.code.to_owned(),
            metadata: ErrorMetadata {
                path: self.path.clone(),
                request_id,
                outcome: self.outcome.map(str::to_owned),
            },
        }
    }
}

impl From<ServiceError> for ApiError {
    fn from(err: ServiceError) -> Self {
        let message = err.to_string();
        match err {
            ServiceError::NotFound { .. } => Self::new(StatusCode::NOT_FOUND, "not_found", message),
            ServiceError::Invalid { path, .. } => Self { path, ..Self::invalid(message) },
            ServiceError::BadRequest(_) => {
                Self::new(StatusCode::BAD_REQUEST, "bad_request", message)
            }
            ServiceError::UnsupportedVersion(_) => {
                Self::new(StatusCode::BAD_REQUEST, "unsupported_payload_version", message)
            }
            ServiceError::Conflict(_) => Self::new(StatusCode::CONFLICT, "conflict", message),
            ServiceError::TooLarge(_) => too_large(message),
            ServiceError::TooMany { retry_after, .. } => {
                let seconds = retry_after.as_secs().max(1);
                Self::new(StatusCode::TOO_MANY_REQUESTS, "too_many", message)
                    .with(Extra::RetryAfter(seconds))
            }
            ServiceError::Unauthorized(_) => unauthorized(message),
            ServiceError::Forbidden(_) => Self::new(StatusCode::FORBIDDEN, "forbidden", message),
            ServiceError::Unavailable { .. } => {
                tracing::warn!(error = chain(&err), "a request needs what cannot be reached now");
                Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
                    .with(Extra::RetryAfter(1))
            }
            ServiceError::Tool(err) => tool_error(err),
            ServiceError::Internal(_) => {
                tracing::error!(error = chain(&err), "a request failed");
                Self::internal()
            }
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body(None))).into_response();
        let headers = response.headers_mut();
        match self.extra {
            Extra::None => {}
            Extra::Authenticate => {
                let how = HeaderValue::from_static("Bearer realm=\"cynai\"");
                headers.insert(header::WWW_AUTHENTICATE, how);
            }
            Extra::RetryAfter(seconds) => {
                headers.insert(header::RETRY_AFTER, seconds.into());
            }
        }
        response
    }
}

/// The error of a caller who did not prove who it is.
pub(super) fn unauthorized(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", message).with(Extra::Authenticate)
}

/// The error of something over its size.
pub(super) fn too_large(message: impl Into<String>) -> ApiError {
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
}

/// The error of a call to a tool: the server's own failure is a bad gateway's.
fn tool_error(err: ToolError) -> ApiError {
    use ToolErrorKind as Kind;
    let status = match err.kind {
        Kind::UnknownServer | Kind::UnknownTool => StatusCode::NOT_FOUND,
        Kind::NotAllowed => StatusCode::FORBIDDEN,
        Kind::Changed => StatusCode::CONFLICT,
        Kind::InvalidArguments => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::Busy => StatusCode::TOO_MANY_REQUESTS,
        Kind::Unavailable | Kind::LoginRequired | Kind::Misconfigured | Kind::Closing => {
            StatusCode::SERVICE_UNAVAILABLE
        }
        Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Kind::ServerDied
        | Kind::Refused
        | Kind::InputRequired
        | Kind::TooLarge
        | Kind::InvalidOutput
        | Kind::Protocol => StatusCode::BAD_GATEWAY,
    };
    let code = match err.kind {
        Kind::UnknownServer | Kind::UnknownTool => "not_found",
        kind => kind.as_str(),
    };
    let again = err.retry_after.map(|after| Extra::RetryAfter(after.as_secs().max(1)));
    let outcome = Some(err.outcome.as_str());
    let plain = ApiError::new(status, code, err.message);
    ApiError { path: err.path, outcome, extra: again.unwrap_or(Extra::None), ..plain }
}

/// An error with its causes, on one line.
pub(super) fn chain(err: &dyn Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(err: ServiceError, status: u16, code: &str) {
        let found = ApiError::from(err);
        assert_eq!((found.status.as_u16(), found.code), (status, code));
    }

    #[test]
    fn every_situation_has_its_status() {
        check(ServiceError::not_found("run", 1), 404, "not_found");
        check(ServiceError::invalid("x"), 422, "invalid");
        check(ServiceError::BadRequest(String::new()), 400, "bad_request");
        check(ServiceError::Conflict(String::new()), 409, "conflict");
        check(ServiceError::TooLarge(String::new()), 413, "too_large");
        let retry_after = std::time::Duration::from_millis(1);
        check(ServiceError::TooMany { message: String::new(), retry_after }, 429, "too_many");
        check(ServiceError::Unauthorized(String::new()), 401, "unauthorized");
        check(ServiceError::Forbidden(String::new()), 403, "forbidden");
        check(ServiceError::unavailable("x"), 503, "unavailable");
        check(ServiceError::internal("the secret cause"), 500, "internal");
    }

    #[test]
    fn a_defects_cause_stays_on_the_server() {
        let body = ApiError::from(ServiceError::internal("the secret cause")).body(None);
        assert!(!serde_json::to_string(&body).unwrap().contains("secret"));
        let err = ServiceError::internal("the secret cause");
        assert_eq!(chain(&err), "internal error: the secret cause");
    }
}
