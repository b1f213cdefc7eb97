//! The guarded HTTP client on real sockets: names that change their meaning, redirects, answers without an end.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::IntoResponse;
use axum::routing::any;
use cynai::egress::address::{Allowed, Refusal};
use cynai::egress::guard::{Bounds, EgressError, Guard, Lookup, Redirects, read_limited, send};
use futures::FutureExt;
use futures::future::BoxFuture;
use reqwest::Method;
use tokio::net::TcpListener;
use tokio::task::JoinSet;

/// Answers names from a script, one entry for each question; the last one stays.
#[derive(Default)]
struct Names {
    script: Mutex<BTreeMap<String, VecDeque<Vec<IpAddr>>>>,
    asked: Mutex<Vec<String>>,
}

impl Names {
    fn say(self, name: &str, answers: &[&[&str]]) -> Self {
        let answers = answers.iter().map(|one| one.iter().map(|ip| ip.parse().unwrap()).collect());
        self.script.lock().unwrap().insert(name.to_owned(), answers.collect());
        self
    }
}

impl Lookup for Names {
    fn addresses<'a>(&'a self, host: &'a str) -> BoxFuture<'a, std::io::Result<Vec<IpAddr>>> {
        self.asked.lock().unwrap().push(host.to_owned());
        let mut script = self.script.lock().unwrap();
        let answers = script.get_mut(host).expect("a name of the script");
        let answer = if answers.len() > 1 { answers.pop_front() } else { answers.front().cloned() };
        async move { Ok(answer.unwrap()) }.boxed()
    }
}

/// A server that counts its requests, answers with its address, and redirects from `/to?URL`.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<(String, HeaderMap)>>>,
    _serving: JoinSet<()>,
}

impl Server {
    async fn on(ip: &str) -> Self {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let listener = TcpListener::bind((ip, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let answer = move |uri: Uri, headers: HeaderMap| async move {
            log.lock().unwrap().push((uri.path().to_owned(), headers));
            match (uri.path(), uri.query()) {
                ("/to", Some(to)) => {
                    (StatusCode::FOUND, [(header::LOCATION, to.to_owned())]).into_response()
                }
                ("/hang", _) => std::future::pending().await,
                ("/large", _) => "x".repeat(100_000).into_response(),
                ("/endless", _) => {
                    let chunks = futures::stream::repeat_with(|| {
                        Ok::<_, std::io::Error>(bytes::Bytes::from_static(&[b'x'; 1000]))
                    });
                    axum::body::Body::from_stream(chunks).into_response()
                }
                _ => address.ip().to_string().into_response(),
            }
        };
        let router = Router::new().fallback(any(answer));
        let mut serving = JoinSet::new();
        serving.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, seen, _serving: serving }
    }

    fn count(&self) -> usize {
        self.seen.lock().unwrap().len()
    }

    fn url(&self, host: &str, path: &str) -> String {
        format!("http://{host}:{}{path}", self.address.port())
    }
}

fn guard(allow: &[&str], names: Names) -> (Guard, Arc<Names>) {
    let names = Arc::new(names);
    (Guard::with_lookup(Allowed::parse(allow).unwrap(), Arc::clone(&names) as _), names)
}

async fn get(guard: &Guard, bounds: &Bounds, url: &str) -> Result<String, EgressError> {
    let client = guard.client(bounds).unwrap();
    let request = client.request(Method::GET, url).header("authorization", "Bearer key").build();
    let response = send(guard, &client, request.unwrap()).await?;
    let bytes = read_limited(response, 10_000).await?;
    Ok(String::from_utf8(bytes.to_vec()).unwrap())
}

fn following() -> Bounds {
    Bounds { redirects: Redirects::Checked, ..Bounds::default() }
}

fn is_address(found: &Result<String, EgressError>) -> bool {
    matches!(found, Err(EgressError::Refused(Refusal::Address { .. })))
}

/// 127.0.0.2 plays a public address and 127.0.0.1 a private one.
#[tokio::test]
async fn a_name_that_changes_its_meaning_gains_nothing() {
    let (public, private) = (Server::on("127.0.0.2").await, Server::on("127.0.0.1").await);
    let names = Names::default().say("a.test", &[&["127.0.0.2"], &["127.0.0.1"]]);
    let (guard, names) = guard(&["127.0.0.2"], names);
    let first = get(&guard, &Bounds::default(), &public.url("a.test", "/")).await;
    assert_eq!(first.unwrap(), "127.0.0.2");
    assert_eq!(names.asked.lock().unwrap().len(), 1, "a name is resolved once for a connection");
    let second = get(&guard, &Bounds::default(), &private.url("a.test", "/")).await;
    assert!(is_address(&second), "{second:?}");
    let message = second.unwrap_err().to_string();
    assert!(message.contains("a.test") && message.contains("127.0.0.1 is loopback"), "{message}");
    assert_eq!(private.count(), 0);
}

#[tokio::test]
async fn of_several_addresses_only_good_ones_are_tried() {
    let (public, private) = (Server::on("127.0.0.2").await, Server::on("127.0.0.1").await);
    let both = Names::default()
        .say("both.test", &[&["127.0.0.1", "::1", "127.0.0.2"]])
        .say("bad.test", &[&["127.0.0.1", "10.0.0.1", "::ffff:127.0.0.1"]]);
    let (guard, _) = guard(&["127.0.0.2"], both);
    let found = get(&guard, &Bounds::default(), &public.url("both.test", "/")).await;
    assert_eq!(found.unwrap(), "127.0.0.2");
    let found = get(&guard, &Bounds::default(), &private.url("bad.test", "/")).await;
    assert!(is_address(&found), "{found:?}");
    assert_eq!(private.count(), 0);
}

#[tokio::test]
async fn literal_addresses_do_not_pass_by_the_resolver() {
    let private = Server::on("127.0.0.1").await;
    let (guard, _) = guard(&[], Names::default());
    for host in ["127.0.0.1", "2130706433", "0x7f.1", "127.1", "[::ffff:127.0.0.1]", "localhost"] {
        let found = get(&guard, &following(), &private.url(host, "/")).await;
        assert!(is_address(&found), "{host}: {found:?}");
    }
    assert_eq!(private.count(), 0);
    let allowed = Guard::new(Allowed::parse(&["127.0.0.0/8"]).unwrap());
    let found = get(&allowed, &Bounds::default(), &private.url("127.0.0.1", "/")).await;
    assert_eq!(found.unwrap(), "127.0.0.1");
}

#[tokio::test]
async fn every_redirect_is_checked_again() {
    let (public, private) = (Server::on("127.0.0.2").await, Server::on("127.0.0.1").await);
    let names = || {
        Names::default()
            .say("a.test", &[&["127.0.0.2"]])
            .say("b.test", &[&["127.0.0.2"]])
            .say("evil.test", &[&["127.0.0.1"]])
    };
    let to = |target: String| public.url("a.test", &format!("/to?{target}"));
    for target in [
        private.url("127.0.0.1", "/"),
        private.url("2130706433", "/"),
        private.url("[::ffff:7f00:1]", "/"),
        private.url("evil.test", "/"),
        private.url("localhost", "/"),
    ] {
        let found = get(&guard(&["127.0.0.2"], names()).0, &following(), &to(target.clone())).await;
        assert!(is_address(&found), "{target}: {found:?}");
    }
    let to_file = to("file:///etc/passwd".to_owned());
    let file = get(&guard(&["127.0.0.2"], names()).0, &following(), &to_file).await;
    assert!(file.as_ref().map_or(true, String::is_empty), "{file:?}");
    assert_eq!(private.count(), 0);
    // A good one is followed, without the key when it leads elsewhere.
    let guard = guard(&["127.0.0.2"], names()).0;
    let found = get(&guard, &following(), &to(public.url("b.test", "/there"))).await;
    assert_eq!(found.unwrap(), "127.0.0.2");
    let seen = public.seen.lock().unwrap().last().cloned().unwrap();
    assert!(seen.0 == "/there" && !seen.1.contains_key("authorization"), "{seen:?}");
    // Three are followed, and no fourth.
    let mut url = public.url("a.test", "/end");
    for _ in 0..3 {
        url = to(url);
    }
    assert!(get(&guard, &following(), &url).await.is_ok());
    let found = get(&guard, &following(), &to(url)).await;
    let refused = matches!(found, Err(EgressError::Refused(Refusal::TooManyRedirects(3))));
    assert!(refused, "{found:?}");
    // And none where none is to be.
    let before = private.count();
    let found = get(&guard, &Bounds::default(), &to(private.url("127.0.0.1", "/"))).await;
    assert_eq!((found.unwrap().as_str(), private.count()), ("", before));
}

#[tokio::test]
async fn answers_are_bounded_in_size_and_time() {
    let server = Server::on("127.0.0.2").await;
    let guard = Guard::new(Allowed::parse(&["127.0.0.2"]).unwrap());
    for path in ["/large", "/endless"] {
        let found = get(&guard, &Bounds::default(), &server.url("127.0.0.2", path)).await;
        assert!(matches!(found, Err(EgressError::TooLarge { limit: 10_000, .. })), "{found:?}");
    }
    let begun = Instant::now();
    let bounds = Bounds { total: Some(Duration::from_millis(200)), ..Bounds::default() };
    let found = get(&guard, &bounds, &server.url("127.0.0.2", "/hang")).await;
    assert!(matches!(found, Err(EgressError::Timeout { .. })), "{found:?}");
    let bounds = Bounds { idle: Duration::from_millis(200), total: None, ..Bounds::default() };
    let found = get(&guard, &bounds, &server.url("127.0.0.2", "/hang?token=hunter2")).await;
    let err = found.unwrap_err();
    assert!(!format!("{err:?}{err}").contains("hunter2"), "{err:?}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    let closed = TcpListener::bind("127.0.0.2:0").await.unwrap().local_addr().unwrap();
    let found = get(&guard, &Bounds::default(), &format!("http://{closed}/?token=hunter2")).await;
    assert!(matches!(found, Err(EgressError::Connect { .. })), "{found:?}");
    assert!(!format!("{found:?}").contains("hunter2"), "{found:?}");
}
