//! `assistants`.
