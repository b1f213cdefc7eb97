//! A value that flows through a graph: JSON behind an `Arc`.
//!
//! Channels are read by every activation of a superstep and changed by few, so sharing a value costs
//! a counter and changing it copies only when somebody else still holds it.
//!
//! **Invariant:** expressions read this JSON where it lies; there is no second, converted form of it.

use std::sync::Arc;

use serde_json::Value;

/// A JSON value, cheap to clone.
#[derive(Clone, Debug)]
pub struct Shared(Arc<Value>);

impl Shared {
    /// Wraps `json`.
    #[must_use]
    pub fn new(json: Value) -> Self {
        Self(Arc::new(json))
    }

    /// The value as JSON.
    #[must_use]
    pub fn json(&self) -> &Value {
        &self.0
    }

    /// The JSON for changing in place: without a copy when nobody else holds this value.
    pub fn make_mut(&mut self) -> &mut Value {
        Arc::make_mut(&mut self.0)
    }

    /// The JSON by value, without a copy when nobody else holds it.
    #[must_use]
    pub fn into_json(self) -> Value {
        Arc::unwrap_or_clone(self.0)
    }
}

impl From<Value> for Shared {
    fn from(json: Value) -> Self {
        Self::new(json)
    }
}

impl PartialEq for Shared {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0) || self.0 == other.0
    }
}
