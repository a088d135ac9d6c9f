//! Finds NaN and infinity in a state. JSON has neither: `serde_json` would write null, and the state
//! could not be read.

use std::fmt::{self, Display};

use serde::ser::{
    self, Serialize, SerializeMap, SerializeSeq, SerializeStruct, SerializeStructVariant,
    SerializeTuple, SerializeTupleStruct, SerializeTupleVariant, Serializer,
};

/// An error that names the field and its number.
pub(super) fn check_finite(state: &(impl Serialize + ?Sized)) -> Result<(), String> {
    state.serialize(Finite).map_err(|Found { field, reason }| {
        let field = field.map_or(String::new(), |field| format!("{field} "));
        format!("{field}{reason}")
    })
}

/// A serializer that writes nothing.
struct Finite;

#[derive(Debug)]
struct Found {
    /// The path of the field, if it is in one.
    field: Option<String>,
    reason: String,
}

impl Found {
    fn inside(self, name: &str) -> Self {
        let field = match self.field {
            Some(field) => format!("{name}.{field}"),
            None => name.to_string(),
        };
        Self {
            field: Some(field),
            ..self
        }
    }
}

impl Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

impl std::error::Error for Found {}

impl ser::Error for Found {
    fn custom<T: Display>(reason: T) -> Self {
        Self {
            field: None,
            reason: reason.to_string(),
        }
    }
}

type Checked = Result<(), Found>;

fn check(number: f64) -> Checked {
    if number.is_finite() {
        return Ok(());
    }
    Err(ser::Error::custom(format!(
        "is {number}, which JSON can't hold: make it an Option, or leave it out"
    )))
}

/// Methods that have nothing to check.
macro_rules! accept {
    ($($method:ident($($argument:ty),*)),* $(,)?) => {
        $(fn $method(self, $(_: $argument),*) -> Checked {
            Ok(())
        })*
    };
}

/// Methods that look into a value.
macro_rules! look_into {
    ($($method:ident($($argument:ty),*)),* $(,)?) => {
        $(fn $method<T: Serialize + ?Sized>(self, $(_: $argument,)* value: &T) -> Checked {
            value.serialize(self)
        })*
    };
}

/// Methods that begin a list or a map.
macro_rules! begin {
    ($($method:ident($($argument:ty),*)),* $(,)?) => {
        $(fn $method(self, $(_: $argument),*) -> Result<Self, Found> {
            Ok(self)
        })*
    };
}

type Name = &'static str;

impl Serializer for Finite {
    type Ok = ();
    type Error = Found;
    type SerializeSeq = Self;
    type SerializeTuple = Self;
    type SerializeTupleStruct = Self;
    type SerializeTupleVariant = Self;
    type SerializeMap = Self;
    type SerializeStruct = Self;
    type SerializeStructVariant = Self;

    fn serialize_f32(self, number: f32) -> Checked {
        check(f64::from(number))
    }

    fn serialize_f64(self, number: f64) -> Checked {
        check(number)
    }

    accept! {
        serialize_bool(bool),
        serialize_i8(i8), serialize_i16(i16), serialize_i32(i32), serialize_i64(i64), serialize_i128(i128),
        serialize_u8(u8), serialize_u16(u16), serialize_u32(u32), serialize_u64(u64), serialize_u128(u128),
        serialize_char(char), serialize_str(&str), serialize_bytes(&[u8]),
        serialize_none(), serialize_unit(), serialize_unit_struct(Name),
        serialize_unit_variant(Name, u32, Name),
    }
    look_into! {
        serialize_some(), serialize_newtype_struct(Name), serialize_newtype_variant(Name, u32, Name),
    }
    begin! {
        serialize_seq(Option<usize>), serialize_tuple(usize), serialize_tuple_struct(Name, usize),
        serialize_tuple_variant(Name, u32, Name, usize), serialize_map(Option<usize>),
        serialize_struct(Name, usize), serialize_struct_variant(Name, u32, Name, usize),
    }
}

/// The parts of a list.
macro_rules! parts {
    ($($Compound:ident :: $method:ident),* $(,)?) => {
        $(impl $Compound for Finite {
            type Ok = ();
            type Error = Found;
            fn $method<T: Serialize + ?Sized>(&mut self, value: &T) -> Checked {
                value.serialize(Finite)
            }
            fn end(self) -> Checked {
                Ok(())
            }
        })*
    };
}

parts! {
    SerializeSeq::serialize_element, SerializeTuple::serialize_element,
    SerializeTupleStruct::serialize_field, SerializeTupleVariant::serialize_field,
}

/// The fields of a struct.
macro_rules! fields {
    ($($Compound:ident),*) => {
        $(impl $Compound for Finite {
            type Ok = ();
            type Error = Found;
            fn serialize_field<T: Serialize + ?Sized>(&mut self, name: Name, value: &T) -> Checked {
                value.serialize(Finite).map_err(|found| found.inside(name))
            }
            fn end(self) -> Checked {
                Ok(())
            }
        })*
    };
}

fields!(SerializeStruct, SerializeStructVariant);

impl SerializeMap for Finite {
    type Ok = ();
    type Error = Found;
    fn serialize_key<T: Serialize + ?Sized>(&mut self, _: &T) -> Checked {
        Ok(())
    }
    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Checked {
        value.serialize(Finite)
    }
    fn end(self) -> Checked {
        Ok(())
    }
}
