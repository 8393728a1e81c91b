//! The contract between the balancer and its clients: the documents of the admin API and
//! the default paths of the admin socket.
//!
//! Written by `daemon`, read by `client`, `cli` and `lab`. It opens no connection and
//! listens on no address.
//!
//! - A document has exactly the fields of its type, in their order.
//! - A reader can read the documents of a newer balancer: it ignores unknown fields and
//!   keeps unknown names as `Other`.
//! - A missing field is an error, unless it has a default because it was added after a
//!   release.
//! - Times are in seconds, sizes in bytes. A `_total` counts since the process started.

pub mod answers;
pub mod decision;
pub mod events;
pub mod explain;
pub mod history;
pub mod names;
pub mod place;
pub mod reload;
pub mod sessions;
pub mod sources;
pub mod status;
pub mod stream;
