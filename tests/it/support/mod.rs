//! What tests share that run Cynai as a user does: as processes, over HTTP.

pub(crate) mod client;
pub(crate) mod server;
pub(crate) mod traces;
