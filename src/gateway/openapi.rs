//! The description of this API that it serves itself. Routes add themselves; this adds what all share.

use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{ComponentsBuilder, ContentBuilder, OpenApi, Ref, ResponseBuilder};
use utoipa::{OpenApi as _, PartialSchema, ToSchema};

use super::error::{ErrorBody, ErrorMetadata};

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Cynai",
        description = "Runs work as checkpointed state graphs. Clients of LangGraph's API work unchanged."
    ),
    security(("bearer" = []), ("api_key" = []))
)]
struct Base;

/// The description without its routes.
pub(super) fn base() -> OpenApi {
    Base::openapi()
}

/// Adds to every operation what all have in common: how to prove who asks, and the form of errors.
#[must_use]
pub(super) fn finished(mut api: OpenApi) -> OpenApi {
    let bearer = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build();
    let key = ApiKey::Header(ApiKeyValue::new("x-api-key"));
    let shared = ComponentsBuilder::new()
        .security_scheme("bearer", SecurityScheme::Http(bearer))
        .security_scheme("api_key", SecurityScheme::ApiKey(key))
        .schema(ErrorBody::name(), ErrorBody::schema())
        .schema(ErrorMetadata::name(), ErrorMetadata::schema())
        .build();
    let components = api.components.get_or_insert_default();
    components.schemas.extend(shared.schemas);
    components.security_schemes.extend(shared.security_schemes);
    let content =
        ContentBuilder::new().schema(Some(Ref::from_schema_name(ErrorBody::name()))).build();
    let error =
        ResponseBuilder::new().description("What went wrong").content("application/json", content);
    let error = error.build();
    for path in api.paths.paths.values_mut() {
        let operations =
            [&mut path.get, &mut path.put, &mut path.post, &mut path.delete, &mut path.patch];
        for operation in operations.into_iter().flatten() {
            operation.responses.responses.insert("default".to_owned(), error.clone().into());
        }
    }
    api
}
