//! Member sources: a real Tidegate process, lists and name servers that fail or change, and
//! backends under load.

mod accidents;
mod files;
mod load;
mod name_faults;
mod names;
mod registries;
