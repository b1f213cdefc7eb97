//! `cynai run`: starts a run, follows it, answers what it asks, prints what came out.

use std::collections::VecDeque;
use std::io::IsTerminal;

use anyhow::{Context, bail};
use clap::Args;
use reqwest::Method;
use serde_json::{Value, json};

use super::client::{Client, ClientArgs, json_argument};
use super::follow::{Watch, follow};
use super::form::Form;
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
    let answers = answers.collect::<anyhow::Result<VecDeque<_>>>()?;
    let client = args.client.client()?;
    let thread = match args.thread {
        Some(thread) => thread.to_string(),
        None => new_thread(&client).await?,
    };
    let watch = args.watch();
    let mut conversation =
        Conversation { client: &client, graph: args.graph.clone(), thread, answers, watch };
    let body = match (args.thread, input) {
        (_, input) if args.checkpoint.is_some() => {
            json!({"assistant_id": args.graph, "input": input, "checkpoint_id": args.checkpoint})
        }
        (Some(_), None) if !conversation.answers.is_empty() => {
            let answer = conversation.answers.pop_front().unwrap_or_default();
            conversation.resume(&answer)
        }
        (_, input) => {
            json!({"assistant_id": args.graph, "input": input.unwrap_or_else(|| json!({}))})
        }
    };
    if args.detach {
        return conversation.detach(&body).await;
    }
    conversation.go(body).await
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

async fn new_thread(client: &Client) -> anyhow::Result<String> {
    let thread = client.post("/threads", &json!({})).await?;
    let id = thread["thread_id"].as_str().context("the server made no thread")?;
    Ok(id.to_owned())
}

/// Runs on one thread, as long as it asks and is answered.
#[derive(Debug)]
pub(super) struct Conversation<'a> {
    /// The server.
    pub(super) client: &'a Client,
    /// A graph's name, or an assistant's id.
    pub(super) graph: String,
    /// The thread's id.
    pub(super) thread: String,
    /// Answers to what will be asked, used in turn.
    pub(super) answers: VecDeque<Value>,
    /// What is shown of the runs.
    pub(super) watch: Watch,
}

impl Conversation<'_> {
    /// The request of a run that brings an answer.
    pub(super) fn resume(&self, answer: &Value) -> Value {
        json!({"assistant_id": self.graph, "command": {"resume": answer}})
    }

    /// Starts the run of `body`, and those that answer what it asks, and prints what came out.
    pub(super) async fn go(mut self, mut body: Value) -> anyhow::Result<()> {
        loop {
            let values = self.one(body).await?;
            if let Some(error) = values.get("__error__") {
                bail!(
                    "the run failed: {}: {}",
                    show::text(&error["error"]),
                    show::text(&error["message"])
                );
            }
            let Some(asked) = values.get("__interrupt__").and_then(Value::as_array).cloned() else {
                self.finish(&values);
                return Ok(());
            };
            let answer = match self.answers.pop_front() {
                Some(answer) => Some(answer),
                None => self.ask(&asked)?,
            };
            let Some(answer) = answer else {
                self.unanswered(&values, &asked);
                return Ok(());
            };
            body = self.resume(&answer);
        }
    }

    /// Starts the run of `body`, prints its id, and leaves it.
    pub(super) async fn detach(&self, body: &Value) -> anyhow::Result<()> {
        let run = self.client.post(&format!("/threads/{}/runs", self.thread), body).await?;
        if self.watch == Watch::Json {
            show::json_line(&run);
        } else {
            let id = show::text(&run["run_id"]);
            show::line(&id);
            show::note(format!("on thread {}; `cynai runs show {id}` shows it", self.thread));
        }
        Ok(())
    }

    /// Starts a run, follows it to its end, and reads its values.
    async fn one(&self, mut body: Value) -> anyhow::Result<Value> {
        body["stream_mode"] = json!(self.watch.modes());
        body["stream_resumable"] = true.into();
        let path = format!("/threads/{}/runs/stream", self.thread);
        let response = self.client.open(Method::POST, &path, Some(&body), &[]).await?;
        let run = follow(self.client, response, self.watch).await?;
        self.client.get(&format!("{run}/join")).await
    }

    /// Asks the person at the terminal; `None` when there is none. The answers are by the ids of the questions.
    pub(super) fn ask(&self, asked: &[Value]) -> anyhow::Result<Option<Value>> {
        let is_terminal = std::io::stdin().is_terminal() && std::io::stderr().is_terminal();
        if self.watch == Watch::Json || !is_terminal {
            return Ok(None);
        }
        let mut form = Form::new(std::io::stdin().lock(), std::io::stderr());
        let mut answers = serde_json::Map::new();
        for question in asked {
            let id = question["id"].as_str().context("a question has no id")?;
            answers.insert(id.to_owned(), form.answer(question)?);
        }
        Ok(Some(Value::Object(answers)))
    }

    fn finish(&self, values: &Value) {
        if self.watch == Watch::Json {
            show::json_line(&json!({"event": "result", "data": values, "thread_id": self.thread}));
        } else {
            show::pretty(values);
            show::note(format!("thread {}", self.thread));
        }
    }

    /// A run that waits for a person is no failure: its thread keeps the question.
    fn unanswered(&self, values: &Value, asked: &[Value]) {
        let thread = &self.thread;
        if self.watch == Watch::Json {
            show::json_line(&json!({"event": "result", "data": values, "thread_id": thread}));
            return;
        }
        for question in asked {
            show::line(format!(
                "asks {}: {}",
                show::text(&question["id"]),
                show::text(&question["value"])
            ));
        }
        let several =
            if asked.len() > 1 { " (an object: id of the question -> answer)" } else { "" };
        show::note(format!("answer with: cynai answer {thread} JSON{several}"));
    }
}
