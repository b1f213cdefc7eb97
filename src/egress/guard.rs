//! The HTTP client for addresses that somebody else chooses.
//!
//! A name is resolved once, by our own resolver, which hands on only addresses that pass; the connection goes
//! to one of these. So a name that changes its meaning between the check and the connection gains nothing. The
//! HTTP library does not ask a resolver about addresses that are written into a URL, so these are checked when a
//! request is made and at each redirect.
//!
//! **Invariant:** no proxy of the environment, no cookie, no compression, and every wait ends.

use std::error::Error;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use url::Url;

use super::address::{Allowed, Refusal};

/// Redirects that are followed, where any are.
pub const MAX_REDIRECTS: usize = 3;
/// Addresses of one name that are looked at.
const MAX_ADDRESSES: usize = 64;

/// How names become addresses.
pub trait Lookup: Send + Sync {
    /// The addresses of `host`.
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>>;
}

/// The system's own resolver.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemLookup;

impl Lookup for SystemLookup {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>> {
        async move {
            let found = tokio::net::lookup_host((host, 0)).await?;
            Ok(found.take(MAX_ADDRESSES).map(|address| address.ip()).collect())
        }
        .boxed()
    }
}

/// What is done about a redirect.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Redirects {
    /// It is the answer: nothing is followed.
    #[default]
    None,
    /// At most [`MAX_REDIRECTS`] are followed, each checked as the first address was. Headers other than
    /// `Authorization` and `Cookie` go along, so not for requests that carry a key in one of their own.
    Checked,
}

/// Bounds of a client's requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// From the name to the end of the TLS handshake.
    pub connect: Duration,
    /// Between two bytes of an answer.
    pub idle: Duration,
    /// For the whole, answer included; `None` is no bound of its own.
    pub total: Option<Duration>,
    /// What is done about redirects.
    pub redirects: Redirects,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            idle: Duration::from_secs(30),
            total: Some(Duration::from_secs(60)),
            redirects: Redirects::None,
        }
    }
}

/// Why a request came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// It goes to an address that is not allowed. Nothing was sent there.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The client could not be made.
    #[error("no HTTP client could be made")]
    Client(#[source] reqwest::Error),
    /// No connection.
    #[error("no connection to {host}: {reason}")]
    Connect {
        /// The host, as it was named.
        host: String,
        /// What the system says.
        reason: String,
    },
    /// It took too long.
    #[error("{host} took longer than it may")]
    Timeout {
        /// The host.
        host: String,
    },
    /// The connection broke, or what came is no HTTP.
    #[error("the connection to {host} broke: {reason}")]
    Broken {
        /// The host.
        host: String,
        /// What the library says.
        reason: String,
    },
    /// The answer is longer than it may be.
    #[error("the answer of {host} has more than {limit} bytes")]
    TooLarge {
        /// The host.
        host: String,
        /// How many are read.
        limit: usize,
    },
}

/// Makes clients that go only where they may. Cheap to clone.
#[derive(Clone)]
pub struct Guard {
    allowed: Arc<Allowed>,
    lookup: Arc<dyn Lookup>,
}

impl std::fmt::Debug for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Guard").field("allowed", &self.allowed).finish_non_exhaustive()
    }
}

impl Default for Guard {
    fn default() -> Self {
        Self::new(Allowed::default())
    }
}

impl Guard {
    /// Public addresses, and what `allowed` says.
    #[must_use]
    pub fn new(allowed: Allowed) -> Self {
        Self::with_lookup(allowed, Arc::new(SystemLookup))
    }

    /// The same, with names resolved by `lookup`.
    #[must_use]
    pub fn with_lookup(allowed: Allowed, lookup: Arc<dyn Lookup>) -> Self {
        Self { allowed: Arc::new(allowed), lookup }
    }

    /// What is allowed beside public addresses.
    #[must_use]
    pub fn allowed(&self) -> &Allowed {
        &self.allowed
    }

    /// Checks what can be told of a URL before its name is resolved. Every URL must pass here before a client of
    /// [`Guard::builder`] gets it: the library does not ask the resolver about addresses that are written out.
    ///
    /// # Errors
    /// It is refused.
    pub fn check(&self, url: &Url) -> Result<(), Refusal> {
        self.allowed.check_url(url)
    }

    /// A client with these bounds, to be built as it is or with more settings.
    pub fn builder(&self, bounds: &Bounds) -> reqwest::ClientBuilder {
        let mut builder = reqwest::Client::builder()
            .no_proxy()
            .referer(false)
            .dns_resolver(Resolver(self.clone()))
            .connect_timeout(bounds.connect)
            .read_timeout(bounds.idle)
            .pool_max_idle_per_host(4)
            .pool_idle_timeout(Duration::from_secs(30))
            .redirect(self.redirects(bounds.redirects))
            .user_agent(concat!("cynai/", env!("CARGO_PKG_VERSION")));
        if let Some(total) = bounds.total {
            builder = builder.timeout(total);
        }
        builder
    }

    /// [`Guard::builder`], built.
    ///
    /// # Errors
    /// The library could not make it.
    pub fn client(&self, bounds: &Bounds) -> Result<reqwest::Client, EgressError> {
        self.builder(bounds).build().map_err(EgressError::Client)
    }

    fn redirects(&self, redirects: Redirects) -> Policy {
        if redirects == Redirects::None {
            return Policy::none();
        }
        let allowed = Arc::clone(&self.allowed);
        Policy::custom(move |attempt| {
            match check_hop(&allowed, attempt.previous(), attempt.url()) {
                Ok(()) => attempt.follow(),
                Err(refusal) => attempt.error(refusal),
            }
        })
    }
}

/// Checks a redirect; `previous` is where the request has been, its beginning first.
fn check_hop(allowed: &Allowed, previous: &[Url], next: &Url) -> Result<(), Refusal> {
    if previous.len() > MAX_REDIRECTS {
        return Err(Refusal::TooManyRedirects(MAX_REDIRECTS));
    }
    let secure = previous.last().is_some_and(|last| last.scheme() == "https");
    if secure && next.scheme() != "https" {
        return Err(Refusal::Downgrade);
    }
    allowed.check_url(next)
}

/// Sends a request that was made with a client of `guard`.
///
/// # Errors
/// See [`EgressError`]; an answer with any status is no error.
pub async fn send(
    guard: &Guard,
    client: &reqwest::Client,
    request: reqwest::Request,
) -> Result<reqwest::Response, EgressError> {
    guard.check(request.url())?;
    let host = request.url().host_str().unwrap_or_default().to_owned();
    client.execute(request).await.map_err(|err| explain(&host, &err))
}

/// Reads an answer of at most `limit` bytes.
///
/// # Errors
/// It is longer, or does not come.
pub async fn read_limited(
    mut response: reqwest::Response,
    limit: usize,
) -> Result<bytes::Bytes, EgressError> {
    let host = response.url().host_str().unwrap_or_default().to_owned();
    let too_large = || EgressError::TooLarge { host: host.clone(), limit };
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Err(too_large());
    }
    let mut body = bytes::BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(|err| explain(&host, &err))? {
        if body.len() + chunk.len() > limit {
            return Err(too_large());
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.freeze())
}

/// The library's error in ours. Its own text would repeat the URL, which may hold somebody's token.
fn explain(host: &str, err: &reqwest::Error) -> EgressError {
    let host = host.to_owned();
    let mut cause: Option<&(dyn Error + 'static)> = Some(err);
    let mut reason = "the request failed".to_owned();
    while let Some(at) = cause {
        if let Some(refusal) = at.downcast_ref::<Refusal>() {
            return EgressError::Refused(refusal.clone());
        }
        // Of the library's own errors the text names the URL.
        if !at.is::<reqwest::Error>() && at.source().is_none() {
            reason = at.to_string();
        }
        cause = at.source();
    }
    if err.is_timeout() {
        EgressError::Timeout { host }
    } else if err.is_connect() {
        EgressError::Connect { host, reason }
    } else {
        EgressError::Broken { host, reason }
    }
}

/// Hands on the addresses that pass.
struct Resolver(Guard);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = self.0.clone();
        async move {
            let host = name.as_str();
            let found = guard.lookup.addresses(host).await?;
            let mut refusal = None;
            let mut good: Vec<SocketAddr> = Vec::new();
            for address in found.into_iter().take(MAX_ADDRESSES) {
                match guard.allowed.check(host, address) {
                    // The port is the URL's.
                    Ok(()) => good.push(SocketAddr::new(address, 0)),
                    Err(err) => refusal = refusal.or(Some(err)),
                }
            }
            match (good.is_empty(), refusal) {
                (true, Some(refusal)) => Err(refusal.into()),
                (true, None) => Err(format!("{host} has no address").into()),
                (false, _) => Ok(Box::new(good.into_iter()) as Addrs),
            }
        }
        .boxed()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redirect_may_become_secure_and_never_the_reverse() {
        let check = |from: &str, to: &str| {
            check_hop(&Allowed::default(), &[from.parse().unwrap()], &to.parse().unwrap())
        };
        assert_eq!(check("http://a.example/", "https://b.example/"), Ok(()));
        assert_eq!(check("https://a.example/", "https://b.example/"), Ok(()));
        assert_eq!(check("https://a.example/", "http://a.example/"), Err(Refusal::Downgrade));
        assert!(check("http://a.example/", "gopher://b.example/").is_err());
        assert!(check("http://a.example/", "http://[::1]/").is_err());
    }
}
