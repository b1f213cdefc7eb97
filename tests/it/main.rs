//! The one integration binary: the parts of Cynai as their users meet them, a database of its own for
//! each test that needs one.

#![expect(clippy::unwrap_used, unreachable_pub, reason = "a test fails by panicking")]

mod access;
mod architecture;
mod assistants;
mod bench;
mod checkpointer;
mod cli;
mod crash_points;
mod examples;
mod faults;
mod crash_random;
mod gateway;
mod races;
mod runs;
mod scoping;
mod support;
mod threads;
mod versions;
mod worker;
