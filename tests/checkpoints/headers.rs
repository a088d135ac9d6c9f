//! Headers that lie: each lie is refused and named.

use anyhow::Result;
use serde_json::{Value, json};
use support::checkpoints::{edited, split, with_header};

use super::hostile::{Bench, set};

/// What is said, and what was changed for that in the document.
#[rustfmt::skip]
fn documents() -> Vec<(&'static str, &'static str, Option<Value>)> {
    vec![
        ("unknown field", "/no_such_field", Some(json!([]))),
        ("unknown variant `Lion`", "/optimizer", Some(json!({"Lion": {}}))),
        ("missing field `lr`", "/optimizer/AdamW/params/lr", None),
        ("lr is NaN", "/optimizer/AdamW/params/lr", Some(json!("NaN"))),
        ("lr is -1", "/optimizer/AdamW/params/lr", Some(json!(-1))),
        ("eps is inf", "/optimizer/AdamW/params/eps", Some(json!("inf"))),
        ("beta1 is 1", "/optimizer/AdamW/params/beta1", Some(json!(1))),
        ("beta2 is -0.5", "/optimizer/AdamW/params/beta2", Some(json!(-0.5))),
        ("max_norm is 0", "/wrapper/clip", Some(json!("norm:0"))),
        ("max_norm is NaN", "/wrapper/clip", Some(json!("norm:NaN"))),
        ("norm_type is -2", "/wrapper/clip", Some(json!("norm:1,norm_type=-2"))),
        ("eps is -1", "/wrapper/clip", Some(json!("norm:1,eps=-1"))),
        ("step is 18446744073709551615", "/wrapper/step", Some(json!(u64::MAX))),
        ("can't be read", "/wrapper/skips_in_a_row", Some(json!(u64::MAX))),
        ("steps is 18446744073709551615", "/steps", Some(json!(u64::MAX))),
        ("can't be read", "/steps", Some(json!(-1))),
        ("no step was taken", "/steps", Some(json!(0))),
        ("two Vars are named \"w\"", "/vars/1/name", Some(json!("w"))),
        ("\"x\" is [2] in the file, [1] here", "/vars/1/shape", Some(json!([2]))),
        ("can't be read", "/vars/0/shape", Some(json!([-1]))),
        ("\"x\" is u32 in the file, f64 here", "/vars/1/dtype", Some(json!("u32"))),
        ("no tensor \"x.first_moment\"", "/vars/1/has_stepped", Some(json!(true))),
        ("to no Var's state: \"w.first_moment\", \"w.second_moment\"", "/vars/0/has_stepped", Some(json!(false))),
    ]
}

/// The same for the header around it.
#[rustfmt::skip]
fn headers() -> Vec<(&'static str, &'static str, Option<Value>)> {
    let info = |dtype, shape: &[u64], from: u64, to: u64| {
        Some(json!({"dtype": dtype, "shape": shape, "data_offsets": [from, to]}))
    };
    vec![
        ("its format is \"pt\"", "/__metadata__/format", Some(json!("pt"))),
        ("its format version is 2", "/__metadata__/format_version", Some(json!("2"))),
        ("its format version is missing", "/__metadata__/format_version", None),
        ("not a checkpoint of an optimizer", "/__metadata__", None),
        ("no entry \"checkpoint\"", "/__metadata__/checkpoint", None),
        ("checksum is", "/__metadata__/checkpoint_crc32", Some(json!("00000000"))),
        ("no checksums of its 2 tensors", "/__metadata__/tensors_crc32", None),
        ("no checksums of its 2 tensors", "/__metadata__/tensors_crc32", Some(json!("0000000000000éx"))),
        ("no checksums of its 2 tensors", "/__metadata__/tensors_crc32", Some(json!("0000000000000000ff"))),
        ("\"w.first_moment\" is damaged", "/__metadata__/tensors_crc32", Some(json!("0000000000000000"))),
        ("can't be read", "/__metadata__", Some(json!([1]))),
        ("belong to no Var's state: \"\"", "/", info("F32", &[0], 0, 0)),
        ("expected it at 0", "/w.first_moment", None),
        ("16 follow the header", "/w.second_moment", None),
        // Of the same size.
        ("in F32 or F64", "/w.first_moment", info("I32", &[2], 0, 8)),
        ("is F64 [1], expected F32 [2]", "/w.first_moment", info("F64", &[1], 0, 8)),
        ("is F32 [2, 1], expected F32 [2]", "/w.first_moment", info("F32", &[2, 1], 0, 8)),
        // Overlaps and gaps.
        ("lies at 0..8", "/w.second_moment", info("F32", &[2], 0, 8)),
        ("lies at 4..12", "/w.second_moment", info("F32", &[2], 4, 12)),
        ("lies at 16..24", "/w.second_moment", info("F32", &[2], 16, 24)),
        ("lies at 8..0", "/w.second_moment", info("F32", &[2], 8, 0)),
        // What no memory holds.
        ("expected it at 8", "/w.second_moment", info("F32", &[1 << 62], 8, u64::MAX)),
        ("expected it at 8", "/w.second_moment", info("F32", &[1 << 40, 1 << 40], 8, 16)),
        ("but 16 follow the header", "/y", info("F32", &[1 << 40], 16, 16 + (1 << 42))),
    ]
}

/// What is wrong with the file is said.
#[test]
fn headers_that_lie() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    bench.load(&edited(&bytes, |_, _| {})?)??;
    // Other entries of the metadata are nobody's business.
    let note = Some(json!("mine"));
    bench.load(&edited(&bytes, |header, _| {
        set(header, "/__metadata__/note", note);
    })?)??;
    let mut check = |expected: &str, bytes: &[u8]| -> Result<()> {
        let error = bench.refused(bytes)?.to_string();
        assert!(error.contains(expected), "expected {expected}, got {error}");
        Ok(())
    };
    for (expected, pointer, new) in documents() {
        check(
            expected,
            &edited(&bytes, |_, document| set(document, pointer, new))?,
        )?;
    }
    for (expected, pointer, new) in headers() {
        check(
            expected,
            &edited(&bytes, |header, _| set(header, pointer, new))?,
        )?;
    }
    // Sizes whose sum nearly is 2^64, and passes it: with 6, safetensors 0.8 panics in a debug
    // build.
    for last in [6, 8, 100] {
        let many = edited(&bytes, |header, _| {
            let mut end = 16u64;
            for (i, elements) in [(1 << 59) - 1; 8].into_iter().chain([last - 4]).enumerate() {
                let next = end.wrapping_add(elements * 4);
                let info =
                    json!({"dtype": "F32", "shape": [elements], "data_offsets": [end, next]});
                set(header, &format!("/y{i}"), Some(info));
                end = next;
            }
        })?;
        check("", &many)?;
    }
    Ok(())
}

#[test]
fn headers_that_json_maps_would_take() -> Result<()> {
    let mut bench = Bench::new()?;
    let bytes = bench.bytes.clone();
    let (header, data) = split(&bytes)?;
    // The document's checksum is what it must be for the text.
    let summed = |text: String| -> String {
        let Ok(Value::Object(parsed)) = serde_json::from_str(&text) else {
            return text;
        };
        let Some(document) = parsed["__metadata__"]["checkpoint"].as_str() else {
            return text;
        };
        let sum = format!("{:08x}", crc32fast::hash(document.as_bytes()));
        let old = parsed["__metadata__"]["checkpoint_crc32"]
            .as_str()
            .unwrap_or("none");
        text.replace(old, &sum)
    };
    let info = r#""w.first_moment":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#;
    assert!(header.contains(info), "{header}");
    for (expected, text) in [
        (
            "comes twice",
            header.replace(info, &format!("{info},{info}")),
        ),
        (
            "comes twice",
            header.replace(info, &format!("{info},\"__metadata__\":{{}}")),
        ),
        (
            "duplicate field",
            header.replace("\"shape\":[2]", "\"shape\":[2],\"shape\":[2]"),
        ),
        (
            "duplicate field",
            header.replace("{\"format\":", "{\"format\":\"x\",\"format\":"),
        ),
        (
            "duplicate field",
            header.replace("\\\"steps\\\":", "\\\"steps\\\":1,\\\"steps\\\":"),
        ),
        (
            "number out of range",
            header.replace("\\\"lr\\\":0.001", "\\\"lr\\\":1e999"),
        ),
        ("can't be read", format!("{}{header}", "[".repeat(100_000))),
        ("can't be read", header.replace("[2]", &"[".repeat(100_000))),
        ("can't be read", String::new()),
        ("can't be read", "null".to_string()),
        ("trailing characters", format!("{}x", header.trim_end())),
    ] {
        let text = summed(text);
        assert_ne!(text, header, "{expected}");
        let error = bench.refused(&with_header(&text, data))?.to_string();
        assert!(error.contains(expected), "expected {expected}, got {error}");
    }
    Ok(())
}
