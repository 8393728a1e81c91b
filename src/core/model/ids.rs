//! Numbers that name pools, backends and frontends for the life of the process.
//!
//! Given out by the controller; used wherever a name would cost too much. No number is used
//! twice, not even after a removal.

/// Names a pool, for as long as its name stays configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u32);

impl PoolId {
    /// No pool has this number.
    pub const NONE: PoolId = PoolId(0);
}

/// Names a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendId(pub u32);

/// Names a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub u32);
