//! `cynai answer`: what waits for a person, and the answers.

use std::io::IsTerminal;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::{Map, Value, json};

use super::client::{Client, ClientArgs, json_argument};
use super::follow::Watch;
use super::form::problem;
use super::run::Conversation;
use super::show;

/// Shown of a question in the list, in characters.
const MOST_SHOWN: usize = 80;

/// List what waits for a person, or answer it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai answer                                  what waits for a person
  cynai answer 0193…                            shows a thread's questions, and asks for the answers
  cynai answer 0193… '{\"action\": \"approve\"}'    answers without asking
  cynai answer 0193… @answer.json --id 5f0c…    answers one of several questions")]
pub(super) struct AnswerArgs {
    /// The thread that waits. Without it, all questions are listed.
    thread: Option<uuid::Uuid>,

    /// The answer as JSON; @FILE reads a file, - reads standard input. With several questions, an object from ids
    /// to answers.
    #[arg(value_name = "JSON|@FILE|-")]
    answer: Option<String>,

    /// Answer only this question.
    #[arg(long, value_name = "QUESTION", requires = "thread")]
    id: Option<String>,

    /// List the questions of at most so many threads.
    #[arg(long, default_value_t = 20)]
    limit: u32,

    /// Do not follow the run: print its id.
    #[arg(long, requires = "thread")]
    no_follow: bool,

    #[command(flatten)]
    client: ClientArgs,
}

/// Runs the command.
pub(super) async fn run(args: AnswerArgs) -> anyhow::Result<()> {
    let client = args.client.client()?;
    let Some(thread) = args.thread else {
        return list(&client, args.limit, args.client.json).await;
    };
    let thread = thread.to_string();
    let given = args.answer.as_deref().map(|text| json_argument("the answer", text)).transpose()?;
    let open = questions_of(&client, &thread).await?;
    let chosen = chosen(&thread, &open, args.id.as_deref())?;
    let watch = match (args.client.json, std::io::stderr().is_terminal()) {
        (true, _) => Watch::Json,
        (false, true) => Watch::Live,
        (false, false) => Watch::Quiet,
    };
    let conversation = Conversation {
        client: &client,
        graph: graph_of(&client, &thread).await?,
        thread: thread.clone(),
        answers: std::collections::VecDeque::new(),
        watch,
    };
    let answers = match given {
        Some(answer) => matched(&chosen, answer)?,
        None => match conversation.ask(&chosen)? {
            Some(Value::Object(answers)) => answers,
            _ => {
                show_questions(&chosen, args.client.json);
                bail!("nobody is at a terminal: give the answer, as in cynai answer {thread} JSON");
            }
        },
    };
    let body = conversation.resume(&Value::Object(answers));
    if args.no_follow { conversation.detach(&body).await } else { conversation.go(body).await }
}

/// Lists the questions of the threads that wait.
async fn list(client: &Client, limit: u32, json: bool) -> anyhow::Result<()> {
    let select = ["thread_id", "state_updated_at", "interrupts"];
    let search = json!({"status": "interrupted", "limit": limit, "select": select});
    let threads = client.post("/threads/search", &search).await?;
    let mut rows = Vec::new();
    for thread in threads.as_array().into_iter().flatten() {
        // One that was cancelled is interrupted too, and asks nothing.
        if thread["interrupts"].as_object().is_none_or(Map::is_empty) {
            continue;
        }
        let Some(id) = thread["thread_id"].as_str() else { continue };
        for mut question in questions_of(client, id).await? {
            question["thread_id"] = id.into();
            question["since"] = thread["state_updated_at"].clone();
            rows.push(question);
        }
    }
    if json {
        rows.iter().for_each(show::json_line);
        return Ok(());
    }
    for row in &mut rows {
        row["words"] = in_short(row).into();
    }
    let columns = [
        ("THREAD", "/thread_id"),
        ("SINCE", "/since"),
        ("NODE", "/node"),
        ("REASON", "/reason"),
        ("QUESTION", "/words"),
    ];
    show::table(&columns, &rows, "nothing waits for a person");
    if !rows.is_empty() {
        show::note("answer with: cynai answer THREAD");
    }
    Ok(())
}

/// A question on one line of a table.
fn in_short(question: &Value) -> String {
    let value = &question["value"];
    let (call, reason) = (&value["sent"], question["reason"].as_str());
    let words = match reason {
        Some("approve_tool") => format!("{} {}", show::text(&value["tool"]), value["arguments"]),
        Some("unknown_outcome") => format!("{} {}", show::text(&call["target"]), call["request"]),
        _ => {
            let keys = ["message", "question", "ask"];
            let words = keys.iter().find_map(|key| value[*key].as_str());
            words.map_or_else(|| show::text(value), str::to_owned)
        }
    };
    let words = show::printable(&words);
    match words.char_indices().nth(MOST_SHOWN) {
        Some((end, _)) => format!("{}…", &words[..end]),
        None => words,
    }
}

/// A thread's open questions: `id`, `value`, `response_schema` as the server tells them, with `node` and `reason`.
async fn questions_of(client: &Client, thread: &str) -> anyhow::Result<Vec<Value>> {
    let state = client.get(&format!("/threads/{thread}/state")).await?;
    let mut questions = Vec::new();
    for task in state["tasks"].as_array().into_iter().flatten() {
        for question in task["interrupts"].as_array().into_iter().flatten() {
            let mut question = question.clone();
            let reason = question["value"]["reason"].as_str();
            let reason = reason.filter(|why| ["approve_tool", "unknown_outcome"].contains(why));
            question["reason"] = reason.unwrap_or("interrupt").into();
            question["node"] = task["name"].clone();
            questions.push(question);
        }
    }
    Ok(questions)
}

/// The questions that are to be answered.
fn chosen(thread: &str, open: &[Value], id: Option<&str>) -> anyhow::Result<Vec<Value>> {
    let Some(id) = id else {
        if open.is_empty() {
            bail!("thread {thread} asks nothing; `cynai answer` lists the threads that do");
        }
        return Ok(open.to_vec());
    };
    let found: Vec<Value> = open.iter().filter(|question| question["id"] == id).cloned().collect();
    if found.is_empty() {
        bail!("thread {thread} has no question {id}; it asks: {}", ids(open));
    }
    Ok(found)
}

/// The graph that goes on: that of the thread's last run.
async fn graph_of(client: &Client, thread: &str) -> anyhow::Result<String> {
    let runs = client.get(&format!("/threads/{thread}/runs?limit=1")).await?;
    let graph = runs[0]["assistant_id"].as_str().map(str::to_owned);
    graph.with_context(|| {
        format!(
            "thread {thread} has no run left that names its graph: cynai run GRAPH --thread {thread} --answer JSON"
        )
    })
}

/// An answer that was given as JSON, by the ids of the questions that it answers; checked against their schemas.
fn matched(open: &[Value], answer: Value) -> anyhow::Result<Map<String, Value>> {
    let knows = |id: &String| open.iter().any(|question| question["id"] == id.as_str());
    let answers = match (open, answer) {
        (_, Value::Object(map)) if !map.is_empty() && map.keys().all(knows) => map,
        ([only], answer) => {
            let id = only["id"].as_str().context("a question has no id")?;
            Map::from_iter([(id.to_owned(), answer)])
        }
        _ => bail!(
            "{} questions wait: name one with --id, or give an object from ids to answers; the ids: {}",
            open.len(),
            ids(open)
        ),
    };
    for question in open {
        let answer = question["id"].as_str().and_then(|id| answers.get(id));
        let wrong = answer.and_then(|answer| problem(question.get("response_schema")?, answer));
        if let Some(why) = wrong {
            bail!(
                "the answer to `{}` does not fit: {why}; wanted is JSON of {}",
                show::text(&question["node"]),
                show::text(&question["response_schema"])
            );
        }
    }
    Ok(answers)
}

fn show_questions(questions: &[Value], json: bool) {
    for question in questions {
        if json {
            show::json_line(question);
        } else {
            show::line(format!(
                "asks {} at `{}`: {}",
                show::text(&question["id"]),
                show::text(&question["node"]),
                super::form::in_words(&question["value"])
            ));
        }
    }
}

fn ids(questions: &[Value]) -> String {
    questions.iter().map(|question| show::text(&question["id"])).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(id: &str) -> Value {
        json!({ "id": id, "value": "?", "node": "ask", "response_schema": { "type": "boolean" } })
    }

    #[test]
    fn an_answer_finds_its_question() {
        let (one, two) = ([question("a")], [question("a"), question("b")]);
        let check = |open: &[Value], answer: Value, expected: Value| {
            assert_eq!(Value::Object(matched(open, answer).unwrap()), expected);
        };
        check(&one, json!(true), json!({ "a": true }));
        check(&one, json!({ "a": false }), json!({ "a": false }));
        check(&two, json!({ "b": true }), json!({ "b": true }));
        check(&two, json!({ "a": true, "b": false }), json!({ "a": true, "b": false }));
    }

    #[test]
    fn an_answer_that_does_not_fit_is_not_sent() {
        let two = [question("a"), question("b")];
        let refused =
            |open: &[Value], answer: Value| matched(open, answer).unwrap_err().to_string();
        assert!(refused(&two, json!(true)).contains("the ids: a, b"));
        assert!(refused(&two, json!({ "a": true, "c": true })).contains("2 questions wait"));
        assert!(refused(&two[..1], json!("yes")).contains("the answer to `ask` does not fit"));
        assert!(refused(&two, json!({ "b": 1 })).contains("does not fit"));
        // Without a schema everything is an answer.
        let free = json!({ "id": "a", "value": "?", "node": "ask" });
        assert!(matched(&[free], json!([1])).is_ok());
        assert!(chosen("t", &two, Some("c")).unwrap_err().to_string().contains("a, b"));
        assert!(chosen("t", &[], None).is_err());
    }
}
