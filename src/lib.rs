//! Cynai: a control plane that runs work as checkpointed state graphs stored in PostgreSQL.
//!
//! The layers, top to bottom: `cli` and `main`; `gateway` (HTTP), `driver` (advances runs), `worker`
//! (runs jobs on a machine); `nodes` (node kinds); `services` (every operation, once); `models` (model
//! endpoints) and `tools` (MCP servers); `store` (all SQL); `kit` (tests of graphs); `graph` (the engine, pure). Dependencies point
//! down only; a test reads the sources and fails on an arrow that points up. ARCHITECTURE.md is the map.

pub mod cli;
pub mod clock;
pub mod config;
pub mod driver;
pub mod egress;
pub mod gateway;
pub mod graph;
pub mod ids;
pub mod kit;
pub mod models;
pub mod nodes;
pub mod services;
pub mod store;
pub mod tls;
pub mod tools;
pub mod worker;
