//! The engine, pure: graph files, their checks, expressions, channels, supersteps, checkpoints.
//!
//! **Invariant:** no clock, no SQL, no HTTP, no randomness: a superstep is a function of a checkpoint and writes.

pub mod build;
pub mod channel;
pub mod check;
pub mod checkpoint;
pub mod compile;
pub mod definition;
pub mod exec;
pub mod expr;
pub mod input;
pub mod load;
pub mod memory;
pub mod model;
pub mod names;
pub mod picture;
pub mod schema;
pub mod source;
pub mod step;
pub mod value;
