//! Who asks: a bearer token, in `Authorization` or in the header that LangGraph's clients use.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Gateway;
use super::error::{ApiError, unauthorized};
use super::extract::Caller;

/// Lets a request pass with its [`Caller`], or refuses it.
pub(super) async fn authenticate(
    State(gateway): State<Gateway>,
    mut request: Request,
    next: Next,
) -> Response {
    let Some(token) = token(request.headers()) else {
        return unauthorized(
            "a token is needed: send `Authorization: Bearer TOKEN` or `x-api-key: TOKEN`",
        )
        .into_response();
    };
    match gateway.services().authenticate(token).await {
        Ok(actor) => {
            request.extensions_mut().insert(Caller(actor));
            next.run(request).await
        }
        Err(err) => ApiError::from(err).into_response(),
    }
}

/// The token that a request carries. A bearer token wins over an API key: it is the one set by hand.
fn token(headers: &HeaderMap) -> Option<&str> {
    bearer(headers).or_else(|| headers.get("x-api-key").and_then(|value| value.to_str().ok()))
}

/// The bearer token that a request carries.
pub(super) fn bearer(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pairs: &[(&'static str, &'static str)], expected: Option<&str>) {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.insert(*name, value.parse().unwrap());
        }
        assert_eq!(token(&headers), expected);
    }

    #[test]
    fn a_token_is_found_in_either_header() {
        check(&[], None);
        check(&[("authorization", "Bearer a")], Some("a"));
        check(&[("authorization", "bearer  a ")], Some("a"));
        check(&[("x-api-key", "b")], Some("b"));
        check(&[("authorization", "Bearer a"), ("x-api-key", "b")], Some("a"));
        check(&[("authorization", "Basic a")], None);
        check(&[("authorization", "Basic a"), ("x-api-key", "b")], Some("b"));
    }
}
