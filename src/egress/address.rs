//! Which addresses may be connected to: public ones, and those that the operator allows.
//!
//! Public is what is left of the address space after everything with a special purpose is taken away: a
//! list of what is refused would let pass what nobody thought of. Addresses that carry another one (IPv4 in
//! IPv6 in its several forms) are judged by what they carry, or refused.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use url::{Host, Url};

/// The most entries of an allow-list.
pub const MAX_ALLOWED: usize = 1000;

/// Blocks of IPv4 that no public server has, and why.
const REFUSED_V4: &[(&str, &str)] = &[
    ("0.0.0.0/8", "unspecified"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by carriers"),
    ("127.0.0.0/8", "loopback"),
    ("168.63.129.16/32", "a cloud's metadata"),
    ("169.254.0.0/16", "link-local, where clouds keep metadata"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "for protocols"),
    ("192.0.2.0/24", "for documentation"),
    ("192.88.99.0/24", "a relay"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "for benchmarks"),
    ("198.51.100.0/24", "for documentation"),
    ("203.0.113.0/24", "for documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
];

/// The only block of IPv6 that public servers have.
const PUBLIC_V6: &str = "2000::/3";

/// Parts of it that they have not.
const REFUSED_V6: &[(&str, &str)] = &[
    ("2001::/23", "for protocols"),
    ("2001:db8::/32", "for documentation"),
    ("2002::/16", "a tunnel to IPv4"),
    ("3fff::/20", "for documentation"),
];

/// IPv6 addresses that a translator makes of IPv4 ones: the IPv4 address is in the last four bytes.
const TRANSLATED: &str = "64:ff9b::/96";

/// An address that is not connected to.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// An address.
    #[error("{host} is refused: its address {address} is {why}; an operator can allow it")]
    Address {
        /// The host, as it was named.
        host: String,
        /// What it came to.
        address: IpAddr,
        /// What kind of address that is.
        why: &'static str,
    },
    /// A URL whose scheme is not spoken here.
    #[error("{scheme} is refused: only http and https are spoken")]
    Scheme {
        /// The scheme.
        scheme: String,
    },
    /// A URL without a host.
    #[error("a URL without a host is refused")]
    NoHost,
    /// A redirect from https to http.
    #[error("a redirect from https to http is refused")]
    Downgrade,
    /// A chain of redirects.
    #[error("more than {0} redirects are refused")]
    TooManyRedirects(usize),
    /// A name and password in a URL.
    #[error("a URL with a name and password in it is refused")]
    Credentials,
}

/// An entry of an allow-list that is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllowError {
    /// Neither an address nor a name.
    #[error(
        "`{0}` is no entry: write an address (192.168.1.5), a block (10.0.0.0/8), a name (hooks.internal), or all names below one (*.internal)"
    )]
    Form(String),
    /// Too many.
    #[error("{0} entries; at most {MAX_ALLOWED} are read")]
    TooMany(usize),
}

/// What an operator allows beside public addresses.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Allowed {
    blocks: Vec<IpNet>,
    /// Names, in lower case.
    names: Vec<String>,
    /// Names with a dot before them: everything below is allowed.
    below: Vec<String>,
}

impl Allowed {
    /// Reads the entries of a list.
    ///
    /// # Errors
    /// One of them cannot be read, or there are too many.
    pub fn parse<S: AsRef<str>>(entries: &[S]) -> Result<Self, AllowError> {
        if entries.len() > MAX_ALLOWED {
            return Err(AllowError::TooMany(entries.len()));
        }
        let mut allowed = Self::default();
        for entry in entries {
            let entry = entry.as_ref().trim();
            let wrong = || AllowError::Form(entry.to_owned());
            let bare = entry.trim_start_matches('[').trim_end_matches(']');
            if let Ok(block) = IpNet::from_str(bare) {
                allowed.blocks.push(block);
            } else if let Ok(address) = IpAddr::from_str(bare) {
                allowed.blocks.push(address.into());
            } else {
                let (name, below) = match entry.strip_prefix("*.") {
                    Some(name) => (name, true),
                    None => (entry, false),
                };
                // As in a URL, so that both are compared in one form. A number would be an address.
                let Ok(Host::Domain(name)) = Host::parse(name) else { return Err(wrong()) };
                let plain = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
                if name.is_empty() || name.len() > 253 || !name.chars().all(plain) {
                    return Err(wrong());
                }
                let name = name.trim_end_matches('.').to_owned();
                if below {
                    allowed.below.push(format!(".{name}"));
                } else {
                    allowed.names.push(name);
                }
            }
        }
        Ok(allowed)
    }

    /// Whether every address of this name is allowed.
    #[must_use]
    pub fn name(&self, host: &str) -> bool {
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        self.names.contains(&host) || self.below.iter().any(|below| host.ends_with(below))
    }

    /// Checks an address that `host` came to.
    ///
    /// # Errors
    /// It is not public, and neither it nor the name is allowed.
    pub fn check(&self, host: &str, address: IpAddr) -> Result<(), Refusal> {
        let Some(why) = refused(address) else { return Ok(()) };
        let bare = address.to_canonical();
        let listed =
            self.blocks.iter().any(|block| block.contains(&bare) || block.contains(&address));
        if listed || self.name(host) {
            return Ok(());
        }
        Err(Refusal::Address { host: host.to_owned(), address, why })
    }

    /// Checks what can be told of a URL without resolving its name: its scheme, its address when it is one.
    ///
    /// # Errors
    /// It is refused.
    pub fn check_url(&self, url: &Url) -> Result<(), Refusal> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(Refusal::Scheme { scheme: url.scheme().to_owned() });
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(Refusal::Credentials);
        }
        match url.host().ok_or(Refusal::NoHost)? {
            Host::Ipv4(address) => self.check(&address.to_string(), address.into()),
            Host::Ipv6(address) => self.check(&format!("[{address}]"), address.into()),
            Host::Domain(name) if is_local(name) => self.check(name, Ipv4Addr::LOCALHOST.into()),
            Host::Domain(_) => Ok(()),
        }
    }
}

/// Whether a name means this machine wherever it is asked.
fn is_local(name: &str) -> bool {
    let name = name.trim_end_matches('.').to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost")
}

/// Why an address is not public; `None` when it is.
#[must_use]
pub fn refused(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(address) => refused_v4(address),
        IpAddr::V6(address) => refused_v6(address),
    }
}

fn refused_v4(address: Ipv4Addr) -> Option<&'static str> {
    let inside = |block: &str| Ipv4Net::from_str(block).is_ok_and(|block| block.contains(&address));
    REFUSED_V4.iter().find(|(block, _)| inside(block)).map(|(_, why)| *why)
}

fn refused_v6(address: Ipv6Addr) -> Option<&'static str> {
    let inside = |block: &str| Ipv6Net::from_str(block).is_ok_and(|block| block.contains(&address));
    if inside(TRANSLATED) {
        let [.., a, b, c, d] = address.octets();
        return refused_v4(Ipv4Addr::new(a, b, c, d));
    }
    if !inside(PUBLIC_V6) {
        let kind = match address.segments()[0] {
            _ if address.is_loopback() => "loopback",
            _ if address.is_unspecified() => "unspecified",
            0xff00.. => "multicast",
            0xfe80..=0xfebf => "link-local",
            0xfc00..=0xfdff => "private",
            _ => "reserved",
        };
        return Some(kind);
    }
    REFUSED_V6.iter().find(|(block, _)| inside(block)).map(|(_, why)| *why)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(address: &str, expected: Option<&str>) {
        assert_eq!(refused(address.parse().unwrap()), expected, "{address}");
    }

    #[test]
    fn only_public_addresses_pass() {
        for public in
            ["1.1.1.1", "8.8.8.8", "100.63.255.255", "172.32.0.1", "192.0.1.1", "223.255.255.255"]
        {
            check(public, None);
        }
        for public in ["2606:4700::1111", "2a00:1450::1", "64:ff9b::1.1.1.1", "::ffff:1.1.1.1"] {
            check(public, None);
        }
        check("0.0.0.0", Some("unspecified"));
        check("0.1.2.3", Some("unspecified"));
        check("127.0.0.1", Some("loopback"));
        check("127.255.255.254", Some("loopback"));
        check("10.1.2.3", Some("private"));
        check("172.31.255.255", Some("private"));
        check("192.168.0.1", Some("private"));
        check("100.64.0.1", Some("shared by carriers"));
        check("100.100.100.200", Some("shared by carriers"));
        check("169.254.169.254", Some("link-local, where clouds keep metadata"));
        check("168.63.129.16", Some("a cloud's metadata"));
        check("192.0.0.192", Some("for protocols"));
        check("224.0.0.1", Some("multicast"));
        check("255.255.255.255", Some("reserved"));
        check("::", Some("unspecified"));
        check("::1", Some("loopback"));
        check("fe80::1", Some("link-local"));
        check("fc00::1", Some("private"));
        check("fd00:ec2::254", Some("private"));
        check("ff02::1", Some("multicast"));
        check("2001:db8::1", Some("for documentation"));
    }

    #[test]
    fn an_address_inside_another_is_found() {
        check("::ffff:127.0.0.1", Some("loopback"));
        check("::ffff:169.254.169.254", Some("link-local, where clouds keep metadata"));
        check("::127.0.0.1", Some("reserved"));
        check("64:ff9b::10.0.0.1", Some("private"));
        check("64:ff9b:1::10.0.0.1", Some("reserved"));
        check("2002:7f00:1::", Some("a tunnel to IPv4"));
        check("2001:0:4136:e378:8000:63bf:80ff:fffe", Some("for protocols"));
    }

    fn check_url(url: &str, allow: &[&str], expected: bool) {
        let allowed = Allowed::parse(allow).unwrap();
        let found = allowed.check_url(&url.parse().unwrap());
        assert_eq!(found.is_ok(), expected, "{url} with {allow:?}: {found:?}");
    }

    #[test]
    fn literal_addresses_are_seen_in_every_spelling() {
        for url in [
            "http://127.0.0.1/",
            "http://2130706433/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:7f00:1]/",
            "http://[64:ff9b::7f00:1]/",
            "http://[2002:7f00:1::]/",
            "http://localhost/",
            "http://LOCALHOST./",
            "http://a.localhost/",
            "http://１２７.0.0.1/",
            "http://169.254.169.254/latest/meta-data/",
            "ftp://1.1.1.1/",
            "file:///etc/passwd",
            "http://name:password@1.1.1.1/",
        ] {
            check_url(url, &[], false);
        }
        check_url("https://1.1.1.1/", &[], true);
        check_url("https://example.com/", &[], true);
    }

    #[test]
    fn an_operator_allows_blocks_and_names() {
        check_url("http://10.1.2.3/", &["10.0.0.0/8"], true);
        check_url("http://11.1.2.3/", &["10.0.0.0/8"], true);
        check_url("http://192.168.1.5/", &["192.168.1.5"], true);
        check_url("http://192.168.1.6/", &["192.168.1.5"], false);
        check_url("http://[::ffff:10.1.2.3]/", &["10.0.0.0/8"], true);
        check_url("http://[::1]/", &["::1"], true);
        check_url("http://localhost/", &["localhost"], true);
        check_url("http://localhost/", &["127.0.0.1"], true);
        let allowed = Allowed::parse(&["*.internal", "Hooks.Example"]).unwrap();
        assert!(allowed.name("a.internal") && allowed.name("A.b.internal."));
        assert!(allowed.name("hooks.example") && !allowed.name("internal"));
        assert!(!allowed.name("evilinternal") && !allowed.name("x.hooks.example"));
        for wrong in ["", "10.0.0.0/33", "http://x", "a b", "*", "a/b", "x:80"] {
            assert!(Allowed::parse(&[wrong]).is_err(), "{wrong}");
        }
    }
}
