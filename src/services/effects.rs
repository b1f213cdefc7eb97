//! What runs did to the world.

use super::Services;
use super::api::{Actor, EffectView, RunKey};
use super::error::ServiceError;
use crate::store::effects::{self, EffectRecord};

impl Services {
    /// A run's effects on the world, in the order in which they were first sent.
    pub async fn list_effects(
        &self,
        actor: &Actor,
        key: RunKey,
        limit: u32,
        offset: u32,
    ) -> Result<Vec<EffectView>, ServiceError> {
        let limit = self.page_limit(limit)?;
        let run = self.run_row(actor, key).await?;
        let mut db = self.pool().acquire().await?;
        let effects = effects::of_run(&mut db, run.run_id, limit, offset.into()).await?;
        effects.into_iter().map(view).collect()
    }
}

fn view(effect: EffectRecord) -> Result<EffectView, ServiceError> {
    let json = |bytes: &[u8]| serde_json::from_slice(bytes).map_err(ServiceError::internal);
    Ok(EffectView {
        task_id: effect.task_id,
        attempt: effect.attempt,
        idempotency_key: effect
            .idempotency_key
            .unwrap_or_else(|| format!("{}-{}", effect.task_id, effect.attempt)),
        checkpoint_ns: effect.namespace,
        node: effect.node,
        kind: effect.kind,
        target: effect.target,
        effect: effect.effect,
        status: effect.status,
        sends: effect.sends,
        started_at: effect.started_at,
        ended_at: effect.ended_at,
        request_hash: effect.request_hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        request: json(&effect.request)?,
        outcome: effect.outcome.as_deref().map(json).transpose()?,
    })
}
