//! Fuzzes the readers of `tidegate import`. A text never panics a reader, every directive line has
//! one verdict, and `tidegate check` accepts the output.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    for kind in tidegate_import::KINDS {
        tidegate_import::fuzz(kind, text);
    }
});
