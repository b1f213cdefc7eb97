//! Prometheus metrics of this process. Other layers count through the `metrics` facade.
//!
//! **Invariant:** a label's values are bounded: routes as patterns, never paths.

use std::sync::OnceLock;
use std::time::Duration;

use metrics_exporter_prometheus::{Matcher, PrometheusBuilder, PrometheusHandle};

/// Requests by method, route and status.
pub(super) const REQUESTS: &str = "cynai_http_requests_total";
/// From the request's head to the response's head.
pub(super) const SECONDS: &str = "cynai_http_request_seconds";
/// Streams and waits that are open.
pub(super) const STREAMS: &str = "cynai_http_streams_open";
/// Requests whose handler panicked.
pub(super) const PANICS: &str = "cynai_http_panics_total";

const BUCKETS: &[f64] =
    &[0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Models take their time.
const MODEL_BUCKETS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0];

/// The process's registry, installed on the first call; `None` when somebody else installed another.
pub fn registry() -> Option<&'static PrometheusHandle> {
    static HANDLE: OnceLock<Option<PrometheusHandle>> = OnceLock::new();
    HANDLE.get_or_init(install).as_ref()
}

fn install() -> Option<PrometheusHandle> {
    let builder = PrometheusBuilder::new()
        .upkeep_timeout(Duration::from_secs(5))
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), BUCKETS)
        .and_then(|builder| {
            // A prefix goes before a suffix.
            let models = Matcher::Prefix("cynai_model_".to_owned());
            builder.set_buckets_for_metric(models, MODEL_BUCKETS)
        });
    let recorder = match builder {
        Ok(builder) => builder.build_recorder(),
        Err(err) => {
            tracing::error!(error = %err, "metrics could not be set up");
            return None;
        }
    };
    let handle = recorder.handle();
    if metrics::set_global_recorder(recorder).is_err() {
        tracing::error!("metrics could not be set up: another recorder is installed");
        return None;
    }
    describe();
    Some(handle)
}

fn describe() {
    metrics::describe_counter!(REQUESTS, "HTTP requests by method, route and status");
    metrics::describe_histogram!(SECONDS, "Seconds from a request's head to its response's head");
    metrics::describe_gauge!(STREAMS, "Streams and waits that are open now");
    metrics::describe_counter!(
        "cynai_webhook_attempts_total",
        "Attempts to tell the end of a run, by outcome"
    );
    metrics::describe_gauge!(
        "cynai_workers",
        "Worker machines that get jobs, and those that do not"
    );
    metrics::describe_counter!(PANICS, "Requests whose handler panicked");
}
