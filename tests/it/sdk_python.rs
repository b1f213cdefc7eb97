//! The unmodified Python SDK of LangGraph against a server: `tests/sdk/test_sdk.py` and `test_agent.py`, in a venv of its
//! own.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use crate::support::agent;
use crate::support::model_endpoint::ModelEndpoint;
use crate::support::server::{Site, Start};

const SDK: &str = "langgraph-sdk==0.4.14";

const CHATTY: &str = r#"
name: chatty
nodes:
  talk:
    use: test/append
    with: { file: "${env.TRACES}", sleep_ms: 120 }
edges: [start -> talk -> end]
"#;

const SLOW: &str = r#"
name: slow
nodes:
  wait:
    use: test/append
    with: { file: "${env.TRACES}", sleep_ms: 60000 }
edges: [start -> wait -> end]
"#;

fn run(command: &mut Command) -> Output {
    command.output().unwrap_or_else(|err| panic!("{command:?} cannot be run: {err}"))
}

fn succeed(command: &mut Command, hint: &str) {
    let output = run(command);
    assert!(
        output.status.success(),
        "{hint}\n{command:?}\n{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// A Python that has the SDK. It is made once, and kept beside what cargo builds.
fn python() -> PathBuf {
    // Several tests begin at once: one installs, the others wait.
    let lock = Path::new(env!("CARGO_TARGET_TMPDIR")).join("langgraph-sdk.lock");
    let lock = std::fs::File::create(lock).unwrap();
    lock.lock().unwrap();
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join(SDK.replace("==", "-"));
    let python = venv.join("bin/python");
    let version =
        ["-c", "import importlib.metadata as m; assert m.version('langgraph-sdk') == '0.4.14'"];
    if python.exists() && run(Command::new(&python).args(version)).status.success() {
        return python;
    }
    // A half-made one is of no use.
    let _ = std::fs::remove_dir_all(&venv);
    let install = "this test needs Python with venv: apt-get install python3 python3-venv";
    succeed(Command::new("python3").args(["-c", "import ensurepip, venv"]), install);
    succeed(Command::new("python3").args(["-m", "venv"]).arg(&venv), install);
    let network = "this test needs a package index of Python's";
    succeed(
        Command::new(&python).args([
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            SDK,
        ]),
        network,
    );
    succeed(Command::new(&python).args(version), "the SDK is not the one that was asked for");
    python
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_sdk_works_unmodified() {
    let python = tokio::task::spawn_blocking(python).await.unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let examples = root.join("examples").display().to_string();
    let site = Site::new(&[("chatty", CHATTY), ("slow", SLOW)]).with_flags(&[
        "--no-local-worker",
        "--graphs",
        &examples,
    ]);
    let server = site.start(&Start::default()).await;
    let token = std::fs::read_to_string(site.path("token")).unwrap();
    let mut command = Command::new(python);
    command
        .arg(root.join("tests/sdk/test_sdk.py"))
        .arg(server.address())
        .env("CYNAI_TOKEN", token.trim())
        .env("NO_PROXY", "*")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let output = tokio::task::spawn_blocking(move || run(&mut command)).await.unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complained}");
    assert!(said.contains("the SDK's steps all went as they should"), "{said}");
    let stopped = server.stop().await;
    assert!(stopped.success(), "{stopped:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_agents_stream_is_left_and_taken_up_again_by_the_python_sdk() {
    let python = tokio::task::spawn_blocking(python).await.unwrap();
    let endpoint = ModelEndpoint::start().await;
    // The synchronous client's run, and the asynchronous one's.
    endpoint.plays(agent::one_run());
    endpoint.plays(agent::one_run());
    let site = agent::site(&endpoint, &[]);
    let server = site.start(&Start::default()).await;
    let token = std::fs::read_to_string(site.path("token")).unwrap();
    let mut command = Command::new(python);
    command
        .arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk/test_agent.py"))
        .arg(server.address())
        .env("CYNAI_TOKEN", token.trim())
        .env("TEXTS", agent::texts().to_string())
        .env("NO_PROXY", "*")
        .env("PYTHONDONTWRITEBYTECODE", "1");
    let output = tokio::task::spawn_blocking(move || run(&mut command)).await.unwrap();
    let (said, complained) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{said}{complained}");
    assert!(said.contains("the agent's streams all went as they should"), "{said}");
    assert!(server.stop().await.success());
}
