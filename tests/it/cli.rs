//! The command line as a person uses it, against a server without a driver.

use std::process::{Output, Stdio};

use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::process::Command;

use crate::support::TestSystem;

/// Runs `cynai` with nothing but these arguments and variables.
async fn cynai(arguments: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_cynai"))
        .args(arguments)
        .env_clear()
        .env("CYNAI_DATA_DIR", "/nonexistent/data")
        .envs(variables.iter().copied())
        .stdin(Stdio::null())
        .output()
        .await
        .unwrap()
}

/// Runs it as the administrator, and answers its standard output.
async fn good(system: &TestSystem, arguments: &[&str]) -> String {
    let variables = [("CYNAI_SERVER", system.base.as_str()), ("CYNAI_TOKEN", &system.token)];
    let output = cynai(arguments, &variables).await;
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn error(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[sqlx::test]
async fn tokens_are_made_listed_and_revoked(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let token = good(&system, &["token", "create", "laptop", "--expires", "30d"]).await;
    let token = token.trim();
    assert!(token.starts_with("cyn_"));
    let listed = good(&system, &["token", "list", "--json"]).await;
    let first: Value = serde_json::from_str(listed.lines().next().unwrap()).unwrap();
    assert_eq!(first["name"], "laptop");
    assert_eq!(first["expires_at"], "2026-12-20T10:00:00.123456+00:00");
    let id = first["token_id"].as_str().unwrap();
    assert!(good(&system, &["token", "list"]).await.contains(id));
    assert!(good(&system, &["token", "revoke", id]).await.contains(id));
    let variables = [("CYNAI_SERVER", system.base.as_str()), ("CYNAI_TOKEN", token)];
    let refused = error(&cynai(&["token", "list"], &variables).await);
    assert!(refused.contains("CYNAI_TOKEN was sent"), "{refused}");
}

#[sqlx::test]
async fn threads_are_listed_for_people_and_for_programs(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let variables = [("CYNAI_SERVER", system.base.as_str()), ("CYNAI_TOKEN", &system.token)];
    let none = cynai(&["threads", "list"], &variables).await;
    assert!(none.status.success() && none.stdout.is_empty());
    assert!(String::from_utf8(none.stderr).unwrap().contains("cynai run GRAPH"));
    let id =
        system.post("/threads", json!({"metadata": {"by": "\u{1b}[31mred"}})).await.expect(200);
    let id = id["thread_id"].as_str().unwrap();
    let shown = good(&system, &["threads", "list"]).await;
    assert!(shown.contains(id) && !shown.contains('\u{1b}'), "{shown}");
    let line: Value =
        serde_json::from_str(&good(&system, &["threads", "list", "--json"]).await).unwrap();
    assert_eq!(line["thread_id"], id);
}

#[sqlx::test]
async fn errors_say_what_to_do(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let here = ("CYNAI_SERVER", system.base.as_str());
    let missing = error(&cynai(&["threads", "list"], &[here]).await);
    assert!(
        missing.contains("/nonexistent/data/admin-token") && missing.contains("--token-file"),
        "{missing}"
    );
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let server = format!("http://{closed}");
    let down = error(&cynai(&["threads", "list", "--server", &server], &[]).await);
    assert!(down.contains("cynai serve"), "{down}");
    let nil = uuid::Uuid::nil().to_string();
    let unknown = cynai(&["threads", "show", &nil, "--token", &system.token], &[here]).await;
    assert!(error(&unknown).contains("not found"));
    let input = cynai(&["run", "count", "--input", "{"], &[here]).await;
    assert!(error(&input).contains("--input is not JSON"));
}

#[sqlx::test]
async fn every_command_shows_an_example(pool: PgPool) {
    drop(pool);
    for command in
        [&["run"][..], &["runs"], &["threads"], &["token"], &["runs", "list"], &["token", "create"]]
    {
        let help = cynai(&[command, &["--help"]].concat(), &[]).await;
        let text = String::from_utf8(help.stdout).unwrap();
        assert!(text.contains("Example"), "{command:?}: {text}");
    }
}
