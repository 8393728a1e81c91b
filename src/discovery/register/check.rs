//! Converts single checks of a service to its health, with rise and fall.
//!
//! `tidegate register` feeds it the results of its probe. It runs no check and reads no clock.

use super::ServiceHealth;

/// Counts checks in a row.
#[derive(Debug, Clone)]
pub struct CheckTally {
    rise: u32,
    fall: u32,
    health: ServiceHealth,
    /// Checks in a row that contradict `health`.
    contrary: u32,
}

// === impl CheckTally ===

impl CheckTally {
    /// `rise` successes in a row mean up and `fall` failures mean down; both at least 1. The
    /// first success means up at once, so that a start is not delayed.
    pub fn new(rise: u32, fall: u32) -> CheckTally {
        CheckTally { rise, fall, health: ServiceHealth::Unknown, contrary: 0 }
    }

    /// Takes the result of a check. Returns the health.
    pub fn take(&mut self, success: bool) -> ServiceHealth {
        let (now, needed) = match (success, self.health) {
            (true, ServiceHealth::Unknown) => (ServiceHealth::Up, 1),
            (true, _) => (ServiceHealth::Up, self.rise),
            (false, _) => (ServiceHealth::Down, self.fall),
        };
        if now == self.health {
            self.contrary = 0;
            return now;
        }
        self.contrary += 1;
        if self.contrary >= needed {
            (self.health, self.contrary) = (now, 0);
        }
        self.health
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ServiceHealth::{Down, Unknown, Up};

    #[test]
    fn health_changes_after_rise_and_fall_checks_in_a_row() {
        let mut tally = CheckTally::new(2, 3);
        let checks = [
            (false, Unknown),
            (true, Up),
            (false, Up),
            (false, Up),
            (true, Up),
            (false, Up),
            (false, Up),
            (false, Down),
            (true, Down),
            (false, Down),
            (true, Down),
            (true, Up),
        ];
        for (success, health) in checks {
            assert_eq!(tally.take(success), health);
        }
    }
}
