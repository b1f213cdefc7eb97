//! Against a real PostgreSQL. Every test has a cluster of its own.

use std::os::unix::fs::PermissionsExt;
use std::process::{Command as StdCommand, Output};

use nix::sys::signal::kill;
use nix::unistd::{Pid, Uid, getpgid};
use sqlx::{PgConnection, Row};

use super::*;

fn config(dir: &tempfile::TempDir) -> EmbeddedConfig {
    EmbeddedConfig::new(dir.path())
}

async fn connect(database: &Embedded) -> PgConnection {
    database.connect_options().connect().await.unwrap()
}

async fn show(connection: &mut PgConnection, setting: &'static str) -> String {
    let query = sqlx::query("select current_setting($1)").bind(setting);
    query.fetch_one(connection).await.unwrap().get(0)
}

async fn note(database: &Embedded, text: &str) {
    let mut connection = connect(database).await;
    sqlx::query("create table if not exists notes (body text)")
        .execute(&mut connection)
        .await
        .unwrap();
    sqlx::query("insert into notes values ($1)").bind(text).execute(&mut connection).await.unwrap();
}

async fn notes(database: &Embedded) -> Vec<String> {
    let mut connection = connect(database).await;
    sqlx::query_scalar("select body from notes order by 1")
        .fetch_all(&mut connection)
        .await
        .unwrap()
}

fn kill_hard(pid: i32) {
    kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
}

#[tokio::test]
async fn first_start_makes_a_durable_database_and_stop_ends_every_process() {
    let dir = tempfile::tempdir().unwrap();
    let database = Embedded::start(config(&dir)).await.unwrap();
    let mut connection = connect(&database).await;
    for setting in ["fsync", "synchronous_commit", "full_page_writes"] {
        assert_eq!(show(&mut connection, setting).await, "on", "{setting}");
    }
    assert_eq!(show(&mut connection, "listen_addresses").await, "");
    assert_eq!(show(&mut connection, "server_encoding").await, "UTF8");
    assert_eq!(show(&mut connection, "lc_collate").await, "C.UTF-8");
    assert_eq!(show(&mut connection, "is_superuser").await, "off");
    sqlx::query("create database second").execute(&mut connection).await.unwrap();
    assert!(sqlx::PgPool::connect(database.url()).await.is_ok());
    // Not in our process group: a terminal's Ctrl-C does not reach it.
    assert_ne!(getpgid(Some(Pid::from_raw(database.pid()))).unwrap(), getpgid(None).unwrap());

    let (pid, cluster) = (database.pid(), database.layout.cluster());
    assert!(postmaster::belongs(pid, &cluster));
    database.stop().await.unwrap();
    assert!(!postmaster::belongs(pid, &cluster));
    assert!(!PidFile::path(&cluster).exists(), "stopped in order, not killed");
}

#[tokio::test]
async fn database_that_survived_its_server_is_taken_over_and_can_be_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let first = Embedded::start(config(&dir)).await.unwrap();
    note(&first, "kept").await;
    let pid = first.pid();
    drop(first);
    let second = Embedded::start(config(&dir)).await.unwrap();
    assert_eq!((second.pid(), second.was_started()), (pid, false));
    assert_eq!(notes(&second).await, ["kept"]);
    let cluster = second.layout.cluster();
    second.stop().await.unwrap();
    assert!(!postmaster::belongs(pid, &cluster));
}

#[tokio::test]
async fn database_with_other_settings_is_restarted_not_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let first = Embedded::start(config(&dir)).await.unwrap();
    let pid = first.pid();
    drop(first);
    let mut changed = config(&dir);
    changed.settings.push(("work_mem".to_owned(), "5MB".to_owned()));
    let second = Embedded::start(changed).await.unwrap();
    assert_ne!(second.pid(), pid);
    assert_eq!(show(&mut connect(&second).await, "work_mem").await, "5MB");
    second.stop().await.unwrap();
}

#[tokio::test]
async fn killed_database_recovers_what_was_committed() {
    let dir = tempfile::tempdir().unwrap();
    let first = Embedded::start(config(&dir)).await.unwrap();
    note(&first, "committed").await;
    kill_hard(first.pid());
    drop(first);
    let second = Embedded::start(config(&dir)).await.unwrap();
    assert!(second.was_started());
    assert_eq!(notes(&second).await, ["committed"]);

    // Again, and now the dead server's process id belongs to somebody else.
    kill_hard(second.pid());
    let cluster = second.layout.cluster();
    drop(second);
    postmaster::clear_left_overs(&cluster).await.unwrap();
    let text = format!("{}\n{}\n1\n5432\n/s\n\n", std::process::id(), cluster.display());
    std::fs::write(PidFile::path(&cluster), text).unwrap();
    let third = Embedded::start(config(&dir)).await.unwrap();
    assert_eq!(notes(&third).await, ["committed"]);
    third.stop().await.unwrap();
}

#[tokio::test]
async fn supervised_database_comes_back_when_it_is_killed() {
    let dir = tempfile::tempdir().unwrap();
    let database = Embedded::start(config(&dir)).await.unwrap();
    note(&database, "committed").await;
    let (pid, cluster) = (database.pid(), database.layout.cluster());
    let options = database.connect_options();
    let stop = CancellationToken::new();
    let mut tasks = tokio::task::JoinSet::new();
    tasks.spawn(database.supervise(stop.clone()));
    kill_hard(pid);
    let deadline = Instant::now() + Duration::from_secs(30);
    let mut connection = loop {
        match options.connect().await {
            Ok(connection) => break connection,
            Err(err) => assert!(Instant::now() < deadline, "{err}"),
        }
        sleep(POLL).await;
    };
    let kept: i64 =
        sqlx::query_scalar("select count(*) from notes").fetch_one(&mut connection).await.unwrap();
    assert_eq!(kept, 1);
    stop.cancel();
    tasks.join_next().await.unwrap().unwrap().unwrap();
    assert_eq!(postmaster::alive(&cluster), None);
}

#[tokio::test]
async fn second_server_on_one_data_directory_is_refused_and_harms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let first = Embedded::start(config(&dir)).await.unwrap();
    let err = Embedded::start(config(&dir)).await.unwrap_err();
    assert!(err.to_string().contains(&format!("process {}", std::process::id())), "{err}");
    note(&first, "still works").await;
    first.stop().await.unwrap();
}

#[tokio::test]
async fn start_that_was_cut_short_leaves_nothing_in_the_way() {
    let dir = tempfile::tempdir().unwrap();
    // Cancelled while initdb runs, as by a kill.
    let cut = tokio::time::timeout(Duration::from_millis(150), Embedded::start(config(&dir))).await;
    assert!(cut.is_err(), "initdb takes longer than this");
    assert!(!dir.path().join("postgres/cluster").exists());
    let database = Embedded::start(config(&dir)).await.unwrap();
    note(&database, "whole").await;
    database.stop().await.unwrap();
}

#[tokio::test]
async fn data_directory_with_a_long_and_odd_name_works() {
    let dir = tempfile::tempdir().unwrap();
    let mut odd = config(&dir);
    odd.data_dir = dir.path().join(format!("my data, 'quoted' {}", "x".repeat(120)));
    if Uid::effective().is_root() {
        // While the parent is root's alone, the database's user cannot get there.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o700)).unwrap();
        let err = Embedded::start(odd.clone()).await.unwrap_err().to_string();
        assert!(err.contains("may not enter") && err.contains("chmod o+x"), "{err}");
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
    }
    let database = Embedded::start(odd).await.unwrap();
    note(&database, "here").await;
    assert!(!database.socket_dir.starts_with(dir.path()));
    let socket_dir = database.socket_dir.clone();
    database.stop().await.unwrap();
    std::fs::remove_dir(socket_dir).unwrap();
}

#[tokio::test]
async fn failed_start_shows_what_postgres_said_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let mut wrong = config(&dir);
    wrong.settings.push(("shared_buffers".to_owned(), "lots".to_owned()));
    let err = Embedded::start(wrong).await.unwrap_err().to_string();
    assert!(err.contains("a --pg-setting has a value that PostgreSQL refuses"), "{err}");
    assert!(err.contains("shared_buffers"), "{err}");
}

#[tokio::test]
async fn cluster_of_another_version_is_refused_with_the_package_to_install() {
    let dir = tempfile::tempdir().unwrap();
    let database = Embedded::start(config(&dir)).await.unwrap();
    let version = database.layout.cluster().join("PG_VERSION");
    database.stop().await.unwrap();
    std::fs::write(version, "14\n").unwrap();
    let err = Embedded::start(config(&dir)).await.unwrap_err().to_string();
    assert!(err.contains("apt-get install postgresql-14"), "{err}");
}

/// Who may connect is decided by the kernel's word and the map, not by what a client claims.
#[tokio::test]
async fn roles_and_users_that_the_map_does_not_name_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let database = Embedded::start(config(&dir)).await.unwrap();
    let admin = database.connect_options().username(ADMIN).database("postgres");
    let mut connection = admin.connect().await.unwrap();
    sqlx::query("create role stranger login").execute(&mut connection).await.unwrap();
    let refused = database.connect_options().username("stranger").connect().await.unwrap_err();
    assert!(refused.to_string().contains("Peer authentication failed"), "{refused}");

    let mode = std::fs::metadata(&database.socket_dir).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    if Uid::effective().is_root() {
        let output = query_as_nobody(&database);
        assert!(error_of(&output).contains("Permission denied"), "{}", error_of(&output));
        // Even past the directory, the user is still not the one that the map names.
        let socket = database.socket_dir.join(format!(".s.PGSQL.{PORT}"));
        std::fs::set_permissions(&database.socket_dir, PermissionsExt::from_mode(0o755)).unwrap();
        std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o777)).unwrap();
        let output = query_as_nobody(&database);
        assert!(error_of(&output).contains("Peer authentication failed"), "{}", error_of(&output));
    }
    database.stop().await.unwrap();
}

fn query_as_nobody(database: &Embedded) -> Output {
    StdCommand::new("setpriv")
        .args(["--reuid=65534", "--regid=65534", "--clear-groups", "psql", "-Atc", "select 1"])
        .arg(database.url())
        .output()
        .unwrap_or_else(|err| panic!("setpriv (apt-get install util-linux): {err}"))
}

fn error_of(output: &Output) -> String {
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}
