//! In the middle of an answer something ends: the model's server, ours, or the run.

use std::time::Duration;

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::super::{effects, end, read, start};
use super::chats::joined;
use super::{Kind, Lab, on_both};
use crate::support::client::Client;
use crate::support::server::Start;

/// An answer that takes its time, whatever the model would rather say: so many lines of eight letters or so.
const LONG: &str = r#"
name: long
state: { out: {}, failure: {} }
nodes:
  think:
    model:
      prompt: Write a table of letters.
      schema:
        type: array
        minItems: LINES
        maxItems: LINES
        items: { type: array, minItems: 8, maxItems: 8, items: { enum: [A, B] } }
      sampling: { temperature: 0 }
    set: { out: "${output}" }
    on_error: failed
  failed: { set: { failure: "${error}" } }
edges: [ start -> think -> end, failed -> end ]
"#;

fn long(lines: u32) -> String {
    LONG.replace("LINES", &lines.to_string())
}

/// A run in the middle of its answer: thread, run, the path of its stream, and what was seen of the message.
async fn talking(client: &Client) -> (String, String, String, Vec<super::super::Event>) {
    let request = json!({ "stream_mode": ["messages-tuple"] });
    let (thread, run) = start(client, "long", request).await;
    let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple");
    let seen = read(client, &path, "-1", |events| {
        events.iter().filter(|event| event.data[0]["content"] != "").count() >= 5
    })
    .await;
    assert!(joined(&seen).1 >= 5, "{seen:?}");
    (thread, run, path, seen)
}

on_both!(a_killed_server_of_the_model_is_asked_again_when_it_is_back);

async fn a_killed_server_of_the_model_is_asked_again_when_it_is_back(kind: Kind, pool: PgPool) {
    let mut lab = Lab::new(kind, &pool, &[("long", &long(12))]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let (thread, run, path, seen) = talking(&client).await;
    lab.engine.kill();
    lab.engine.start_again().await;
    let after = seen.last().unwrap().id.clone().unwrap();
    let rest = read(&client, &path, &after, |_| false).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(ended["status"], "success", "{ended}");
    let out = &thread["values"]["out"];
    assert!(out["attempts"].as_u64().unwrap() >= 2, "{thread}");
    // What was half said is void: the message has another id, and begins again.
    let last = &out["message"]["id"];
    assert_ne!(&seen[0].data[0]["id"], last);
    let whole: Vec<_> = rest.into_iter().filter(|event| &event.data[0]["id"] == last).collect();
    assert_eq!(json!(joined(&whole).0), out["text"]);
    // For the run it was one effect, of which it is known how it went.
    let told = effects(&client, &run).await;
    assert_eq!(told.len(), 1);
    assert_eq!((&told[0]["status"], &told[0]["sends"]), (&json!("done"), &json!(1)), "{told:?}");
}

/// An endpoint without a route has the usual three attempts.
#[sqlx::test]
async fn a_server_of_the_model_that_stays_away_is_a_clear_failure_node(pool: PgPool) {
    let graph =
        long(12).replace("model:\n", &format!("model:\n      model: late/{}\n", super::NAME));
    let mut lab = Lab::new(Kind::Node, &pool, &[("long", &graph)]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let (thread, run, ..) = talking(&client).await;
    lab.engine.kill();
    let (_, thread) = end(&client, &thread, &run).await;
    assert_eq!(thread["values"]["failure"]["kind"], "connect", "{thread}");
    let told = effects(&client, &run).await;
    let told: Vec<[&Value; 3]> =
        told.iter().map(|one| ["attempt", "sends", "status"].map(|name| &one[name])).collect();
    assert_eq!(told, [[&json!(1), &json!(1), &json!("failed")]]);
}

on_both!(our_killed_server_asks_again_under_the_same_key);

async fn our_killed_server_asks_again_under_the_same_key(kind: Kind, pool: PgPool) {
    let lab = Lab::new(kind, &pool, &[("long", &long(12))]).await;
    let server = lab.site.start(&Start::default()).await;
    let (thread, run, path, seen) = talking(&server.client()).await;
    let key = effects(&server.client(), &run).await[0]["idempotency_key"].clone();
    server.kill();
    // The endpoint sees that nobody reads on.
    lab.is_idle_within(Duration::from_secs(2)).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let after = seen.last().unwrap().id.clone().unwrap();
    let rest = read(&client, &path, &after, |_| false).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(ended["status"], "success", "{ended}");
    let out = &thread["values"]["out"];
    assert_ne!(seen[0].data[0]["id"], rest[0].data[0]["id"]);
    assert_eq!(json!(joined(&rest).0), out["text"]);
    let told = effects(&client, &run).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert_eq!(
        (&told[0]["status"], &told[0]["sends"], &told[0]["idempotency_key"]),
        (&json!("done"), &json!(2), &key)
    );
}

on_both!(a_cancelled_run_closes_its_connection);

async fn a_cancelled_run_closes_its_connection(kind: Kind, pool: PgPool) {
    // More than it can say in the time that it is given below.
    let lab = Lab::new(kind, &pool, &[("long", &long(80))]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let (one, two) = tokio::join!(talking(&client), talking(&client));
    assert_eq!(lab.engine.busy().await, 2);
    for (thread, run, ..) in [&one, &two] {
        let path = format!("/threads/{thread}/runs/{run}/cancel?wait=1");
        client.call(Method::POST, &path, None).await.unwrap();
    }
    lab.is_idle_within(Duration::from_secs(2)).await;
    for (thread, run, ..) in [&one, &two] {
        let (ended, _) = end(&client, thread, run).await;
        assert_eq!(ended["status"], "interrupted", "{ended}");
    }
    // And serves the next one as before.
    talking(&client).await;
}
