//! The ways in which editors, scripts and orchestrators replace a file. Each makes exactly one
//! generation, and no session is affected. A reload during a write waits for the writer.

use crate::common::backend::{self, ScriptedBackend};
use crate::common::client::{self, connect};
use crate::common::conf::{Conf, Pool};
use crate::common::proxy::TestProxy;
use crate::common::{self, Engine, eventually, ms, on_every_engine, secs};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::Command;

on_every_engine!(
    slow_write_makes_one_generation,
    every_method_of_replacing_a_file_makes_one_generation,
    reload_during_a_write_waits_for_the_writer,
    reload_waits_for_the_writer_of_a_list_file,
    reload_is_rejected_if_the_writer_does_not_finish,
    file_replaced_behind_a_mount_gives_a_warning,
);

/// A process with two frontends to an echo backend. The weight in pool `last` distinguishes
/// the files.
struct RewriteSetup {
    proxy: TestProxy,
    echo: ScriptedBackend,
}

fn setup(engine: Engine) -> RewriteSetup {
    let echo = ScriptedBackend::start(backend::echo());
    let proxy = TestProxy::start(conf(engine, &echo));
    RewriteSetup { proxy, echo }
}

fn conf(engine: Engine, echo: &ScriptedBackend) -> Conf {
    let first = Conf::simple(engine, Pool::new("web").backend("e", echo.address()));
    first.frontend("last", "last", "").pool(Pool::new("last").backend("e", echo.address()))
}

impl RewriteSetup {
    /// Renders the configuration with a weight that depends on `number`.
    fn text(&self, number: u32) -> String {
        let mut conf = self.proxy.conf();
        conf.pool_mut("last").backends[0].keys = format!("weight = {}", 10 + number);
        self.proxy.render(&conf)
    }

    fn weight(&self) -> u64 {
        self.proxy.backend("last", "e")["weight"].as_u64().unwrap()
    }

    fn path(&self) -> PathBuf {
        self.proxy.config_path().to_path_buf()
    }

    /// Checks that `replace` makes exactly the generation `number + 1` and that an open session
    /// continues.
    #[track_caller]
    fn assert_one_generation(
        &self,
        what: &str,
        number: u32,
        replace: impl FnOnce(&RewriteSetup, &str),
    ) {
        let open = connect(self.proxy.addr("last"));
        assert_eq!(client::exchange(&open, b"before").unwrap(), b"before");
        replace(self, &self.text(number));
        eventually(secs(10), &format!("{what} is noticed"), || {
            self.weight() == u64::from(10 + number)
        });
        std::thread::sleep(ms(500));
        assert_eq!(self.proxy.generation(), 1 + u64::from(number), "{what}");
        assert_eq!(client::exchange(&open, b"after").unwrap(), b"after", "{what}");
        let refused = self.proxy.metric("tidegate_reloads_total", &[("result", "refused")]);
        assert_eq!(refused, 0.0, "{what}: {}", self.proxy.log());
    }
}

/// Writes `text` in 20 pieces over about 3 s.
fn write_slowly(mut file: File, text: &str) {
    for piece in text.as_bytes().chunks(text.len().div_ceil(20)) {
        file.write_all(piece).unwrap();
        std::thread::sleep(ms(150));
    }
}

fn slow_write_makes_one_generation(engine: Engine) {
    let setup = setup(engine);
    setup.assert_one_generation("a slow write", 1, |setup, text| {
        write_slowly(File::create(setup.path()).unwrap(), text);
    });
}

#[track_caller]
fn shell(setup: &RewriteSetup, script: &str) {
    let directory = setup.path().parent().unwrap().to_owned();
    let status = Command::new("sh").args(["-ec", script]).current_dir(directory).status();
    assert!(status.unwrap().success(), "{script}");
}

fn every_method_of_replacing_a_file_makes_one_generation(engine: Engine) {
    let setup = setup(engine);
    // Each script gets the new text in new.txt, in the directory of tidegate.toml.
    let scripts = [
        ("truncate and write", "cat new.txt > tidegate.toml"),
        ("cp", "cp new.txt tidegate.toml"),
        ("mv", "mv new.txt tidegate.toml"),
        ("rsync", "cp new.txt .tidegate.toml.Xy1z; mv .tidegate.toml.Xy1z tidegate.toml"),
        ("vim", "mv tidegate.toml tidegate.toml~; cat new.txt > tidegate.toml; rm tidegate.toml~"),
        ("vim with a copy", "cp tidegate.toml b~; cat new.txt > tidegate.toml; rm b~"),
        ("two writes", "head -c 200 new.txt > tidegate.toml; sleep 0.05; cp new.txt tidegate.toml"),
        ("delete and create", "rm tidegate.toml; cp new.txt tidegate.toml"),
    ];
    let mut number = 0;
    for (what, script) in scripts {
        number += 1;
        setup.assert_one_generation(what, number, |setup, text| {
            std::fs::write(setup.path().with_file_name("new.txt"), text).unwrap();
            shell(setup, script);
        });
    }
    number += 1;
    setup.assert_one_generation("sed -i", number, |setup, _| {
        let (old, new) = (10 + number - 1, 10 + number);
        shell(setup, &format!("sed -i 's/weight = {old}/weight = {new}/' tidegate.toml"));
    });
    // The first call makes the file a link, and the second replaces the link's target.
    for _ in 0..2 {
        number += 1;
        setup.assert_one_generation("ConfigMap", number, |setup, text| {
            setup.proxy.rewrite_by_symlink_swap(text);
        });
    }
}

fn reload_during_a_write_waits_for_the_writer(engine: Engine) {
    let setup = setup(engine);
    setup.assert_one_generation("a slow write with signals", 1, |setup, text| {
        let path = setup.path();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_slowly(File::create(path).unwrap(), text));
            std::thread::sleep(ms(700));
            setup.proxy.sighup();
            let answer = setup.proxy.admin_request("POST", "/v1/reload");
            assert_eq!(answer.status, 200, "{}", answer.body);
            assert_eq!(answer.json()["changed"], true, "{}", answer.body);
            assert!(writer.is_finished() || setup.weight() == 11, "answered too early");
            writer.join().unwrap();
        });
    });
    eventually(secs(5), "the session ends", || setup.echo.active() == 0);
}

fn reload_waits_for_the_writer_of_a_list_file(engine: Engine) {
    let mut setup = setup(engine);
    let list = setup.path().with_file_name("deny.txt");
    std::fs::write(&list, "192.0.2.1\n").unwrap();
    let mut conf = setup.proxy.conf();
    let key = format!("[frontend.last.sources]\ndeny_file = \"{}\"", list.display());
    conf.frontend_mut("last").keys = key;
    setup.proxy.reload(conf);
    // The first line alone would allow the client that the last line denies.
    let mut writer = OpenOptions::new().write(true).truncate(true).open(&list).unwrap();
    writer.write_all(b"192.0.2.2\n").unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| setup.proxy.admin_request("POST", "/v1/reload"));
        std::thread::sleep(ms(700));
        assert!(!asked.is_finished(), "the list was read half written");
        writer.write_all(b"127.0.0.1\n").unwrap();
        drop(writer);
        let answer = asked.join().unwrap();
        assert_eq!(answer.json()["changed"], true, "{}", answer.body);
    });
    let answered = TcpStream::connect(setup.proxy.addr("last")).and_then(|mut denied| {
        denied.write_all(b"x")?;
        denied.read_exact(&mut [0])
    });
    assert!(answered.is_err(), "only a part of the list is applied");
}

fn reload_is_rejected_if_the_writer_does_not_finish(engine: Engine) {
    if engine != Engine::Epoll {
        // The test takes seconds and does not depend on the engine.
        return;
    }
    let setup = setup(engine);
    let text = setup.text(1);
    let mut writer = File::create(setup.path()).unwrap();
    writer.write_all(&text.as_bytes()[..text.len() / 2]).unwrap();
    let answer = setup.proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("is still being written"), "{}", answer.body);
    assert_eq!(setup.proxy.generation(), 1);
    writer.write_all(&text.as_bytes()[text.len() / 2..]).unwrap();
    drop(writer);
    eventually(secs(5), "the whole file is read", || setup.weight() == 11);
}

/// Bind-mounts the file, as containers do with a single file, and starts the program with the
/// mounted file. `$1` is the program and `$4` the file.
const MOUNTED: &str = "touch $4.mounted; mount --bind $4 $4.mounted; program=$1; file=$4; \
                       shift 4; exec $program run --config $file.mounted $@";

fn file_replaced_behind_a_mount_gives_a_warning(engine: Engine) {
    let may = Command::new("unshare").args(["--mount", "true"]).status();
    if !may.is_ok_and(|status| status.success()) {
        return common::skip("unshare --mount is not allowed here");
    }
    let echo = ScriptedBackend::start(backend::echo());
    let wrapper = ["unshare", "--mount", "sh", "-ec", MOUNTED, "sh"];
    let proxy = TestProxy::start_under(conf(engine, &echo), &wrapper);
    let setup = RewriteSetup { proxy, echo };
    let answer = setup.proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["warnings"], serde_json::json!([]), "{answer}");
    setup.proxy.rewrite_by_rename(&setup.text(1));
    let answer = setup.proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["changed"], false, "{answer}");
    let warning = answer["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.contains("was deleted or replaced"), "{answer}");
    eventually(secs(5), "the warning is in the log", || {
        setup.proxy.log().contains("mount its directory")
    });
}
