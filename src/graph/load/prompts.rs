//! Texts for models that lie in files of their own: taken when the graph is loaded, so that a graph's hash covers them.

use std::io::Read as _;
use std::path::{Component, Path};

use super::super::check::Diagnostic;
use super::super::definition::GraphFile;
use super::super::definition::models::TextDef;
use super::super::expr::MAX_PROMPT_BYTES;

/// Puts the text of each file in the place of its name. `file` is the graph file.
pub(super) fn take(file: &str, graph: &mut GraphFile) -> Vec<Diagnostic> {
    let directory = Path::new(file).parent().unwrap_or(Path::new(""));
    let mut problems = Vec::new();
    for (name, node) in graph.nodes.iter_mut() {
        let mut texts = Vec::new();
        if let Some(model) = &mut node.model {
            texts.push((["model", "system"], &mut model.system));
            texts.push((["model", "prompt"], &mut model.prompt));
        }
        if let Some(agent) = &mut node.agent {
            texts.push((["agent", "system"], &mut agent.system));
            texts.push((["agent", "prompt"], &mut agent.prompt));
        }
        for ([kind, key], text) in texts {
            let Some(TextDef::File(from)) = text else { continue };
            match read(directory, &from.file) {
                Ok(read) => *text = Some(TextDef::Text(read)),
                Err(why) => {
                    let path = ["nodes", name, kind, key, "file"];
                    let message = format!("{} {why}", from.file);
                    problems.push(Diagnostic::error("prompt-file", &path, message));
                    *text = Some(TextDef::Text(String::new()));
                }
            }
        }
    }
    problems
}

fn read(directory: &Path, file: &str) -> Result<String, String> {
    let inside = Path::new(file).components().all(|part| matches!(part, Component::Normal(_)));
    if !inside {
        return Err("does not lie beside the graph file or below it".to_owned());
    }
    let path = directory.join(file);
    let mut bytes = Vec::new();
    let most = u64::try_from(MAX_PROMPT_BYTES).unwrap_or(u64::MAX).saturating_add(1);
    let opened =
        std::fs::File::open(&path).and_then(|opened| opened.take(most).read_to_end(&mut bytes));
    opened.map_err(|err| format!("cannot be read: {err}"))?;
    if bytes.len() > MAX_PROMPT_BYTES {
        return Err(format!("has more than {MAX_PROMPT_BYTES} bytes"));
    }
    String::from_utf8(bytes).map_err(|_| "is no UTF-8 text".to_owned())
}
