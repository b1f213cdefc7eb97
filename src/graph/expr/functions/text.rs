//! Functions on text.

use super::{Func, as_index, as_text, refused};
use crate::graph::expr::eval::{Machine, Outcome};
use crate::graph::expr::operand::{Operand, Text, unsuitable};

pub(super) fn on_text<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    text: &Text<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    machine.built(text.len())?;
    let made = match (id, rest) {
        (Func::StartsWith, [part]) => {
            return Ok(Operand::Bool(text.starts_with(as_text(name, part)?)));
        }
        (Func::EndsWith, [part]) => {
            return Ok(Operand::Bool(text.ends_with(as_text(name, part)?)));
        }
        (Func::Split, rest) => return split(machine, name, text, rest),
        (Func::Trim, []) => text.trim().to_owned(),
        (Func::Lower, []) => text.to_lowercase(),
        (Func::Upper, []) => text.to_uppercase(),
        (Func::Replace, [old, new]) => {
            let (old, new) = (as_text(name, old)?, as_text(name, new)?);
            let found = text.matches(old).count();
            machine.built(found.saturating_mul(new.len()))?;
            text.replace(old, new)
        }
        (Func::Substring, [from, rest @ ..]) => {
            let from = as_index(name, from)?;
            let to = rest.first().map_or(Ok(usize::MAX), |to| as_index(name, to))?;
            text.chars().skip(from).take(to.saturating_sub(from)).collect()
        }
        (_, rest) => {
            let mut args = vec![Operand::Text(text.clone())];
            args.extend_from_slice(rest);
            return Err(refused(name, &args));
        }
    };
    Ok(Operand::text(made))
}

pub(super) fn split<'a>(
    machine: &mut Machine<'a>,
    name: &str,
    text: &Text<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    let parts: Vec<&str> = match rest {
        [] => text.split_whitespace().collect(),
        [separator, ..] => match as_text(name, separator)? {
            "" => return Err(unsuitable("split() needs a separator that is not empty")),
            separator => text.split(separator).collect(),
        },
    };
    machine.built_slots(parts.len())?;
    Ok(Operand::list(parts.into_iter().map(Operand::text).collect()))
}
