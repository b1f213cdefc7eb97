//! `access`.
