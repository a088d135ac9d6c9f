//! The names of the saved tensors.

use std::path::Path;

use candle_core::Var;

use super::header::VarRecord;
use crate::error::{Error, Result};
use crate::optim::Settings;

/// The name of a master copy.
const MASTER: &str = "master";

/// The names of the tensors of a Var, in the order in which its arrays are kept.
pub(super) fn keys(record: &VarRecord, var: &Var, settings: &Settings) -> Vec<String> {
    if !record.has_stepped {
        return Vec::new();
    }
    let master = settings.layout().has_master(var.dtype()).then_some(MASTER);
    let arrays = settings.moments().iter().copied().chain(master);
    arrays
        .map(|array| format!("{}.{array}", record.name))
        .collect()
}

/// State is matched by the Vars' names. An index is not a name: in another order, moments of the
/// same shape would go to the wrong Vars.
pub(super) fn check_names(path: &Path, has_places: bool) -> Result<()> {
    if !has_places {
        return Ok(());
    }
    Err(Error::Checkpoint {
        path: path.to_path_buf(),
        reason: "the Vars have no names but their places in a Vec (var.0, var.1, ...), and in another order state would go to \
                 the wrong Var; expected names of their own: make the optimizer by `from_named_vars`, or wrap it, with &varmap or \
                 (name, Var) pairs; NamedVars::by_place(vars) if the order is always the same"
            .to_string(),
    })
}
