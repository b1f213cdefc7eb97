//! Numbers, instants and durations: what the operators do with them.

use super::EvalProblem;
use super::eval::Outcome;
use super::lower::Op;
use super::operand::{self, Operand, unsuitable};

pub(super) fn negate<'a>(value: &Operand<'a>) -> Outcome<'a> {
    match value {
        Operand::Int(value) => operand::int(-value),
        Operand::Double(value) => Ok(Operand::Double(-value)),
        Operand::Duration(value) => Ok(Operand::Duration(-*value)),
        other => Err(unsuitable(format!("{} cannot be negated", other.describe()))),
    }
}

pub(super) fn arithmetic<'a>(op: Op, a: &Operand<'a>, b: &Operand<'a>) -> Outcome<'a> {
    match (a, b) {
        (Operand::Int(a), Operand::Int(b)) => integers(op, *a, *b),
        (Operand::Timestamp(_) | Operand::Duration(_), _)
        | (_, Operand::Timestamp(_) | Operand::Duration(_)) => moments(op, a, b),
        _ => match (a.as_double(), b.as_double(), op) {
            (Some(a), Some(b), Op::Add) => Ok(Operand::Double(a + b)),
            (Some(a), Some(b), Op::Subtract) => Ok(Operand::Double(a - b)),
            (Some(a), Some(b), Op::Multiply) => Ok(Operand::Double(a * b)),
            (Some(a), Some(b), Op::Divide) => Ok(Operand::Double(a / b)),
            _ => Err(no_operator(op, a, b)),
        },
    }
}

fn integers<'a>(op: Op, a: i128, b: i128) -> Outcome<'a> {
    if b == 0 && matches!(op, Op::Divide | Op::Modulo) {
        return Err(unsuitable(format!("{a} is divided by zero")));
    }
    let result = match op {
        Op::Add => a.checked_add(b),
        Op::Subtract => a.checked_sub(b),
        Op::Multiply => a.checked_mul(b),
        Op::Divide => a.checked_div(b),
        _ => a.checked_rem(b),
    };
    result
        .ok_or_else(|| unsuitable("the result is out of the range of integers"))
        .and_then(operand::int)
}

fn moments<'a>(op: Op, a: &Operand<'a>, b: &Operand<'a>) -> Outcome<'a> {
    let range = || unsuitable("the result is out of the range of time");
    match (op, a, b) {
        (Op::Add, Operand::Timestamp(at), Operand::Duration(by))
        | (Op::Add, Operand::Duration(by), Operand::Timestamp(at)) => {
            at.checked_add_signed(*by).map(Operand::Timestamp).ok_or_else(range)
        }
        (Op::Subtract, Operand::Timestamp(at), Operand::Duration(by)) => {
            at.checked_sub_signed(*by).map(Operand::Timestamp).ok_or_else(range)
        }
        (Op::Subtract, Operand::Timestamp(a), Operand::Timestamp(b)) => {
            Ok(Operand::Duration(a.signed_duration_since(*b)))
        }
        (Op::Add, Operand::Duration(a), Operand::Duration(b)) => {
            a.checked_add(b).map(Operand::Duration).ok_or_else(range)
        }
        (Op::Subtract, Operand::Duration(a), Operand::Duration(b)) => {
            a.checked_sub(b).map(Operand::Duration).ok_or_else(range)
        }
        _ => Err(no_operator(op, a, b)),
    }
}

fn no_operator(op: Op, a: &Operand<'_>, b: &Operand<'_>) -> EvalProblem {
    let sign = match op {
        Op::Add => "+",
        Op::Subtract => "-",
        Op::Multiply => "*",
        Op::Divide => "/",
        _ => "%",
    };
    unsuitable(format!("{} {sign} {} has no meaning", a.describe(), b.describe()))
}
