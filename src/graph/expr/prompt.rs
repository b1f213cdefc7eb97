//! Prompts: Markdown with `MiniJinja` in it, over the same scope as expressions.
//!
//! `{{ state.x }}`, `{% for .. %}`, `{{ item.name | tojson }}`. A name that no scope has is an error when the graph is
//! loaded; a value that is missing when the prompt is rendered is an error then, never an empty word.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::sync::Arc;

use minijinja::value::Serde;
use minijinja::{Environment, Error, UndefinedBehavior, Value as Rendered};
use serde_json::Value;

use super::{EvalError, EvalProblem, ExprError, References, Scope};

/// Bytes of one prompt's source.
pub const MAX_PROMPT_BYTES: usize = 256 << 10;
/// Bytes of what one prompt renders to.
const MAX_RENDERED_BYTES: usize = 4 << 20;
/// Instructions of one rendering.
const FUEL: u64 = 2_000_000;
/// Calls inside calls.
const MAX_RECURSION: usize = 50;

/// A prompt whose names were checked.
#[derive(Debug, Clone)]
pub(super) struct Prompt {
    source: Arc<str>,
    channels: Vec<String>,
    vars: Vec<String>,
}

impl Prompt {
    /// Checks `source`, in which channels of `state` and the names of `vars` may be used.
    pub(super) fn compile(source: &str, vars: &[&str]) -> Result<Self, ExprError> {
        if source.len() > MAX_PROMPT_BYTES {
            let message = format!("a prompt has at most {MAX_PROMPT_BYTES} bytes");
            return Err(ExprError::at(None, message));
        }
        let environment = environment();
        let template = environment.template_from_str(source).map_err(|err| syntax(source, &err))?;
        let globals: BTreeSet<&str> = environment.globals().map(|(name, _)| name).collect();
        let (mut channels, mut used) = (BTreeSet::new(), BTreeSet::new());
        for path in template.undeclared_variables(true) {
            let mut parts = path.split('.');
            let root = parts.next().unwrap_or_default();
            match (root, parts.next()) {
                ("state", Some(channel)) => {
                    channels.insert(channel.to_owned());
                }
                ("state", None) => {
                    let help = "write state.NAME: a prompt sees the channels that it names";
                    let message = "`state` alone is no value in a prompt";
                    return Err(ExprError::at(source.find("state"), message).help(help));
                }
                (root, _) if vars.contains(&root) => {
                    used.insert(root.to_owned());
                }
                (root, _) if globals.contains(root) => {}
                (root, _) => {
                    let message = format!("there is no `{root}` here");
                    let help = format!("in scope are state, {}", vars.join(", "));
                    return Err(ExprError::at(source.find(root), message).help(help));
                }
            }
        }
        let (channels, vars) = (channels.into_iter().collect(), used.into_iter().collect());
        Ok(Self { source: source.into(), channels, vars })
    }

    pub(super) fn references(&self) -> References {
        References { channels: self.channels.clone(), vars: self.vars.clone() }
    }

    /// The text, in `scope`.
    pub(super) fn render(&self, scope: &Scope<'_>) -> Result<String, EvalError> {
        let fail = |problem| EvalError { problem, expression: self.excerpt() };
        let mut state = BTreeMap::new();
        for name in &self.channels {
            let value = scope.state.get(name);
            let value = value.ok_or_else(|| fail(EvalProblem::MissingChannel(name.clone())))?;
            state.insert(name.as_str(), value_of(value.json()));
        }
        let mut context = BTreeMap::from([("state", Rendered::from(state))]);
        for name in &self.vars {
            let found = scope.vars.iter().find(|(var, _)| *var == name.as_str());
            let (_, value) =
                found.ok_or_else(|| fail(EvalProblem::MissingVariable(name.clone())))?;
            context.insert(name.as_str(), value_of(value.json()));
        }
        let environment = environment();
        let mut text = Bounded(Vec::new());
        let rendered = environment.template_from_str(&self.source).and_then(|template| {
            template.render_captured_to(Rendered::from(context), &mut text).map(drop)
        });
        match rendered {
            Ok(()) => Ok(String::from_utf8_lossy(&text.0).into_owned()),
            Err(_) if text.0.len() >= MAX_RENDERED_BYTES => {
                let limit = MAX_RENDERED_BYTES;
                Err(fail(EvalProblem::Limit { what: "bytes of a rendered prompt", limit }))
            }
            Err(err) => Err(fail(EvalProblem::Unsuitable(in_words(&err)))),
        }
    }

    /// The first line, to be named in errors.
    fn excerpt(&self) -> Arc<str> {
        self.source.lines().next().unwrap_or_default().chars().take(80).collect::<String>().into()
    }
}

fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_undefined_behavior(UndefinedBehavior::Strict);
    environment.set_fuel(Some(FUEL));
    environment.set_recursion_limit(MAX_RECURSION);
    // A prompt is no page: nothing is escaped.
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment
}

fn value_of(json: &Value) -> Rendered {
    Rendered::from(Serde(json))
}

fn in_words(err: &Error) -> String {
    let detail = err.detail().map_or_else(|| err.kind().to_string(), str::to_owned);
    match err.line() {
        Some(line) => format!("line {line} of the prompt: {detail}"),
        None => detail,
    }
}

fn syntax(source: &str, err: &Error) -> ExprError {
    let offset = err.range().map(|range| range.start).or_else(|| {
        let before = err.line()?.checked_sub(1)?;
        Some(source.split_inclusive('\n').take(before).map(str::len).sum())
    });
    ExprError::at(offset, in_words(err))
}

/// Text up to the limit; what goes over it is an error.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_RENDERED_BYTES {
            self.0.resize(MAX_RENDERED_BYTES, b' ');
            return Err(io::Error::other("the prompt is too long"));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::super::value::Shared;
    use super::super::{StateView, Template};
    use super::*;

    struct Channels(Value);

    impl StateView for Channels {
        fn get(&self, channel: &str) -> Option<Shared> {
            self.0.get(channel).cloned().map(Shared::new)
        }
    }

    fn render(source: &str, state: Value) -> Result<String, String> {
        let prompt = Prompt::compile(source, &["run", "item"])
            .map_err(|err| format!("{} at {:?}", err.message, err.offset))?;
        let vars = [("run", Shared::new(json!({ "id": "r1" })))];
        let scope = Scope { state: &Channels(state), vars: &vars };
        prompt.render(&scope).map_err(|err| err.to_string())
    }

    #[test]
    fn a_prompt_sees_the_state_and_the_variables_that_it_names() {
        let text = render(
            "# {{ state.title }}\n{% for file in state.files %}- {{ file.name }} <{{ loop.index }}>\n{% endfor %}{{ run.id }}",
            json!({ "title": "A & B", "files": [{ "name": "x" }, { "name": "y" }] }),
        );
        assert_eq!(text.unwrap(), "# A & B\n- x <1>\n- y <2>\nr1");
        let text = render("{{ state.o | tojson }}", json!({ "o": { "a": [1, 2.5, null] } }));
        assert_eq!(text.unwrap(), r#"{"a": [1, 2.5, null]}"#);
    }

    #[test]
    fn unknown_names_and_bad_syntax_are_errors_when_it_is_compiled() {
        let wrong = |source: &str| render(source, json!({})).unwrap_err();
        assert_eq!(wrong("hello {{ nobody.name }}"), "there is no `nobody` here at Some(9)");
        assert!(wrong("{{ state }}").contains("`state` alone"));
        assert!(wrong("{% for x in state.y %}{{ x }}").contains("at Some("));
        assert!(wrong(&"x".repeat(MAX_PROMPT_BYTES + 1)).contains("at most 262144 bytes"));
    }

    #[test]
    fn what_is_missing_when_it_is_rendered_is_an_error() {
        assert_eq!(
            render("{{ state.x }}", json!({})).unwrap_err(),
            "state.x has no value yet, in `{{ state.x }}`"
        );
        let err = render("{{ state.x.y }}", json!({ "x": {} })).unwrap_err();
        assert!(err.contains("undefined"), "{err}");
        assert!(render("{{ item.x }}", json!({})).unwrap_err().contains("item is not available"));
    }

    #[test]
    fn rendering_is_bounded() {
        let bomb = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}";
        assert!(render(bomb, json!({})).unwrap_err().contains("fuel"));
        let long = "{% for a in range(9999) %}{{ state.x }}{% endfor %}";
        let err = render(long, json!({ "x": "y".repeat(10_000) })).unwrap_err();
        assert!(err.contains("more than 4194304 bytes"), "{err}");
    }

    #[test]
    fn a_template_can_be_a_prompt() {
        let template = Template::prompt("hi {{ state.who }}", &[]).unwrap();
        assert_eq!(template.references().channels, ["who"]);
        let state = Channels(json!({ "who": "Ada" }));
        assert_eq!(template.eval(&Scope { state: &state, vars: &[] }).unwrap(), json!("hi Ada"));
        assert_eq!(Template::prompt("plain", &[]).unwrap().as_literal(), Some(&json!("plain")));
    }
}
