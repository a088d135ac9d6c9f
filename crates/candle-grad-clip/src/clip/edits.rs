//! What is to be done to the gradient of each Var.

use std::sync::Arc;

use candle_grad_clip_kernels::Edit;

/// One edit for all Vars, one for each group of them, or one for each of them.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Edits {
    All(Edit),
    Grouped {
        /// The place of each Var's group in `edits`.
        places: Arc<[usize]>,
        edits: Vec<Edit>,
    },
    PerVar(Vec<Edit>),
}

impl Edits {
    pub(crate) fn of(&self, index: usize) -> Edit {
        match self {
            Self::All(edit) => *edit,
            Self::Grouped { places, edits } => edits[places[index]],
            Self::PerVar(edits) => edits[index],
        }
    }

    /// The edits that make of gradients times `scale` what these make of the gradients.
    pub(crate) fn of_scaled(self, scale: f64) -> Self {
        let each = |edits: Vec<Edit>| edits.into_iter().map(|e| e.of_scaled(scale)).collect();
        match self {
            Self::All(edit) => Self::All(edit.of_scaled(scale)),
            Self::Grouped { places, edits } => Self::Grouped {
                places,
                edits: each(edits),
            },
            Self::PerVar(edits) => Self::PerVar(each(edits)),
        }
    }

    /// Whether nothing is to be done to any.
    pub(crate) fn is_nothing(&self) -> bool {
        match self {
            Self::All(edit) => *edit == Edit::NOTHING,
            Self::Grouped { edits, .. } | Self::PerVar(edits) => {
                edits.iter().all(|edit| *edit == Edit::NOTHING)
            }
        }
    }
}
