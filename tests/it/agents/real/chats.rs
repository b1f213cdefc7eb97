//! A message, whole and in pieces; two runs at a time.

use std::time::Instant;

use serde_json::{Value, json};
use sqlx::PgPool;

use super::super::{Event, effects, end, read, start};
use super::{Kind, Lab, NAME, on_both};
use crate::support::server::Start;

const TALK: &str = r#"
name: talk
state: { say: { type: string }, out: {}, short: {} }
input: [say]
nodes:
  think:
    model: { prompt: "{{ state.say }}", sampling: { temperature: 0, max_tokens: 150 } }
    set: { out: "${output}" }
  cut:
    model: { prompt: "{{ state.say }}", sampling: { temperature: 0, max_tokens: 4 } }
    set: { short: "${output}" }
edges: [ start -> think -> cut -> end ]
"#;

const SAY: [&str; 2] = ["Tell me a story about a fox.", "Tell me a story about a ship."];

on_both!(an_answer_has_words_a_reason_and_its_usage);

async fn an_answer_has_words_a_reason_and_its_usage(kind: Kind, pool: PgPool) {
    let lab = Lab::new(kind, &pool, &[("talk", TALK)]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let listed = client.get("/v1/model-endpoints").await.unwrap();
    assert!(listed.to_string().contains(NAME), "{listed}");
    let runs = SAY.map(|say| start(&client, "talk", json!({ "input": { "say": say } })));
    for (thread, run) in futures::future::join_all(runs).await {
        let (ended, thread) = end(&client, &thread, &run).await;
        assert_eq!(ended["status"], "success", "{ended}");
        let values = &thread["values"];
        for (out, most) in [(&values["out"], 150), (&values["short"], 4)] {
            assert!(!out["text"].as_str().unwrap().trim().is_empty(), "{out}");
            let count = |name: &str| out["usage"][name].as_u64().unwrap();
            let (input, output) = (count("input"), count("output"));
            assert!(input > 5 && (1..=most).contains(&output), "{out}");
            assert_eq!((count("total"), count("unreported")), (input + output, 0), "{out}");
            let metadata = &out["message"]["usage_metadata"];
            assert_eq!(
                (&metadata["input_tokens"], &metadata["output_tokens"]),
                (&json!(input), &json!(output))
            );
            let reason = if output < most { "stop" } else { "length" };
            assert_eq!(out["finish_reason"], reason, "{out}");
            assert_eq!(
                (&out["model"], &out["endpoint"], &out["attempts"]),
                (&json!(NAME), &json!("e"), &json!(1))
            );
            assert!(out["usage"]["cost_usd"].as_f64().unwrap() > 0.0, "{out}");
        }
        assert_eq!(values["short"]["finish_reason"], "length");
        let told: Vec<Value> =
            effects(&client, &run).await.iter().map(|one| one["status"].clone()).collect();
        assert_eq!(told, ["done", "done"]);
    }
}

/// The text that the pieces of the first message say together, and how many said something.
pub(super) fn joined(events: &[Event]) -> (String, usize) {
    let of_first = events.iter().filter(|event| event.data[0]["id"] == events[0].data[0]["id"]);
    let pieces: Vec<&str> =
        of_first.map(|event| event.data[0]["content"].as_str().unwrap()).collect();
    (pieces.concat(), pieces.iter().filter(|piece| !piece.is_empty()).count())
}

on_both!(tokens_arrive_one_after_the_other);

async fn tokens_arrive_one_after_the_other(kind: Kind, pool: PgPool) {
    let lab = Lab::new(kind, &pool, &[("talk", TALK)]).await;
    let server = lab.site.start(&Start::default()).await;
    let client = server.client();
    let follow = async |say: &str| {
        let request = json!({ "input": { "say": say }, "stream_mode": ["messages-tuple"] });
        let (thread, run) = start(&client, "talk", request).await;
        let path = format!("/threads/{thread}/runs/{run}/stream?stream_mode=messages-tuple");
        let mut arrivals = Vec::new();
        let events = read(&client, &path, "-1", |events| {
            arrivals.resize(events.len(), Instant::now());
            false
        })
        .await;
        let (_, thread) = end(&client, &thread, &run).await;
        (events, arrivals, thread["values"]["out"].clone())
    };
    let (one, two) = tokio::join!(follow(SAY[0]), follow(SAY[1]));
    // The two were made side by side.
    assert!(one.1[0] < *two.1.last().unwrap() && two.1[0] < *one.1.last().unwrap());
    for (events, arrivals, out) in [one, two] {
        let (text, pieces) = joined(&events);
        assert_eq!(json!(text), out["text"]);
        assert_eq!(events[0].data[0]["id"], out["message"]["id"]);
        // A token has a letter at least.
        assert!(pieces > 20, "{pieces} pieces: {text}");
        let mut moments = arrivals;
        moments.dedup();
        assert!(moments.len() > 10, "they came in {} moments", moments.len());
    }
}
