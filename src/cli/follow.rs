//! Follows a run: what its nodes do, as they do it.
//!
//! A stream that is cut (the server was killed, say) is taken up again after its last event, until the
//! server has been away for too long: the run itself needs nobody who watches.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use anyhow::bail;
use eventsource_stream::{Event, Eventsource};
use futures::StreamExt;
use indicatif::{ProgressBar, ProgressStyle};
use reqwest::{Method, Response};
use serde_json::{Value, json};

use super::client::{Client, Refused};
use super::show;
use super::speech::{Said, Speech};

const AWAY_AT_MOST: u32 = 120;
const PAUSE: Duration = Duration::from_secs(1);

/// What to show of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    /// Only its end.
    Quiet,
    /// Its progress, for a person.
    Live,
    /// Its events, as JSON lines.
    Json,
}

impl Watch {
    /// The stream modes that this needs, for a run that is started, or followed again.
    pub(super) fn modes(self) -> &'static [&'static str] {
        match self {
            Self::Quiet => &["tasks"],
            Self::Live | Self::Json => &["tasks", "custom", "messages-tuple"],
        }
    }
}

/// A run by its path, and its last event.
#[derive(Debug)]
struct Position {
    path: String,
    last: Option<String>,
}

/// Follows the run whose stream is `response` until it has ended; answers its path
/// (`/threads/ID/runs/ID`).
pub(super) async fn follow(
    client: &Client,
    response: Response,
    watch: Watch,
) -> anyhow::Result<String> {
    let Some(path) = response.headers().get("content-location").and_then(|path| path.to_str().ok())
    else {
        bail!("the server did not say where the run is");
    };
    let mut position = Position { path: path.to_owned(), last: None };
    let mut progress = Progress::new(watch);
    let mut response = Some(response);
    let mut away = 0;
    loop {
        if let Some(response) = response.take()
            && drain(response, &mut position, &mut progress, &mut away).await
        {
            progress.finish();
            return Ok(position.path);
        }
        away += 1;
        if away > AWAY_AT_MOST {
            bail!(
                "the server was away for too long; the run is not lost: `cynai runs show {}`",
                position.path.rsplit('/').next().unwrap_or_default()
            );
        }
        if away == 2 {
            progress.say("connection lost; waiting for the server");
        }
        tokio::time::sleep(PAUSE).await;
        response = reopen(client, &position, watch).await?;
    }
}

/// `None` while the server cannot be reached.
async fn reopen(
    client: &Client,
    position: &Position,
    watch: Watch,
) -> anyhow::Result<Option<Response>> {
    let modes: Vec<String> =
        watch.modes().iter().map(|mode| format!("stream_mode={mode}")).collect();
    let path = format!("{}/stream?{}", position.path, modes.join("&"));
    let last = position.last.as_deref().unwrap_or("-1");
    match client.open(Method::GET, &path, None, &[("last-event-id", last)]).await {
        Ok(response) => Ok(Some(response)),
        // An answer that is not a passing trouble will not get better by asking again.
        Err(err) => match err.downcast_ref::<Refused>() {
            Some(refused) if !refused.status.is_server_error() => Err(err),
            _ => Ok(None),
        },
    }
}

/// Reads a stream to its end; answers whether the run has ended.
async fn drain(
    response: Response,
    position: &mut Position,
    progress: &mut Progress,
    away: &mut u32,
) -> bool {
    let mut events = response.bytes_stream().eventsource();
    while let Some(Ok(event)) = events.next().await {
        *away = 0;
        if !event.id.is_empty() {
            position.last = Some(event.id.clone());
        }
        let over = matches!(event.event.as_str(), "end" | "error");
        progress.event(&event);
        if over {
            return true;
        }
    }
    false
}

/// What has been seen of the superstep under way.
#[derive(Debug)]
struct Progress {
    watch: Watch,
    /// Whether there is a bar where no text is being said.
    has_bar: bool,
    bar: Option<ProgressBar>,
    began: Instant,
    superstep: u32,
    /// What the ids of its events begin with.
    place: String,
    /// Node -> activations that started and ended.
    nodes: BTreeMap<String, (u32, u32)>,
    speech: Speech,
    /// Whose words the line under way has.
    speaking: Option<String>,
}

impl Progress {
    fn new(watch: Watch) -> Self {
        let mut progress = Self {
            watch,
            has_bar: watch == Watch::Live && std::io::stderr().is_terminal(),
            bar: None,
            began: Instant::now(),
            superstep: 0,
            place: String::new(),
            nodes: BTreeMap::new(),
            speech: Speech::default(),
            speaking: None,
        };
        progress.draw();
        progress
    }

    /// Draws the bar, where there is to be one and there is none.
    fn draw(&mut self) {
        if !self.has_bar || self.bar.is_some() {
            return;
        }
        let bar = ProgressBar::new_spinner().with_elapsed(self.began.elapsed());
        bar.enable_steady_tick(Duration::from_millis(120));
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} [{elapsed}]") {
            bar.set_style(style);
        }
        self.bar = Some(bar);
        self.describe();
    }

    fn describe(&self) {
        if let Some(bar) = self.bar.as_ref().filter(|_| self.superstep > 0) {
            bar.set_message(format!("superstep {}: {}", self.superstep, self.counts()));
        }
    }

    fn event(&mut self, event: &Event) {
        let data = serde_json::from_str(&event.data).unwrap_or_else(|_| event.data.clone().into());
        match self.watch {
            Watch::Quiet => {}
            Watch::Json => {
                show::json_line(&json!({"event": event.event, "id": event.id, "data": data}));
            }
            Watch::Live => self.live(event, &data),
        }
    }

    fn live(&mut self, event: &Event, data: &Value) {
        let (mode, namespace) = event.event.split_once('|').unwrap_or((&event.event, ""));
        // An id is the superstep and a place within it.
        let place = event.id.split('-').next().unwrap_or_default();
        match mode {
            "tasks" if namespace.is_empty() => self.activation(place, data),
            "custom" => self.say(&format!("  {}", show::text(data))),
            "messages" => self.said(data),
            _ => {}
        }
    }

    fn said(&mut self, data: &Value) {
        for said in self.speech.take(data) {
            match said {
                Said::Line(line) => self.say(&line),
                Said::Over(speaker) if self.speaking.as_ref() == Some(&speaker) => self.hush(),
                Said::Over(_) => {}
                Said::Piece { speaker, node, text } => self.speak(speaker, &node, &text),
            }
        }
    }

    /// Adds words to the line under way. While there is one, there is no bar.
    fn speak(&mut self, speaker: String, node: &str, text: &str) {
        if self.speaking.as_ref().is_none_or(|before| *before != speaker) {
            self.hush();
            if let Some(bar) = self.bar.take() {
                bar.finish_and_clear();
            }
            show::note_part(&format!("  {node}: "));
        }
        show::note_part(&text.replace('\n', "\n    "));
        self.speaking = Some(speaker);
    }

    /// Ends the line under way.
    fn hush(&mut self) {
        if self.speaking.take().is_some() {
            show::note_part("\n");
        }
        self.draw();
    }

    /// An activation began, or it ended: the end has a result. One that is over at once has no begin.
    fn activation(&mut self, place: &str, data: &Value) {
        if place != self.place || self.superstep == 0 {
            self.end_superstep();
            self.superstep += 1;
            place.clone_into(&mut self.place);
        }
        let name = show::text(&data["name"]);
        let counts = self.nodes.entry(name.clone()).or_default();
        if data.get("result").is_none() {
            counts.0 += 1;
        } else {
            counts.1 += 1;
            counts.0 = counts.0.max(counts.1);
            self.ended(&name, data);
        }
        self.describe();
    }

    fn ended(&mut self, name: &str, data: &Value) {
        if !data["error"].is_null() {
            let error = data["error"].get("message").unwrap_or(&data["error"]);
            self.say(&format!("  {name} failed: {}", show::text(error)));
        }
        if data["interrupts"].as_array().is_some_and(|asked| !asked.is_empty()) {
            self.say(&format!("  {name} asks a person"));
        }
    }

    fn counts(&self) -> String {
        let count = |(name, (started, ended)): (&String, &(u32, u32))| {
            if *started > 1 { format!("{name} {ended}/{started}") } else { name.clone() }
        };
        self.nodes.iter().map(count).collect::<Vec<_>>().join(", ")
    }

    fn end_superstep(&mut self) {
        if !self.nodes.is_empty() {
            self.say(&format!("{:>3}  {}", self.superstep, self.counts()));
        }
        self.nodes.clear();
    }

    fn say(&mut self, text: &str) {
        self.hush();
        match (&self.bar, self.watch) {
            (Some(bar), _) => bar.suspend(|| show::note(text)),
            (None, Watch::Live) => show::note(text),
            (None, _) => {}
        }
    }

    fn finish(&mut self) {
        if self.watch == Watch::Live {
            self.end_superstep();
        }
        self.hush();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_are_counted_by_node_and_superstep() {
        let mut progress = Progress::new(Watch::Quiet);
        let start = |name: &str| json!({"id": "x", "name": name, "input": {}, "triggers": []});
        let end = |name: &str| json!({"id": "x", "name": name, "error": null, "result": {}});
        let mut check = |place: &str, activation: Value, expected: (u32, &str)| {
            progress.activation(place, &activation);
            assert_eq!((progress.superstep, progress.counts().as_str()), expected);
        };
        check("1", start("scan"), (1, "scan"));
        check("1", start("scan"), (1, "scan 0/2"));
        check("1", end("scan"), (1, "scan 1/2"));
        check("1", start("audit"), (1, "audit, scan 1/2"));
        check("1", end("scan"), (1, "audit, scan 2/2"));
        // These are over at once.
        check("2", end("merge"), (2, "merge"));
        check("2", end("merge"), (2, "merge 2/2"));
        check("3", start("report"), (3, "report"));
    }
}
