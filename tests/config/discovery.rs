//! Registries, `discover` tables and names: what the reader makes of them, and the files with
//! their secrets.

use super::*;
use model::{
    BackendAddr, EmptyAnswer, NameRecord, RegistryKind, RegistryQuery, ServerAddr, SourceKey,
    SourceQuestion,
};
use tidegate_config::Spot;

/// A file with `lines` after a frontend of pool `web`.
fn text(lines: &str) -> String {
    format!("[frontend.web]\nbind = \"127.0.0.1:1\"\npool = \"web\"\n{lines}")
}

#[track_caller]
fn parsed(lines: &str) -> Config {
    config::parse(&text(lines), "t").unwrap_or_else(|problems| panic!("{problems}"))
}

#[track_caller]
fn rejected(lines: &str) -> Vec<String> {
    let problems = config::parse(&text(lines), "t").unwrap_err();
    problems.list.into_iter().map(|problem| problem.message).collect()
}

const CONSUL: &str = "[pool.web.discover]\nfrom = \"main\"\nservice = \"web\"\n\
                      [registry.main]\nkind = \"consul\"\nservers = \"127.0.0.1:8500\"\n";

#[test]
fn pool_can_have_names_only_and_keeps_the_kinds_of_backends_apart() {
    let config = parsed(
        "[[pool.web.backend]]\nname = \"pg\"\naddress = \"DB.internal:05432\"\nweight = 7\n\
         [[pool.web.backend]]\naddress = \"srv:_pg._tcp.db\"\n[[pool.web.backend]]\n\
         address = \"10.0.0.1:80\"\n[[pool.web.backend]]\naddress = \"db:80\"\nbackup = true\n",
    );
    let pool = &config.pools[0];
    assert_eq!(pool.backends.len(), 1);
    assert!(matches!(pool.backends[0].address, BackendAddr::Tcp(_)));
    let named: Vec<_> = pool.named.iter().map(|it| (&*it.name, it.question.to_string())).collect();
    let wanted = [("pg", "DB.internal:5432"), ("srv:_pg._tcp.db", "srv:_pg._tcp.db")];
    assert_eq!(named[..2], wanted.map(|(name, question)| (name, question.to_owned())));
    assert_eq!((named[2].0, pool.named[2].tier, pool.named[0].weight), ("db:80", 1, 7));
    assert_eq!(pool.named[1].question.record, NameRecord::Srv);
    let only_names = parsed("[[pool.web.backend]]\naddress = \"db:80\"\n");
    assert!(only_names.pools[0].backends.is_empty());
}

#[test]
fn guards_without_keys_depend_on_what_is_asked() {
    let spec = |lines: &str| parsed(lines).pools[0].discover.clone().unwrap();
    let dns = spec("[pool.web.discover]\nkind = \"dns\"\nname = \"db\"\nport = 80\n");
    assert_eq!((dns.guards.empty, dns.guards.missing), (EmptyAnswer::Keep, 2));
    let file = spec("[pool.web.discover]\nkind = \"file\"\npath = \"/a\"\n");
    assert_eq!((file.guards.empty, file.guards.missing), (EmptyAnswer::Confirm, 1));
    assert_eq!(file.first_wait, Duration::from_secs(10));
    assert_eq!(spec(CONSUL).guards.empty, EmptyAnswer::Keep);
    let etcd = CONSUL.replace("consul", "etcd").replace("service = \"web\"\n", "");
    let etcd = spec(&etcd);
    assert_eq!(etcd.guards.empty, EmptyAnswer::Confirm);
    let SourceQuestion::Registry { registry, query } = &etcd.question else { panic!() };
    assert_eq!((registry.kind, &*registry.name), (RegistryKind::Etcd, "main"));
    let RegistryQuery::Etcd { prefix } = query else { panic!() };
    assert_eq!(&**prefix, "/tidegate/services/web/");
    let ranges: Vec<String> = etcd.guards.addresses.iter().map(ToString::to_string).collect();
    let private = "10.0.0.0/8 100.64.0.0/10 172.16.0.0/12 192.168.0.0/16 fc00::/7";
    assert_eq!(ranges.join(" "), private);
}

#[test]
fn order_of_ranges_of_a_source_does_not_change_the_configuration() {
    let with = |ranges: &str| {
        parsed(&format!(
            "[pool.web.discover]\nkind = \"file\"\npath = \"/a\"\naddresses = {ranges}"
        ))
    };
    assert_eq!(
        with("[\"10.0.0.0/8\", \"127.0.0.0/8\"]"),
        with("[\"127.0.0.0/8\", \"10.0.0.0/8\", \"10.0.0.0/8\"]")
    );
}

#[test]
fn secret_goes_to_another_host_only_with_tls() {
    let clear = |kind: &str, servers: &str, keys: &str| {
        let service = if kind == "consul" { "service = \"web\"\n" } else { "" };
        let lines = format!(
            "[pool.web.discover]\nfrom = \"main\"\n{service}[registry.main]\nkind = \"{kind}\"\n\
             servers = [{servers}]\n{keys}"
        );
        config::parse(&text(&lines), "t").err().map(|it| it.list[0].message.clone())
    };
    let token = "token_file = \"/t\"\n";
    let login = "user = \"a\"\npassword_file = \"/p\"\n";
    for local in ["\"127.0.0.9:1\"", "\"[::1]:1\"", "\"localhost:1\"", "\"unix:/consul\""] {
        assert_eq!(clear("consul", local, token), None, "{local}");
    }
    let message = clear("consul", "\"127.0.0.1:1\", \"consul.internal:8500\"", token).unwrap();
    assert_eq!(
        message,
        "token_file: the token would go to consul.internal:8500 without encryption"
    );
    let message = clear("etcd", "\"10.0.0.1:2379\"", login).unwrap();
    assert_eq!(message, "password_file: the password would go to 10.0.0.1:2379 without encryption");
    assert_eq!(clear("etcd", "\"10.0.0.1:2379\"", &format!("tls = true\n{login}")), None);
    assert_eq!(clear("consul", "\"10.0.0.1:8500\"", ""), None);
    let url = |url: &str| {
        let lines = format!("[pool.web.discover]\nkind = \"http\"\nurl = \"{url}\"\n{token}");
        config::parse(&text(&lines), "t").is_ok()
    };
    assert!(url("https://a.b/") && url("http://127.0.0.1/") && url("http://localhost:1/"));
    assert!(!url("http://a.b/") && !url("http://10.0.0.1/"));
}

#[test]
fn kubernetes_needs_no_server_in_a_pod() {
    let lines =
        CONSUL.replace("consul", "kubernetes").replace("servers = \"127.0.0.1:8500\"\n", "");
    let config = parsed(&lines);
    assert_eq!((config.registries[0].servers.len(), &config.registries[0].tls), (0, &None));
    let with_token = parsed(&format!("{lines}token_file = \"/t\"\n"));
    assert!(with_token.registries[0].token_file.is_some());
    let problems = rejected(&format!("{lines}kubeconfig = \"/k\"\ntoken_file = \"/t\"\n"));
    assert_eq!(problems, ["token_file has no effect with kubeconfig"]);
}

#[test]
fn file_has_at_most_16_registries_and_a_registry_at_most_16_servers() {
    let registries = |count: usize| -> String {
        let one = |n: usize| format!("[registry.r{n}]\nkind = \"kubernetes\"\n");
        "[[pool.web.backend]]\naddress = \"db:1\"\n".to_owned()
            + &(0..count).map(one).collect::<String>()
    };
    assert_eq!(parsed(&registries(16)).registries.len(), config::REGISTRIES_MAX);
    assert_eq!(rejected(&registries(17)), ["17 registries are more than the 16 allowed"]);
}

/// Writes a configuration with files of these contents and modes; `DIR` is their directory.
fn with_files(lines: &str, files: &[(&str, &str, u32)]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    for (name, content, mode) in files {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).unwrap();
    }
    let path = directory.path().join("t.toml");
    fs::write(&path, text(&lines.replace("DIR", &directory.path().display().to_string()))).unwrap();
    (directory, path)
}

const PEM: &str = "-----BEGIN CERTIFICATE-----\n";
const KEY: &str = "-----BEGIN PRIVATE KEY-----\n";

#[test]
fn files_of_registries_are_checked_and_belong_to_the_configuration() {
    let lines = format!(
        "{CONSUL}tls = true\nca_file = \"DIR/ca\"\ncert_file = \"DIR/cert\"\n\
         key_file = \"DIR/key\"\ntoken_file = \"DIR/token\"\n"
    );
    let with = |token: (&str, u32), key: (&str, u32), ca: &str| {
        let files = [
            ("ca", ca, 0o644),
            ("cert", PEM, 0o644),
            ("key", key.0, key.1),
            ("token", token.0, token.1),
        ];
        with_files(&lines, &files)
    };
    let (directory, path) = with(("secret\n", 0o640), (KEY, 0o600), PEM);
    let loaded = config::load(&path).unwrap();
    assert!(!format!("{loaded:?}").contains("secret"));
    let mut named: Vec<_> =
        loaded.config.named_files().iter().map(|file| bare_name(file)).collect();
    named.sort();
    assert_eq!(named, ["ca", "cert", "key", "token"]);
    let spot = Spot::NamedFile(directory.path().join("token"));
    let problem = loaded.origin.error(&spot, "expired", None);
    assert_eq!((problem.line, problem.column), (14, 14));
    // After a crash, the kept texts are enough.
    let texts = config::Texts::of(&path, loaded.text.clone(), &loaded.config);
    fs::remove_file(directory.path().join("token")).unwrap();
    assert_eq!(config::load_kept(&texts).unwrap().config, loaded.config);
    assert!(config::load(&path).is_err());
    for (token, key, ca, why) in [
        (("x", 0o644), (KEY, 0o600), PEM, "is accessible to others than its owner and group"),
        (("", 0o600), (KEY, 0o600), PEM, "is empty"),
        (("a\nb", 0o600), (KEY, 0o600), PEM, "contains more than one line"),
        (("x", 0o600), (KEY, 0o644), PEM, "run chmod 0640"),
        (("x", 0o600), ("no key", 0o600), PEM, "has no private key in PEM form"),
        (("x", 0o600), ("-----BEGIN ENCRYPTED PRIVATE KEY-----", 0o600), PEM, "encrypted"),
        (("x", 0o600), (KEY, 0o600), "der", "has no certificate"),
    ] {
        let (_directory, path) = with(token, key, ca);
        let problems = config::load(&path).unwrap_err();
        assert_eq!(problems.list.len(), 1, "{problems}");
        assert!(problems.list[0].message.contains(why), "{problems}");
    }
}

#[test]
fn files_of_a_url_belong_to_the_configuration() {
    let lines = "[pool.web.discover]\nkind = \"http\"\nurl = \"https://a.b/\"\n\
                 ca_file = \"DIR/ca\"\ntoken_file = \"DIR/token\"\n";
    let (_directory, path) = with_files(lines, &[("ca", PEM, 0o644), ("token", "x", 0o600)]);
    let named: Vec<_> = config::load(&path).unwrap().config.named_files();
    assert_eq!(named.iter().map(|file| bare_name(file)).collect::<Vec<_>>(), ["ca", "token"]);
}

#[test]
fn problems_that_are_found_later_have_the_place_of_their_source() {
    let lines = format!("{CONSUL}[[pool.web.backend]]\nname = \"pg\"\naddress = \"db:1\"\n");
    let (_directory, path) = with_files(&lines, &[]);
    let loaded = config::load(&path).unwrap();
    let place = |spot: &Spot| {
        let problem = loaded.origin.warning(spot, "not found", None);
        (problem.line, problem.column)
    };
    let source = |backend: Option<&str>| {
        Spot::MemberSource(SourceKey { pool: "web".into(), backend: backend.map(Into::into) })
    };
    assert_eq!(place(&source(None)), (5, 8));
    assert_eq!(place(&source(Some("pg"))), (12, 11));
    let server = ServerAddr::Ip("127.0.0.1:8500".parse().unwrap());
    assert_eq!(place(&Spot::RegistryServer("main".into(), server)), (9, 11));
}
