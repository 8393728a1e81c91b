//! The state of the sandbox: each layer, whether it is in force, and how far or why not.
//!
//! `daemon::sandbox` fills it in. Status, metrics and the log show it. Plain data: it
//! never makes a system call.

/// The state of a layer of [`LAYERS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxLayer {
    /// Name of the layer.
    pub layer: &'static str,
    /// True if the layer restricts this process.
    pub in_force: bool,
    /// How far it restricts the process, or why it does not.
    pub detail: String,
}

/// The state of all layers, in the order of [`LAYERS`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SandboxReport(Vec<SandboxLayer>);

/// The layers, in the order in which they are applied.
pub const LAYERS: [&str; 5] = ["user", "capabilities", "no_new_privs", "landlock", "seccomp"];

// === impl SandboxReport ===

impl SandboxReport {
    /// Makes a report in which no layer is in force, for the reason `why`.
    pub fn none(why: &str) -> SandboxReport {
        let layer = |layer| SandboxLayer { layer, in_force: false, detail: why.to_owned() };
        SandboxReport(LAYERS.into_iter().map(layer).collect())
    }

    /// Sets the state of a layer: how far it is in force, or why it is not.
    pub fn set(&mut self, layer: &str, state: Result<String, String>) {
        if let Some(found) = self.0.iter_mut().find(|one| one.layer == layer) {
            found.in_force = state.is_ok();
            found.detail = state.unwrap_or_else(|why| why);
        }
    }

    /// Returns whether the layer is in force.
    pub fn holds(&self, layer: &str) -> bool {
        self.0.iter().any(|one| one.layer == layer && one.in_force)
    }

    /// Returns all layers.
    pub fn layers(&self) -> &[SandboxLayer] {
        &self.0
    }

    /// Returns the report in one line: `user (tidegate:tidegate), no landlock (off)`.
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
    fn line_names_every_layer_in_order_with_its_reason() {
        let mut confinement = SandboxReport::none("off");
        confinement.set("seccomp", Ok("200 system calls".to_owned()));
        confinement.set("landlock", Err("not in this kernel".to_owned()));
        assert!(confinement.holds("seccomp") && !confinement.holds("user"));
        let line = "no user (off), no capabilities (off), no no_new_privs (off), \
                    no landlock (not in this kernel), seccomp (200 system calls)";
        assert_eq!(confinement.line(), line);
    }
}
