//! An `agent`: calls side by side, what a model gets wrong, people who decide, and where it stops.

use reqwest::StatusCode;
use serde_json::{Value, json};
use sqlx::PgPool;

use super::{Desk, asks, effects, end, start, start_on, values};
use crate::support::client::CallError;
use crate::support::model_endpoint::Script;
use crate::support::server::Start;

/// A graph of one agent.
fn agent(name: &str, more: &str) -> String {
    format!(
        r#"
name: {name}
state: {{ task: {{ type: string }}, out: {{}}, failure: {{}} }}
input: [task]
nodes:
  work:
    agent:
      system: You work.
      prompt: "{{{{ state.task }}}}"
      {more}
    set: {{ out: "${{output}}" }}
    on_error: failed
  failed: {{ set: {{ failure: "${{error}}" }} }}
edges: [ start -> work -> end, failed -> end ]
"#
    )
}

/// The messages of a request, in short: who speaks, of which call, and what is said.
fn said(body: &Value) -> Vec<(String, String, String)> {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let messages = body["messages"].as_array().unwrap().iter();
    messages
        .map(|one| (text(&one["role"]), text(&one["tool_call_id"]), text(&one["content"])))
        .collect()
}

#[sqlx::test]
async fn calls_go_side_by_side_and_what_is_wrong_with_them_is_for_the_model_to_read(pool: PgPool) {
    let work = agent("work", "tools: [\"s/echo\", \"s/add\", \"s/slow\", \"s/fail\"]");
    let desk = Desk::new(&pool, &[("work", &work)]).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    desk.endpoint.plays([
        asks(&[
            ("call_0", "s__slow", r#"{"seconds": 0.5}"#),
            ("call_1", "s__slow", r#"{"seconds": 0.5}"#),
            ("call_2", "s__echo", r#"{"a": 1}"#),
        ]),
        // The same ids again, as endpoints give that count from 0.
        asks(&[
            ("call_0", "s__die", "{}"),
            ("call_1", "s__echo", "{\"a\": "),
            ("call_2", "s__add", r#"{"a": 1}"#),
            ("call_3", "s__fail", "{}"),
        ]),
        asks(&[("call_0", "s__echo", "[1]")]),
        Script::text(&["All ", "done."]),
    ]);
    let begun = std::time::Instant::now();
    let (run, values) = values(&client, "work", json!({ "task": "Do it." })).await;
    let out = &values["out"];
    assert_eq!(out["text"], "All done.", "{values}");
    let counts =
        ["turns", "tool_calls", "input_tokens", "output_tokens"].map(|name| out[name].clone());
    assert_eq!((counts, &out["stopped"]), ([4, 8, 40, 8].map(Value::from), &Value::Null));
    assert!(begun.elapsed() < std::time::Duration::from_secs(20));

    let calls = desk.endpoint.calls();
    let offered = calls[0].body["tools"].as_array().unwrap().iter();
    let offered: Vec<&str> =
        offered.map(|tool| tool["function"]["name"].as_str().unwrap()).collect();
    assert_eq!(offered, ["s__echo", "s__add", "s__slow", "s__fail"]);
    let last = said(&calls[3].body);
    let expected = [
        ("system", "", "You work."),
        ("user", "", "Do it."),
        ("assistant", "", ""),
        ("tool", "call_0", "at last"),
        ("tool", "call_1", "at last"),
        ("tool", "call_2", "{\"a\": 1}"),
        ("assistant", "", ""),
    ];
    for (at, (role, id, text)) in expected.iter().enumerate() {
        assert_eq!(
            last[at],
            ((*role).to_owned(), (*id).to_owned(), (*text).to_owned()),
            "{last:?}"
        );
    }
    // Those whose arguments can be read come first.
    let told = |id: &str| {
        let found = last[7..11].iter().find(|(role, of, _)| role == "tool" && of == id);
        found.unwrap_or_else(|| panic!("no answer to {id}: {last:?}")).2.clone()
    };
    assert_eq!(
        told("call_0"),
        "There is no tool `s__die`. There are: s__echo, s__add, s__slow, s__fail."
    );
    assert!(
        told("call_1").contains("must be a JSON object (the arguments are no JSON"),
        "{last:?}"
    );
    assert!(told("call_2").contains("list"), "{last:?}");
    assert_eq!(told("call_3"), "it did not work");
    let (role, id, text) = &last[12];
    assert_eq!((role.as_str(), id.as_str()), ("tool", "call_0"));
    assert!(text.contains("must be a JSON object"), "{text}");

    // Intents and outcomes: of each turn, and of each call that does more than look and was made.
    let listed = effects(&client, &run).await;
    let mut kinds: Vec<(&str, &str)> = listed
        .iter()
        .map(|one| (one["target"].as_str().unwrap(), one["status"].as_str().unwrap()))
        .collect();
    kinds.sort_unstable();
    let turns = [("default", "done"); 4];
    let made = [("s/add", "done"), ("s/fail", "done"), ("s/slow", "done"), ("s/slow", "done")];
    assert_eq!(kinds, [turns, made].concat());
    let mut keys: Vec<String> = listed
        .iter()
        .filter(|one| ["s/slow", "s/fail"].contains(&one["target"].as_str().unwrap()))
        .map(|one| one["idempotency_key"].as_str().unwrap().to_owned())
        .collect();
    let calls = desk.tool_calls().into_iter().filter(|(name, _)| name != "echo");
    let mut sent: Vec<String> = calls.map(|(_, key)| key).collect();
    keys.sort_unstable();
    sent.sort_unstable();
    assert_eq!(keys, sent);
    assert_eq!(desk.endpoint.calls_by_key().len(), 4);
}

#[sqlx::test]
async fn a_person_lets_a_call_be_made_changes_it_or_rejects_it(pool: PgPool) {
    let work = agent(
        "work",
        "tools: [\"s/*\"]\n      approve: [\"s/novel\", \"s/env\", \"s/hang\", \"s/echo\"]",
    );
    let desk = Desk::new(&pool, &[("work", &work)]).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    desk.endpoint.plays([
        asks(&[
            ("a", "s__echo", r#"{"n": 1}"#),
            ("b", "s__echo", r#"{"n": 2}"#),
            ("c", "s__echo", r#"{"n": 3}"#),
            ("d", "s__parts", "{}"),
        ]),
        Script::text(&["Well."]),
    ]);
    let (thread, run) = start(&client, "work", json!({ "input": { "task": "Do it." } })).await;
    let (_, asking) = end(&client, &thread, &run).await;
    assert_eq!(asking["status"], "interrupted", "{asking}");
    // What nobody has to look at is done; the rest waits.
    let called: Vec<String> = desk.tool_calls().into_iter().map(|(name, _)| name).collect();
    assert_eq!(called, ["parts"]);
    let questions = asking["interrupts"].as_object().unwrap().values();
    let questions: Vec<Value> = questions.flat_map(|of| of.as_array().unwrap().clone()).collect();
    assert_eq!(questions.len(), 3, "{asking}");
    let mut answers = serde_json::Map::new();
    for question in &questions {
        assert_eq!(
            (&question["value"]["reason"], &question["value"]["tool"]),
            (&json!("approve_tool"), &json!("s/echo"))
        );
        let answer = match question["value"]["arguments"]["n"].as_i64().unwrap() {
            1 => json!({ "action": "approve" }),
            2 => json!({ "action": "approve", "arguments": { "n": 20 } }),
            _ => json!({ "action": "reject", "reason": "not today" }),
        };
        answers.insert(question["id"].as_str().unwrap().to_owned(), answer);
    }
    let mut wrong = answers.clone();
    for answer in wrong.values_mut() {
        *answer = json!({ "action": "perhaps" });
    }
    let refused =
        client.start_run(&thread, "work", json!({ "command": { "resume": wrong } })).await;
    let Err(CallError::Refused(status, _)) = refused else { panic!("{refused:?}") };
    assert_eq!(status, StatusCode::UNPROCESSABLE_ENTITY);

    // One answer first: nothing goes on before the others.
    let first = questions[0]["id"].as_str().unwrap().to_owned();
    let one = json!({ "command": { "resume": { &first: answers[&first] } } });
    let run = start_on(&client, &thread, "work", one).await;
    let (_, asking) = end(&client, &thread, &run).await;
    assert_eq!(asking["status"], "interrupted", "{asking}");
    answers.remove(&first);
    assert_eq!(desk.endpoint.calls().len(), 1);
    let run = start_on(&client, &thread, "work", json!({ "command": { "resume": answers } })).await;
    let (ended, thread) = end(&client, &thread, &run).await;
    assert_eq!(
        (&ended["status"], &thread["values"]["out"]["text"]),
        (&json!("success"), &json!("Well."))
    );
    let last = said(&desk.endpoint.calls()[1].body);
    let told: Vec<(&str, &str)> = last
        .iter()
        .filter(|one| one.0 == "tool")
        .map(|one| (one.1.as_str(), one.2.as_str()))
        .collect();
    assert_eq!(
        told[..3],
        [
            ("a", "{\"n\": 1}"),
            ("b", "{\"n\": 20}"),
            ("c", "A person rejected this call: not today"),
        ]
    );
    assert_eq!(desk.tool_calls().len(), 3, "what was done before the question is not done again");
}

#[sqlx::test]
async fn a_tool_that_has_to_be_called_is_asked_for_once_and_its_absence_is_a_failure(pool: PgPool) {
    let more = "tools: [\"s/*\"]\n      tool_choice: ";
    let graphs = [("any", "required"), ("one", "s/echo")]
        .map(|(name, choice)| (name, agent(name, &format!("{more}{choice}"))));
    let graphs: Vec<(&str, &str)> =
        graphs.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let desk = Desk::new(&pool, &graphs).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    let one = json!({ "type": "function", "function": { "name": "s__echo" } });
    for (graph, wanted) in [("any", json!("required")), ("one", one)] {
        let before = desk.endpoint.calls().len();
        desk.endpoint.plays([asks(&[("a", "s__echo", "{}")]), Script::text(&["Done."])]);
        let (run, got) = values(&client, graph, json!({ "task": "Do it." })).await;
        assert_eq!((&got["out"]["text"], &got["out"]["tool_calls"]), (&json!("Done."), &json!(1)));
        let calls = desk.endpoint.calls();
        let choices: Vec<_> =
            calls[before..].iter().map(|call| &call.body["tool_choice"]).collect();
        assert_eq!(choices, [&wanted, &json!("auto")]);
        let told = effects(&client, &run).await[0]["request"]["tool_choice"].clone();
        assert_eq!(told, if graph == "any" { "required" } else { "s/echo" });

        desk.endpoint.plays([Script::text(&["I would rather talk."])]);
        let (_, got) = values(&client, graph, json!({ "task": "Do it." })).await;
        assert_eq!(got["failure"]["kind"], "unsupported", "{got}");
        let message = got["failure"]["message"].as_str().unwrap();
        assert!(message.contains("`tool_choice` wants a call"), "{message}");
    }
}

#[sqlx::test]
async fn an_agent_stops_at_its_limits_and_leaves_no_call_without_an_answer(pool: PgPool) {
    let limits = [
        ("turns", "turns: 2"),
        ("calls", "calls: 2"),
        ("tokens", "tokens: 24"),
        ("cost", "cost_usd: 0.0"),
        ("duration", "duration: 1ms"),
    ];
    let graphs: Vec<(&str, String)> = limits
        .iter()
        .map(|(name, limit)| {
            (*name, agent(name, &format!("tools: [\"s/slow\"]\n      limits: {{ {limit} }}")))
        })
        .collect();
    let graphs: Vec<(&str, &str)> =
        graphs.iter().map(|(name, text)| (*name, text.as_str())).collect();
    let desk = Desk::new(&pool, &graphs).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    for (limit, made) in [("turns", 2), ("calls", 2), ("tokens", 2), ("cost", 0), ("duration", 2)] {
        let two = || {
            asks(&[
                ("call_0", "s__slow", r#"{"seconds": 0.01}"#),
                ("call_1", "s__slow", "{\"seconds\": 0.01}"),
            ])
        };
        let turns = if made == 0 { 1 } else { 2 };
        desk.endpoint.plays(std::iter::repeat_with(two).take(turns));
        let before = desk.tool_calls().len();
        let (_, values) = values(&client, limit, json!({ "task": "Do it." })).await;
        let out = &values["out"];
        assert_eq!((&out["stopped"], &out["turns"]), (&json!(limit), &json!(turns)), "{values}");
        assert_eq!(desk.tool_calls().len() - before, made, "{limit}");
        // The conversation can go on: each call has its answer, and those that were not made say so.
        let messages = out["messages"].as_array().unwrap();
        let answers: Vec<&Value> = messages.iter().filter(|one| one["type"] == "tool").collect();
        assert_eq!(answers.len(), 2 * turns, "{limit}: {out}");
        for answer in &answers[made..] {
            assert_eq!(answer["status"], "error");
            assert!(answer["content"].as_str().unwrap().contains("limit"), "{answer}");
            assert!(answer["id"].is_string());
        }
    }
}

#[sqlx::test]
async fn the_last_answer_fits_its_schema_after_tools_as_well(pool: PgPool) {
    let more = "tools: [\"s/echo\"]\n      schema: { type: object, properties: { n: { type: integer } }, required: [n] }";
    let work = agent("work", more);
    let desk = Desk::new(&pool, &[("work", &work)]).await;
    let server = desk.site.start(&Start::default()).await;
    let client = server.client();
    desk.endpoint.plays([
        asks(&[("a", "s__echo", "{}")]),
        Script::text(&["It is seven."]),
        Script::text(&["{\"n\": 7}"]),
    ]);
    let (_, got) = values(&client, "work", json!({ "task": "Count." })).await;
    assert_eq!((&got["out"]["json"], &got["out"]["turns"]), (&json!({ "n": 7 }), &json!(2)));
    assert_eq!(got["out"]["input_tokens"], 30);
    let calls = desk.endpoint.calls();
    assert!(calls[2].body["tools"].is_null() && calls[1].body["tools"].is_array());
    assert_eq!(desk.endpoint.calls_by_key().len(), 3, "another request has another key");

    // The endpoint refuses: the attempt has failed, and so has the agent; `retry` was not asked for.
    desk.endpoint.plays([Script::error("400 Bad Request", "no")]);
    let (run, got) = values(&client, "work", json!({ "task": "Count." })).await;
    assert_eq!(got["failure"]["kind"], "bad_request", "{got}");
    assert_eq!(effects(&client, &run).await[0]["status"], "failed");
}
