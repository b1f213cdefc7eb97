//! How we introduce ourselves, and what a server is told that asks something on the connection.
//!
//! **Invariant:** what was not announced as a capability is declined or refused when it is asked for.

use rmcp::handler::client::ClientHandler;
use rmcp::model::{
    ClientCapabilities, ClientConfig, ElicitRequestParams, ElicitResult, ElicitationAction,
    ElicitationCapability, ErrorData, FormElicitationCapability, Implementation, ProtocolVersion,
};
use rmcp::service::{RequestContext, RoleClient};

use crate::config::tools::Elicitation;
use crate::tools::questions;

/// This side of a connection.
#[derive(Debug)]
pub(super) struct Us {
    config: ClientConfig,
    elicitation: Elicitation,
}

impl Us {
    /// We, with the capabilities that follow from how forms are answered.
    pub(super) fn new(elicitation: Elicitation) -> Self {
        let mut capabilities = ClientCapabilities::default();
        if elicitation == Elicitation::Defaults {
            let forms = ElicitationCapability::new().with_form(FormElicitationCapability::new());
            capabilities.elicitation = Some(forms);
        }
        let us = Implementation::new("cynai", env!("CARGO_PKG_VERSION"));
        let config = ClientConfig::new(capabilities, us)
            .with_protocol_version(ProtocolVersion::V_2025_11_25);
        Self { config, elicitation }
    }
}

impl ClientHandler for Us {
    fn get_info(&self) -> ClientConfig {
        self.config.clone()
    }

    async fn create_elicitation(
        &self,
        params: ElicitRequestParams,
        _context: RequestContext<RoleClient>,
    ) -> Result<ElicitResult, ErrorData> {
        let params = serde_json::to_value(params).unwrap_or_default();
        let answer = questions::answer(self.elicitation, &params);
        Ok(serde_json::from_value(answer)
            .unwrap_or_else(|_| ElicitResult::new(ElicitationAction::Decline)))
    }
}
