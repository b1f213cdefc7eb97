//! Making the cluster: once, and completely or not at all.
//!
//! It is made under another name (initdb, then the role and the database in PostgreSQL's single-user
//! mode, which needs no server and no open door) and renamed when it is whole and synced. A server
//! killed anywhere before that starts over.

use std::io;
use std::path::{Path, PathBuf};

use tokio::process::Command;

use super::account::Account;
use super::binaries::Binaries;
use super::error::EmbeddedError;
use super::layout::Layout;
use super::{ADMIN, ROLE, run};

/// Makes the cluster of `layout`.
pub(super) async fn make(
    layout: &Layout,
    account: &Account,
    binaries: &Binaries,
) -> Result<(), EmbeddedError> {
    let begun = tokio::time::Instant::now();
    tracing::info!(
        version = binaries.major,
        user = account.server,
        "making a database in {}",
        layout.cluster().display()
    );
    let dir = layout.new_cluster(account)?;
    let maker = Maker { layout, account, dir };
    maker.run(binaries.initdb(), &initdb_arguments(&maker.dir), "").await?;
    let sql = format!("create role {ROLE} login createdb;\ncreate database {ROLE} owner {ROLE};\n");
    maker.run(binaries.postgres(), &single_arguments(&maker.dir), &sql).await?;
    layout.adopt_cluster(&maker.dir)?;
    tracing::info!(milliseconds = begun.elapsed().as_millis(), "made the database");
    Ok(())
}

struct Maker<'a> {
    layout: &'a Layout,
    account: &'a Account,
    dir: PathBuf,
}

impl Maker<'_> {
    async fn run(
        &self,
        program: PathBuf,
        arguments: &[String],
        input: &str,
    ) -> Result<(), EmbeddedError> {
        let mut command = Command::new(&program);
        command
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C.UTF-8")
            .env("TZ", "UTC")
            .env("PATH", "/usr/bin:/bin")
            .current_dir(self.layout.base());
        self.account.apply(&mut command);
        let output = match run::feed(command, &program, run::SLOW, input).await {
            Err(EmbeddedError::Run { source, .. }) => {
                return Err(not_run(source, &program, self.layout, self.account));
            }
            other => other?,
        };
        if output.status.success() {
            return Ok(());
        }
        let said = [output.stdout, output.stderr].concat();
        Err(EmbeddedError::Init { dir: self.layout.cluster(), said: run::tail(&said) })
    }
}

/// Our directories are passable and the program was run before, so when the server's user may not start
/// it here, a directory further up keeps it out.
pub(super) fn not_run(
    source: io::Error,
    program: &Path,
    layout: &Layout,
    account: &Account,
) -> EmbeddedError {
    if account.separate && source.kind() == io::ErrorKind::PermissionDenied {
        let dir = layout.base().to_owned();
        return EmbeddedError::Unreachable { dir, account: account.server.clone() };
    }
    EmbeddedError::Run { program: program.to_owned(), source }
}

fn initdb_arguments(dir: &Path) -> Vec<String> {
    let mut arguments: Vec<String> = [
        "--encoding=UTF8",
        "--locale=C.UTF-8",
        "--auth-local=peer",
        "--auth-host=reject",
        "--no-instructions",
    ]
    .map(String::from)
    .to_vec();
    arguments.push(format!("--username={ADMIN}"));
    arguments.push(format!("--pgdata={}", dir.display()));
    arguments
}

fn single_arguments(dir: &Path) -> Vec<String> {
    let dir = dir.display().to_string();
    ["--single", "-D", &dir, "-c", "exit_on_error=on", "-c", "log_checkpoints=off", ADMIN]
        .map(String::from)
        .to_vec()
}
