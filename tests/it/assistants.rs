//! Assistants over REST.

use reqwest::Method;
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::support::TestSystem;

#[sqlx::test]
async fn every_loaded_graph_has_a_default_that_nobody_can_change(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let search = json!({"graph_id": "count"});
    let found = system.post("/assistants/search", search).await.expect(200);
    let default = &found[0];
    assert_eq!(default["graph_id"], "count");
    assert_eq!(default["metadata"], json!({"created_by": "system"}));
    let id = default["assistant_id"].as_str().unwrap();
    assert_eq!(uuid::Uuid::parse_str(id).unwrap().get_version_num(), 5);
    let path = format!("/assistants/{id}");
    assert_eq!(system.get(&path).await.expect(200), *default);
    system.call(Method::PATCH, &path, json!({"name": "x"})).await.expect_error(403, "forbidden");
    system.call(Method::DELETE, &path, Value::Null).await.expect_error(403, "forbidden");
    let all = json!({"metadata": {"created_by": "system"}});
    assert_eq!(system.post("/assistants/count", all).await.expect(200), 2);
    // Started again, the same graphs make nothing new.
    let again = cynai::services::catalog::GraphCatalog::new(crate::support::graphs());
    system.services.register_graphs(again).await.unwrap();
    assert_eq!(system.post("/assistants/count", json!({})).await.expect(200), 2);
}

#[sqlx::test]
async fn an_assistant_is_made_changed_found_and_deleted(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let request = json!({"graph_id": "count", "name": "My Counter", "metadata": {"team": "a"},
                         "config": {"recursion_limit": 5}});
    let made = system.post("/assistants", request).await.expect(200);
    assert_eq!((&made["version"], &made["context"]), (&json!(1), &json!({})));
    let path = format!("/assistants/{}", made["assistant_id"].as_str().unwrap());
    let change = json!({"metadata": {"more": 1}, "description": "counts"});
    let changed = system.call(Method::PATCH, &path, change).await.expect(200);
    assert_eq!(changed["version"], 2);
    assert_eq!(changed["metadata"], json!({"team": "a", "more": 1}));
    assert_eq!(changed["config"], json!({"recursion_limit": 5}));
    assert_eq!(changed["description"], "counts");
    let found = json!({"name": "counter", "metadata": {"team": "a"}, "select": ["version"]});
    let found = system.post("/assistants/search", found).await;
    assert_eq!(found.expect(200), json!([{"version": 2}]));
    assert_eq!(found.header("x-pagination-total"), Some("1"));
    system
        .call(Method::DELETE, &format!("{path}?delete_threads=false"), Value::Null)
        .await
        .expect(200);
    system.get(&path).await.expect_error(404, "not_found");
}

#[sqlx::test]
async fn bad_assistants_are_refused(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let create = async |body: Value| system.post("/assistants", body).await;
    create(json!({"graph_id": "nothing"})).await.expect_error(404, "not_found");
    create(json!({})).await.expect_error(422, "invalid");
    create(json!({"graph_id": "count", "context": [1]})).await.expect_error(422, "invalid");
    create(json!({"graph_id": "count", "name": "\n"})).await.expect_error(422, "invalid");
    let made = create(json!({"graph_id": "count"})).await.expect(200);
    let again = json!({"graph_id": "count", "assistant_id": made["assistant_id"]});
    create(again.clone()).await.expect_error(409, "conflict");
    let mut kept = again;
    kept["if_exists"] = "do_nothing".into();
    assert_eq!(create(kept).await.expect(200), made);
    system.get(&format!("/assistants/{}", uuid::Uuid::nil())).await.expect_error(404, "not_found");
    system.get("/assistants/by-name").await.expect_error(422, "invalid");
}

#[sqlx::test]
async fn a_graph_is_drawn_with_and_without_its_insides(pool: PgPool) {
    let system = TestSystem::start(pool).await;
    let found = system.post("/assistants/search", json!({"graph_id": "outer"})).await.expect(200);
    let path = format!("/assistants/{}", found[0]["assistant_id"].as_str().unwrap());
    let ids = |drawing: &Value| {
        let nodes = drawing["nodes"].as_array().unwrap().iter();
        nodes.map(|node| node["id"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let flat = system.get(&format!("{path}/graph")).await.expect(200);
    assert_eq!(ids(&flat), ["__start__", "inner", "__end__"]);
    assert_eq!(
        flat["edges"][0],
        json!({"source": "__start__", "target": "inner", "conditional": false})
    );
    let deep = system.get(&format!("{path}/graph?xray=true")).await.expect(200);
    assert_eq!(ids(&deep), ["__start__", "inner:add", "__end__"]);
    assert_eq!(system.get(&format!("{path}/graph?xray=1")).await.expect(200), deep);
    system.get(&format!("{path}/graph?xray=x")).await.expect_error(422, "invalid");
    let schemas = system.get(&format!("{path}/schemas")).await.expect(200);
    assert_eq!(schemas["graph_id"], "outer");
    assert_eq!(schemas["input_schema"]["properties"]["n"]["type"], "integer");
    let subgraphs = system.get(&format!("{path}/subgraphs")).await.expect(200);
    assert_eq!(subgraphs["inner"]["graph_id"], "count");
    assert_eq!(system.get(&format!("{path}/subgraphs/inner")).await.expect(200), subgraphs);
    assert_eq!(system.get(&format!("{path}/subgraphs/none")).await.expect(200), json!({}));
}
