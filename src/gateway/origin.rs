//! Where a request comes from: the Host and Origin headers.
//!
//! A server on loopback has one kind of stranger to fear: a page in the user's browser, whose name
//! resolves to 127.0.0.1 for the occasion (DNS rebinding) or which simply posts to localhost. The
//! first shows in Host, the second in Origin.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

use super::Gateway;
use super::error::ApiError;

/// What Host and Origin may be.
#[derive(Debug, Clone, Default)]
pub struct OriginPolicy {
    /// Whether the server listens on loopback only: then Host must be a loopback name or listed.
    pub loopback: bool,
    /// Names by which the server is reached, without ports. On an address that is not loopback an
    /// empty list accepts any.
    pub hosts: Vec<String>,
    /// Origins of pages that may call, as in the header: `https://console.example.org`.
    pub origins: Vec<String>,
}

impl OriginPolicy {
    fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), String> {
        let named = headers.get(header::HOST).and_then(|host| host.to_str().ok());
        let named = named.or_else(|| uri.authority().map(axum::http::uri::Authority::as_str));
        let Some(host) = named.and_then(host_name) else {
            return Err("the Host header is missing or malformed".to_owned());
        };
        if !self.accepts_host(&host) {
            return Err(format!(
                "this server is not reached as `{host}`: allow that host, or use localhost"
            ));
        }
        let Some(origin) = headers.get(header::ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        if self.accepts_origin(origin, &host) {
            return Ok(());
        }
        Err("pages of this origin may not call this server: allow the origin".to_owned())
    }

    fn accepts_host(&self, host: &str) -> bool {
        let listed = self.hosts.iter().any(|allowed| allowed.eq_ignore_ascii_case(host));
        listed || if self.loopback { is_loopback(host) } else { self.hosts.is_empty() }
    }

    /// An origin is fine when it is listed, or when the page was loaded from this very server.
    fn accepts_origin(&self, origin: &str, host: &str) -> bool {
        let listed = self.origins.iter().any(|allowed| allowed.eq_ignore_ascii_case(origin));
        let from = origin.split_once("://").and_then(|(_, rest)| host_name(rest));
        listed || from.is_some_and(|from| from == host || (self.loopback && is_loopback(&from)))
    }
}

/// Refuses a request whose Host or Origin is not one of ours.
pub(super) async fn check_origin(
    State(gateway): State<Gateway>,
    request: Request,
    next: Next,
) -> Response {
    match gateway.config().origin.check(request.uri(), request.headers()) {
        Ok(()) => next.run(request).await,
        Err(message) => {
            ApiError::new(StatusCode::FORBIDDEN, "wrong_origin", message).into_response()
        }
    }
}

/// The lower-cased name of `host[:port]`; brackets of an IPv6 address stay.
fn host_name(authority: &str) -> Option<String> {
    let (name, port) = if authority.starts_with('[') {
        let end = authority.find(']')? + 1;
        (authority.get(..end)?, authority.get(end..)?)
    } else {
        authority.split_at(authority.find(':').unwrap_or(authority.len()))
    };
    let good_port = port.is_empty()
        || port.strip_prefix(':').is_some_and(|digits| digits.parse::<u16>().is_ok());
    let word = |b: u8| b.is_ascii_alphanumeric() || b".-_[]:".contains(&b);
    (good_port && !name.is_empty() && name.bytes().all(word)).then(|| name.to_ascii_lowercase())
}

fn is_loopback(host: &str) -> bool {
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || bare.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(policy: &OriginPolicy, host: &str, origin: Option<&str>, expected: bool) {
        let mut headers = HeaderMap::new();
        headers.insert(header::HOST, host.parse().unwrap());
        if let Some(origin) = origin {
            headers.insert(header::ORIGIN, origin.parse().unwrap());
        }
        let found = policy.check(&Uri::from_static("/"), &headers);
        assert_eq!(found.is_ok(), expected, "{host} {origin:?}: {found:?}");
    }

    #[test]
    fn on_loopback_only_loopback_names_are_served() {
        let policy = OriginPolicy { loopback: true, ..OriginPolicy::default() };
        check(&policy, "localhost", None, true);
        check(&policy, "LOCALHOST:2024", None, true);
        check(&policy, "127.0.0.1:2024", None, true);
        check(&policy, "[::1]:2024", None, true);
        check(&policy, "evil.example", None, false);
        check(&policy, "localhost.evil.example:2024", None, false);
        check(&policy, "127.0.0.1.evil.example", None, false);
        check(&policy, "localhost:x", None, false);
        check(&policy, "", None, false);
    }

    #[test]
    fn a_foreign_page_is_refused_and_an_own_one_is_not() {
        let policy = OriginPolicy {
            loopback: true,
            hosts: vec!["box.lan".to_owned()],
            origins: vec!["https://console.example".to_owned()],
        };
        check(&policy, "localhost:2024", Some("http://localhost:2024"), true);
        check(&policy, "localhost:2024", Some("http://127.0.0.1:3000"), true);
        check(&policy, "box.lan", Some("http://box.lan"), true);
        check(&policy, "localhost", Some("https://console.example"), true);
        check(&policy, "localhost", Some("https://evil.example"), false);
        check(&policy, "localhost", Some("null"), false);
        check(&policy, "localhost", Some("https://console.example.evil"), false);
    }

    #[test]
    fn elsewhere_any_host_is_served_unless_some_are_listed() {
        let open = OriginPolicy::default();
        check(&open, "cynai.example", None, true);
        check(&open, "cynai.example", Some("https://cynai.example"), true);
        check(&open, "cynai.example", Some("https://evil.example"), false);
        let listed =
            OriginPolicy { hosts: vec!["cynai.example".to_owned()], ..OriginPolicy::default() };
        check(&listed, "cynai.example:443", None, true);
        check(&listed, "localhost", None, false);
    }
}
