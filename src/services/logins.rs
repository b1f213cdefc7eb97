//! Logins to tool servers: an administrator makes them, this process keeps them sealed and renews them.
//!
//! A login is one secret, `mcp-login.SERVER`: deleting that secret is logging out.
//!
//! **Invariant:** nothing that a client can ask for answers a token.

use secrecy::SecretString;
use serde::Serialize;
use url::{Host, Url};
use utoipa::ToSchema;

use super::Services;
use super::access::only_admin;
use super::api::Actor;
use super::error::ServiceError;
use super::secrets::{SecretError, Vault};
use crate::config::values::SecretSource;
use crate::store::webhooks::SYSTEM_USER;
use crate::tools::Tools;
use crate::tools::error::{ToolError, ToolErrorKind};

/// Bytes of an address that a browser is led to.
const MAX_ADDRESS_BYTES: usize = 16 << 10;

/// A login that was begun.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ToolLoginView {
    /// The page on which a person agrees.
    pub authorization_url: String,
}

impl Services {
    /// Begins a login to a tool server. The person's browser is led to `redirect_uri` in the end, which is on the
    /// person's own machine. Only an administrator may.
    ///
    /// # Errors
    /// Nobody logs in to this server, it does not tell how, or logins cannot be kept.
    pub async fn begin_tool_login(
        &self,
        actor: &Actor,
        server: &str,
        redirect_uri: &str,
    ) -> Result<ToolLoginView, ServiceError> {
        let tools = self.login_tools(actor, server)?;
        let redirect_uri = address("/redirect_uri", redirect_uri)?;
        let here = match redirect_uri.host() {
            Some(Host::Ipv4(host)) => host.is_loopback(),
            Some(Host::Ipv6(host)) => host.is_loopback(),
            Some(Host::Domain(host)) => host == "localhost",
            None => false,
        };
        if redirect_uri.scheme() != "http" || !here || redirect_uri.query().is_some() {
            return Err(ServiceError::invalid_at(
                "/redirect_uri",
                "`redirect_uri` is http:// with a loopback address, such as http://127.0.0.1:8400/callback",
            ));
        }
        if let Vault::Closed(reason) = self.vault() {
            let message = format!("a login could not be kept: secrets cannot be used: {reason}");
            return Err(ServiceError::unavailable(message));
        }
        let authorization_url = tools.begin_login(server, &redirect_uri).await?;
        Ok(ToolLoginView { authorization_url })
    }

    /// Finishes the login that was begun last on this process, with the whole address that the browser was led
    /// to. Only an administrator may.
    ///
    /// # Errors
    /// None was begun, or it was refused.
    pub async fn finish_tool_login(
        &self,
        actor: &Actor,
        server: &str,
        led_to: &str,
    ) -> Result<(), ServiceError> {
        let tools = self.login_tools(actor, server)?;
        let led_to = address("/led_to", led_to)?;
        tools.finish_login(server, &led_to).await?;
        tracing::info!(tools.server = server, by = %actor.name, "{} logged in to {server}", actor.name);
        Ok(())
    }

    fn login_tools(&self, actor: &Actor, server: &str) -> Result<&Tools, ServiceError> {
        let tools = self.tools().ok_or_else(|| {
            ToolError::new(ToolErrorKind::UnknownServer, "no tool servers are configured")
        })?;
        tools.config(server)?;
        only_admin(actor)?;
        Ok(tools)
    }

    /// The login to a tool server; none when nobody has logged in.
    pub(super) async fn kept_login(&self, server: &str) -> Result<Option<SecretString>, String> {
        match self.secret_value(&SecretSource::Secret(secret_name(server))).await {
            Ok(login) => Ok(Some(login)),
            Err(SecretError::Missing(_)) => Ok(None),
            Err(err) => Err(err.to_string()),
        }
    }

    /// Keeps a login to a tool server.
    pub(super) async fn keep_login(&self, server: &str, login: SecretString) -> Result<(), String> {
        let kept = self.put_secret(SYSTEM_USER, &secret_name(server), &login).await;
        kept.map_err(|err| err.to_string())
    }
}

fn secret_name(server: &str) -> String {
    format!("mcp-login.{server}")
}

fn address(path: &str, text: &str) -> Result<Url, ServiceError> {
    let size = text.len();
    if size > MAX_ADDRESS_BYTES {
        let message =
            format!("the address has {size} bytes; at most {MAX_ADDRESS_BYTES} are accepted");
        return Err(ServiceError::invalid_at(path, message));
    }
    Url::parse(text).map_err(|_| ServiceError::invalid_at(path, "this is no absolute address"))
}
