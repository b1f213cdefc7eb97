//! `worker`: sandboxed jobs on a worker machine, from both sides of the wire.
//!
//! The agent accepts jobs over HTTP, runs each in a sandbox of its own and keeps its result until the
//! caller acknowledges it. The client is how the rest of Cynai speaks to an agent. The specification's
//! wire says *node* (`node_*` payloads, `/v1/nodes`) for what the code calls a worker; the Worker API
//! itself lives under `/v1/worker` and needs no mapping.
//!
//! **Invariant:** nothing here knows of the store, the graph engine or the services.
//! **Invariant:** no command runs outside a sandbox; where the sandbox does not work, jobs are refused.

pub mod config;
pub mod node;
pub mod startup;
pub mod wire;

pub mod effective;

pub mod sandbox;

pub mod jobs;

pub mod agent;
pub mod client;
pub mod enrol;
pub mod local;

#[cfg(test)]
mod tests;
