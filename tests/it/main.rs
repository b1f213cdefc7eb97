//! The integration tests: one binary, a database of its own for each test.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test fails by panicking")]

mod access;
mod architecture;
mod assistants;
mod cli;
mod gateway;
mod scoping;
mod support;
mod threads;
