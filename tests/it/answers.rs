//! `cynai answer` and the live view of `cynai run`, as processes against a real server.

use std::process::{Output, Stdio};

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use uuid::Uuid;

use crate::support::agent;
use crate::support::model_endpoint::ModelEndpoint;
use crate::support::server::{Server, Site, Start};

const PROGRAM: &str = env!("CARGO_BIN_EXE_cynai");

const ASKS: &str = r#"
name: asks
state:
  color: { type: string }
  more: { type: boolean }
input: []
nodes:
  color:
    interrupt:
      ask: { question: "Which color?" }
      schema:
        type: object
        properties:
          color: { enum: [red, blue] }
          sure: { type: boolean }
          why: { type: string }
        required: [color, sure]
        additionalProperties: false
    set: { color: "${output.color}" }
  more:
    interrupt: { ask: "Any more?", schema: { type: boolean } }
    set: { more: "${output}" }
edges: [start -> color -> end, start -> more -> end]
"#;

const ONE: &str = r#"
name: one
state:
  more: { type: boolean }
input: []
nodes:
  more:
    interrupt: { ask: "Any more?", schema: { type: boolean } }
    set: { more: "${output}" }
edges: [start -> more -> end]
"#;

/// A server and its clients.
struct Town {
    server: Server,
    token: String,
    endpoint: ModelEndpoint,
    site: Site,
}

impl Town {
    async fn new() -> Self {
        let endpoint = ModelEndpoint::start().await;
        let site = agent::site(&endpoint, &[("asks", ASKS), ("one", ONE)]);
        let server = site.start(&Start::default()).await;
        let token = std::fs::read_to_string(site.path("token")).unwrap().trim().to_owned();
        Self { server, token, endpoint, site }
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env_clear()
            .env("PATH", "/usr/bin:/bin")
            .env("CYNAI_SERVER", self.server.address())
            .env("CYNAI_TOKEN", &self.token)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn cynai(&self, arguments: &[&str]) -> Output {
        self.command(PROGRAM).args(arguments).output().await.unwrap()
    }

    async fn good(&self, arguments: &[&str]) -> String {
        let output = self.cynai(arguments).await;
        assert!(output.status.success(), "{arguments:?} {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    async fn bad(&self, arguments: &[&str]) -> String {
        let output = self.cynai(arguments).await;
        assert_eq!(output.status.code(), Some(1), "{arguments:?} {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    /// Starts a run on a thread of its own, which comes to its questions.
    async fn asking(&self, graph: &str) -> String {
        let thread = Uuid::now_v7().to_string();
        let client = self.server.client();
        client.ensure_thread(&thread).await.unwrap();
        let request = json!({"assistant_id": graph, "input": {}});
        let values = client.post(&format!("/threads/{thread}/runs/wait"), &request).await.unwrap();
        assert!(values.get("__interrupt__").is_some(), "{values}");
        thread
    }

    async fn questions(&self) -> Vec<Value> {
        let listed = self.good(&["answer", "--json"]).await;
        listed.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    async fn values(&self, thread: &str) -> Value {
        let state = self.server.client().get(&format!("/threads/{thread}/state")).await.unwrap();
        state["values"].clone()
    }

    /// At a terminal, with these lines typed.
    async fn at_a_terminal(&self, arguments: &str, typed: &str) -> Output {
        let mut command = self.command("script");
        command.args(["-qefc", &format!("{PROGRAM} {arguments}"), "/dev/null"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.env("TERM", "dumb").spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        input.write_all(typed.as_bytes()).await.unwrap();
        let output = child.wait_with_output().await.unwrap();
        drop(input);
        output
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn questions_are_listed_and_answered_with_json() {
    let town = Town::new().await;
    let nothing = town.cynai(&["answer"]).await;
    assert!(nothing.status.success() && nothing.stdout.is_empty(), "{nothing:?}");
    let (both, one) = (town.asking("asks").await, town.asking("one").await);
    let listed = town.good(&["answer"]).await;
    assert!(listed.contains(&both) && listed.contains("Which color?"), "{listed}");
    let questions = town.questions().await;
    let of = |thread: &str, node: &str| {
        let found = questions.iter().find(|q| q["thread_id"] == thread && q["node"] == node);
        found.unwrap_or_else(|| panic!("{questions:?}")).clone()
    };
    assert_eq!(questions.len(), 3);
    assert_eq!(of(&one, "more")["reason"], "interrupt");
    assert!(of(&one, "more")["since"].is_string());
    assert_eq!(of(&both, "color")["response_schema"]["required"], json!(["color", "sure"]));

    // What does not fit is not sent.
    let wrong = town.bad(&["answer", &one, "\"yes\""]).await;
    assert!(wrong.contains("does not fit") && wrong.contains("boolean"), "{wrong}");
    let runs = town.good(&["runs", "list", "--thread", &one, "--json"]).await;
    assert_eq!(runs.lines().count(), 1, "a wrong answer started a run");
    // Nobody is there to be asked.
    let nobody = town.bad(&["answer", &one]).await;
    assert!(nobody.contains("nobody is at a terminal"), "{nobody}");

    let values: Value = serde_json::from_str(&town.good(&["answer", &one, "true"]).await).unwrap();
    assert_eq!(values, json!({"more": true}));
    assert!(town.bad(&["answer", &one, "true"]).await.contains("asks nothing"));

    // Of several, one after the other by its id, or all at once.
    let (color, more) = (of(&both, "color"), of(&both, "more"));
    let (color, more) = (color["id"].as_str().unwrap(), more["id"].as_str().unwrap());
    let unnamed = town.bad(&["answer", &both, "true"]).await;
    assert!(unnamed.contains("--id") && unnamed.contains(color), "{unnamed}");
    assert!(town.bad(&["answer", &both, "1", "--id", "x"]).await.contains(more));
    town.good(&["answer", &both, "false", "--id", more]).await;
    let left = town.questions().await;
    assert_eq!(left.len(), 1, "{left:?}");
    assert_eq!(left[0]["id"], color);
    let blue = json!({"color": "blue", "sure": true}).to_string();
    town.good(&["answer", &both, &blue]).await;
    assert_eq!(town.values(&both).await, json!({"color": "blue", "more": false}));

    let all = town.asking("asks").await;
    let mut answers = json!({});
    for question in town.questions().await {
        let answer = if question["node"] == "more" {
            json!(true)
        } else {
            json!({"color": "red", "sure": false})
        };
        answers[question["id"].as_str().unwrap()] = answer;
    }
    let run = town.good(&["answer", &all, &answers.to_string(), "--no-follow"]).await;
    let run: Uuid = run.trim().parse().expect("the run's id alone");
    town.server.client().get(&format!("/threads/{all}/runs/{run}/join")).await.unwrap();
    assert_eq!(town.values(&all).await, json!({"color": "red", "more": true}));
    assert!(town.server.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_person_at_a_terminal_fills_in_a_form() {
    let town = Town::new().await;
    let thread = town.asking("asks").await;
    // The order of the questions is the server's; both forms take these lines, and complain where they do not fit.
    let first = &town.questions().await[0]["node"];
    let (color, more) = ("9\n2\nperhaps\ny\n\n", "n\n");
    let typed = if first == "color" { [color, more].concat() } else { [more, color].concat() };
    let output = town.at_a_terminal(&format!("answer {thread}"), &typed).await;
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{shown}");
    for wanted in
        ["Which color?", "1  red", "2  blue", "1 to 2, please", "y or n, please", "may be left out"]
    {
        assert!(shown.contains(wanted), "{wanted}: {shown}");
    }
    assert_eq!(town.values(&thread).await, json!({"color": "blue", "more": false}));
    assert!(town.server.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_shows_what_its_agent_says_and_does() {
    let town = Town::new().await;
    town.endpoint.plays(agent::one_run());
    let output = town.cynai(&["run", "helper", "--follow"]).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    for text in agent::texts().as_array().unwrap() {
        let said = format!("  help/think: {}\n", text.as_str().unwrap());
        assert!(told.contains(&said), "{said:?} is not in {told}");
    }
    assert!(told.contains("  help/think calls things__echo {\"words\": \"hello\"}\n"), "{told}");
    assert!(told.contains("  help/act: things/echo answered: "), "{told}");

    town.endpoint.plays(agent::one_run());
    let events = town.good(&["run", "helper", "--json"]).await;
    let events: Vec<Value> =
        events.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let texts = events.iter().filter(|event| event["event"] == "messages");
    let texts: String = texts
        .filter(|event| event["data"][0]["type"] == "AIMessageChunk")
        .map(|event| event["data"][0]["content"].as_str().unwrap())
        .collect();
    let wanted: Vec<String> = serde_json::from_value(agent::texts()).unwrap();
    assert_eq!(texts, wanted.concat());
    assert!(town.server.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_a_message_whose_server_is_killed_sees_it_begin_again() {
    let mut town = Town::new().await;
    let [first, second] = agent::one_run();
    town.endpoint.plays([first.clone(), first, second]);
    let mut command = town.command(PROGRAM);
    command.args(["run", "helper", "--follow"]).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let (mut stderr, mut told) = (child.stderr.take().unwrap(), Vec::new());
    while !String::from_utf8_lossy(&told).contains("help/think: look0 ") {
        assert!(stderr.read_buf(&mut told).await.unwrap() > 0, "it ended early");
    }
    let address = town.server.address().strip_prefix("http://").unwrap().to_owned();
    let again = Start { listen: Some(address), ..Start::default() };
    town.server.kill();
    town.server = town.site.start(&again).await;
    stderr.read_to_end(&mut told).await.unwrap();
    assert!(child.wait().await.unwrap().success());
    let told = String::from_utf8(told).unwrap();
    let (before, after) = told.split_once("  help/think begins again\n").expect(&told);
    let texts = agent::texts();
    let said = format!("  help/think: {}\n", texts[0].as_str().unwrap());
    assert!(!before.contains(&said) && after.contains(&said), "{told}");
    assert!(after.contains(texts[1].as_str().unwrap()), "{told}");
    assert!(town.server.stop().await.success());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_wants_approval_is_approved_with_other_arguments() {
    let town = Town::new().await;
    town.endpoint.plays(agent::one_run());
    let thread = town.asking("careful").await;
    let questions = town.questions().await;
    assert_eq!(questions.len(), 1, "{questions:?}");
    assert_eq!(questions[0]["reason"], "approve_tool");
    assert_eq!(questions[0]["node"], "help");
    let output =
        town.at_a_terminal(&format!("answer {thread}"), "1\n{\"words\": \"other\"}\n\n").await;
    let shown = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && shown.contains("things/echo"), "{shown}");
    assert!(shown.contains("help/think: see0 "), "the run is followed: {shown}");
    let values = town.values(&thread).await;
    assert_eq!(values["answer"], agent::texts()[1]);
    let asked = &town.endpoint.calls()[1].body["messages"];
    let answer = asked.as_array().unwrap().last().unwrap().to_string();
    assert!(answer.contains("other") && !answer.contains("hello"), "{answer}");
    assert!(town.server.stop().await.success());
}
