//! `cynai models`.

use clap::Args;
use serde_json::json;

use super::client::ClientArgs;
use super::show;

/// List the endpoints of models, what they have, and the routes that graphs name.
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  cynai models
  cynai models --json")]
pub(super) struct ModelsArgs {
    #[command(flatten)]
    client: ClientArgs,
}

/// Runs the command.
pub(super) async fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let listing = args.client.patient_client()?.get("/v1/model-endpoints").await?;
    if args.client.json {
        show::json_line(&listing);
        return Ok(());
    }
    let endpoints = listing["endpoints"].as_array().map(Vec::as_slice).unwrap_or_default();
    let columns = [
        ("ENDPOINT", "/name"),
        ("ADDRESS", "/url"),
        ("TOOK MS", "/took_ms"),
        ("MODELS", "/models"),
        ("PROBLEM", "/problem"),
    ];
    let none = "no endpoints; name one under `models:` in the configuration (docs/models.md)";
    show::table(&columns, endpoints, none);
    let routes: Vec<_> = listing["routes"]
        .as_object()
        .into_iter()
        .flatten()
        .map(|(name, candidates)| {
            let names =
                candidates.as_array().into_iter().flatten().filter_map(|name| name.as_str());
            json!({ "name": name, "candidates": names.collect::<Vec<_>>().join(", then ") })
        })
        .collect();
    if !routes.is_empty() {
        show::line("");
        show::table(&[("ROUTE", "/name"), ("ASKS", "/candidates")], &routes, "");
    }
    Ok(())
}
