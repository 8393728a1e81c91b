//! Forms of Tidegate's configuration that a reader uses only if the configuration takes them.
//!
//! The readers ask here before they write such a form. Without it, the line of the source is
//! NOT POSSIBLE, or approximated if another form does nearly the same. A form is tried with the
//! reader of configurations, so a new key is in use as soon as it exists.

use std::sync::OnceLock;

/// What the configuration can express.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Available {
    /// `when_none_eligible = "wait"`
    pub(crate) wait: bool,
    /// `on_down = "reset"`
    pub(crate) on_down: bool,
    /// `backups = "one"`
    pub(crate) backups: bool,
    /// `[pool.NAME] proxy_protocol = "v2"`
    pub(crate) proxy_out: bool,
    /// `[frontend.NAME.proxy_protocol]`, and `proxy_protocol` of a bind.
    pub(crate) proxy_in: bool,
    /// The port of the client: a backend without port.
    pub(crate) client_port: bool,
    /// The port of the client and an offset: `10.0.0.7:+1000`.
    pub(crate) port_offset: bool,
    /// `enabled = false`
    pub(crate) enabled: bool,
    /// `kind = "mysql"`, with a user.
    pub(crate) mysql: bool,
    /// `kind = "postgres"`, with a user.
    pub(crate) postgres: bool,
    /// `kind = "smtp"`
    pub(crate) smtp: bool,
    /// `kind = "agent"`
    pub(crate) agent: bool,
    /// `kind = "exec"`, with a process that runs commands.
    pub(crate) exec: bool,
    /// `kind = "redis"`
    pub(crate) redis: bool,
    /// `kind = "ldap"`
    pub(crate) ldap: bool,
    /// `[log] access = "syslog:..."`
    pub(crate) syslog: bool,
}

impl Available {
    /// Tries every form, once per process.
    pub(crate) fn now() -> Self {
        static TRIED: OnceLock<Available> = OnceLock::new();
        *TRIED.get_or_init(Self::tried)
    }

    fn tried() -> Self {
        let bind = "\"127.0.0.1:1\"";
        let pool = |keys: &str| accepts(bind, "", keys, "\"127.0.0.2:1\"");
        let address = |address: &str| accepts(bind, "", "", address);
        let probe = |keys: &str| pool(&format!("probe = {{ {keys} }}"));
        Available {
            wait: pool("when_none_eligible = \"wait\"\nqueue_max = 1"),
            on_down: pool("on_down = \"reset\""),
            backups: pool("backups = \"one\""),
            proxy_out: pool("proxy_protocol = \"v2\""),
            proxy_in: accepts(
                "{ address = \"127.0.0.1:1\", proxy_protocol = true }",
                "[frontend.a.proxy_protocol]\nfrom = [\"0.0.0.0/0\"]",
                "",
                "\"127.0.0.2:1\"",
            ),
            client_port: address("\"127.0.0.2\""),
            port_offset: address("\"127.0.0.2:+1000\""),
            enabled: address(
                "\"127.0.0.2:1\"\nenabled = false\n[[pool.a.backend]]\naddress = \"127.0.0.3:1\"",
            ),
            mysql: probe("kind = \"mysql\", user = \"a\""),
            postgres: probe("kind = \"postgres\", user = \"a\""),
            smtp: probe("kind = \"smtp\""),
            agent: probe("kind = \"agent\", port = 1"),
            exec: accepts(
                bind,
                "[process]\nprobe_helper = true",
                "probe = { kind = \"exec\", command = [\"/a\"] }",
                "\"127.0.0.2:1\"",
            ),
            redis: probe("kind = \"redis\""),
            ldap: probe("kind = \"ldap\""),
            syslog: accepts(
                bind,
                "[log]\naccess = \"syslog:/dev/log\"\naccess_facility = \"local0\"",
                "",
                "\"127.0.0.2:1\"",
            ),
        }
    }
}

/// Returns true if a configuration with these parts is valid.
fn accepts(bind: &str, of_frontend: &str, of_pool: &str, address: &str) -> bool {
    let text = format!(
        "[frontend.a]\nbind = {bind}\npool = \"a\"\n{of_frontend}\n[pool.a]\n{of_pool}\n\
         [[pool.a.backend]]\naddress = {address}\n"
    );
    tidegate_config::parse(&text, "form").is_ok()
}
