//! Every way in which editors, scripts and orchestrators replace a file: each
//! makes exactly one generation, whole, and no session notices. A reload that
//! is asked for in the middle of a write waits for the writer.

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
    a_file_written_slowly_makes_one_generation,
    every_way_to_replace_a_file_makes_one_generation,
    a_reload_asked_for_in_the_middle_of_a_write_waits_for_the_writer,
    a_reload_waits_for_the_writer_of_a_list,
    a_reload_is_refused_while_a_writer_does_not_end,
    a_file_replaced_behind_a_mount_is_warned_of,
);

/// A frontend each for a backend that echoes and one whose weight tells the
/// files apart.
struct Bed {
    proxy: TestProxy,
    echo: ScriptedBackend,
}

fn bed(engine: Engine) -> Bed {
    let echo = ScriptedBackend::start(backend::echo());
    let proxy = TestProxy::start(conf(engine, &echo));
    Bed { proxy, echo }
}

fn conf(engine: Engine, echo: &ScriptedBackend) -> Conf {
    let first = Conf::simple(engine, Pool::new("web").backend("e", echo.address()));
    first.frontend("last", "last", "").pool(Pool::new("last").backend("e", echo.address()))
}

impl Bed {
    /// The text of a file that differs from all others by its number.
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

    /// `replace` makes generation `number + 1` and no other, with a session open.
    #[track_caller]
    fn makes_one_generation(&self, what: &str, number: u32, replace: impl FnOnce(&Bed, &str)) {
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

/// Writes `text` in pieces over about three seconds.
fn write_slowly(mut file: File, text: &str) {
    for piece in text.as_bytes().chunks(text.len().div_ceil(20)) {
        file.write_all(piece).unwrap();
        std::thread::sleep(ms(150));
    }
}

fn a_file_written_slowly_makes_one_generation(engine: Engine) {
    let bed = bed(engine);
    bed.makes_one_generation("a slow write", 1, |bed, text| {
        write_slowly(File::create(bed.path()).unwrap(), text);
    });
}

#[track_caller]
fn shell(bed: &Bed, script: &str) {
    let directory = bed.path().parent().unwrap().to_owned();
    let status = Command::new("sh").args(["-ec", script]).current_dir(directory).status();
    assert!(status.unwrap().success(), "{script}");
}

fn every_way_to_replace_a_file_makes_one_generation(engine: Engine) {
    let bed = bed(engine);
    // Each gets the new text in new.txt, beside tidegate.toml.
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
        bed.makes_one_generation(what, number, |bed, text| {
            std::fs::write(bed.path().with_file_name("new.txt"), text).unwrap();
            shell(bed, script);
        });
    }
    number += 1;
    bed.makes_one_generation("sed -i", number, |bed, _| {
        let (old, new) = (10 + number - 1, 10 + number);
        shell(bed, &format!("sed -i 's/weight = {old}/weight = {new}/' tidegate.toml"));
    });
    // The first makes the file a link, the second swaps what it leads to.
    for _ in 0..2 {
        number += 1;
        bed.makes_one_generation("ConfigMap", number, |bed, text| {
            bed.proxy.rewrite_by_symlink_swap(text);
        });
    }
}

fn a_reload_asked_for_in_the_middle_of_a_write_waits_for_the_writer(engine: Engine) {
    let bed = bed(engine);
    bed.makes_one_generation("a slow write with signals", 1, |bed, text| {
        let path = bed.path();
        std::thread::scope(|scope| {
            let writer = scope.spawn(move || write_slowly(File::create(path).unwrap(), text));
            std::thread::sleep(ms(700));
            bed.proxy.sighup();
            let answer = bed.proxy.admin_request("POST", "/v1/reload");
            assert_eq!(answer.status, 200, "{}", answer.body);
            assert_eq!(answer.json()["changed"], true, "{}", answer.body);
            assert!(writer.is_finished() || bed.weight() == 11, "answered too early");
            writer.join().unwrap();
        });
    });
    eventually(secs(5), "the session ends", || bed.echo.active() == 0);
}

fn a_reload_waits_for_the_writer_of_a_list(engine: Engine) {
    let mut bed = bed(engine);
    let list = bed.path().with_file_name("deny.txt");
    std::fs::write(&list, "192.0.2.1\n").unwrap();
    let mut conf = bed.proxy.conf();
    let key = format!("[frontend.last.sources]\ndeny_file = \"{}\"", list.display());
    conf.frontend_mut("last").keys = key;
    bed.proxy.reload(conf);
    // Its first line alone would let the client in that the last one denies.
    let mut writer = OpenOptions::new().write(true).truncate(true).open(&list).unwrap();
    writer.write_all(b"192.0.2.2\n").unwrap();
    std::thread::scope(|scope| {
        let asked = scope.spawn(|| bed.proxy.admin_request("POST", "/v1/reload"));
        std::thread::sleep(ms(700));
        assert!(!asked.is_finished(), "the list was read half written");
        writer.write_all(b"127.0.0.1\n").unwrap();
        drop(writer);
        let answer = asked.join().unwrap();
        assert_eq!(answer.json()["changed"], true, "{}", answer.body);
    });
    let answered = TcpStream::connect(bed.proxy.addr("last")).and_then(|mut denied| {
        denied.write_all(b"x")?;
        denied.read_exact(&mut [0])
    });
    assert!(answered.is_err(), "the list is in force as a whole");
}

fn a_reload_is_refused_while_a_writer_does_not_end(engine: Engine) {
    if engine != Engine::Epoll {
        // Nothing here is an engine's, and it takes its time.
        return;
    }
    let bed = bed(engine);
    let text = bed.text(1);
    let mut writer = File::create(bed.path()).unwrap();
    writer.write_all(&text.as_bytes()[..text.len() / 2]).unwrap();
    let answer = bed.proxy.admin_request("POST", "/v1/reload");
    assert_eq!(answer.status, 422, "{}", answer.body);
    assert!(answer.body.contains("is still being written"), "{}", answer.body);
    assert_eq!(bed.proxy.generation(), 1);
    writer.write_all(&text.as_bytes()[text.len() / 2..]).unwrap();
    drop(writer);
    eventually(secs(5), "the whole file is read", || bed.weight() == 11);
}

/// Mounts the file by itself, as containers do with one file, and starts the
/// program on the mount: `$1` is the program, `$4` the file.
const MOUNTED: &str = "touch $4.mounted; mount --bind $4 $4.mounted; program=$1; file=$4; \
                       shift 4; exec $program run --config $file.mounted $@";

fn a_file_replaced_behind_a_mount_is_warned_of(engine: Engine) {
    let may = Command::new("unshare").args(["--mount", "true"]).status();
    if !may.is_ok_and(|status| status.success()) {
        return common::skip("unshare --mount is not allowed here");
    }
    let echo = ScriptedBackend::start(backend::echo());
    let wrapper = ["unshare", "--mount", "sh", "-ec", MOUNTED, "sh"];
    let proxy = TestProxy::start_under(conf(engine, &echo), &wrapper);
    let bed = Bed { proxy, echo };
    let answer = bed.proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["warnings"], serde_json::json!([]), "{answer}");
    bed.proxy.rewrite_by_rename(&bed.text(1));
    let answer = bed.proxy.admin_request("POST", "/v1/reload").json();
    assert_eq!(answer["changed"], false, "{answer}");
    let warning = answer["warnings"][0].as_str().unwrap_or_default();
    assert!(warning.contains("was deleted or replaced"), "{answer}");
    eventually(secs(5), "the log says it, too", || bed.proxy.log().contains("mount its directory"));
}
