//! What confines this process, as it is told: each layer, whether it is in force,
//! and how far or why not.
//!
//! Filled in by `daemon::sandbox`, shown by status, metrics and the log. Plain data:
//! it changes nothing and asks nobody.

/// One of [`LAYERS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxLayer {
    /// Its name.
    pub layer: &'static str,
    /// Whether it confines anything.
    pub in_force: bool,
    /// How far; or why not.
    pub detail: String,
}

/// Everything that confines a process, in the order of [`LAYERS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxReport(Vec<SandboxLayer>);

/// In the order in which they are put up.
pub const LAYERS: [&str; 5] = ["user", "capabilities", "no_new_privs", "landlock", "seccomp"];

// === impl SandboxReport ===

impl SandboxReport {
    /// Nothing is in force, for that reason.
    pub fn none(why: &str) -> SandboxReport {
        let layer = |layer| SandboxLayer { layer, in_force: false, detail: why.to_owned() };
        SandboxReport(LAYERS.into_iter().map(layer).collect())
    }

    /// Notes that a layer is in force and how far, or why it is not.
    pub fn set(&mut self, layer: &str, state: Result<String, String>) {
        if let Some(found) = self.0.iter_mut().find(|one| one.layer == layer) {
            found.in_force = state.is_ok();
            found.detail = state.unwrap_or_else(|why| why);
        }
    }

    /// Whether that layer is in force.
    pub fn holds(&self, layer: &str) -> bool {
        self.0.iter().any(|one| one.layer == layer && one.in_force)
    }

    /// All of them.
    pub fn layers(&self) -> &[SandboxLayer] {
        &self.0
    }

    /// In one line: `user tidegate:tidegate; no landlock (not in this kernel)`.
    pub fn line(&self) -> String {
        let one = |layer: &SandboxLayer| match layer.in_force {
            true => format!("{} ({})", layer.layer, layer.detail),
            false => format!("no {} ({})", layer.layer, layer.detail),
        };
        self.0.iter().map(one).collect::<Vec<_>>().join(", ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_layer_is_told_in_order_with_its_reason() {
        let mut confinement = SandboxReport::none("off");
        confinement.set("seccomp", Ok("200 system calls".to_owned()));
        confinement.set("landlock", Err("not in this kernel".to_owned()));
        assert!(confinement.holds("seccomp") && !confinement.holds("user"));
        let line = "no user (off), no capabilities (off), no no_new_privs (off), \
                    no landlock (not in this kernel), seccomp (200 system calls)";
        assert_eq!(confinement.line(), line);
    }
}
