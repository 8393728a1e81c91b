//! What the balancer and those who ask it have to agree on.
//!
//! Used by `daemon`, which answers, and by `client`, which asks. Nothing here connects
//! or listens.

pub mod place;
