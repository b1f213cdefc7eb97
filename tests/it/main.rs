//! The one integration binary: the parts of Cynai as their users meet them, a database of its own for
//! each test that needs one.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::print_stderr,
    unreachable_pub,
    reason = "a test fails by panicking, and says what it measured"
)]

mod access;
mod agents;
mod answers;
mod architecture;
mod assistants;
mod bench;
mod checkpointer;
mod cli;
mod crash_points;
mod crash_random;
mod egress;
mod examples;
mod faults;
mod fleet;
mod gateway;
mod kit;
mod models;
mod notes_digest;
mod races;
mod retention;
mod runs;
mod scoping;
mod sdk_js;
mod sdk_python;
mod secrets;
mod support;
mod threads;
mod tools;
mod versions;
mod webhooks;
mod worker;
