//! `cynai run`: starts a run, follows it, answers what it asks, prints what came out.

use std::collections::VecDeque;
use std::io::{BufRead, IsTerminal, Write};

use anyhow::{Context, bail};
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs, json_argument};
use super::follow::{Watch, follow};
use super::show;

/// Start a run of a graph and follow it to its end.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai run triage --input '{\"files\": [\"a.log\"]}'
  cynai run triage --input @input.json --json
  cynai run triage --thread 0193… --answer true     answers what the thread waits for
  cynai run triage --thread 0193… --checkpoint 00…  goes on from an earlier state, on a branch of its own

The run goes on when this command is interrupted: `cynai runs list` finds it again.")]
pub(super) struct RunArgs {
    /// A graph's name, or an assistant's id.
    graph: String,

    /// The run's input as JSON; @FILE reads a file, - reads standard input.
    #[arg(long, value_name = "JSON|@FILE|-")]
    input: Option<String>,

    /// Run on this thread instead of a new one.
    #[arg(long, value_name = "ID")]
    thread: Option<uuid::Uuid>,

    /// Go on from this checkpoint of the thread (`cynai threads history`), on a new branch.
    #[arg(long, value_name = "ID", requires = "thread")]
    checkpoint: Option<String>,

    /// An answer to what the run asks, as JSON; several are used in turn.
    #[arg(long = "answer", value_name = "JSON|@FILE")]
    answers: Vec<String>,

    /// Show progress [default: when standard error is a terminal].
    #[arg(long, conflicts_with = "detach")]
    follow: bool,

    /// Do not wait: print the run's id.
    #[arg(long)]
    detach: bool,

    #[command(flatten)]
    client: ClientArgs,
}

/// Runs the command.
pub(super) async fn run(args: RunArgs) -> anyhow::Result<()> {
    let input = args.input.as_deref().map(|input| json_argument("--input", input)).transpose()?;
    let answers = args.answers.iter().map(|answer| json_argument("--answer", answer));
    let mut answers = answers.collect::<anyhow::Result<VecDeque<_>>>()?;
    let client = args.client.client()?;
    let thread = match args.thread {
        Some(thread) => thread.to_string(),
        None => new_thread(&client).await?,
    };
    let mut body = match (args.thread, input) {
        (_, input) if args.checkpoint.is_some() => {
            json!({"assistant_id": args.graph, "input": input, "checkpoint_id": args.checkpoint})
        }
        (Some(_), None) if !answers.is_empty() => resume(&args.graph, answers.pop_front()),
        (_, input) => {
            json!({"assistant_id": args.graph, "input": input.unwrap_or_else(|| json!({}))})
        }
    };
    if args.detach {
        return detach(&client, &args, &thread, &body).await;
    }
    let watch = args.watch();
    loop {
        let values = one(&client, &thread, body, watch).await?;
        if let Some(error) = values.get("__error__") {
            bail!(
                "the run failed: {}: {}",
                show::text(&error["error"]),
                show::text(&error["message"])
            );
        }
        let Some(asked) = values.get("__interrupt__").and_then(Value::as_array).cloned() else {
            finish(&args, &thread, &values);
            return Ok(());
        };
        let answer =
            answers.pop_front().map_or_else(|| ask(&args, &asked), |answer| Ok(Some(answer)));
        let Some(answer) = answer? else {
            return unanswered(&args, &thread, &values, &asked);
        };
        body = resume(&args.graph, Some(answer));
    }
}

impl RunArgs {
    fn watch(&self) -> Watch {
        if self.client.json {
            Watch::Json
        } else if self.follow || std::io::stderr().is_terminal() {
            Watch::Live
        } else {
            Watch::Quiet
        }
    }
}

fn resume(graph: &str, answer: Option<Value>) -> Value {
    json!({"assistant_id": graph, "command": {"resume": answer}})
}

async fn new_thread(client: &Client) -> anyhow::Result<String> {
    let thread = client.post("/threads", &json!({})).await?;
    let id = thread["thread_id"].as_str().context("the server made no thread")?;
    Ok(id.to_owned())
}

async fn detach(client: &Client, args: &RunArgs, thread: &str, body: &Value) -> anyhow::Result<()> {
    let run = client.post(&format!("/threads/{thread}/runs"), body).await?;
    if args.client.json {
        show::json_line(&run);
    } else {
        show::line(show::text(&run["run_id"]));
        show::note(format!(
            "on thread {thread}; `cynai runs show {}` shows it",
            show::text(&run["run_id"])
        ));
    }
    Ok(())
}

/// Starts a run, follows it to its end, and reads its values.
async fn one(
    client: &Client,
    thread: &str,
    mut body: Value,
    watch: Watch,
) -> anyhow::Result<Value> {
    body["stream_mode"] = json!(["tasks", "custom"]);
    body["stream_resumable"] = true.into();
    let path = format!("/threads/{thread}/runs/stream");
    let response = client.open(Method::POST, &path, Some(&body), &[]).await?;
    let run = follow(client, response, watch).await?;
    client.get(&format!("{run}/join")).await
}

/// Asks the person at the terminal; `None` when there is none.
fn ask(args: &RunArgs, asked: &[Value]) -> anyhow::Result<Option<Value>> {
    if args.client.json || !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        return Ok(None);
    }
    let mut answers = serde_json::Map::new();
    for question in asked {
        let id = question["id"].as_str().context("a question has no id")?;
        answers.insert(id.to_owned(), ask_one(question)?);
    }
    Ok(Some(Value::Object(answers)))
}

fn ask_one(question: &Value) -> anyhow::Result<Value> {
    show::note(format!("\n{}", show::text(&question["value"])));
    if let Some(schema) = question.get("response_schema").filter(|schema| !schema.is_null()) {
        show::note(format!("  (an answer is JSON of {schema})"));
    }
    let mut stderr = std::io::stderr();
    write!(stderr, "> ").and_then(|()| stderr.flush()).context("could not ask")?;
    let mut line = String::new();
    if std::io::stdin().lock().read_line(&mut line).context("could not read the answer")? == 0 {
        bail!("no answer was given");
    }
    let line = line.trim();
    Ok(serde_json::from_str(line).unwrap_or_else(|_| line.into()))
}

fn finish(args: &RunArgs, thread: &str, values: &Value) {
    if args.client.json {
        show::json_line(&json!({"event": "result", "data": values, "thread_id": thread}));
    } else {
        show::pretty(values);
        show::note(format!("thread {thread}"));
    }
}

/// A run that waits for a person is no failure: its thread keeps the question.
fn unanswered(args: &RunArgs, thread: &str, values: &Value, asked: &[Value]) -> anyhow::Result<()> {
    if args.client.json {
        show::json_line(&json!({"event": "result", "data": values, "thread_id": thread}));
        return Ok(());
    }
    for question in asked {
        show::line(format!(
            "asks {}: {}",
            show::text(&question["id"]),
            show::text(&question["value"])
        ));
    }
    show::note(format!(
        "answer with: cynai run {} --thread {thread} --answer JSON{}",
        args.graph,
        if asked.len() > 1 { " (an object: id of the question -> answer)" } else { "" }
    ));
    Ok(())
}
