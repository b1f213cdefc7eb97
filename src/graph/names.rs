//! Names: which are well formed, and which one an author probably meant.

/// Bytes of the name of a graph, a node, a channel or an item variable.
pub const MAX_NAME_BYTES: usize = 64;
/// The most of a tool's name that endpoints of models take, in bytes.
const MAX_OFFERED_BYTES: usize = 64;
/// What joins a server's name and a tool's into a name for a model.
const JOINT: &str = "__";

/// Whether `name` is an identifier: a letter or `_`, then letters, digits and `_`, so that it can stand
/// in an expression as `state.NAME`.
#[must_use]
pub fn is_identifier(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && chars.all(|char| char.is_ascii_alphanumeric() || char == '_')
        && name.len() <= MAX_NAME_BYTES
}

/// Whether `name` names a graph or a node: as [`is_identifier`], and `-` and `.` inside.
#[must_use]
pub fn is_name(name: &str) -> bool {
    let mut chars = name.chars();
    chars.next().is_some_and(|first| first.is_ascii_alphanumeric() || first == '_')
        && chars.all(|char| char.is_ascii_alphanumeric() || matches!(char, '_' | '-' | '.'))
        && name.len() <= MAX_NAME_BYTES
}

/// The candidate that `name` is most likely a misspelling of.
pub fn did_you_mean<'a>(
    name: &str,
    candidates: impl IntoIterator<Item = &'a str>,
) -> Option<&'a str> {
    let lower = name.to_lowercase();
    let distance = |candidate: &str| match candidate.to_lowercase() {
        cut if lower.len() >= 3 && cut.starts_with(&lower) => 1,
        other => strsim::damerau_levenshtein(&lower, &other),
    };
    candidates
        .into_iter()
        .map(|candidate| (distance(candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len().max(name.len()) / 3).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// At most twelve names, for a message: `a`, `b`, `c` and 3 more.
pub fn listed<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    const SHOWN: usize = 12;
    let names: Vec<&str> = names.into_iter().collect();
    let shown: Vec<String> = names.iter().take(SHOWN).map(|name| format!("`{name}`")).collect();
    match names.len().saturating_sub(SHOWN) {
        0 => shown.join(", "),
        more => format!("{} and {more} more", shown.join(", ")),
    }
}

/// What a model sees as the name of a server's tool: `SERVER__TOOL` in the letters that endpoints take; of a long name
/// the end is a hash.
#[must_use]
pub fn offered_name(server: &str, tool: &str) -> String {
    let plain = |text: &str| -> String {
        let allowed = |letter: char| letter.is_ascii_alphanumeric() || matches!(letter, '_' | '-');
        text.chars().map(|letter| if allowed(letter) { letter } else { '_' }).collect()
    };
    let name = format!("{}{JOINT}{}", plain(server), plain(tool));
    if name.len() <= MAX_OFFERED_BYTES {
        return name;
    }
    let digest = <sha2::Sha256 as sha2::Digest>::digest(format!("{server}/{tool}"));
    let hash: String = digest.iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    format!("{}_{hash}", &name[..MAX_OFFERED_BYTES - hash.len() - 1])
}

/// Whether a pattern (`SERVER/TOOL`, `SERVER/*`) names the tool.
#[must_use]
pub fn names_tool(pattern: &str, server: &str, tool: &str) -> bool {
    pattern
        .split_once('/')
        .is_some_and(|(of, which)| of == server && (which == "*" || which == tool))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_name_one_tool_or_all_of_a_server() {
        assert!(
            names_tool("files/read", "files", "read") && names_tool("files/*", "files", "read")
        );
        assert!(
            !names_tool("files/read", "files", "write") && !names_tool("other/*", "files", "read")
        );
    }

    #[test]
    fn a_near_name_is_suggested_and_a_far_one_is_not() {
        let check = |name: &str, expected: Option<&str>| {
            assert_eq!(did_you_mean(name, ["total", "errors", "files"]), expected, "{name}");
        };
        check("totl", Some("total"));
        check("Total", Some("total"));
        check("erorrs", Some("errors"));
        check("tot", Some("total"));
        check("approved", None);
        check("", None);
    }

    #[test]
    fn names_are_checked_by_their_characters_and_length() {
        let check = |name: &str, identifier: bool, accepted: bool| {
            assert_eq!(is_identifier(name), identifier, "{name}");
            assert_eq!(is_name(name), accepted, "{name}");
        };
        check("total_2", true, true);
        check("log-triage", false, true);
        check("2fast", false, true);
        check("-x", false, false);
        check("a b", false, false);
        check("", false, false);
        check(&"a".repeat(65), false, false);
    }

    #[test]
    fn models_get_names_that_endpoints_take() {
        assert_eq!(offered_name("files", "read_file"), "files__read_file");
        assert_eq!(offered_name("my.files", "read file"), "my_files__read_file");
        let long = offered_name("server", &"x".repeat(100));
        assert_eq!(long.len(), 64);
        assert_ne!(long, offered_name("server", &"x".repeat(101)));
    }
}
