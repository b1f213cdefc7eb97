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

#[tokio::test]
async fn a_configuration_file_is_checked_without_a_server() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("cynai.yaml");
    let path = file.to_str().unwrap();
    std::fs::write(&file, "retention: { max_age: 30d }\nwebhooks: { allow: [10.0.0.0/8] }\n")
        .unwrap();
    let good = cynai(&["config", "check", path], &[]).await;
    assert!(good.status.success() && good.stdout.ends_with(b"nothing is wrong\n"), "{good:?}");
    std::fs::write(&file, "retention:\n  max_aeg: 30d\n").unwrap();
    let data = ("CYNAI_DATA_DIR", folder.path().to_str().unwrap());
    let wrong = error(&cynai(&["config", "check"], &[data]).await);
    assert!(wrong.contains("cynai.yaml:2:3: ") && wrong.contains("`max_age`"), "{wrong}");
    std::fs::write(&file, "webhooks: { allow: [10.0.0.0/99] }\n").unwrap();
    let wrong = error(&cynai(&["config", "check", path], &[]).await);
    assert!(wrong.contains("webhooks.allow") && wrong.contains("10.0.0.0/99"), "{wrong}");
    let server = cynai(&["serve", "--config", path, "--listen", "127.0.0.1:0"], &[data]).await;
    assert!(error(&server).contains("webhooks.allow"));
}

/// The commands below one, as its help lists them.
fn commands_below(path: &[String]) -> Vec<Vec<String>> {
    let help = help_of(path);
    let listed = help
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty());
    let names =
        listed.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help");
    names.map(|name| [path, &[name.to_owned()]].concat()).collect()
}

fn help_of(path: &[String]) -> String {
    let done = std::process::Command::new(env!("CARGO_BIN_EXE_cynai"))
        .args(path)
        .arg("--help")
        .output()
        .unwrap();
    assert!(done.status.success(), "{path:?}");
    String::from_utf8(done.stdout).unwrap()
}

#[test]
fn the_help_of_every_command_has_an_example() {
    let mut open = vec![Vec::new()];
    let mut seen = 0;
    while let Some(path) = open.pop() {
        let called = format!("cynai {}", path.join(" "));
        let example = help_of(&path)
            .lines()
            .any(|line| !line.starts_with("Usage:") && line.contains(called.trim()));
        assert!(example, "{called} --help has no example");
        open.extend(commands_below(&path));
        seen += 1;
    }
    assert!(seen > 15, "only {seen} commands were found");
}
