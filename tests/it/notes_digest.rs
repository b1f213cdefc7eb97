//! `examples/notes-digest` with what it is made for: the real filesystem server, and its stand-in for a model.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::json;

use crate::support::server::{Site, Start};
use crate::tools::real::servers;

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/notes-digest")
}

/// The stand-in. Dropping it ends it.
struct Model(Child);

impl Drop for Model {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn model() -> (Model, String) {
    let mut child = Command::new("python3")
        .arg(example().join("model.py"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the stand-in needs python3");
    let mut url = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut url).unwrap();
    (Model(child), url.trim().to_owned())
}

#[tokio::test]
async fn the_notes_are_read_summed_up_and_written_when_a_person_agrees() {
    let servers = servers().await;
    let (_model, url) = model();
    let site = Site::new(&[]);
    let notes = site.path("notes");
    std::fs::create_dir(&notes).unwrap();
    for note in std::fs::read_dir(example().join("notes")).unwrap() {
        let note = note.unwrap();
        std::fs::copy(note.path(), notes.join(note.file_name())).unwrap();
    }
    let program = servers.join("node_modules/.bin/mcp-server-filesystem");
    let config = json!({
        "models": {
            "endpoints": { "clerk": { "url": url } },
            "routes": { "default": [{ "endpoint": "clerk", "model": "headings" }] },
        },
        "mcp_servers": { "files": { "command": [program, notes] } },
    });
    let (file, graphs) = (site.path("config.yaml"), example().display().to_string());
    std::fs::write(&file, config.to_string()).unwrap();
    let site = site.with_flags(&[
        "--no-local-worker",
        "--graphs",
        &graphs,
        "--config",
        file.to_str().unwrap(),
    ]);
    let server = site.start(&Start::default()).await;
    let client = server.client();
    let thread = "00000000-0000-4000-8000-000000000001";
    client.ensure_thread(thread).await.unwrap();
    let (wait, target) = (format!("/threads/{thread}/runs/wait"), notes.join("DIGEST.md"));
    let input = json!({ "folder": notes, "target": target });
    let asked =
        client.post(&wait, &json!({ "assistant_id": "digest", "input": input })).await.unwrap();
    let question = &asked["__interrupt__"][0]["value"];
    assert_eq!(question["reason"], "approve_tool", "{asked}");
    assert_eq!(question["tool"], "files/write_file");
    let content = question["arguments"]["content"].as_str().unwrap();
    assert!(content.contains("- 2026-11-09-heating.md: The heating stays off"), "{content}");
    assert!(!target.exists(), "it is written before a person agreed");
    let answer =
        json!({ "assistant_id": "digest", "command": { "resume": { "action": "approve" } } });
    let done = client.post(&wait, &answer).await.unwrap();
    assert_eq!(done["wrote"], json!(target), "{done}");
    assert_eq!(done["files"].as_array().unwrap().len(), 3);
    assert_eq!(std::fs::read_to_string(&target).unwrap(), content);
    assert!(server.stop().await.success());
}
