//! Numbers that identify pools, backends and frontends for the lifetime of the process.
//!
//! The controller assigns them. They are used in place of names if a name is too large
//! or too slow to compare. A number is never reused, not even after a removal.

/// Identifies a pool while its name is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PoolId(pub u32);

impl PoolId {
    /// A number that no pool has.
    pub const NONE: PoolId = PoolId(0);
}

/// Identifies a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BackendId(pub u32);

/// Identifies a frontend.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FrontendId(pub u32);
