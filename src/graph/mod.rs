//! The engine, pure: graph files, their checks, expressions, channels, supersteps, checkpoints.
//!
//! **Invariant:** no clock, no SQL, no HTTP, no randomness: a superstep is a function of a checkpoint and writes.

pub mod check;
pub mod compile;
pub mod definition;
pub mod expr;
pub mod model;
pub mod names;
pub mod value;
