//! The 16 orders in which a session can close, one scene each.
//!
//! They differ in the side that ends first, in FIN or RST, in bytes sent before ([`STREAM`] or
//! none), and in whether the other side is idle or sends as many bytes. Bytes before a FIN
//! always arrive. A reset arrives as a reset, after all bytes that Tidegate had acknowledged.
//! `scripts/fault-table` prints the table of outcomes in `tests/net/README.md`.

use super::Act::{Acknowledged, Fin, Reset, SeesTheEnd, Send};
use super::Step::{Backend, Client, Connect};
use super::{Bytes, GONE, SCENE, STREAM, Scene, fin, reset, scenes};

scenes! {
    client_fin_before_data_while_the_backend_is_idle: Scene {
        steps: &[&[Connect, Client(Fin), Backend(SeesTheEnd), Backend(Fin)]],
        client: fin(Bytes::None),
        backend: fin(Bytes::None),
        ..SCENE
    };
    client_fin_before_data_while_the_backend_sends: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Client(Fin), Backend(SeesTheEnd)],
            &[Backend(Send(STREAM)), Backend(Fin)]],
        backend: fin(Bytes::None),
        ..SCENE
    };
    client_fin_after_data_while_the_backend_is_idle: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Client(Fin), Backend(SeesTheEnd), Backend(Fin)]],
        client: fin(Bytes::None),
        ..SCENE
    };
    client_fin_after_data_while_the_backend_sends: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Client(Send(STREAM)), Client(Fin)],
            &[Backend(SeesTheEnd), Backend(Send(STREAM)), Backend(Fin)]],
        ..SCENE
    };
    backend_fin_before_data_while_the_client_is_idle: Scene {
        steps: &[&[Connect, Backend(Fin), Client(SeesTheEnd), Client(Fin)]],
        client: fin(Bytes::None),
        backend: fin(Bytes::None),
        ..SCENE
    };
    backend_fin_before_data_while_the_client_sends: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Backend(Fin), Client(SeesTheEnd)],
            &[Client(Send(STREAM)), Client(Fin)]],
        client: fin(Bytes::None),
        ..SCENE
    };
    backend_fin_after_data_while_the_client_is_idle: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Backend(Fin), Client(SeesTheEnd), Client(Fin)]],
        backend: fin(Bytes::None),
        ..SCENE
    };
    backend_fin_after_data_while_the_client_sends: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Backend(Send(STREAM)), Backend(Fin)],
            &[Client(SeesTheEnd), Client(Send(STREAM)), Client(Fin)]],
        ..SCENE
    };
    client_rst_before_data_while_the_backend_is_idle: Scene {
        steps: &[&[Connect, Client(Reset)]],
        client: GONE,
        backend: reset(Bytes::None),
        cause: "client-reset",
        ..SCENE
    };
    client_rst_before_data_while_the_backend_sends: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Client(Reset), Backend(Send(STREAM))]],
        client: GONE,
        backend: reset(Bytes::None),
        cause: "client-reset",
        ..SCENE
    };
    client_rst_after_data_while_the_backend_is_idle: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Client(Acknowledged), Client(Reset)]],
        client: GONE,
        backend: reset(Bytes::All),
        cause: "client-reset",
        ..SCENE
    };
    client_rst_after_data_while_the_backend_sends: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Client(Send(STREAM)), Client(Acknowledged)],
            &[Client(Reset), Backend(Send(STREAM))]],
        client: GONE,
        backend: reset(Bytes::All),
        cause: "client-reset",
        ..SCENE
    };
    backend_rst_before_data_while_the_client_is_idle: Scene {
        steps: &[&[Connect, Backend(Reset)]],
        client: reset(Bytes::None),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    backend_rst_before_data_while_the_client_sends: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Backend(Reset), Client(Send(STREAM))]],
        client: reset(Bytes::None),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    backend_rst_after_data_while_the_client_is_idle: Scene {
        steps: &[&[Connect, Backend(Send(STREAM)), Backend(Acknowledged), Backend(Reset)]],
        client: reset(Bytes::All),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
    backend_rst_after_data_while_the_client_sends: Scene {
        steps: &[&[Connect, Client(Send(STREAM)), Backend(Send(STREAM)), Backend(Acknowledged)],
            &[Backend(Reset), Client(Send(STREAM))]],
        client: reset(Bytes::All),
        backend: GONE,
        cause: "backend-reset",
        ..SCENE
    };
}
