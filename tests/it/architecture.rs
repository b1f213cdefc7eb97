//! The shape of the code, checked by reading it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// Which parts each part may use.
const ARROWS: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "gateway", "driver", "worker", "nodes", "services", "models", "store", "tools",
            "egress", "kit", "graph", "config", "tls", "clock", "ids",
        ],
    ),
    ("gateway", &["services", "tools", "tls", "ids", "clock"]),
    ("driver", &["nodes", "services", "graph", "store", "worker", "clock", "ids"]),
    ("nodes", &["services", "models", "tools", "worker", "graph", "clock", "ids"]),
    (
        "services",
        &[
            "models",
            "store",
            "egress",
            "recurrence",
            "worker",
            "tools",
            "graph",
            "config",
            "tls",
            "clock",
            "ids",
        ],
    ),
    ("store", &["graph", "clock", "ids", "config"]),
    ("models", &["config", "clock", "ids", "egress"]),
    ("worker", &["config", "tls", "clock", "ids"]),
    ("tools", &["config", "clock", "ids"]),
    ("kit", &["graph", "clock", "ids"]),
    ("graph", &["ids"]),
    ("recurrence", &[]),
    ("egress", &["config", "clock", "ids"]),
    ("tls", &[]),
    ("config", &["ids"]),
    ("clock", &[]),
    ("ids", &[]),
];

/// Where a crate may be named.
const HOMES: &[(&str, &[&str])] = &[
    ("petgraph", &["graph"]),
    ("cel", &["graph"]),
    ("async_openai", &["models"]),
    ("axum", &["gateway", "worker"]),
    ("utoipa_axum", &["gateway"]),
    ("tower_http", &["gateway", "worker"]),
    ("clap", &["cli", "config", "worker"]),
    ("comfy_table", &["cli"]),
    ("indicatif", &["cli"]),
    ("anyhow", &["cli", "main"]),
    ("chacha20poly1305", &["egress"]),
    ("hmac", &["egress"]),
    ("ipnet", &["egress"]),
    ("rcgen", &["tls"]),
    ("tokio_rustls", &["tls"]),
];

struct Source {
    path: PathBuf,
    part: String,
    /// The code without comments and without what follows the file's own tests.
    code: String,
    text: String,
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = Vec::new();
    walk(&root, &mut |path| {
        let inner = path.strip_prefix(&root).unwrap();
        let first = inner.components().next().unwrap().as_os_str().to_str().unwrap();
        let part = first.trim_end_matches(".rs").to_owned();
        let text = std::fs::read_to_string(path).unwrap();
        let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
        let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
        let code = lines.collect::<Vec<_>>().join("\n");
        found.push(Source { path: inner.to_owned(), part, code, text });
    });
    assert!(found.len() > 30, "only {} sources were found", found.len());
    found
}

fn walk(folder: &Path, found: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            walk(&path, found);
        } else if path.extension().is_some_and(|kind| kind == "rs") {
            found(&path);
        }
    }
}

fn is_test(source: &Source) -> bool {
    source.path.file_stem().is_some_and(|name| name == "tests")
        || source.path.components().any(|part| part.as_os_str() == "tests")
}

#[test]
fn dependencies_point_down() {
    let arrows: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !is_test(source)) {
        if matches!(source.part.as_str(), "main" | "lib") {
            continue;
        }
        let allowed = arrows.get(source.part.as_str()).expect("a new part needs its arrows");
        for (part, _) in ARROWS {
            let named = source.code.contains(&format!("crate::{part}::"))
                || source.code.contains(&format!("crate::{part};"));
            if named && *part != source.part && !allowed.contains(part) {
                wrong.push(format!("{} uses {part}", source.path.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn sql_is_in_the_store_only() {
    let marks = [
        "query!(",
        "query_as!(",
        "query_scalar!(",
        "sqlx::query(",
        "sqlx::query_as(",
        "sqlx::query_scalar(",
        "sqlx::raw_sql(",
        "query_unchecked!",
    ];
    for source in sources().iter().filter(|source| source.part != "store" && !is_test(source)) {
        for mark in marks {
            assert!(!source.code.contains(mark), "{} has {mark}", source.path.display());
        }
    }
}

#[test]
fn crates_stay_at_home() {
    for source in sources().iter().filter(|source| !is_test(source)) {
        for (name, homes) in HOMES {
            let named = source.code.contains(&format!("use {name}::"))
                || source.code.contains(&format!(" {name}::"))
                || source.code.contains(&format!("({name}::"));
            let home = homes.contains(&source.part.as_str());
            assert!(!named || home, "{} uses {name}", source.path.display());
        }
    }
}

#[test]
fn nodes_are_implemented_where_nodes_live() {
    for source in sources().iter().filter(|source| !is_test(source)) {
        let has = source.code.lines().any(|line| line.contains("impl Node for"));
        // The kit's are stand-ins: they do nothing outside.
        let home = matches!(source.part.as_str(), "nodes" | "kit")
            || source.path.starts_with("graph/exec");
        assert!(!has || home, "{} implements Node", source.path.display());
    }
}

#[test]
fn only_routes_that_describe_themselves_are_served() {
    for source in sources().iter().filter(|source| source.part == "gateway") {
        let bare = source.code.matches(".route(").count();
        let own = usize::from(source.path.ends_with("gateway/meta.rs"));
        assert_eq!(
            bare,
            own,
            "{} serves a route outside of the description",
            source.path.display()
        );
    }
}

#[test]
fn every_file_says_what_it_is() {
    for source in sources().iter().filter(|source| !is_test(source)) {
        assert!(source.text.starts_with("//! "), "{} has no header", source.path.display());
    }
}

#[test]
fn what_is_one_place_s_business_is_done_there_only() {
    let rules: &[(&str, &[&str])] = &[
        ("Utc::now(", &["clock.rs"]),
        ("SystemTime::now(", &["clock.rs"]),
        // It waits for signals as long as the process lives: nobody is left to await it.
        ("tokio::spawn(", &["cli/serve.rs"]),
        // The crash points are armed by the tests that kill servers, not by an operator.
        ("env::var", &["config/", "store/crash.rs"]),
        ("println!(", &["cli/"]),
        // Everything else sees tools, servers and JSON.
        ("rmcp::", &["tools/wire/"]),
        ("unsafe {", &[]),
        ("todo!(", &[]),
        ("dbg!(", &[]),
    ];
    let mut wrong = Vec::new();
    for source in sources().iter().filter(|source| !is_test(source)) {
        let path = source.path.to_str().unwrap();
        for (mark, homes) in rules {
            if source.code.contains(mark) && !homes.iter().any(|home| path.starts_with(home)) {
                wrong.push(format!("{path} has {mark}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
