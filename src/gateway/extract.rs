//! What handlers take out of a request, with errors in this API's own form.

use axum::body::Bytes;
use axum::extract::rejection::PathRejection;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use serde::de::DeserializeOwned;

use super::error::{ApiError, too_large};
use crate::services::api::Actor;

/// Who asks; put there by the authentication.
#[derive(Debug, Clone)]
pub(super) struct Caller(pub(super) Actor);

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

/// Ids in the path.
#[derive(Debug)]
pub(super) struct Ids<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Ids<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Path::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Path(ids)) => Ok(Self(ids)),
            Err(PathRejection::FailedToDeserializePathParams(err)) => {
                Err(ApiError::invalid(format!("the path is not right: {}", err.body_text())))
            }
            Err(_) => Err(ApiError::internal()),
        }
    }
}

/// The JSON body. No body at all is an empty object: every field of some requests is optional.
#[derive(Debug)]
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = Bytes::from_request(request, state).await.map_err(|rejection| {
            if rejection.status() == axum::http::StatusCode::PAYLOAD_TOO_LARGE {
                too_large("the request's body is over this server's limit")
            } else {
                ApiError::new(
                    rejection.status(),
                    "bad_request",
                    "the request's body could not be read",
                )
            }
        })?;
        let bytes = if bytes.is_empty() { &b"{}"[..] } else { &bytes };
        parse(bytes).map(Self)
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    serde_json::from_slice(bytes).map_err(|err| {
        if err.is_data() {
            ApiError::invalid(format!("the body is not what is expected here: {err}"))
        } else {
            ApiError::invalid(format!("Invalid JSON: {err}"))
        }
    })
}

/// The query's parameters in order, repeated ones included. Unknown ones are ignored.
#[derive(Debug)]
pub(super) struct Params(Vec<(String, String)>);

impl<S: Send + Sync> FromRequestParts<S> for Params {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let query = axum::extract::Query::<Vec<(String, String)>>::from_request_parts(parts, state);
        match query.await {
            Ok(axum::extract::Query(pairs)) => Ok(Self(pairs)),
            Err(err) => {
                Err(ApiError::invalid(format!("the query is not right: {}", err.body_text())))
            }
        }
    }
}

impl Params {
    /// The last parameter of this name.
    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().rev().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// All parameters of this name; a value may also be a list, separated by commas or as JSON: clients write all
    /// three.
    pub(super) fn all(&self, name: &str) -> Vec<String> {
        let values = self.0.iter().filter(|(key, _)| key == name);
        let words =
            values.flat_map(|(_, value)| match serde_json::from_str::<Vec<String>>(value) {
                Ok(words) => words,
                Err(_) => value.split(',').map(str::to_owned).collect(),
            });
        words.filter(|word| !word.is_empty()).collect()
    }

    /// A switch, in any of the four spellings that clients use; absent is off.
    pub(super) fn flag(&self, name: &str) -> Result<bool, ApiError> {
        match self.get(name) {
            None | Some("0" | "false" | "False") => Ok(false),
            Some("1" | "true" | "True") => Ok(true),
            Some(_) => Err(ApiError::invalid_at(
                format!("/query/{name}"),
                format!("`{name}` must be true, false, 1 or 0"),
            )),
        }
    }

    /// A value that is read from text; `expected` says what is right.
    pub(super) fn parsed<T>(
        &self,
        name: &str,
        expected: &str,
        read: impl Fn(&str) -> Option<T>,
    ) -> Result<Option<T>, ApiError> {
        let Some(text) = self.get(name).filter(|text| !text.is_empty()) else { return Ok(None) };
        let wrong = || {
            ApiError::invalid_at(format!("/query/{name}"), format!("`{name}` must be {expected}"))
        };
        read(text).ok_or_else(wrong).map(Some)
    }

    /// A number, or `default` when absent.
    pub(super) fn number(&self, name: &str, default: u32) -> Result<u32, ApiError> {
        let found = self.parsed(name, "a number that is not negative", |text| text.parse().ok())?;
        Ok(found.unwrap_or(default))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(pairs: &[(&str, &str)]) -> Params {
        Params(pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
    }

    #[test]
    fn all_four_spellings_of_a_switch_are_understood() {
        fn check(input: &str, expected: Option<bool>) {
            assert_eq!(params(&[("wait", input)]).flag("wait").ok(), expected, "{input}");
        }
        check("1", Some(true));
        check("true", Some(true));
        check("0", Some(false));
        check("false", Some(false));
        check("yes", None);
        assert_eq!(params(&[]).flag("wait").ok(), Some(false));
    }

    #[test]
    fn repeated_and_comma_separated_values_are_collected() {
        let params = params(&[("m", "a,b"), ("x", "y"), ("m", "c"), ("j", r#"["d", "e"]"#)]);
        assert_eq!(params.all("m"), ["a", "b", "c"]);
        assert_eq!(params.all("j"), ["d", "e"]);
        assert_eq!(params.get("m"), Some("c"));
        assert!(params.all("none").is_empty());
    }

    #[test]
    fn a_number_that_is_none_is_refused() {
        assert!(params(&[("limit", "-1")]).number("limit", 10).is_err());
        assert!(params(&[("limit", "9999999999")]).number("limit", 10).is_err());
        assert_eq!(params(&[]).number("limit", 10).unwrap(), 10);
    }
}
