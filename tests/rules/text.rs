//! A clip as text.

use candle_grad_clip::{
    AdaGc, Agc, AgcUnits, AutoClip, Clip, Error, GradientStabilizer, NonFinite, NormType,
    QuantileClip, SkipSteps, ZClip, ZClipMode,
};
use proptest::prelude::*;

fn limit() -> impl Strategy<Value = f64> {
    prop_oneof![Just(1.0), Just(f64::INFINITY), 1e-300..1e300, 0.01..100.0]
}

fn zclip() -> impl Strategy<Value = Clip> {
    let settings = (
        (0.0..1.0, limit(), 1..1000usize, 0.0..1.0),
        (limit(), 0..3usize, limit(), any::<bool>()),
    );
    settings.prop_map(
        |((alpha, z_thresh, warmup, deviation_eps), (max_norm, mode, clip_scale, skip))| {
            let mode = [ZClipMode::ZScore, ZClipMode::Percentile, ZClipMode::Mean][mode];
            Clip::from(ZClip {
                alpha,
                z_thresh,
                warmup,
                deviation_eps,
                max_norm,
                mode,
                clip_scale,
                skip,
            })
        },
    )
}

fn method() -> impl Strategy<Value = Clip> {
    let adagc = (limit(), limit(), 0.0..1.0, 0..u64::MAX);
    let adagc = adagc.prop_map(|(lambda_abs, lambda_rel, beta, warmup)| {
        Clip::from(AdaGc {
            lambda_abs,
            lambda_rel,
            beta,
            warmup,
        })
    });
    let skip = (limit(), limit(), limit(), 2..1000usize, limit());
    let skip = skip.prop_map(|(norm, z, loss_z, window, max_norm)| {
        Clip::from(SkipSteps {
            norm,
            z,
            loss_z,
            window,
            max_norm,
        })
    });
    let exclude = proptest::collection::vec("[a-z0-9_.*?:=-]{1,8}", 0..3);
    let agc = (limit(), 0..3usize, exclude).prop_map(|(clipping, units, exclude)| {
        Clip::from(Agc {
            clipping,
            eps: 1e-3,
            units: [AgcUnits::Rows, AgcUnits::Columns, AgcUnits::Optax][units],
            exclude,
        })
    });
    let auto = (0.0..=100.0, proptest::option::of(1..1000usize));
    let auto = auto.prop_map(|(percentile, window)| Clip::from(AutoClip { percentile, window }));
    let quantile = (0.001..0.999, 1e-9..10.0);
    let quantile = quantile.prop_map(|(target, rate)| Clip::from(QuantileClip { target, rate }));
    let stabilizer = (0.0..1.0, 0.0..1.0);
    let stabilizer =
        stabilizer.prop_map(|(gamma1, gamma2)| Clip::from(GradientStabilizer { gamma1, gamma2 }));
    prop_oneof![
        Just(Clip::none()),
        limit().prop_map(Clip::norm),
        limit().prop_map(Clip::value),
        limit().prop_map(Clip::param_norm),
        limit().prop_map(Clip::block_rms),
        agc,
        auto,
        quantile,
        zclip(),
        adagc,
        stabilizer,
        skip,
    ]
}

fn clip() -> impl Strategy<Value = Clip> {
    let norm_type = prop_oneof![
        Just(NormType::L2),
        Just(NormType::L1),
        Just(NormType::Inf),
        (0.1..1.9).prop_map(NormType::from),
    ];
    let non_finite = prop_oneof![
        Just(NonFinite::SkipStep),
        Just(NonFinite::Error),
        Just(NonFinite::Zero),
        Just(NonFinite::Propagate),
    ];
    let options = (
        norm_type,
        proptest::option::of(0.0..1.0),
        non_finite,
        any::<u32>(),
    );
    (method(), options).prop_map(|(clip, (norm_type, eps, non_finite, max_skips))| {
        let clip = clip
            .norm_type(norm_type)
            .non_finite(non_finite)
            .max_skips(max_skips);
        eps.into_iter().fold(clip, Clip::eps)
    })
}

proptest! {
    #[test]
    fn every_clip_reads_back_as_itself(clip in clip()) {
        let text = clip.to_string();
        prop_assert_eq!(&text.parse::<Clip>().unwrap(), &clip, "{}", text);
    }

    #[test]
    fn every_list_reads_back_as_itself(clips in proptest::collection::vec(clip(), 0..4)) {
        let Ok(clip) = Clip::chain(clips) else { return Ok(()) };
        let text = clip.to_string();
        prop_assert_eq!(&text.parse::<Clip>().unwrap(), &clip, "{}", text);
    }

    #[test]
    fn no_text_panics(text in "[a-z:=,.0-9 +|*-]{0,30}") {
        let _ = text.parse::<Clip>();
    }
}

#[test]
fn defaults_and_names() {
    for (text, clip) in [
        ("none", Clip::none()),
        ("norm:1.0", Clip::norm(1.0)),
        ("norm:max_norm=1", Clip::norm(1.0)),
        ("value:0.5", Clip::value(0.5)),
        ("param-norm:1", Clip::param_norm(1.0)),
        ("block-rms:1", Clip::block_rms(1.0)),
        ("auto", Clip::autoclip(10.0)),
        ("auto:25", Clip::autoclip(25.0)),
        ("quantile", Clip::quantile(0.5)),
        ("zclip", Clip::zclip()),
        ("zclip:", Clip::zclip()),
        ("adagc", Clip::adagc()),
        ("agc", Clip::agc()),
        ("stabilizer", Clip::stabilizer()),
        ("stabilizer:eps=1e-8,gamma1=0.7", Clip::stabilizer()),
        ("agc:clipping=0.01,eps=0.001", Clip::agc()),
        ("agc:eps=0.01", Clip::agc().eps(0.01)),
        ("skip", Clip::skip_above_zscore(6.0)),
        ("skip:norm=2", Clip::skip_above_norm(2.0)),
        ("norm: 1 , eps = 0", Clip::norm(1.0).eps(0.0)),
        (
            "norm:1,norm_type=inf",
            Clip::norm(1.0).norm_type(NormType::Inf),
        ),
    ] {
        assert_eq!(text.parse::<Clip>().unwrap(), clip, "{text}");
    }
    let zclip: Clip = "zclip:z_thresh=2.5,warmup=25".parse().unwrap();
    assert_eq!(
        (zclip.to_string().as_str(), zclip),
        ("zclip", Clip::zclip())
    );
}

#[test]
fn errors_name_the_option_and_what_is_allowed() {
    for (text, expected) in [
        ("", "no method is named ``, expected one of none, norm"),
        ("Norm:1", "no method is named `Norm`"),
        ("norm", "expected a max_norm, such as `norm:1`"),
        ("norm:one", "option `max_norm` is `one`, expected a number"),
        ("norm:1,max_norm=2", "option `max_norm` is given twice"),
        ("norm:1,2", "option `2` has no value"),
        (
            "zclip:zz=2",
            "`zclip` has no option `zz`, expected one of alpha, z_thresh, warmup",
        ),
        (
            "zclip:warmup=2.5",
            "option `warmup` is `2.5`, expected a whole number",
        ),
        ("zclip:mode=max", "expected zscore, percentile or mean"),
        ("zclip:skip=maybe", "expected true or false"),
        (
            "norm:1,non_finite=skip",
            "expected error, skip_step, zero or propagate",
        ),
        ("none:1", "option `1` has no value"),
        ("agc:units=row", "expected rows, columns or optax"),
        ("agc:exclude=", "pattern `` is empty"),
        ("agc:exclude=a||b", "pattern `` is empty"),
    ] {
        let error = text.parse::<Clip>().unwrap_err();
        assert!(matches!(error, Error::InvalidClip { .. }), "{error}");
        assert!(error.to_string().contains(expected), "{error}");
    }
    for (text, name) in [
        ("norm:0", "max_norm"),
        ("norm:nan", "max_norm"),
        ("block-rms:-1", "max_rms"),
        ("auto:101", "percentile"),
        ("auto:nan", "percentile"),
        ("auto:10,window=0", "window"),
        ("quantile:1", "target"),
        ("quantile:0.5,rate=inf", "rate"),
        ("zclip:alpha=1", "alpha"),
        ("zclip:warmup=0", "warmup"),
        ("adagc:beta=-1", "beta"),
        ("stabilizer:gamma1=1", "gamma1"),
        ("stabilizer:gamma2=nan", "gamma2"),
        ("agc:clipping=0", "clipping"),
        ("agc:eps=0", "eps"),
        ("skip:z=1,window=1", "window"),
        ("norm:1,eps=inf", "eps"),
    ] {
        let error = text.parse::<Clip>().unwrap_err();
        assert!(
            error.to_string().starts_with(&format!("{name} is ")),
            "{text}: {error}"
        );
    }
}
