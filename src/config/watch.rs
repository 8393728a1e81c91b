//! stub
/// x
#[derive(Debug)]
pub struct ConfigWatcher;
