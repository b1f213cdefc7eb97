//! Assistants: a graph with a name and a configuration, which is what clients start.
//!
//! Every loaded graph has a default assistant whose id is a hash of the graph's name, so every replica
//! makes the same one and clients can compute it. Defaults belong to nobody and cannot be changed.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::types::Json;
use utoipa::ToSchema;
use uuid::Uuid;

use super::api::{Actor, AssistantRef, IfExists, Object, Page, instant};
use super::catalog::GraphCatalog;
use super::drawing::{self, DrawingView, SchemasView};
use super::error::ServiceError;
use super::{Services, checks};
use crate::graph::model::Graph;
use crate::ids::AssistantId;
use crate::store::assistants::{self as store, AssistantPage, AssistantQuery, AssistantRow};
use crate::store::crash;
use crate::store::status::words;

/// The namespace that clients of this API know for the ids of default assistants.
const DEFAULTS: Uuid = Uuid::from_u128(0x6ba7_b821_9dad_11d1_80b4_00c0_4fd4_30c8);

/// An assistant as clients see it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct AssistantView {
    /// Its id.
    #[schema(value_type = Uuid)]
    pub assistant_id: AssistantId,
    /// The graph's name.
    pub graph_id: String,
    /// `tags`, `recursion_limit`, `configurable`.
    #[schema(value_type = Object)]
    pub config: Object,
    /// Constant values for its runs.
    #[schema(value_type = Object)]
    pub context: Value,
    /// When it was made.
    #[serde(with = "instant")]
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    #[serde(with = "instant")]
    pub updated_at: DateTime<Utc>,
    /// The client's own keys.
    #[schema(value_type = Object)]
    pub metadata: Object,
    /// Grows with every change.
    pub version: i32,
    /// What people call it.
    pub name: String,
    /// What it is for.
    pub description: Option<String>,
}

/// A new assistant.
#[derive(Debug, Clone)]
pub struct CreateAssistant {
    /// The client's choice of an id.
    pub assistant_id: Option<AssistantId>,
    /// The graph's name.
    pub graph_id: String,
    /// As in the view.
    pub config: Object,
    /// As in the view.
    pub context: Value,
    /// As in the view.
    pub metadata: Object,
    /// When the id is taken.
    pub if_exists: IfExists,
    /// Default: the graph's name.
    pub name: Option<String>,
    /// What it is for.
    pub description: Option<String>,
}

/// Changes of an assistant; what is `None` stays.
#[derive(Debug, Clone, Default)]
pub struct UpdateAssistant {
    /// Another graph.
    pub graph_id: Option<String>,
    /// Replaces the whole.
    pub config: Option<Object>,
    /// Replaces the whole.
    pub context: Option<Value>,
    /// Laid over the old.
    pub metadata: Option<Object>,
    /// Another name.
    pub name: Option<String>,
    /// Another description.
    pub description: Option<String>,
}

/// Which assistants to list.
#[derive(Debug, Clone)]
pub struct SearchAssistants {
    /// Whose metadata contains this.
    pub metadata: Object,
    /// Of this graph.
    pub graph_id: Option<String>,
    /// Whose name contains this, in any case.
    pub name: Option<String>,
    /// At most so many.
    pub limit: u32,
    /// Skip so many.
    pub offset: u32,
    /// By what.
    pub sort_by: AssistantSort,
    /// Smallest first.
    pub ascending: bool,
}

words! {
    /// What assistants are sorted by.
    AssistantSort {
        /// Their id.
        AssistantId = "assistant_id",
        /// Their graph's name.
        GraphId = "graph_id",
        /// Their name.
        Name = "name",
        /// When they were made.
        CreatedAt = "created_at",
        /// When they last changed.
        UpdatedAt = "updated_at",
    }
}

/// What a new run takes from its assistant.
#[derive(Debug, Clone)]
pub(super) struct ResolvedAssistant {
    /// Its id.
    pub(super) assistant_id: AssistantId,
    /// The version of its graph that is loaded now.
    pub(super) graph: Arc<Graph>,
    /// To be overlaid by the run's own.
    pub(super) config: Object,
    /// To be overlaid by the run's own.
    pub(super) context: Value,
}

impl Services {
    /// Makes `catalog` what new runs start: stores every graph and makes its default assistant.
    pub async fn register_graphs(&self, catalog: GraphCatalog) -> Result<(), ServiceError> {
        let now = self.clock().now();
        let mut tx = self.transaction().await?;
        // In order of names, so that two servers that start at once do not wait for each other in turn.
        for graph in catalog.iter() {
            for inner in graph.subgraphs().values() {
                insert_graph(&mut tx, inner, now).await?;
            }
            insert_graph(&mut tx, graph, now).await?;
        }
        for graph in catalog.iter() {
            store::set_graph_name(&mut tx, &graph.name, &graph.hash.0, now).await?;
            store::insert(&mut tx, &default_row(&graph.name, now)).await?;
        }
        // Under names that no graph file can have, and without an assistant.
        for graph in self.builtin().into_iter().flat_map(GraphCatalog::iter) {
            insert_graph(&mut tx, graph, now).await?;
            let name = format!("cynai/{}", graph.name);
            store::set_graph_name(&mut tx, &name, &graph.hash.0, now).await?;
        }
        crash::commit(tx, "graphs").await?;
        self.set_graphs(catalog);
        Ok(())
    }

    /// What a new run of `assistant` starts.
    pub(super) async fn resolve_assistant(
        &self,
        actor: &Actor,
        assistant: &AssistantRef,
    ) -> Result<ResolvedAssistant, ServiceError> {
        match assistant {
            AssistantRef::Name(name) => Ok(ResolvedAssistant {
                assistant_id: default_id(name),
                graph: self.loaded_graph(name)?,
                config: Object::new(),
                context: json!({}),
            }),
            AssistantRef::Id(id) => {
                let row = self.assistant_row(actor, *id).await?;
                Ok(ResolvedAssistant {
                    assistant_id: row.assistant_id,
                    graph: self.loaded_graph(&row.graph_name)?,
                    config: row.config.0,
                    context: row.context.0,
                })
            }
        }
    }

    /// Makes an assistant.
    pub async fn create_assistant(
        &self,
        actor: &Actor,
        request: CreateAssistant,
    ) -> Result<AssistantView, ServiceError> {
        self.loaded_graph(&request.graph_id)?;
        let now = self.clock().now();
        let row = AssistantRow {
            assistant_id: request.assistant_id.unwrap_or_else(AssistantId::new),
            user_id: Some(actor.user_id),
            name: request.name.unwrap_or_else(|| request.graph_id.clone()),
            graph_name: request.graph_id,
            description: request.description,
            config: Json(request.config),
            context: Json(request.context),
            metadata: Json(request.metadata),
            version: 1,
            created_at: now,
            updated_at: now,
        };
        self.check_assistant(&row)?;
        let mut db = self.pool().acquire().await?;
        if crash::around("assistant made", store::insert(&mut db, &row)).await? {
            return Ok(view(row));
        }
        let id = row.assistant_id;
        let taken = || ServiceError::Conflict(format!("there is an assistant {id} already"));
        if request.if_exists == IfExists::Raise {
            return Err(taken());
        }
        store::find(&mut db, id, actor.user_id).await?.map(view).ok_or_else(taken)
    }

    /// One assistant.
    pub async fn get_assistant(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<AssistantView, ServiceError> {
        self.assistant_row(actor, id).await.map(view)
    }

    /// Changes an assistant; its version grows.
    pub async fn update_assistant(
        &self,
        actor: &Actor,
        id: AssistantId,
        request: UpdateAssistant,
    ) -> Result<AssistantView, ServiceError> {
        let mut row = self.own_assistant(actor, id).await?;
        if let Some(graph) = request.graph_id {
            self.loaded_graph(&graph)?;
            row.graph_name = graph;
        }
        if let Some(config) = request.config {
            row.config = Json(config);
        }
        if let Some(context) = request.context {
            row.context = Json(context);
        }
        row.metadata.0.extend(request.metadata.unwrap_or_default());
        row.name = request.name.unwrap_or(row.name);
        row.description = request.description.or(row.description);
        row.version += 1;
        row.updated_at = self.clock().now();
        self.check_assistant(&row)?;
        let mut db = self.pool().acquire().await?;
        if !crash::around("assistant changed", store::update(&mut db, &row)).await? {
            return Err(ServiceError::Conflict(format!(
                "assistant {id} was changed by somebody else at the same time: read it again"
            )));
        }
        Ok(view(row))
    }

    /// Deletes an assistant. Its runs go on: they are pinned to their graph.
    pub async fn delete_assistant(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<(), ServiceError> {
        self.own_assistant(actor, id).await?;
        let mut db = self.pool().acquire().await?;
        if crash::around("assistant deleted", store::delete(&mut db, id, actor.user_id)).await? {
            return Ok(());
        }
        Err(ServiceError::not_found("assistant", id))
    }

    /// The actor's assistants and the defaults of the loaded graphs.
    pub async fn search_assistants(
        &self,
        actor: &Actor,
        request: &SearchAssistants,
    ) -> Result<Page<AssistantView>, ServiceError> {
        let page = AssistantPage {
            sort_by: request.sort_by.as_str(),
            ascending: request.ascending,
            limit: self.page_limit(request.limit)? + 1,
            offset: request.offset.into(),
        };
        self.check_metadata(&request.metadata)?;
        let loaded = self.graphs().names().map(str::to_owned).collect::<Vec<_>>();
        let mut db = self.pool().acquire().await?;
        let rows = store::search(&mut db, &assistant_query(actor, request, &loaded), &page).await?;
        Page::cut(rows, request.limit, request.offset, |row| Ok(view(row)))
    }

    /// How many there are.
    pub async fn count_assistants(
        &self,
        actor: &Actor,
        request: &SearchAssistants,
    ) -> Result<u64, ServiceError> {
        self.check_metadata(&request.metadata)?;
        let loaded = self.graphs().names().map(str::to_owned).collect::<Vec<_>>();
        let mut db = self.pool().acquire().await?;
        let count = store::count(&mut db, &assistant_query(actor, request, &loaded)).await?;
        u64::try_from(count).map_err(ServiceError::internal)
    }

    /// The picture of an assistant's graph, with the insides of its subgraphs to a depth of `xray`.
    pub async fn assistant_drawing(
        &self,
        actor: &Actor,
        id: AssistantId,
        xray: u32,
    ) -> Result<DrawingView, ServiceError> {
        let graph = self.assistant_graph(actor, id).await?;
        Ok(drawing::drawing(&graph, xray))
    }

    /// The JSON Schemas of an assistant's graph.
    pub async fn assistant_schemas(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<SchemasView, ServiceError> {
        let graph = self.assistant_graph(actor, id).await?;
        Ok(SchemasView::of(&graph))
    }

    /// The JSON Schemas of the graphs that an assistant's graph calls, by namespace.
    pub async fn assistant_subgraphs(
        &self,
        actor: &Actor,
        id: AssistantId,
        namespace: Option<&str>,
        recurse: bool,
    ) -> Result<Vec<(String, SchemasView)>, ServiceError> {
        let graph = self.assistant_graph(actor, id).await?;
        let found = drawing::subgraphs(&graph, recurse || namespace.is_some());
        let wanted =
            found.into_iter().filter(|(name, _)| namespace.is_none_or(|wanted| wanted == name));
        Ok(wanted.map(|(name, graph)| (name, SchemasView::of(&graph))).collect())
    }

    fn loaded_graph(&self, name: &str) -> Result<Arc<Graph>, ServiceError> {
        let graphs = self.graphs();
        graphs.get(name).cloned().ok_or_else(|| ServiceError::not_found("graph", name))
    }

    async fn assistant_graph(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<Arc<Graph>, ServiceError> {
        let row = self.assistant_row(actor, id).await?;
        self.loaded_graph(&row.graph_name)
    }

    async fn assistant_row(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<AssistantRow, ServiceError> {
        let mut db = self.pool().acquire().await?;
        let row = store::find(&mut db, id, actor.user_id).await?;
        row.ok_or_else(|| ServiceError::not_found("assistant", id))
    }

    async fn own_assistant(
        &self,
        actor: &Actor,
        id: AssistantId,
    ) -> Result<AssistantRow, ServiceError> {
        let row = self.assistant_row(actor, id).await?;
        if row.user_id.is_none() {
            return Err(ServiceError::Forbidden(format!(
                "assistant {id} is the default of graph {}, which cannot be changed: create one of your own",
                row.graph_name
            )));
        }
        Ok(row)
    }

    fn check_assistant(&self, row: &AssistantRow) -> Result<(), ServiceError> {
        let limit = self.limits().metadata_bytes;
        checks::text("name", &row.name, 200)?;
        if let Some(description) = &row.description
            && (description.len() > limit || description.contains('\0'))
        {
            return Err(ServiceError::invalid_at(
                "/description",
                format!("a description is at most {limit} bytes, without U+0000"),
            ));
        }
        checks::object("config", &row.config, limit)?;
        checks::object("metadata", &row.metadata, limit)?;
        match &row.context.0 {
            Value::Object(context) => checks::object("context", context, limit),
            _ => Err(ServiceError::invalid_at("/context", "`context` must be an object")),
        }
    }
}

/// The id of a graph's default assistant.
#[must_use]
pub fn default_id(graph: &str) -> AssistantId {
    AssistantId(Uuid::new_v5(&DEFAULTS, graph.as_bytes()))
}

fn default_row(graph: &str, now: DateTime<Utc>) -> AssistantRow {
    let mut metadata = Object::new();
    metadata.insert("created_by".to_owned(), "system".into());
    AssistantRow {
        assistant_id: default_id(graph),
        user_id: None,
        graph_name: graph.to_owned(),
        name: graph.to_owned(),
        description: None,
        config: Json(Object::new()),
        context: Json(json!({})),
        metadata: Json(metadata),
        version: 1,
        created_at: now,
        updated_at: now,
    }
}

async fn insert_graph(
    db: &mut sqlx::PgConnection,
    graph: &Graph,
    now: DateTime<Utc>,
) -> Result<(), ServiceError> {
    let subgraphs = graph.subgraphs();
    let subgraphs =
        subgraphs.iter().map(|(name, inner)| (name.clone(), inner.hash.to_string().into()));
    let definition = graph.file.canonical_json();
    let subgraphs = subgraphs.collect::<Object>();
    store::insert_graph(db, &graph.hash.0, &graph.name, &definition, &subgraphs, now).await?;
    Ok(())
}

fn assistant_query<'a>(
    actor: &Actor,
    request: &'a SearchAssistants,
    loaded: &'a [String],
) -> AssistantQuery<'a> {
    AssistantQuery {
        user: actor.user_id,
        loaded,
        metadata: &request.metadata,
        graph: request.graph_id.as_deref(),
        name: request.name.as_deref(),
    }
}

fn view(row: AssistantRow) -> AssistantView {
    AssistantView {
        assistant_id: row.assistant_id,
        graph_id: row.graph_name,
        config: row.config.0,
        context: row.context.0,
        created_at: row.created_at,
        updated_at: row.updated_at,
        metadata: row.metadata.0,
        version: row.version,
        name: row.name,
        description: row.description,
    }
}
