//! The client side of the REST API: which server, which token, and errors that say what to do.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use reqwest::{Method, Response, StatusCode, Url};
use serde_json::Value;

use crate::config::usual_admin_token_file;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than a server is silent on a stream or a wait, several times over.
const SILENCE: Duration = Duration::from_secs(60);
/// Longer than any call of a tool may take.
const LONG_SILENCE: Duration = Duration::from_secs(25 * 3600);

/// Which server, and who asks.
#[derive(Debug, Clone, Args)]
pub(super) struct ClientArgs {
    /// The server.
    #[arg(
        long,
        env = "CYNAI_SERVER",
        value_name = "URL",
        default_value = "http://127.0.0.1:2024",
        global = true
    )]
    server: Url,

    /// An API token.
    #[arg(long, env = "CYNAI_TOKEN", value_name = "TOKEN", hide_env_values = true, global = true)]
    token: Option<String>,

    /// A file with an API token [default: the administrator's, when this user can read it].
    #[arg(long, env = "CYNAI_TOKEN_FILE", value_name = "FILE", global = true)]
    token_file: Option<PathBuf>,

    /// The data directory of a server on this machine, where the administrator's token is.
    #[arg(long, env = "CYNAI_DATA_DIR", value_name = "DIR", hide = true, global = true)]
    data_dir: Option<PathBuf>,

    /// Print JSON; what comes bit by bit is one JSON value a line.
    #[arg(long, global = true)]
    pub(super) json: bool,
}

/// A client of one server.
#[derive(Debug, Clone)]
pub(super) struct Client {
    http: reqwest::Client,
    server: Url,
    token: Option<String>,
    /// Where the token is looked for, for the message when it is refused.
    place: String,
}

/// A refusal by the server.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct Refused {
    /// The status.
    pub(super) status: StatusCode,
    message: String,
}

impl ClientArgs {
    /// A client as the arguments say.
    pub(super) fn client(&self) -> anyhow::Result<Client> {
        self.client_for(SILENCE)
    }

    /// The same, for answers that take as long as somebody else's work.
    pub(super) fn patient_client(&self) -> anyhow::Result<Client> {
        self.client_for(LONG_SILENCE)
    }

    fn client_for(&self, silence: Duration) -> anyhow::Result<Client> {
        let http = reqwest::Client::builder()
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(silence)
            .user_agent(concat!("cynai/", env!("CARGO_PKG_VERSION")))
            .build()
            .context("could not make an HTTP client")?;
        let (token, place) = self.find_token()?;
        Ok(Client { http, server: self.server.clone(), token, place })
    }

    fn find_token(&self) -> anyhow::Result<(Option<String>, String)> {
        if let Some(token) = &self.token {
            return Ok((Some(token.trim().to_owned()), "--token or CYNAI_TOKEN".to_owned()));
        }
        if let Some(file) = &self.token_file {
            let text = std::fs::read_to_string(file)
                .with_context(|| format!("could not read the token file {}", file.display()))?;
            return Ok((Some(text.trim().to_owned()), file.display().to_string()));
        }
        let usual = self.data_dir.as_ref().map(|dir| dir.join("admin-token"));
        let Some(file) = usual.or_else(usual_admin_token_file) else {
            return Ok((None, "nowhere".to_owned()));
        };
        // A server elsewhere needs no file here, and one that needs none at all is no reason to fail.
        let token = std::fs::read_to_string(&file).ok();
        Ok((token.map(|text| text.trim().to_owned()), file.display().to_string()))
    }
}

impl Client {
    /// Sends a request and reads the JSON that comes back; null when there is none.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Value> {
        let response = self.open(method, path, body, &[]).await?;
        let text = response.text().await.context("the server's answer was cut off")?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| {
            format!("{} does not answer as a Cynai server does: is the address right?", self.server)
        })
    }

    /// Reads something.
    pub(super) async fn get(&self, path: &str) -> anyhow::Result<Value> {
        self.call(Method::GET, path, None).await
    }

    /// Sends something.
    pub(super) async fn post(&self, path: &str, body: &Value) -> anyhow::Result<Value> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Sends a request, and answers the response when it is a success.
    pub(super) async fn open(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
        headers: &[(&str, &str)],
    ) -> anyhow::Result<Response> {
        let base = self.server.as_str().trim_end_matches('/');
        let mut request = self.http.request(method, format!("{base}{path}"));
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        if let Some(body) = body {
            request = request.json(body);
        }
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.map_err(|err| self.unreachable(err))?;
        if response.status().is_success() {
            return Ok(response);
        }
        Err(self.refused(response).await.into())
    }

    fn unreachable(&self, err: reqwest::Error) -> anyhow::Error {
        let hint = if err.is_connect() {
            format!(
                "no server answers at {}: start one with `cynai serve`, or name another with --server",
                self.server
            )
        } else if err.is_timeout() {
            format!("the server at {} takes too long to answer", self.server)
        } else {
            format!("the connection to {} broke", self.server)
        };
        anyhow::Error::new(err).context(hint)
    }

    async fn refused(&self, response: Response) -> Refused {
        let status = response.status();
        let id = response.headers().get("x-request-id").and_then(|id| id.to_str().ok());
        let id = id.map(|id| format!(" (request {id})")).unwrap_or_default();
        let text = response.text().await.unwrap_or_default();
        let body = serde_json::from_str::<Value>(&text).unwrap_or_default();
        let detail = body["detail"].as_str().map_or_else(|| status.to_string(), str::to_owned);
        let path = body["metadata"]["path"].as_str().map(|path| format!(" (at {path})"));
        let path = path.unwrap_or_default();
        let message = match status {
            StatusCode::UNAUTHORIZED => {
                let looked = match self.token {
                    Some(_) => format!("the token from {} was sent", self.place),
                    None => format!("no token was found: {} cannot be read", self.place),
                };
                format!(
                    "{detail}; {looked}. The first start of the server writes the administrator's token to \
                     a file and logs where: pass it with --token-file or CYNAI_TOKEN"
                )
            }
            _ if status.is_server_error() => format!("the server failed: {detail}{id}"),
            _ => format!("{detail}{path}"),
        };
        Refused { status, message }
    }
}

/// Reads JSON from an argument: the text itself, `@FILE`, or `-` for standard input.
pub(super) fn json_argument(name: &str, argument: &str) -> anyhow::Result<Value> {
    let text = match argument.strip_prefix('@') {
        Some(file) => {
            std::fs::read_to_string(file).with_context(|| format!("could not read {file}"))?
        }
        None if argument == "-" => {
            std::io::read_to_string(std::io::stdin()).context("could not read standard input")?
        }
        None => argument.to_owned(),
    };
    match serde_json::from_str(&text) {
        Ok(value) => Ok(value),
        Err(err) => {
            bail!(
                "{name} is not JSON ({err}); a text needs quotes of its own, as in {name} '\"text\"'"
            )
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_comes_from_the_argument_or_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("input.json");
        std::fs::write(&file, "[1]").unwrap();
        let from_file = json_argument("--input", &format!("@{}", file.display()));
        assert_eq!(from_file.unwrap(), json!([1]));
        assert_eq!(json_argument("--input", "{\"a\": 1}").unwrap(), json!({"a": 1}));
        let err = json_argument("--answer", "yes").unwrap_err().to_string();
        assert!(err.contains("'\"text\"'"), "{err}");
        assert!(json_argument("--input", "@/nowhere/at/all").is_err());
    }
}
