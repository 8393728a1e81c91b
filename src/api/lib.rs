//! What the balancer and its clients have to agree on: the documents of the admin API,
//! and where the admin socket is.
//!
//! Used by `daemon`, which writes the documents, and by `client`, `cli` and `lab`, which
//! read them. Nothing here connects or listens.
//!
//! A document has exactly the fields that its type lists, in that order. A reader
//! ignores fields it does not know, and keeps names it does not know as `Other`: so it
//! reads the documents of newer balancers. A field that is missing is an error, except
//! one that has a default because it came after a release. Times are in seconds, sizes
//! in bytes; a name that ends in `_total` counts from the start of the process.

pub mod answers;
pub mod explain;
pub mod names;
pub mod place;
pub mod reload;
pub mod status;
