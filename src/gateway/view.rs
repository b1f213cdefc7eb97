//! Parts of views, and the headers of pages.

use axum::Json;
use axum::http::{HeaderMap, HeaderValue};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

use super::error::ApiError;
use crate::services::api::Page;

const EXTRACTS_AT_MOST: usize = 10;

/// A page as a JSON list with its headers.
pub(super) fn page<T: Serialize>(page: &Page<T>, items: Vec<Value>) -> Response {
    let mut headers = HeaderMap::new();
    headers.insert("x-pagination-total", HeaderValue::from(page.total));
    if let Some(next) = page.next {
        headers.insert("x-pagination-next", HeaderValue::from(next));
    }
    (headers, Json(items)).into_response()
}

/// Only the keys in `select`, which may be `key` or `key.below`; all of them when it is empty.
pub(super) fn select(view: &impl Serialize, select: &[String]) -> Result<Value, ApiError> {
    let value = serde_json::to_value(view).map_err(|_| ApiError::internal())?;
    let Value::Object(mut whole) = value else { return Ok(value) };
    if select.is_empty() {
        return Ok(Value::Object(whole));
    }
    let mut chosen = Map::new();
    for path in select {
        match path.split_once('.') {
            None => {
                if let Some(value) = whole.get(path) {
                    chosen.insert(path.clone(), value.clone());
                }
            }
            Some((key, below)) => {
                let Some(Value::Object(inner)) = whole.get_mut(key) else { continue };
                let Some(value) = inner.get(below).cloned() else { continue };
                let place = chosen.entry(key).or_insert_with(|| Value::Object(Map::new()));
                if let Value::Object(place) = place {
                    place.insert(below.to_owned(), value);
                }
            }
        }
    }
    Ok(Value::Object(chosen))
}

/// Adds `extracted`: alias -> the value at a path such as `values.messages[-1].content`.
pub(super) fn extract(
    view: &impl Serialize,
    wanted: &BTreeMap<String, String>,
) -> Result<Value, ApiError> {
    let whole = serde_json::to_value(view).map_err(|_| ApiError::internal())?;
    let found = wanted.iter().map(|(alias, path)| {
        (alias.clone(), at_path(&whole, path).cloned().unwrap_or(Value::Null))
    });
    Ok(Value::Object(found.collect()))
}

/// Refuses extracts that are too many or that look outside of what may be extracted.
pub(super) fn check_extract(wanted: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if wanted.len() > EXTRACTS_AT_MOST {
        let message = format!("`extract` may have at most {EXTRACTS_AT_MOST} entries");
        return Err(ApiError::invalid_at("/extract", message));
    }
    for (alias, path) in wanted {
        let root = path.split(['.', '[']).next().unwrap_or_default();
        if !["values", "metadata", "interrupts", "config", "error", "status"].contains(&root) {
            return Err(ApiError::invalid_at(
                format!("/extract/{alias}"),
                "a path begins with values, metadata, interrupts, config, error or status",
            ));
        }
    }
    Ok(())
}

fn at_path<'a>(whole: &'a Value, path: &str) -> Option<&'a Value> {
    path.split('.').try_fold(whole, |value, part| {
        let (key, mut indices) = part.split_at(part.find('[').unwrap_or(part.len()));
        let mut value = if key.is_empty() { value } else { value.get(key)? };
        while let Some(rest) = indices.strip_prefix('[') {
            let (index, rest) = rest.split_once(']')?;
            let items = value.as_array()?;
            let index: i64 = index.parse().ok()?;
            let place = usize::try_from(index).ok();
            let place = place
                .or_else(|| items.len().checked_sub(usize::try_from(index.unsigned_abs()).ok()?));
            value = items.get(place?)?;
            indices = rest;
        }
        Some(value)
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn check(path: &str, expected: Option<Value>) {
        let whole = json!({"values": {"list": [{"a": 1}, {"a": 2}], "text": "x"}});
        assert_eq!(at_path(&whole, path), expected.as_ref(), "{path}");
    }

    #[test]
    fn paths_reach_into_objects_and_lists_from_both_ends() {
        check("values.text", Some(json!("x")));
        check("values.list[0].a", Some(json!(1)));
        check("values.list[-1].a", Some(json!(2)));
        check("values.list[-3]", None);
        check("values.list[2]", None);
        check("values.list[x]", None);
        check("values.text.below", None);
        check("values.none", None);
    }

    #[test]
    fn selected_keys_may_reach_one_level_down() {
        let view = json!({"values": {"a": 1, "b": 2}, "next": [], "metadata": {}});
        let chosen = ["next".to_owned(), "values.b".to_owned(), "nothing".to_owned()];
        assert_eq!(select(&view, &chosen).unwrap(), json!({"next": [], "values": {"b": 2}}));
        assert_eq!(select(&view, &[]).unwrap(), view);
    }
}
