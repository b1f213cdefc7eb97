//! What readers see of messages while they are made: all of it, once, whichever server they ask.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::{Desk, Event, asks, end, parsed, read, start};
use crate::support::client::Client;
use crate::support::model_endpoint::{Script, ending, event};
use crate::support::server::{Start, until};

const WORK: &str = r#"
name: work
state: { out: {} }
nodes:
  work: { agent: { prompt: Go., tools: ["s/add"] }, set: { out: "${output.text}" } }
edges: [ start -> work -> end ]
"#;

const MANY: &str = r#"
name: many
state: { out: { type: array, reduce: append } }
nodes:
  work:
    for_each: ${[1, 2, 3, 4, 5, 6]}
    agent: { prompt: "Go, {{ item }}." }
    set: { out: "${[output.text]}" }
edges: [ start -> work -> end ]
"#;

const TALK: &str = r#"
name: talk
state: { out: { type: array, reduce: append } }
nodes:
  one: { model: { prompt: Go. }, set: { out: "${[output.text.size()]}" } }
  two: { model: { prompt: Go. }, set: { out: "${[output.text.size()]}" } }
  three: { model: { prompt: Go. }, set: { out: "${[output.text.size()]}" } }
edges: [ start -> one -> two -> three -> end ]
"#;

const WORDS: [&str; 12] = ["a ", "b ", "c ", "d ", "e ", "f ", "g ", "h ", "i ", "j ", "k ", "l"];

/// What the pieces of each message say together, in the order of the messages.
fn texts(events: &[Event]) -> Vec<(String, String)> {
    let mut found: Vec<(String, String)> = Vec::new();
    for event in events {
        let (id, text) =
            (event.data[0]["id"].as_str().unwrap(), event.data[0]["content"].as_str().unwrap());
        match found.iter_mut().find(|(known, _)| known == id) {
            Some((_, all)) => all.push_str(text),
            None => found.push((id.to_owned(), text.to_owned())),
        }
    }
    found
}

#[sqlx::test]
async fn a_reader_that_comes_back_elsewhere_misses_and_repeats_nothing(pool: PgPool) {
    let desk = Desk::new(&pool, &[("work", WORK)]).await;
    let one = desk.site.start(&Start::default()).await;
    let two = desk.site.start(&Start { number: 1, ..Start::default() }).await;
    let (client, other) = (one.client(), two.client());
    for modes in ["messages-tuple", "messages"] {
        desk.endpoint.plays([
            asks(&[("a", "s__add", r#"{"list": [1, 2]}"#)]),
            Script::slowly(&WORDS, Duration::from_millis(70)),
        ]);
        let request = json!({ "stream_mode": [modes], "stream_subgraphs": modes == "messages" });
        let (thread, run) = start(&client, "work", request).await;
        let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode={modes}");
        // Cut off again and again, in the middle of the message too, and each time at the other server.
        let mut seen: Vec<Event> = Vec::new();
        let mut after = "-1".to_owned();
        let mut lives = 0;
        loop {
            let reader = if lives % 2 == 0 { &other } else { &client };
            let part = read(reader, &path, &after, |events| {
                events.len() >= 2 && events.last().unwrap().id.is_some()
            })
            .await;
            lives += 1;
            if part.is_empty() {
                break;
            }
            after = part.last().unwrap().id.clone().unwrap();
            seen.extend(part);
        }
        let (ended, _) = end(&client, &thread, &run).await;
        assert_eq!(ended["status"], "success", "{ended}");
        let whole = read(&client, &path, "-1", |_| false).await;
        assert!(lives > 3, "the message came in pieces: {seen:?}");
        if modes == "messages-tuple" {
            assert_eq!(seen, whole);
            let texts = texts(&seen);
            assert_eq!(texts.len(), 3, "{texts:?}");
            assert_eq!(texts[2].1, WORDS.concat());
            assert!(seen.iter().all(|event| event.name == "messages"), "{seen:?}");
            let tool = seen.iter().find(|event| event.data[0]["type"] == "tool").unwrap();
            assert_eq!(
                (&tool.data[0]["content"], &tool.data[0]["tool_call_id"]),
                (&json!("sum"), &json!("a"))
            );
            assert_eq!(seen[0].data[1]["langgraph_node"], "think");
            assert_eq!(seen[0].data[1]["run_id"], run);
        } else {
            // The partial messages depend on how the pieces were met; what is complete does not.
            let complete = |events: &[Event]| -> Vec<Value> {
                let complete =
                    events.iter().filter(|event| event.name.starts_with("messages/complete|work:"));
                complete.map(|event| event.data[0].clone()).collect()
            };
            assert_eq!(complete(&seen), complete(&whole));
            let complete = complete(&seen);
            assert_eq!(complete.len(), 3, "{seen:?}");
            assert_eq!(complete[0]["tool_calls"][0]["args"], json!({ "list": [1, 2] }));
            assert_eq!(complete[2]["content"], WORDS.concat());
            let mut length = 0;
            for event in seen.iter().filter(|event| event.data[0]["id"] == complete[2]["id"]) {
                let now = event.data[0]["content"].as_str().unwrap().len();
                assert!(now >= length, "a message only grows: {seen:?}");
                length = now;
            }
        }
        let ids: Vec<&String> = seen.iter().filter_map(|event| event.id.as_ref()).collect();
        let unique: std::collections::BTreeSet<&String> = ids.iter().copied().collect();
        assert_eq!(ids.len(), unique.len(), "{ids:?}");
    }
}

#[sqlx::test]
async fn agents_side_by_side_hide_nothing_of_each_other(pool: PgPool) {
    let desk = Desk::new(&pool, &[("many", MANY)]).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    let pieces: Vec<String> = (0..60).map(|at| format!("{at} ")).collect();
    let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
    desk.endpoint.plays((0..6).map(|at| Script::slowly(&pieces, Duration::from_millis(11 + at))));
    let (thread, run) = start(&client, "many", json!({ "stream_mode": ["messages-tuple"] })).await;
    let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple");
    let live = read(&client, &path, "-1", |_| false).await;
    let (ended, _) = end(&client, &thread, &run).await;
    assert_eq!(ended["status"], "success", "{ended}");
    assert_eq!(live, read(&client, &path, "-1", |_| false).await);
    let texts = texts(&live);
    assert_eq!(texts.len(), 6);
    assert!(texts.iter().all(|(_, text)| *text == pieces.concat()), "{texts:?}");
}

#[sqlx::test]
async fn a_message_that_a_crash_cut_off_begins_again_under_another_id(pool: PgPool) {
    let desk = Desk::new(&pool, &[("work", WORK)]).await;
    let server = desk.site.start(&Start::default()).await;
    let begun = event(json!({ "content": "Half of " }));
    desk.endpoint.plays([Script::stream(begun).hang(), Script::text(&["A whole ", "message."])]);
    let client = server.client();
    let (thread, run) =
        start(&client, "work", json!({ "stream_mode": ["messages-tuple", "values"] })).await;
    let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple");
    let seen = read(&client, &path, "-1", |events| !events.is_empty()).await;
    assert_eq!(texts(&seen)[0].1, "Half of ");
    server.kill();
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    let after = seen.last().unwrap().id.clone().unwrap();
    let rest = read(&client, &path, &after, |_| false).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(
        thread["values"]["out"],
        "A whole message.",
        "{ended} {rest:?} {:?}",
        super::effects(&client, &run).await
    );
    let (first, second) = (texts(&seen), texts(&rest));
    assert_eq!(second.len(), 1, "{rest:?}");
    assert_ne!(first[0].0, second[0].0);
    assert_eq!(second[0].1, "A whole message.", "{seen:?} {rest:?}");
    // It was the same request, under the same key.
    let keys: BTreeMap<String, usize> = desk.endpoint.calls_by_key();
    assert_eq!(keys.values().copied().collect::<Vec<_>>(), [2], "{keys:?}");
    let effects = until("the effect is listed", async || {
        client.get(&format!("/runs/{run}/effects")).await.ok()
    })
    .await;
    assert_eq!((&effects[0]["sends"], &effects[0]["status"]), (&json!(2), &json!("done")));
}

/// A reader that has asked for a stream and reads nothing of it.
async fn deaf(client: &Client, address: &str, path: &str) -> TcpStream {
    let request = client.request(reqwest::Method::GET, path).build().unwrap();
    let token = request.headers()["authorization"].to_str().unwrap().to_owned();
    let socket = TcpSocket::new_v4().unwrap();
    // What it does not read does not lie in the kernel either.
    socket.set_recv_buffer_size(4096).unwrap();
    let address = address.trim_start_matches("http://");
    let mut stream = socket.connect(address.parse().unwrap()).await.unwrap();
    // Of HTTP/1.0, the body is all that comes until the end.
    let head = format!("GET {path} HTTP/1.0\r\nhost: {address}\r\nauthorization: {token}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.unwrap();
    stream
}

#[sqlx::test]
async fn a_reader_that_does_not_read_slows_nobody_and_loses_nothing(pool: PgPool) {
    let desk = Desk::new(&pool, &[("talk", TALK)]).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    // Nine megabytes: more than a connection's buffers hold, and much more than the readers of a run share.
    let pieces: Vec<String> =
        (0..50_u8).map(|at| char::from(b'A' + at % 26).to_string().repeat(60_000)).collect();
    for _ in 0..3 {
        let mut script = Script::stream("");
        for piece in &pieces {
            script = script.then(event(json!({ "content": piece }))).wait(Duration::from_millis(4));
        }
        desk.endpoint.plays([script.then(ending("stop"))]);
    }
    let request = json!({ "stream_mode": ["messages-tuple"] });
    let (thread, run) = start(&client, "talk", request).await;
    let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple");
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(deaf(&client, server.address(), &path).await);
    }
    let live = read(&client, &path, "-1", |_| false).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(ended["status"], "success", "{ended}");
    assert_eq!(thread["values"]["out"], json!([3_000_000, 3_000_000, 3_000_000]));
    let expected: Vec<String> = vec![pieces.concat(); 3];
    let said =
        |events: &[Event]| texts(events).into_iter().map(|(_, text)| text).collect::<Vec<_>>();
    assert!(said(&live) == expected, "the reader that reads missed something");
    // One of them reads after all, when nobody else is left.
    let mut late = silent.pop().unwrap();
    drop(silent);
    let mut bytes = Vec::new();
    late.read_to_end(&mut bytes).await.unwrap();
    let text = String::from_utf8(bytes).unwrap();
    let events: Vec<Event> = text.split_inclusive("\n\n").filter_map(parsed).collect();
    assert!(said(&events) == expected, "the reader that was late missed something");
    assert!(events == live, "what was read late is not what was read live");
}
