//! `job`: a sandboxed execution on a worker. The activation parks until the worker is done.

use std::collections::BTreeMap;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;

use crate::graph::checkpoint::WaitKind;
use crate::graph::exec::{Activation, Node, NodeError, Outcome, Wait};
use crate::graph::expr::Template;
use crate::graph::model::{Effect, JobTemplate, NodeKind};
use crate::services::Services;
use crate::services::jobs::{JobOrder, Submitted};
use crate::worker::wire::{Resources, SandboxRequest};

/// Workers that may lose one attempt before it counts as failed.
const MAX_LOST: u32 = 5;

/// The code of `job` nodes.
#[derive(Debug, Clone)]
pub struct Job {
    services: Services,
}

impl Job {
    /// Sends jobs through `services`.
    #[must_use]
    pub fn new(services: Services) -> Self {
        Self { services }
    }
}

impl Node for Job {
    fn run<'a>(
        &'a self,
        activation: &'a Activation<'a>,
    ) -> BoxFuture<'a, Result<Outcome, NodeError>> {
        async move {
            let NodeKind::Job(template) = &activation.node.kind else {
                return Err(NodeError::fatal("internal", "not a job node"));
            };
            let mut lost = 0;
            if let Some(previous) = activation.previous.filter(|wait| wait.kind == WaitKind::Job) {
                let data = previous
                    .data
                    .as_deref()
                    .and_then(|data| serde_json::from_slice::<Value>(data).ok());
                lost = data
                    .and_then(|data| u32::try_from(data.get("lost")?.as_u64()?).ok())
                    .unwrap_or(0);
                if let Some(answer) = &previous.answer {
                    match ended(template, answer)? {
                        Ended::With(output) => return Ok(Outcome::output(output)),
                        Ended::Lost if lost + 1 < MAX_LOST => lost += 1,
                        Ended::Lost => {
                            return Err(NodeError::retryable(
                                "lost",
                                format!("{MAX_LOST} workers were lost with the job"),
                            ));
                        }
                    }
                }
            }
            self.submit(activation, template, lost).await
        }
        .boxed()
    }

    fn effect(&self) -> Effect {
        Effect::Idempotent
    }
}

impl Job {
    async fn submit(
        &self,
        activation: &Activation<'_>,
        template: &JobTemplate,
        lost: u32,
    ) -> Result<Outcome, NodeError> {
        let order = JobOrder {
            run_id: activation.run_id,
            thread_id: activation.thread_id,
            fence: activation.fence,
            namespace: activation.namespace,
            planned: activation.planned,
            task_id: activation.task.id,
            node: &activation.node.name,
            attempt: activation.attempt,
            lost,
            sandbox: request(activation, template)?,
        };
        match self.services.submit_job(&order).await {
            Ok(Submitted::Waiting) => Ok(Outcome::Wait(Wait {
                kind: WaitKind::Job,
                due: None,
                name: None,
                data: None,
                stored: true,
            })),
            Ok(Submitted::Refused(reason)) => Err(NodeError::fatal("job_refused", reason)),
            Ok(Submitted::Fenced) => Err(NodeError::Fenced),
            Err(err) => Err(NodeError::NotStarted {
                message: crate::graph::exec::chain(&err),
                after: std::time::Duration::from_secs(1),
            }),
        }
    }
}

enum Ended {
    With(Value),
    Lost,
}

/// What the worker's answer means for the node.
fn ended(template: &JobTemplate, answer: &[u8]) -> Result<Ended, NodeError> {
    let result: Value = serde_json::from_slice(answer).map_err(|err| {
        NodeError::fatal("job_failed", format!("the job's result cannot be read: {err}"))
    })?;
    let text = |key: &str| result.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
    let reason = result.pointer("/error/message").and_then(Value::as_str).unwrap_or_default();
    match text("status").as_str() {
        "lost" => Ok(Ended::Lost),
        "timeout" => Err(NodeError::retryable(
            "timeout",
            "the job took longer than its timeout and was killed",
        )),
        "canceled" => Err(NodeError::fatal("canceled", "the job was stopped")),
        _ => {
            let code = result.get("exit_code").and_then(Value::as_i64);
            let fine = code
                .is_some_and(|code| template.ok_exit_codes.iter().any(|ok| i64::from(*ok) == code));
            if fine && reason.is_empty() {
                return Ok(Ended::With(result));
            }
            let tail = tail(&text("stderr"));
            let code = code.map_or("no exit code".to_owned(), |code| format!("exit code {code}"));
            let parts: Vec<&str> = [reason, code.as_str(), tail.as_str()]
                .into_iter()
                .filter(|part| !part.is_empty())
                .collect();
            Err(NodeError::retryable("job_failed", format!("the job failed: {}", parts.join("; "))))
        }
    }
}

/// The end of what a job wrote, for a message.
fn tail(text: &str) -> String {
    const MOST: usize = 400;
    let text = text.trim_end();
    let mut start = text.len().saturating_sub(MOST);
    while !text.is_char_boundary(start) {
        start += 1;
    }
    text[start..].to_owned()
}

fn request(
    activation: &Activation<'_>,
    template: &JobTemplate,
) -> Result<SandboxRequest, NodeError> {
    let text = |template: &Template| -> Result<String, NodeError> {
        Ok(match activation.eval(template)? {
            Value::String(text) => text,
            Value::Null => {
                return Err(NodeError::fatal("job_refused", "a part of the command is null"));
            }
            other => other.to_string(),
        })
    };
    let command = template.command.iter().map(&text).collect::<Result<Vec<String>, NodeError>>()?;
    let env = template
        .env
        .iter()
        .map(|(name, value)| Ok((name.clone(), text(value)?)))
        .collect::<Result<BTreeMap<String, String>, NodeError>>()?;
    let resources = template.resources;
    let asks = resources.memory_mb.is_some()
        || resources.processes.is_some()
        || resources.millicpus.is_some()
        || resources.disk_mb.is_some();
    Ok(SandboxRequest {
        image: template.image.clone(),
        command,
        env,
        timeout_seconds: activation
            .node
            .timeout
            .map(|timeout| timeout.as_secs_f64().ceil().max(1.0))
            .and_then(whole),
        network_policy: None,
        stdin: template.stdin.as_ref().map(&text).transpose()?,
        mounts: template.mounts.clone(),
        resources: asks.then(|| Resources {
            memory_mb: resources.memory_mb.map(u64::from),
            processes: resources.processes.map(u64::from),
            cpus: resources.millicpus.map(|thousandths| f64::from(thousandths) / 1000.0),
            disk_mb: resources.disk_mb.map(u64::from),
        }),
    })
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "checked to be a small whole number"
)]
fn whole(seconds: f64) -> Option<u64> {
    (1.0..=1e9).contains(&seconds).then_some(seconds as u64)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn template(ok_exit_codes: Vec<i32>) -> JobTemplate {
        JobTemplate {
            image: "sandbox/base".to_owned(),
            command: Vec::new(),
            env: Vec::new(),
            stdin: None,
            mounts: Vec::new(),
            resources: crate::graph::model::JobResources::default(),
            ok_exit_codes,
        }
    }

    fn kind(ok: Vec<i32>, answer: Value) -> String {
        match ended(&template(ok), answer.to_string().as_bytes()) {
            Ok(Ended::With(_)) => "output".to_owned(),
            Ok(Ended::Lost) => "lost".to_owned(),
            Err(NodeError::Retryable { kind, .. }) => format!("again {kind}"),
            Err(NodeError::Fatal { kind, .. }) => format!("never {kind}"),
            Err(other) => other.to_string(),
        }
    }

    #[test]
    fn the_end_of_a_job_decides_what_the_node_does() {
        assert_eq!(kind(vec![0], json!({"status": "completed", "exit_code": 0})), "output");
        assert_eq!(
            kind(vec![0], json!({"status": "failed", "exit_code": 1, "stderr": "no"})),
            "again job_failed"
        );
        assert_eq!(kind(vec![0, 1], json!({"status": "failed", "exit_code": 1})), "output");
        assert_eq!(kind(vec![0], json!({"status": "timeout"})), "again timeout");
        assert_eq!(kind(vec![0], json!({"status": "canceled"})), "never canceled");
        assert_eq!(kind(vec![0], json!({"status": "lost"})), "lost");
        assert_eq!(
            kind(
                vec![1],
                json!({"status": "failed", "exit_code": 1, "error": {"kind": "out_of_memory", "message": "killed"}})
            ),
            "again job_failed"
        );
    }
}
