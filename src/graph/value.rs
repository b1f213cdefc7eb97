//! A value that flows through a graph: JSON, shared, and converted for expressions at most once.
//!
//! Channels are read by every activation of a superstep and changed by few, so a value is behind an
//! `Arc`; its CEL form is made when an expression first asks for it, and forgotten when it changes.

use std::sync::{Arc, OnceLock};

use serde_json::Value;

/// A JSON value, cheap to clone.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    json: Value,
    cel: OnceLock<cel::Value>,
}

impl Shared {
    /// Wraps `json`.
    #[must_use]
    pub fn new(json: Value) -> Self {
        Self(Arc::new(Inner { json, cel: OnceLock::new() }))
    }

    /// The value as JSON.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0.json
    }

    /// The value as an expression sees it; converted on the first call and kept.
    pub(super) fn cel(&self) -> &cel::Value {
        self.0.cel.get_or_init(|| super::expr::to_cel(&self.0.json))
    }

    /// The JSON for changing in place: without a copy when nobody else holds this value.
    pub fn make_mut(&mut self) -> &mut Value {
        if Arc::get_mut(&mut self.0).is_none() {
            self.0 = Arc::new(Inner { json: self.0.json.clone(), cel: OnceLock::new() });
        }
        let inner = Arc::get_mut(&mut self.0).expect("made unique above");
        inner.cel = OnceLock::new();
        &mut inner.json
    }

    /// The JSON by value, without a copy when nobody else holds it.
    #[must_use]
    pub fn into_json(self) -> Value {
        match Arc::try_unwrap(self.0) {
            Ok(inner) => inner.json,
            Err(shared) => shared.json.clone(),
        }
    }
}

impl From<Value> for Shared {
    fn from(json: Value) -> Self {
        Self::new(json)
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0.json == other.0.json
    }
}
