//! `cynai tools login`: waits on a loopback port for the browser of whoever agrees.

use std::time::Duration;

use anyhow::{Context, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::client::Client;
use super::show;

/// How long a person has to agree, as the server says too.
const PATIENCE: Duration = Duration::from_secs(600);
/// How long a browser may take to say what it wants.
const REQUEST_PATIENCE: Duration = Duration::from_secs(5);
/// Bytes of a request's head.
const MAX_HEAD: usize = 32 << 10;

/// Begins a login to `server`, whose routes are below `path`, and waits until it is finished.
pub(super) async fn login(
    client: &Client,
    server: &str,
    path: &str,
    port: u16,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(("127.0.0.1", port))
        .await
        .with_context(|| format!("could not listen on 127.0.0.1:{port}"))?;
    let base = format!("http://{}", listener.local_addr()?);
    let begin = json!({"redirect_uri": format!("{base}/callback")});
    let begun = client.post(&format!("{path}/login"), &begin).await?;
    show::note(format_args!("Open this page, and agree there:"));
    show::line(show::text(&begun["authorization_url"]));
    show::note(format_args!(
        "A browser on another machine ends on a page that cannot be opened. Give its address to\n  \
         cynai tools login {server} --finish ADDRESS"
    ));
    let waited = tokio::time::timeout(PATIENCE, agreed(&listener)).await;
    let Ok(agreed) = waited else {
        bail!("nobody agreed within {}", humantime::format_duration(PATIENCE));
    };
    let (mut browser, target) = agreed?;
    let finished = finish(client, server, path, &format!("{base}{target}")).await;
    let told = if finished.is_ok() { "You are logged in" } else { "The login failed" };
    // Whether the browser shows it does not matter.
    let _ = answer(&mut browser, "200 OK", &format!("{told}. This page can be closed.\n")).await;
    finished
}

/// Finishes a login with the address that the browser was led to.
pub(super) async fn finish(
    client: &Client,
    server: &str,
    path: &str,
    led_to: &str,
) -> anyhow::Result<()> {
    client.post(&format!("{path}/login/finish"), &json!({"led_to": led_to})).await?;
    show::line(format_args!("logged in to {}", show::text(&Value::from(server))));
    Ok(())
}

/// The first browser that comes with an answer, and where it was led to.
async fn agreed(listener: &TcpListener) -> anyhow::Result<(TcpStream, String)> {
    loop {
        let (mut browser, _) = listener.accept().await.context("could not wait for the browser")?;
        let asked = tokio::time::timeout(REQUEST_PATIENCE, target(&mut browser)).await;
        match asked.ok().flatten() {
            Some(target) if target.starts_with("/callback?") => return Ok((browser, target)),
            _ => {
                let _ = answer(&mut browser, "404 Not Found", "There is nothing here.\n").await;
            }
        }
    }
}

/// What a browser asks for; none when it does not ask as a browser does.
async fn target(browser: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if head.len() > MAX_HEAD || browser.read_buf(&mut head).await.ok()? == 0 {
            return None;
        }
    }
    let head = String::from_utf8(head).ok()?;
    let line = head.lines().next()?.strip_prefix("GET ")?;
    Some(line.split(' ').next()?.to_owned())
}

async fn answer(browser: &mut TcpStream, status: &str, text: &str) -> std::io::Result<()> {
    let size = text.len();
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-type: text/plain\r\ncontent-length: {size}\r\nconnection: close\r\n\r\n"
    );
    browser.write_all(format!("{head}{text}").as_bytes()).await?;
    browser.shutdown().await
}
