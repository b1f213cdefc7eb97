//! Functions on lists and maps.

use std::collections::HashSet;

use super::{Func, as_index, as_text, refused};
use crate::graph::expr::eval::{Machine, Outcome};
use crate::graph::expr::operand::{List, Map, Operand, int, int_of_double, unsuitable};
use crate::graph::expr::{MAX_BUILT_BYTES, MAX_VALUE_DEPTH};

pub(super) fn extreme<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    args: &[Operand<'a>],
) -> Outcome<'a> {
    let items: Vec<Operand<'a>> = match args {
        [Operand::List(list)] => list.iter().collect(),
        args => args.to_vec(),
    };
    machine.built_slots(items.len())?;
    let wanted =
        if id == Func::Min { std::cmp::Ordering::Less } else { std::cmp::Ordering::Greater };
    let mut items = items.into_iter();
    let Some(mut best) = items.next() else {
        return Err(unsuitable(format!("{name}() of an empty list")));
    };
    for item in items {
        machine.spend(1)?;
        if item.order(&best)? == wanted {
            best = item;
        }
    }
    Ok(best)
}

pub(super) fn range<'a>(
    machine: &mut Machine<'a>,
    name: &str,
    args: &[Operand<'a>],
) -> Outcome<'a> {
    let (from, to) = match args {
        [Operand::Int(to)] => (0, *to),
        [Operand::Int(from), Operand::Int(to)] => (*from, *to),
        args => return Err(refused(name, args)),
    };
    let len = usize::try_from((to - from).max(0)).unwrap_or(MAX_BUILT_BYTES);
    machine.built_slots(len)?;
    Ok(Operand::list((from..to).map(Operand::Int).collect()))
}

pub(super) fn on_list<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    list: &List<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    if id == Func::Get {
        let found = as_index(name, &rest[0]).ok().and_then(|at| list.get(at));
        return Ok(found.or_else(|| rest.get(1).cloned()).unwrap_or(Operand::Null));
    }
    machine.built_slots(list.len())?;
    let mut items: Vec<Operand<'a>> = list.iter().collect();
    match (id, rest) {
        (Func::Join, rest) => return join(machine, name, &items, rest),
        (Func::Sum, []) => {
            let zero = Operand::Int(0);
            return items.iter().try_fold(zero, |sum, item| add(&sum, item));
        }
        (Func::Sort, []) => return sort(items),
        (Func::Reverse, []) => items.reverse(),
        (Func::Distinct, []) => return distinct(machine, items),
        (Func::Flatten, []) => {
            let mut flat = Vec::new();
            for item in items {
                match item {
                    Operand::List(inner) => {
                        machine.built_slots(inner.len())?;
                        flat.extend(inner.iter());
                    }
                    other => flat.push(other),
                }
            }
            items = flat;
        }
        (Func::Slice, [from, rest @ ..]) => {
            let to = rest.first().map_or(Ok(usize::MAX), |to| as_index(name, to))?;
            items.truncate(to);
            let from = as_index(name, from)?.min(items.len());
            items.drain(..from);
        }
        _ => return Err(refused(name, &[Operand::List(list.clone())])),
    }
    Ok(Operand::list(items))
}

pub(super) fn add<'a>(a: &Operand<'a>, b: &Operand<'a>) -> Outcome<'a> {
    match (a, b, a.as_double(), b.as_double()) {
        (Operand::Int(a), Operand::Int(b), ..) => int(a + b),
        (_, _, Some(a), Some(b)) => Ok(Operand::Double(a + b)),
        _ => Err(unsuitable(format!("sum() adds numbers, not {}", b.describe()))),
    }
}

pub(super) fn join<'a>(
    machine: &mut Machine<'a>,
    name: &str,
    items: &[Operand<'a>],
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    let separator = rest.first().map_or(Ok(""), |separator| as_text(name, separator))?;
    let mut text = String::new();
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            machine.built(separator.len())?;
            text.push_str(separator);
        }
        text.push_str(&machine.text_of(item)?);
    }
    Ok(Operand::text(text))
}

/// Sorts what has one order: a mixture of integers and doubles is compared as doubles throughout,
/// because comparing some pairs exactly and some not would be no order at all.
pub(super) fn sort(mut items: Vec<Operand<'_>>) -> Outcome<'_> {
    let Some(first) = items.first() else { return Ok(Operand::list(items)) };
    for item in &items {
        first.order(item)?;
        item.order(item)?;
    }
    if items.iter().any(|item| matches!(item, Operand::Double(_))) {
        let key = |item: &Operand<'_>| item.as_double().unwrap_or(f64::NAN);
        items.sort_by(|a, b| key(a).total_cmp(&key(b)));
    } else {
        items.sort_by(|a, b| a.order(b).unwrap_or(std::cmp::Ordering::Equal));
    }
    Ok(Operand::list(items))
}

pub(super) fn distinct<'a>(machine: &mut Machine<'a>, items: Vec<Operand<'a>>) -> Outcome<'a> {
    let mut seen = HashSet::new();
    let mut kept = Vec::new();
    for item in items {
        // The JSON text tells values apart, with numbers by value: 1.0 is written as 1 is compared.
        let key = match &item {
            Operand::Double(value) if value.fract() == 0.0 => int_of_double(*value)
                .ok()
                .and_then(|value| value.scalar_text())
                .unwrap_or_else(|| value.to_string()),
            other => {
                let json = machine.json_of(other, MAX_VALUE_DEPTH)?.to_string();
                machine.built(json.len())?;
                json
            }
        };
        if seen.insert(key) {
            kept.push(item);
        }
    }
    Ok(Operand::list(kept))
}

pub(super) fn on_map<'a>(
    machine: &mut Machine<'a>,
    id: Func,
    name: &str,
    map: &Map<'a>,
    rest: &[Operand<'a>],
) -> Outcome<'a> {
    if id == Func::Get {
        let found = map.get(as_text(name, &rest[0])?);
        return Ok(found.or_else(|| rest.get(1).cloned()).unwrap_or(Operand::Null));
    }
    machine.built_slots(map.len())?;
    match (id, rest) {
        (Func::Keys, []) => Ok(Operand::list(map.keys().into_iter().map(Operand::Text).collect())),
        (Func::Values, []) => {
            Ok(Operand::list(map.entries().into_iter().map(|(_, value)| value).collect()))
        }
        (Func::Merge, [Operand::Map(other)]) => {
            machine.built_slots(other.len())?;
            let mut merged: Vec<_> =
                map.entries().into_iter().filter(|(key, _)| other.get(key).is_none()).collect();
            machine.spend(map.len().saturating_mul(match other {
                Map::Lent(_) => 1,
                Map::Made(made) => made.len(),
            }))?;
            merged.extend(other.entries());
            Ok(Operand::Map(Map::Made(std::rc::Rc::new(merged))))
        }
        _ => Err(refused(name, &[Operand::Map(map.clone())])),
    }
}
